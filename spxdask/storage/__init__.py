"""Folders on disk and in object stores, whose files are whole or not there at all."""

from spxdask.storage.local import LocalStore, raise_disk_full
from spxdask.storage.location import local_path, locate_file, open_store, read_file
from spxdask.storage.names import file_stem
from spxdask.storage.object import ObjectStore, s3_options
from spxdask.storage.store import Store

__all__ = [
    "LocalStore",
    "ObjectStore",
    "Store",
    "file_stem",
    "local_path",
    "locate_file",
    "open_store",
    "raise_disk_full",
    "read_file",
    "s3_options",
]
