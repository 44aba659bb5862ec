"""What is in a folder of the archive, by any of the three ways in which it can be listed."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from spxdask.archive.observation import SERVICE_PREFIX, frame_url
from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.s3 import open_bucket
from spxdask.archive.transfer import fetch_file
from spxdask.errors import ArchiveError, FrameError
from spxdask.storage import local_path

__all__ = ["Entry", "list_folder"]

# IRSA's listing for programs: one JSON object a line.
LISTING_PREFIX = "ibe/dir/list/spherex/"
# A folder of frames has some ten thousand entries of about 150 bytes.
MAX_LISTING_BYTES = 16 << 20
MAX_PAGES = 100
# A run does without products that cannot be had, so a server that does not list its folders is
# not asked for minutes.
MAX_RETRIES, LONGEST_RETRY_AFTER_S, LONGEST_STALL_S = 2, 5.0, 20.0
# How servers say that there is no such folder.
_ABSENT = ("HTTP 404", "HTTP 410")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file or a folder.

    Attributes
    ----------
    name : str
        Without a slash at its end.
    size : int or None
        Length of a file in bytes, None if the listing does not state it.
    modified : str
        When it was last changed, as the listing states it; only to be compared.
    """

    name: str
    size: int | None = None
    modified: str = ""


def list_folder(
    archive_url: str,
    folder: str,
    *,
    retry: RetryPolicy,
    stall_timeout_s: float,
    endpoint: str | None = None,
) -> list[Entry]:
    """List a folder of the archive.

    Parameters
    ----------
    archive_url : str
        Base URL of the archive (http, https), the bucket (s3) or a mirror (file).
    folder : str
        Path below the releases, such as ``qr3/epsf``; empty for the releases themselves.
    retry : RetryPolicy
        Number of attempts and the delays between them, both within limits of listings.
    stall_timeout_s : float
        Longest time without a byte, in seconds, within a limit of listings.
    endpoint : str, optional
        URL of the S3 server, where that is not the usual one.

    Returns
    -------
    list of Entry
        Sorted by name; empty if there is no such folder.

    Raises
    ------
    ArchiveError
        If the archive does not answer, or not with a listing.
    """
    retry = dataclasses.replace(
        retry,
        max_retries=min(retry.max_retries, MAX_RETRIES),
        longest_retry_after_s=min(retry.longest_retry_after_s, LONGEST_RETRY_AFTER_S),
    )
    stall_timeout_s = min(stall_timeout_s, LONGEST_STALL_S)
    scheme = archive_url.partition(":")[0]
    if scheme == "file":
        found = _list_mirror(archive_url, folder)
    elif scheme == "s3":
        found = _list_bucket(archive_url, folder, retry, stall_timeout_s, endpoint)
    else:
        found = _list_server(archive_url, folder, retry, stall_timeout_s)
    return sorted(found, key=lambda entry: entry.name)


def _list_mirror(archive_url: str, folder: str) -> list[Entry]:
    path = local_path(frame_url(archive_url, SERVICE_PREFIX + folder))
    assert path is not None, "file: URLs are paths on disk"
    found = []
    try:
        with os.scandir(path) as items:
            for item in items:
                # A link to nothing is not there.
                if os.path.exists(item):
                    status = item.stat()
                    size = None if item.is_dir() else status.st_size
                    modified = str(status.st_mtime_ns)
                    found.append(Entry(name=item.name, size=size, modified=modified))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ArchiveError(error.strerror or str(error), path=str(path)) from error
    return found


