"""How the archive lists its files: lines of JSON, a page for people, and S3's ListObjectsV2."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import escape

__all__ = ["bucket_listing", "entity_tag", "folder_listing", "list_children", "page_for_people"]

_MAX_KEYS = 1000


class Child(NamedTuple):
    """A file, or a folder without size."""

    name: str
    size: int | None
    modified_s: float


def list_children(files: Mapping[str, Path], folder: str) -> list[Child]:
    """Return what a folder contains.

    Parameters
    ----------
    files : mapping of str to Path
        Files on disk, by their place in the archive.
    folder : str
        Without a slash at its end; empty for the root.

    Returns
    -------
    list of Child
        Sorted by name; empty if there is no such folder. A folder is as new as the newest file
        in it.
    """
    prefix = f"{folder}/" if folder else ""
    found: dict[str, Child] = {}
    for place, path in files.items():
        if not place.startswith(prefix):
            continue
        name, separator, _ = place.removeprefix(prefix).partition("/")
        status = path.stat()
        modified_s = max(status.st_mtime, found[name].modified_s if name in found else 0.0)
        found[name] = Child(name, None if separator else status.st_size, modified_s)
    return [found[name] for name in sorted(found)]


def folder_listing(children: Iterable[Child]) -> str:
    """Return the listing for programs.

    Parameters
    ----------
    children : iterable of Child
        What the folder contains.

    Returns
    -------
    str
        One JSON object a line; the size of a folder is null.
    """
    return "".join(
        json.dumps(
            {
                "name": child.name,
                "last_modified": _timestamp(child.modified_s),
                "size": child.size,
            }
        )
        + "\n"
        for child in children
    )


def page_for_people(folder: str) -> str:
    """Return what a browser gets: a page whose listing is made by its scripts.

    Parameters
    ----------
    folder : str
        The folder.

    Returns
    -------
    str
        HTML without a single name of a file.
    """
    title = escape(folder)
    return (
        f"<!DOCTYPE html><html><head><title>{title}</title></head><body>"
        "<noscript>Enable JavaScript to see this folder.</noscript></body></html>"
    )


def bucket_listing(files: Mapping[str, Path], bucket: str, query: Mapping[str, str]) -> str:
    """Answer ListObjectsV2 of S3.

    Parameters
    ----------
    files : mapping of str to Path
        Files on disk, by key.
    bucket : str
        Name of the bucket.
    query : mapping of str to str
        Parameters of the request: prefix, delimiter, max-keys, continuation-token, start-after
        and encoding-type.

    Returns
    -------
    str
        XML.

    Raises
    ------
    ValueError
        If max-keys is no number of keys, or the continuation token is not one of ours.
    """
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    max_keys = min(int(query.get("max-keys", _MAX_KEYS)), _MAX_KEYS)
    if max_keys < 0:
        raise ValueError(f"max-keys must be >= 0, got {max_keys}")
    after = query.get("start-after", "")
    token = query.get("continuation-token")
    if token is not None:
        try:
            after = base64.b64decode(token, altchars=b"-_", validate=True).decode()
        except (binascii.Error, UnicodeError):
            raise ValueError("The continuation token provided is incorrect") from None

    # A common prefix counts as one item, and stands for all keys that begin with it.
    items: dict[str, Path | None] = {}
    for key in sorted(key for key in files if key.startswith(prefix)):
        name, separator, _ = key.removeprefix(prefix).partition(delimiter or "\0")
        item = f"{prefix}{name}{separator}"
        if item > after and not (separator and after.startswith(item)):
            items[item] = None if separator else files[key]
    page = list(items)[:max_keys]
    is_truncated = len(items) > len(page)

    def encode(text: str) -> str:
        return escape(quote(text, safe="/") if query.get("encoding-type") == "url" else text)

    content = [
        f"<Name>{bucket}</Name><Prefix>{encode(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
        f"<MaxKeys>{max_keys}</MaxKeys><IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
    ]
    if delimiter:
        content.append(f"<Delimiter>{encode(delimiter)}</Delimiter>")
    if "encoding-type" in query:
        content.append(f"<EncodingType>{escape(query['encoding-type'])}</EncodingType>")
    if token is not None:
        content.append(f"<ContinuationToken>{escape(token)}</ContinuationToken>")
    if is_truncated and page:
        following = base64.urlsafe_b64encode(page[-1].encode()).decode()
        content.append(f"<NextContinuationToken>{following}</NextContinuationToken>")
    for item in page:
        path = items[item]
        if path is None:
            content.append(f"<CommonPrefixes><Prefix>{encode(item)}</Prefix></CommonPrefixes>")
            continue
        status = path.stat()
        content.append(
            f"<Contents><Key>{encode(item)}</Key>"
            f"<LastModified>{_timestamp(status.st_mtime)}</LastModified>"
            f"<ETag>{escape(entity_tag(path))}</ETag><Size>{status.st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"{''.join(content)}</ListBucketResult>"
    )


def entity_tag(path: Path) -> str:
    """Return the ETag of a file, which changes with its time and length.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    str
        In quotation marks.
    """
    status = path.stat()
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


def _timestamp(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
