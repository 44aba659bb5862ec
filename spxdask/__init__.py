"""Photometry of every catalogue source in every SPHEREx image, on a Dask cluster."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spxdask.batch import run_batch
    from spxdask.config import BatchConfig
    from spxdask.pipeline import BatchPipeline
    from spxdask.results.run import open_run
    from spxdask.run.query_summary import load_query_summary
    from spxdask.science.options import PhotometryConfig
    from spxdask.tables.selection import select_good_rows

__version__ = "0.1.0"

__all__ = [
    "BatchConfig",
    "BatchPipeline",
    "PhotometryConfig",
    "load_query_summary",
    "open_run",
    "run_batch",
    "select_good_rows",
]

UNSUPPORTED_PLATFORM = (
    "spxdask runs on Linux, macOS and WSL; on Windows, install it within WSL "
    "(https://learn.microsoft.com/windows/wsl)"
)

# Modules of the public names. They are imported when a name is first used, because importing
# Dask takes a second, which `spxdask --help` and modules that do not need Dask should not cost.
_MODULES = {
    "BatchConfig": "spxdask.config",
    "BatchPipeline": "spxdask.pipeline",
    "load_query_summary": "spxdask.run.query_summary",
    "open_run": "spxdask.results.run",
    "PhotometryConfig": "spxdask.science.options",
    "run_batch": "spxdask.batch",
    "select_good_rows": "spxdask.tables.selection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'spxdask' has no attribute {name!r}")
    if sys.platform == "win32":
        raise ImportError(UNSUPPORTED_PLATFORM)
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
