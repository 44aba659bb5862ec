"""Imports run one way: what is below knows nothing of what is above."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spxdask

ROOT = Path(spxdask.__file__).parent
WITHOUT_DASK = [
    f"spxdask.{folder}.{path.stem}"
    for folder in ("science", "simulate")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
] + [
    "spxdask.config",
    "spxdask.tables.rows",
    "spxdask.storage",
    "spxdask.run.ledger",
    "spxdask.run.folder",
]


def modules_after_import(name: str) -> set[str]:
    code = f"import sys, {name}; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("name", sorted(WITHOUT_DASK))
def test_lower_layers_do_without_dask(name):
    loaded = modules_after_import(name)
    assert not {"dask", "distributed"} & loaded
    assert not {m for m in loaded if m.startswith(("spxdask.stages", "spxdask.pipeline"))}


def test_science_does_not_know_the_simulator():
    for path in (ROOT / "science").glob("*.py"):
        assert "spxdask.simulate" not in path.read_text()
    for path in (ROOT / "simulate").glob("*.py"):
        assert "spxdask.science" not in path.read_text()


def test_public_names_are_there():
    for name in spxdask.__all__:
        assert getattr(spxdask, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = spxdask.nonsense
