"""What the package says of itself: its dependencies, its version, and that it is typed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages whose types are part of the interface of a declared dependency.
COMES_WITH = {
    "annotated_types": "pydantic",
    "pydantic_core": "pydantic",
    "tornado": "distributed",
    "urllib3": "requests",
    "yarl": "aiohttp",
}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements: list[str]) -> set[str]:
    return {normalise(re.match(r"[\w.-]+", text)[0]) for text in requirements}


def imported_packages() -> set[str]:
    """Return the top-level names of all that spxdask imports from elsewhere."""
    names = set()
    for path in (ROOT / "spxdask").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"spxdask"}


@pytest.mark.slow
def test_every_import_is_of_a_declared_dependency():
    extras = PROJECT["optional-dependencies"]
    names = set(extras) - {"dev", "test"}
    declared = distributions(sum((extras[name] for name in names), PROJECT["dependencies"]))
    providers = packages_distributions()
    for name in {COMES_WITH.get(name, name) for name in imported_packages()}:
        found = {normalise(provider) for provider in providers.get(name, [name])}
        assert found & declared, f"{name} is imported, and no dependency declares it"


def test_every_dependency_has_a_lower_bound():
    for text in PROJECT["dependencies"]:
        assert ">=" in text


def test_the_package_is_typed():
    assert (files("spxdask") / "py.typed").is_file()