def _list_bucket(
    archive_url: str, folder: str, retry: RetryPolicy, stall_timeout_s: float, endpoint: str | None
) -> list[Entry]:
    url = frame_url(archive_url, SERVICE_PREFIX + folder).rstrip("/")
    path = url.partition("://")[2]
    attempts = 0
    while True:
        attempts += 1
        try:
            bucket = open_bucket(path.partition("/")[0], stall_timeout_s, endpoint)
            found = bucket.ls(path, detail=True, refresh=True)
            break
        except FileNotFoundError:
            return []
        except (PermissionError, ImportError) as error:
            raise ArchiveError(str(error), path=url, blame="access") from error
        except Exception as error:
            # botocore's errors have no common base class.
            reason = f"{type(error).__name__}: {error}"
            if "Credentials" in type(error).__name__:
                raise ArchiveError(reason, path=url, blame="access") from error
            if attempts > retry.max_retries:
                raise ArchiveError(reason, path=url, attempts=attempts, blame="archive") from error
            time.sleep(retry.delay(attempts))
    return [
        Entry(
            name=item["name"].rstrip("/").rpartition("/")[2],
            size=item["size"] if item["type"] == "file" else None,
            modified=f"{item.get('LastModified', '')}{item.get('ETag', '')}",
        )
        for item in found
        if item["name"].rstrip("/") != path
    ]


def _list_server(
    archive_url: str, folder: str, retry: RetryPolicy, stall_timeout_s: float
) -> list[Entry]:
    """List a folder of IRSA's service or, where there is none, of a store that answers HTTP."""

    def ask(url: str, parse: Callable[[bytes], Any]) -> Any:
        received = ReceivedFile(memoryview(bytearray(MAX_LISTING_BYTES)))
        return fetch_file(
            url,
            received,
            lambda whole: parse(bytes(whole.content)),
            retry=retry,
            stall_timeout_s=stall_timeout_s,
        )

    try:
        return ask(f"{archive_url}/{LISTING_PREFIX}{quote(folder)}", _parse_lines)
    except ArchiveError as error:
        if not _is_refusal(error):
            raise
        refusal = error
    entries: list[Entry] = []
    query = {"list-type": "2", "delimiter": "/", "prefix": f"{folder}/" if folder else ""}
    for _ in range(MAX_PAGES):
        try:
            page = ask(f"{archive_url}/?{urlencode(query)}", _parse_page)
        except ArchiveError as error:
            if not _is_refusal(error):
                raise
            page = None
        if page is None:
            # Neither is a listing, as with the home page of a server that lacks the folder.
            if refusal.reason.startswith(_ABSENT):
                return []
            raise refusal
        entries += page[0]
        if not page[1]:
            return entries
        query["continuation-token"] = page[1]
    raise ArchiveError(f"the listing has more than {MAX_PAGES} pages", path=archive_url)


def _is_refusal(error: ArchiveError) -> bool:
    """Return whether a server has said, for good, that it has no such page for us."""
    return error.attempts is None and error.reason.startswith("HTTP 4")


def _parse_lines(content: bytes) -> list[Entry]:
    """Read one JSON object a line, with name, last_modified and size."""
    found = []
    for line in content.decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            name, size = item["name"], item.get("size")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FrameError(f"the answer is not a listing: {line[:60]!r}") from None
        is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        found.append(
            Entry(
                name=str(name).rstrip("/").rpartition("/")[2],
                size=size if is_size and not str(name).endswith("/") else None,
                modified=str(item.get("last_modified", "")),
            )
        )
    return found


def _parse_page(content: bytes) -> tuple[list[Entry], str | None] | None:
    """Read an answer of ListObjectsV2, and the token of the next one; None if it is no such."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return None
    if not root.tag.endswith("ListBucketResult"):
        return None
    found, token = [], None
    for child in root:
        tag = child.tag.rpartition("}")[2]
        if tag == "CommonPrefixes":
            prefix = "".join(part.text or "" for part in child)
            found.append(Entry(name=prefix.rstrip("/").rpartition("/")[2]))
        elif tag == "Contents":
            values = {part.tag.rpartition("}")[2]: part.text or "" for part in child}
            key, size = values.get("Key", ""), values.get("Size", "")
            if not key.endswith("/"):
                modified = values.get("LastModified", "") + values.get("ETag", "")
                number = int(size) if size.isdecimal() else None
                found.append(Entry(name=key.rpartition("/")[2], size=number, modified=modified))
        elif tag == "NextContinuationToken":
            token = child.text or None
    return found, token
