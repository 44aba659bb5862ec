#!/usr/bin/env python3
"""Validate the numpydoc docstrings of what is public: ``python .ci/docstrings.py [FILES]``.

This is ``numpydoc lint`` with the settings of pyproject.toml and two exceptions: a property
needs no section Returns, and the Parameters of a class without ``__init__``, such as a
dataclass, are not compared with its signature, which numpydoc does not see.
Prints what is wrong, then a count by file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from numpydoc.hooks.validate_docstrings import DocstringVisitor, parse_config

ROOT = Path(__file__).parents[1]


class PublicVisitor(DocstringVisitor):
    """Leaves out what does not apply to properties and dataclasses."""

    def _ignore_issue(self, node: ast.AST, check: str) -> bool:
        if check == "RT01" and _is_property(node):
            return True
        if check == "PR02" and isinstance(node, ast.ClassDef) and not _has_init(node):
            return True
        return super()._ignore_issue(node, check)


def _is_property(node: ast.AST) -> bool:
    names = (ast.unparse(one).split(".")[-1] for one in getattr(node, "decorator_list", []))
    return any(name in ("property", "cached_property") for name in names)


def _has_init(node: ast.ClassDef) -> bool:
    return any(getattr(member, "name", None) == "__init__" for member in node.body)


def _list_files() -> list[str]:
    command = ["git", "ls-files", "spxdask/*.py"]
    return subprocess.check_output(command, cwd=ROOT, text=True).split()


def main(files: list[str]) -> int:
    """Print the findings; return 1 if there are any."""
    config = parse_config(ROOT)
    counts: Counter[str] = Counter()
    for file in files or _list_files():
        path = Path(file) if files else ROOT / file
        visitor = PublicVisitor(str(path), config)
        visitor.visit(ast.parse(path.read_text(encoding="utf-8"), file))
        counts[file] = len(visitor.findings)
        for _, name, check, text in visitor.findings:
            print(f"{file}: {name}: {check} {text}")
    for file, count in counts.items():
        if count:
            print(f"{count:4d}  {file}")
    return int(counts.total() > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
