"""Transfers from an object store, such as the archive's public bucket."""

from __future__ import annotations

import asyncio
import errno
import functools
from contextlib import closing
from typing import Any

import aiohttp
import fsspec

from spxdask.archive.received import FileVersion, ReceivedFile
from spxdask.errors import ArchiveError, FrameError, SpxdaskError, StoreError
from spxdask.storage import s3_options

# Readable by everybody, so requests carry no credentials.
PUBLIC_BUCKET = "nasa-irsa-spherex"
# Largest number of bytes taken from a response at a time.
CHUNK_BYTES = 1 << 20


async def receive_from_bucket(url: str, received: ReceivedFile, stall_timeout_s: float) -> None:
    """Receive a file, or the rest of it where a transfer was interrupted.

    Bytes of two versions are never joined: with If-Match, the store sends the rest only if
    the object is still of the version that the ETag names.

    Parameters
    ----------
    url : str
        Where the file is: ``s3://bucket/key``.
    received : ReceivedFile
        What has been received before; the rest is appended.
    stall_timeout_s : float
        Longest time without a byte, in seconds.

    Raises
    ------
    ArchiveError, FrameError, StoreError, aiohttp.ClientError, OSError
        If the file is not received; see `spxdask.archive.transfer.classify_failure`.
    """
    is_resumed = received.can_resume
    try:
        filesystem = open_bucket(url.split("/")[2], stall_timeout_s)
        bucket, key, _ = filesystem.split_path(url)
        request = {"Bucket": bucket, "Key": key}
        if is_resumed:
            request |= {"Range": f"bytes={received.size}-", "IfMatch": received.etag}
        else:
            received.discard()
        # Outside of the time limit, as the first time it loads botocore's service models.
        await filesystem.set_session()
        response = await asyncio.wait_for(
            filesystem._call_s3("get_object", **request), stall_timeout_s
        )
        with closing(response["Body"]) as body:
            content_range = response.get("ContentRange", "")
            if is_resumed and not (
                response["ETag"] == received.etag
                and content_range.startswith(f"bytes {received.size}-")
            ):
                raise FrameError("the store sent a range that was not requested")
            received.etag = response["ETag"]
            received.version = received.version.of_object(response)
            received.check_size(received.size + response["ContentLength"])
            while chunk := await asyncio.wait_for(body.read(CHUNK_BYTES), stall_timeout_s):
                received.append(chunk)
    except (FileNotFoundError, PermissionError, TimeoutError, aiohttp.ClientError, SpxdaskError):
        raise
    except OSError as error:
        # s3fs raises EINVAL when the condition IfMatch is not met.
        if is_resumed and error.errno == errno.EINVAL:
            raise FrameError("the file changed during the transfer") from error
        raise
    except ImportError as error:
        # fsspec's text names the package to install.
        raise ArchiveError(str(error)) from error
    except Exception as error:
        # botocore's errors have no common base class, and botocore may not be installed.
        if "Credentials" in type(error).__name__:
            raise ArchiveError(str(error)) from error
        raise StoreError(f"{type(error).__name__}: {error}") from error


async def ask_bucket_version(url: str, stall_timeout_s: float) -> FileVersion:
    """Ask an object store for the version of an object, by a HEAD request.

    Parameters
    ----------
    url : str
        Where the object is: ``s3://bucket/key``.
    stall_timeout_s : float
        Longest time without a byte, in seconds.

    Returns
    -------
    FileVersion

    Raises
    ------
    ArchiveError, StoreError, OSError
        If it does not answer; see `spxdask.archive.transfer.classify_failure`.
    """
    try:
        filesystem = open_bucket(url.split("/")[2], stall_timeout_s)
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
def open_bucket(name: str, stall_timeout_s: float) -> Any:
    """Return the file system of a bucket, which leaves retries to the caller.

    Parameters
    ----------
    name : str
        The bucket.
    stall_timeout_s : float
        Longest time to connect, in seconds.

    Returns
    -------
    s3fs.S3FileSystem
        The same one for the same arguments, so that connections are used again.
    """
    # The read timeout is longer than our own, so that ours ends a stalled transfer.
    times = {"connect_timeout": stall_timeout_s, "read_timeout": 2 * stall_timeout_s}
    options = s3_options(**times, retries={"max_attempts": 0})
    if name == PUBLIC_BUCKET:
        options["anon"] = True
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    filesystem.retries = 1
    return filesystem
