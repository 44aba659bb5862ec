"""Imports run one way: a room knows the rooms below it, and nothing of those above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spxdask

ROOT = Path(spxdask.__file__).parent

# What each room, or module beside the rooms, may import of the package, besides itself.
SCIENCE = {"errors", "science"}
INPUT_AND_OUTPUT = SCIENCE | {"archive", "storage", "tables"}
OPTIONS = INPUT_AND_OUTPUT | {"config", "progress", "text"}
STAGES = OPTIONS | {"run", "cluster"}
EVERYTHING = STAGES | {
    *("extras", "results", "report", "stages", "pipeline", "batch", "inject", "demo", "demo_plots"),
    "cli",
    "simulate",
}
MAY_IMPORT = {
    "errors": set(),
    "progress": {"errors", "text"},
    "text": set(),
    "extras": {"errors"},
    "science": SCIENCE,
    "simulate": {"errors"},
    "storage": SCIENCE,
    "tables": SCIENCE | {"storage"},
    "archive": SCIENCE | {"storage"},
    "config": INPUT_AND_OUTPUT | {"text"},
    "run": OPTIONS,
    "cluster": OPTIONS,
    "results": OPTIONS | {"extras", "run"},
    "report": OPTIONS | {"run"},
    "stages": STAGES | {"extras", "results"},
    "pipeline": STAGES | {"extras", "report", "results", "stages"},
    "batch": STAGES | {"pipeline"},
    "inject": STAGES | {"extras", "stages"},
    "demo": EVERYTHING,
    "demo_plots": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
    "__init__": EVERYTHING,
}
# Who may import a library: all others may not.
LIBRARIES = {
    "distributed": {"cluster", "pipeline"},
    "dask_jobqueue": {"cluster"},
    "dask": {"cluster", "pipeline", "report", "results", "stages"},
}
# Modules of no Dask at all, whatever the libraries that they import do.
WITHOUT_DASK = ["archive", "config", "run", "science", "simulate", "storage", "tables"]


def list_modules(room: str) -> list[str]:
    """Return the names of all modules of a room."""
    paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py")
    names = (".".join(("spxdask", *p.relative_to(ROOT).with_suffix("").parts)) for p in paths)
    return sorted(name.removesuffix(".__init__") for name in names)


def find_imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a module imports, wherever in it."""
    package = ("spxdask", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *([node.module] if node.module else ())))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def find_violations() -> Iterator[tuple[str, str]]:
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name, room = ".".join(("spxdask", *parts)).removesuffix(".__init__"), parts[0]
        for imported in find_imports(path):
            library, _, rest = imported.partition(".")
            target = rest.partition(".")[0]
            if library == "spxdask":
                # What is defined in spxdask/__init__.py itself, such as the version, is free.
                is_room = (ROOT / target).is_dir() or (ROOT / f"{target}.py").exists()
                if is_room and target != room and target not in MAY_IMPORT[room]:
                    yield name, target
            elif room not in LIBRARIES.get(library, {room}):
                yield name, library


def run_python(code: str) -> set[str]:
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_every_room_is_known():
    rooms = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)


def test_imports_run_one_way():
    assert list(find_violations()) == []


def test_the_plan_and_the_recipe_know_neither_dask_nor_disk():
    for name in ("plan", "recipe"):
        path = ROOT / "run" / f"{name}.py"
        if path.exists():
            libraries = {imported.partition(".")[0] for imported in find_imports(path)}
            rooms = {i.split(".")[1] for i in find_imports(path) if i.startswith("spxdask.")}
            assert not libraries & {"dask", "distributed", "fsspec", "upath", "os", "pathlib"}
            assert "storage" not in rooms


def test_science_needs_neither_files_of_options_nor_stores_nor_dask():
    """Blocked in a fresh process, as numba imports yaml itself where it is installed."""
    blocked = ["fsspec", "yaml", "ruamel.yaml", "upath", "dask", "distributed"]
    # What would delay each worker by half a second; some functions import them.
    blocked += ["astropy", "scipy"]
    modules = list_modules("science")
    assert "spxdask.science.level2.frame" in modules
    code = f"import sys; sys.modules |= dict.fromkeys({blocked}); import {', '.join(modules)}; "
    code += "print(*(m for m in sys.modules if m.startswith('spxdask.')))"
    loaded = run_python(code)
    assert {name.split(".")[1] for name in loaded} == {"science", "errors"}


@pytest.mark.slow
def test_lower_rooms_do_without_dask():
    """All in one process, as each takes more than a second to import."""
    modules = [module for room in WITHOUT_DASK for module in list_modules(room)]
    code = "import importlib, sys\n"
    code += f"for module in {modules}:\n"
    code += "    importlib.import_module(module)\n"
    code += "    if sys.modules.keys() & {'dask', 'distributed'}: print('dask:', module); break\n"
    code += "print(*(m for m in sys.modules if m.startswith(('spxdask.stages', 'spxdask.pipe'))))"
    assert run_python(code) == set()


def test_packages_hold_nothing_but_exports():
    for path in ROOT.rglob("*/__init__.py"):
        for node in ast.parse(path.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or isinstance(node, ast.Import | ast.ImportFrom | ast.Assign), path


def test_public_names_are_there():
    for name in spxdask.__all__:
        assert getattr(spxdask, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = spxdask.nonsense
