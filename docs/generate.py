"""Write the tables of the documentation from the code: ``python docs/generate.py``.

A page holds a table between two comments, ``<!-- generated: options -->`` and
``<!-- end -->``. Everything between them is replaced. `tests/test_docs.py` fails when a page
does not hold what the code says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
YAML_CONSTANTS = {"None": "null", "True": "true", "False": "false"}


def make_tables() -> dict[str, str]:
    """Return the generated tables by the names that pages call them by."""
    from spxdask.config import BatchConfig, option_rows
    from spxdask.run.frame_table import FRAME_COLUMNS
    from spxdask.science.flags import FLAGS
    from spxdask.science.options import PhotometryConfig
    from spxdask.tables.schema import LIGHT_CURVE, column_rows

    run = [row for row in option_rows(BatchConfig) if row[0] != "photometry"]
    return {
        "options": _options_table(run),
        "photometry_options": _options_table(option_rows(PhotometryConfig)),
        "columns": _table(
            ("column", "unit", "UCD", "in light curves", "meaning"),
            (
                (_code(name), unit, ucd, "yes" if name in LIGHT_CURVE else "no", meaning)
                for name, unit, ucd, meaning in column_rows()
            ),
        ),
        "frame_columns": _table(
            ("column", "unit", "meaning"),
            ((_code(name), unit, meaning) for name, _, unit, meaning in FRAME_COLUMNS),
        ),
        "flags": _table(
            ("bit", "name", "in `bad_flags` by default", "rejects a row", "meaning"),
            (
                (str(f.bit), f.name, "yes" if f.bad else "", "yes" if f.rejects else "", f.meaning)
                for f in FLAGS
            ),
        ),
    }


def fill_page(text: str, tables: dict[str, str]) -> str:
    """Return a page with the tables that it asks for."""
    return BLOCK.sub(lambda found: found[1] + tables[found[2]] + found[3], text)


def _options_table(rows: Iterable[Sequence[str]]) -> str:
    return _table(
        ("option", "default", "meaning"),
        (
            (_code(name), default if default == "required" else _code(default), meaning)
            for name, default, meaning in rows
        ),
    )


def _code(text: str) -> str:
    """Return code with the three constants as YAML writes them."""
    return f"`{YAML_CONSTANTS.get(text, text)}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in cells)


def main() -> None:
    """Rewrite every page whose tables have changed, and print its name."""
    tables = make_tables()
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = fill_page(old, tables)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"rewrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    main()
