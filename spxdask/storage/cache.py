"""The cache folder, which all runs of a user on a machine share."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for files that can be had again.

    Returns
    -------
    Path
        The environment variable SPXDASK_CACHE, by default the system's folder for the caches of
        a user. It need not exist.
    """
    chosen = os.environ.get("SPXDASK_CACHE")
    return Path(os.path.expanduser(chosen)).absolute() if chosen else user_cache_path("spxdask")
