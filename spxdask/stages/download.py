"""Download: fetch frames whole, with async fsspec, and believe none that does not open."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import fsspec
from fsspec.asyn import sync

from spxdask import retry
from spxdask.errors import ArchiveError, FrameError
from spxdask.ledger import Outcome
from spxdask.observation import Observation
from spxdask.science.frame import open_frame
from spxdask.storage import part_path

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How patient a download is; see `BatchConfig`."""

    max_retries: int
    stall_timeout: float


def download(observation: Observation, images: str, options: FetchOptions) -> Outcome:
    """Bring one frame to the images folder; the task of the download stage.

    Parameters
    ----------
    observation : Observation
    images : str
        Folder; the frame gets the archive's own file name in it.
    options : FetchOptions

    Returns
    -------
    Outcome
        ``done`` when the frame is there whole, ``failed`` with the reason when it could
        not be had.
    """
    started = time.monotonic()
    path = Path(images) / observation.filename
    # With the proxies of the environment, which compute nodes may need, as the query has.
    filesystem = fsspec.filesystem(
        observation.download_url.partition(":")[0], client_kwargs={"trust_env": True}
    )
    part = _Part(path=part_path(path))
    try:
        # On fsspec's own IO thread: a coroutine on the worker's loop would hold up its
        # heartbeats, and take a slot all the same.
        sync(filesystem.loop, _fetch, filesystem, observation, part, path, options)
    except (ArchiveError, OSError) as error:
        status, reason = "failed", str(error)
    else:
        status, reason = "done", None
    return Outcome(
        stage="download",
        filename=observation.filename,
        status=status,
        reason=reason,
        seconds=time.monotonic() - started,
        bytes=path.stat().st_size if status == "done" else 0,
        attempts=part.attempts,
    )


def is_complete(observation: Observation, images: str) -> bool:
    """Tell whether a frame is in the images folder with the length the archive says."""
    try:
        size = os.stat(Path(images) / observation.filename).st_size
    except FileNotFoundError:
        return False
    return observation.size_bytes in (None, size)


@dataclass
class _Part:
    """What has come of a file so far, and the tag of the version that it is of."""

    path: Path
    tag: str | None = None
    attempts: int = 0

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


async def _fetch(
    filesystem, observation: Observation, part: _Part, path: Path, options: FetchOptions
) -> None:
    """Fetch until the frame is whole."""
    url = observation.download_url
    try:
        while True:
            part.attempts += 1
            retry_after = None
            try:
                await _transfer(filesystem, observation, part, options.stall_timeout)
                await asyncio.to_thread(_publish, observation, part.path, path)
                return
            except aiohttp.TooManyRedirects as error:
                raise ArchiveError(f"{url}: redirected without end") from error
            except aiohttp.ClientResponseError as error:
                failure = f"HTTP {error.status} {error.message}"
                if error.status == 416:
                    # Nothing is left to send of what was to go on.
                    part.path.unlink(missing_ok=True)
                elif error.status not in retry.TRANSIENT_STATUS:
                    raise ArchiveError(f"{url}: {failure}") from error
                retry_after = (error.headers or {}).get("Retry-After")
            except TimeoutError:
                failure = f"no byte for {options.stall_timeout:g} s"
            except aiohttp.ClientPayloadError:
                failure = f"the transfer broke off after {part.size} bytes"
            except (aiohttp.ClientError, ConnectionError) as error:
                failure = f"{type(error).__name__}: {error}"
            except FrameError as error:
                # Starting over is the only cure for wrong content.
                part.path.unlink(missing_ok=True)
                failure = str(error)
            if part.attempts > options.max_retries:
                raise ArchiveError(f"{url}: {failure} (after {part.attempts} attempts)")
            pause = retry.delay(part.attempts, retry_after)
            logger.info("%s: %s, again in %.1f s", url, failure, pause)
            await asyncio.sleep(pause)
    finally:
        part.path.unlink(missing_ok=True)


async def _transfer(
    filesystem, observation: Observation, part: _Part, stall_timeout: float
) -> None:
    """Bring `part` to full length, going on where it ends.

    Bytes of two versions are never joined: the server is asked to go on only if the file
    still is the one that the tag names, and to send all of it otherwise.
    """
    have = part.size
    headers = {"Accept-Encoding": "identity"}
    if have and part.tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": part.tag}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_timeout, sock_read=stall_timeout)
    # Not `open_async`, whose file forgets the headers and the timeout (fsspec 2026.9).
    session = await filesystem.set_session()
    url = filesystem.encode_url(observation.download_url)
    async with session.get(url, headers=headers, timeout=timeout) as response:
        response.raise_for_status()
        tag = response.headers.get("ETag")
        if response.content_type == "text/html":
            raise FrameError("an HTML page came in place of the file")
        goes_on = response.status == 206
        if goes_on and (
            "Range" not in headers
            or tag != part.tag
            or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        ):
            raise FrameError("the server sent another range than was asked for")
        with open(part.path, "ab" if goes_on else "wb") as file:
            # A weak tag says nothing about bytes.
            part.tag = tag if tag and not tag.startswith("W/") else None
            while chunk := await response.content.read(CHUNK_BYTES):
                file.write(chunk)


def _publish(observation: Observation, part: Path, path: Path) -> None:
    """Give a fetched file its name once it is whole, opens as a frame, and is on disk."""
    size = part.stat().st_size
    if observation.size_bytes not in (None, size):
        raise FrameError(f"{size} bytes came, the archive says {observation.size_bytes}")
    frame = open_frame(part)
    if frame.band != observation.band:
        raise FrameError(f"the file is of band {frame.band}, not {observation.band}")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
