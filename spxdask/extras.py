"""Libraries that only some things need: imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from spxdask.errors import MissingExtraError

__all__ = ["HATS_EXTRA", "import_extra"]

# What brings the libraries of HATS catalogues.
HATS_EXTRA = "hats"


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of a library that may not be installed.

    Parameters
    ----------
    module : str
        Such as ``matplotlib.figure``.
    extra : str
        The extra of spxdask that brings the library.
    purpose : str
        What needs it, for the message.

    Returns
    -------
    module

    Raises
    ------
    MissingExtraError
        If the library is not there; the message has the line for pip.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        # A library that is there may lack another.
        why = "" if getattr(error, "name", None) == library else f" ({error})"
        raise MissingExtraError(
            f"{purpose} needs {library}{why}: pip install 'spxdask[{extra}]', or pip install "
            f"{library}",
            library=library,
            extra=extra,
        ) from error
