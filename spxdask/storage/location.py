"""From paths and URLs, as users and tasks have them, to stores and the files in them."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spxdask.storage.local import LocalStore
from spxdask.storage.object import ObjectStore
from spxdask.storage.store import Store

Location = str | os.PathLike[str]


def open_store(path: Location | Store) -> Store:
    """Return the store of a folder.

    Parameters
    ----------
    path : path, or Store
        A path on disk, a ``file:`` URL, or a URL of any store that fsspec knows. A store is
        returned as it is.

    Returns
    -------
    Store
        Nothing is looked for, so that the folder need not be there.
    """
    if isinstance(path, Store):
        return path
    on_disk = local_path(path)
    return LocalStore(on_disk) if on_disk is not None else ObjectStore(os.fspath(path))


def locate_file(path: Location) -> tuple[Store, str]:
    """Return the store that a file lies in, and its name there.

    Parameters
    ----------
    path : path
        A path on disk, a ``file:`` URL, or a URL of any store that fsspec knows.

    Returns
    -------
    store : Store
        The folder.
    name : str
        The file's name in it.
    """
    on_disk = local_path(path)
    if on_disk is not None:
        return LocalStore(on_disk.parent), on_disk.name
    folder, _, name = os.fspath(path).rstrip("/").rpartition("/")
    return ObjectStore(folder), name


def read_file(path: Location) -> bytes:
    """Read a file, wherever it is.

    Parameters
    ----------
    path : path
        A path on disk, a ``file:`` URL, or a URL of any store that fsspec knows.

    Returns
    -------
    bytes
        Its content.
    """
    store, name = locate_file(path)
    return store.get(name)


def local_path(path: Location) -> Path | None:
    """Return the path on disk that a text stands for, None for the URL of a store.

    Parameters
    ----------
    path : path
        A path on disk, a ``file:`` URL, or a URL of any store that fsspec knows.

    Returns
    -------
    Path or None
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    if text.startswith(("file:", "local:")):
        return Path(unquote(urlsplit(text).path))
    return None
