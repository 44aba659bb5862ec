"""Folders on disk and in object stores, whose files are whole or not there at all."""

from spxdask.storage.local import LocalStore, describe_temporary_folder, raise_disk_full
from spxdask.storage.location import local_path, locate_file, open_store, read_file
from spxdask.storage.names import NEVER_IN_NAMES, file_stem
from spxdask.storage.object import ObjectStore, s3_options
from spxdask.storage.store import Store

__all__ = [
    "NEVER_IN_NAMES",
    "LocalStore",
    "ObjectStore",
    "Store",
    "describe_temporary_folder",
    "file_stem",
    "local_path",
    "locate_file",
    "open_store",
    "raise_disk_full",
    "read_file",
    "s3_options",
]
