"""Write the tables of the documentation from the code: ``python docs/generate.py``.

A page holds a table between two comments, ``<!-- generated: options -->`` and
``<!-- end -->``. Everything between them is replaced. `tests/test_docs.py` fails when a page
does not hold what the code says.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
YAML_CONSTANTS = {"None": "null", "True": "true", "False": "false"}
# These change the defaults of tap_url and archive_url, and must not change the tables.
ENVIRONMENT = ("SPXDASK_TAP_URL", "SPXDASK_ARCHIVE_URL")


def read_option_rows() -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """Return name, default and description of the options of a run, and of photometry."""
    from spxdask import config

    if hasattr(config, "option_rows"):
        run, photometry = (
            [tuple(map(str, row)) for row in config.option_rows(model)]
            for model in (config.BatchConfig, config.PhotometryConfig)
        )
        return [row for row in run if row[0] != "photometry"], photometry

    from dataclasses import MISSING, fields

    def rows(model: type) -> list[Sequence[str]]:
        found = []
        for option in fields(model):
            required = option.default is option.default_factory is MISSING
            default = "required" if required else str(config.default_of(option))
            unit = f" [{option.metadata['unit']}]" if "unit" in option.metadata else ""
            found.append((option.name, default, option.metadata["help"] + unit))
        return [row for row in found if row[0] != "photometry"]

    return rows(config.BatchConfig), rows(config.PhotometryConfig)


def read_column_rows() -> list[Sequence[str]]:
    """Return name, unit and meaning of the columns of a per-image table."""
    try:
        from spxdask.tables.schema import column_rows
    except ImportError:
        return COLUMNS
    return [tuple(map(str, row)) for row in column_rows()]


def read_column_names() -> tuple[Sequence[str], Sequence[str]]:
    """Return the columns of a per-image table and those of a light curve, in order."""
    try:
        from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE
    except ImportError:
        from spxdask.tables.rows import LIGHT_CURVE, PER_IMAGE
    return PER_IMAGE, LIGHT_CURVE


# Used until `spxdask.tables.schema.column_rows` exists; delete it then.
COLUMNS = [
    ("target_id", "", "identifier, as in the catalogue"),
    ("ra", "deg", "right ascension, ICRS, as in the catalogue"),
    ("dec", "deg", "declination, ICRS, as in the catalogue"),
    ("obs_id", "", "exposure, such as `2025W51_1A_0684_2`"),
    ("band", "", "detector, `D1` to `D6`"),
    ("mjd", "d", "middle of the exposure, MJD in UTC"),
    ("x", "pixel", "column on the frame; the centre of the first pixel is 0"),
    ("y", "pixel", "row on the frame; the centre of the first pixel is 0"),
    ("flux", "uJy", "flux density in the aperture, background and zodiacal light subtracted"),
    ("flux_error", "uJy", "standard error of `flux`"),
    ("mag_ab", "mag", "AB magnitude of `flux`; empty where `flux` is not positive"),
    ("mag_ab_error", "mag", "standard error of `mag_ab`"),
    ("wavelength", "um", "central wavelength of the filter at the position"),
    ("bandwidth", "um", "bandwidth of the filter at the position"),
    ("flag", "", "bitwise OR of the flags of all pixels whose centres are in the aperture"),
    ("bg_level", "uJy/arcsec^2", "local background"),
    ("bg_error", "uJy/arcsec^2", "standard error of `bg_level`"),
    ("aperture_radius", "pixel", "radius of the aperture"),
    ("filename", "", "file name of the frame"),
]


def make_tables() -> dict[str, str]:
    """Return the generated tables by the names that pages call them by."""
    from spxdask.science.flags import FLAGS

    with patch.dict(os.environ):
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        run, photometry = read_option_rows()
    _, light_curve = read_column_names()
    return {
        "options": _options_table(run),
        "photometry_options": _options_table(photometry),
        "columns": _table(
            ("column", "unit", "in light curves", "meaning"),
            (
                (_code(name), unit, "yes" if name in light_curve else "no", meaning)
                for name, unit, meaning in read_column_rows()
            ),
        ),
        "flags": _table(
            ("bit", "name", "in `bad_flags` by default", "meaning"),
            ((str(f.bit), f.name, "yes" if f.bad else "", f.meaning) for f in FLAGS),
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
