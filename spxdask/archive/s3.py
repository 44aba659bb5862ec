"""Transfers from an object store, such as the archive's public bucket."""

from __future__ import annotations

import asyncio
import functools
import os
from contextlib import closing
from typing import Any

import aiohttp
import fsspec

from spxdask.archive.network import find_download_proxy, find_trusted_file
from spxdask.archive.received import (
    WRONG_RANGE,
    Answer,
    FileVersion,
    Reception,
    read_content_range,
)
from spxdask.errors import ArchiveError, FileChangedError, FrameError, SpxdaskError, StoreError
from spxdask.storage import s3_options

# Readable by everybody, so requests carry no credentials.
PUBLIC_BUCKET = "nasa-irsa-spherex"
PUBLIC_REGION = "us-east-1"
PUBLIC_ENDPOINT = f"https://s3.{PUBLIC_REGION}.amazonaws.com"
# Largest number of bytes taken from a response at a time.
CHUNK_BYTES = 1 << 20
# Connections to a bucket; how many are used at once is not decided here.
MAX_CONNECTIONS = 100


async def receive_from_bucket(
    url: str, received: Reception, stall_timeout_s: float, endpoint: str | None = None
) -> None:
    """Receive a file, or a range of it, such as the rest where a transfer was interrupted.

    Bytes of two versions are never joined: with If-Match, the store sends the range only if
    the object is still of the version that the ETag names.

    Parameters
    ----------
    url : str
        Where the file is: ``s3://bucket/key``.
    received : Reception
        Names the bytes, and takes them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str, optional
        URL of the server; see `open_bucket`.

    Raises
    ------
    ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    server = endpoint or "the S3 server"
    try:
        filesystem = open_bucket(url.split("/")[2], stall_timeout_s, endpoint)
        bucket, key, _ = filesystem.split_path(url)
        request = {"Bucket": bucket, "Key": key}
        if received.span is not None:
            start, stop = received.span
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if received.condition.strong_etag:
                request["IfMatch"] = received.condition.strong_etag
        # Outside of the time limit, as the first time it loads botocore's service models.
        client = await filesystem.set_session()
        server = client.meta.endpoint_url
        response = await asyncio.wait_for(
            filesystem._call_s3("get_object", **request), stall_timeout_s
        )
        with closing(response["Body"]) as body:
            taking = received.begin(_read_answer(response))
            try:
                while chunk := await asyncio.wait_for(body.read(CHUNK_BYTES), stall_timeout_s):
                    taking.append(chunk)
            finally:
                taking.end()
    except (TimeoutError, aiohttp.ClientError, SpxdaskError):
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise ArchiveError(f"{error.strerror or error} (asked: {server})") from error
    except OSError as error:
        status = find_status(error)
        if status == 412:
            raise FileChangedError("the file changed during the transfer") from error
        if status == 416:
            # Bytes received before are of no use if there are none after them.
            raise FrameError(f"{error.strerror or error} (asked: {server})") from error
        raise StoreError(f"{error.strerror or error} (asked: {server})") from error
    except ImportError as error:
        # fsspec's text names the package to install.
        raise ArchiveError(str(error), blame="access") from error
    except Exception as error:
        # botocore's errors have no common base class, and botocore may not be installed.
        if "Credentials" in type(error).__name__:
            raise ArchiveError(str(error), blame="access") from error
        raise StoreError(f"{type(error).__name__}: {error} (asked: {server})") from error


def _read_answer(response: dict[str, Any]) -> Answer:
    """Return what a response to a GetObject request says of its body."""
    version, length = FileVersion.of_object(response), response.get("ContentLength")
    if "ContentRange" not in response:
        return Answer(version=version, total=length)
    span, total = read_content_range(response["ContentRange"])
    if length not in (None, span[1] - span[0]):
        raise FrameError(WRONG_RANGE)
    return Answer(version=version, span=span, total=total)


def find_status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error was made of.

    Parameters
    ----------
    error : BaseException or None
        Raised by a transfer, whose error may be its cause.

    Returns
    -------
    int or None
        None if there was no answer.
    """
    while error is not None:
        if isinstance(error, aiohttp.ClientResponseError):
            return error.status
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return int(response["ResponseMetadata"].get("HTTPStatusCode", 0)) or None
        error = error.__cause__
    return None


async def ask_bucket_version(
    url: str, stall_timeout_s: float, endpoint: str | None = None
) -> FileVersion:
    """Ask an object store for the version of an object, by a HEAD request.

    Parameters
    ----------
    url : str
        Where the object is: ``s3://bucket/key``.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str, optional
        URL of the server; see `open_bucket`.

    Returns
    -------
    FileVersion

    Raises
    ------
    ArchiveError, StoreError, OSError
        If it does not answer; see `spxdask.archive.transfer.classify_failure`.
    """
    try:
        filesystem = open_bucket(url.split("/")[2], stall_timeout_s, endpoint)
        bucket, key, _ = filesystem.split_path(url)
        await filesystem.set_session()
        request = filesystem._call_s3("head_object", Bucket=bucket, Key=key)
        return FileVersion.of_object(await asyncio.wait_for(request, stall_timeout_s))
    except (OSError, SpxdaskError):
        raise
    except ImportError as error:
        # fsspec's text names the package to install.
        raise ArchiveError(str(error)) from error
    except Exception as error:
        # botocore's errors have no common base class, and botocore may not be installed.
        raise StoreError(f"{type(error).__name__}: {error}") from error


@functools.lru_cache
def open_bucket(name: str, stall_timeout_s: float, endpoint: str | None = None) -> Any:
    """Return the file system of a bucket, which leaves retries to the caller.

    Parameters
    ----------
    name : str
        The bucket.
    stall_timeout_s : float
        Longest time to connect, in seconds.
    endpoint : str, optional
        URL of the server. By default the public bucket is asked for at AWS, whatever server,
        profile and credentials the user's environment names for other buckets, and any other
        bucket where s3fs finds it.

    Returns
    -------
    s3fs.S3FileSystem
        The same one for the same arguments, so that connections are used again.
    """
    if name == PUBLIC_BUCKET:
        endpoint = endpoint or PUBLIC_ENDPOINT
    # The read timeout is longer than our own, so that ours ends a stalled transfer.
    config: dict[str, Any] = {
        "connect_timeout": stall_timeout_s,
        "read_timeout": 2 * stall_timeout_s,
        "retries": {"max_attempts": 0},
        "max_pool_connections": MAX_CONNECTIONS,
    }
    options: dict[str, Any] = {}
    if endpoint is not None:
        # Otherwise botocore finds proxies by rules of its own.
        proxy = find_download_proxy(endpoint)
        config["proxies"] = {} if proxy is None else {"http": proxy, "https": proxy}
        options["endpoint_url"] = endpoint
    if name == PUBLIC_BUCKET:
        # Some of the user's settings for other buckets do not go with an end point.
        own = {"use_fips_endpoint": False, "use_dualstack_endpoint": False}
        options["config_kwargs"] = config | own
        options |= {"anon": True, "key": None, "secret": None, "token": None}
        options["client_kwargs"] = {"region_name": PUBLIC_REGION}
        options["session"] = _make_bare_session()
    else:
        options |= s3_options(**config)
    trusted = find_trusted_file()
    if trusted is not None:
        options.setdefault("client_kwargs", {})["verify"] = trusted
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    filesystem.retries = 1
    return filesystem


def _make_bare_session() -> Any:
    """Return a session of aiobotocore that reads none of the user's files and profiles."""
    from aiobotocore.session import AioSession

    # Each of them: name in files, names in the environment, default, conversion.
    return AioSession(
        session_vars={
            "profile": (None, None, None, None),
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
