"""Download: fetch frames whole, with async fsspec, and believe none that does not open."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import aiohttp
import fsspec
from distributed import get_worker
from fsspec.asyn import get_loop, sync
from yarl import URL

from spxdask.archive import retry
from spxdask.archive.buffer_pool import BufferPool
from spxdask.archive.observation import Observation
from spxdask.archive.urls import without_credentials
from spxdask.errors import ArchiveError, FrameError, SpxdaskError, StoreError
from spxdask.run.ledger import Outcome
from spxdask.science.level2.fits import verify
from spxdask.science.level2.frame import Frame, open_frame
from spxdask.storage import local_path, open_store, s3_options

logger = logging.getLogger(__name__)

# Level 2 files have 71.6 MB (QR2) or less; what is longer than this is none.
MAX_FRAME_BYTES = 256 << 20
# Read from an object store at a time, at most.
CHUNK_BYTES = 1 << 20
# Open to all, credentials or not.
PUBLIC_BUCKET = "nasa-irsa-spherex"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
# IPv6 addresses that end in an IPv4 address, which they lead to: compatible, mapped, NAT64.
_ENDING_IN_IPV4 = tuple(map(ip_network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96")))
# NAT64 of a network of its own.
_LOCAL_NAT64 = ip_network("64:ff9b:1::/48")

frame_buffers = BufferPool()


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How patient a download is, and how much a worker holds; see `BatchConfig`."""

    max_retries: int
    stall_timeout: float
    scratch_bytes: float = math.inf


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
    with fetched(observation, images, options) as image:
        pass
    return image.outcome


@dataclass
class Fetched:
    """A frame in memory, None when it could not be had, and what became of its download.

    The outcome is known once the frame has been written, or was not to be.
    """

    frame: Frame | None
    outcome: Outcome | None = None


@contextmanager
def fetched(
    observation: Observation, images: str | None, options: FetchOptions
) -> Iterator[Fetched]:
    """Fetch one frame into memory, and write it to the images folder if one is given.

    Disk and page cache are slower than memory by far, and a frame is looked at once: in
    the block, while it is written.

    Yields
    ------
    Fetched
        Its frame is open until the block ends, its outcome there from then on.
    """
    started = time.monotonic()
    frame, reason, size = None, None, observation.size_bytes or MAX_FRAME_BYTES
    with (
        frame_buffers.lease(min(size, MAX_FRAME_BYTES), _room(options)) as memory,
        ThreadPoolExecutor(1, thread_name_prefix="keep-image") as writer,
    ):
        part = _Part(memory=memory)
        try:
            if size > MAX_FRAME_BYTES:
                raise ArchiveError(f"{observation.download_url}: {size} bytes are no frame")
            # On fsspec's own IO thread: a coroutine on the worker's loop would hold up its
            # heartbeats, and take a slot all the same.
            frame = sync(get_loop(), _fetch, observation, part, options)
        except (ArchiveError, OSError) as error:
            reason = _one_line(error)
        seconds = time.monotonic() - started
        image = Fetched(frame)
        written = None
        if frame is not None and images is not None:
            store = open_store(images)
            written = writer.submit(store.direct_write, observation.filename, part.content)
        yield image
        if written is not None:
            try:
                written.result()
            except (OSError, StoreError) as error:
                reason = _one_line(error)
        image.outcome = Outcome(
            stage="download",
            filename=observation.filename,
            status="failed" if reason else "done",
            reason=reason,
            seconds=seconds,
            bytes=0 if reason else part.size,
            attempts=part.attempts,
            checksum=None if reason else part.checksum,
        )


def _one_line(error: Exception) -> str:
    """Say what is wrong, without passwords, nor what a server may have put in for a terminal."""
    plain = (c if c.isprintable() else " " for c in without_credentials(str(error)))
    return " ".join("".join(plain).split())


def _room(options: FetchOptions) -> float:
    """Return how many bytes of frames this worker may hold at once."""
    try:
        memory = get_worker().memory_manager.memory_limit or math.inf
    except ValueError:
        # Not in a worker.
        memory = math.inf
    return min(options.scratch_bytes, memory / 4)


def is_complete(observation: Observation, sizes: Mapping[str, int]) -> bool:
    """Tell whether a frame is among files, by name, with the length the archive says."""
    size = sizes.get(observation.filename)
    return size is not None and observation.size_bytes in (None, size)


@dataclass
class _Part:
    """What has come of a file so far, and the tag of the version that it is of."""

    memory: memoryview
    size: int = 0
    tag: str | None = None
    attempts: int = 0
    checksum: str | None = None

    @property
    def content(self) -> memoryview:
        return self.memory[: self.size]

    def append(self, chunk: bytes) -> None:
        size = self.size + len(chunk)
        if size > len(self.memory):
            raise FrameError(f"more than {len(self.memory)} bytes came")
        self.memory[self.size : size] = chunk
        self.size = size


async def _fetch(observation: Observation, part: _Part, options: FetchOptions) -> Frame:
    """Fetch until the frame is whole."""
    url = observation.download_url
    transfer = _TRANSFERS[url.partition(":")[0]]
    while True:
        part.attempts += 1
        retry_after = None
        try:
            await transfer(observation, part, options.stall_timeout)
            return await asyncio.to_thread(_open, observation, part)
        except aiohttp.ClientResponseError as error:
            failure = f"HTTP {error.status} {error.message}"
            if error.status == 416:
                # Nothing is left to send of what was to go on.
                part.size = 0
            elif error.status not in retry.TRANSIENT_STATUS:
                raise ArchiveError(f"{url}: {failure}") from error
            retry_after = (error.headers or {}).get("Retry-After")
        except TimeoutError:
            failure = f"no byte for {options.stall_timeout:g} s"
        except aiohttp.ClientPayloadError:
            failure = f"the transfer broke off after {part.size} bytes"
        except (aiohttp.ClientError, ConnectionError) as error:
            failure = f"{type(error).__name__}: {error}"
        except (FileNotFoundError, PermissionError) as error:
            raise ArchiveError(f"{url}: {error.strerror or error}") from error
        except (OSError, StoreError) as error:
            failure = str(error)
        except FrameError as error:
            # Starting over is the only cure for wrong content.
            part.size = 0
            failure = str(error)
        if part.attempts > options.max_retries:
            raise ArchiveError(f"{url}: {failure} (after {part.attempts} attempts)")
        pause = retry.delay(part.attempts, retry_after)
        logger.info("%s, again in %.1f s", without_credentials(f"{url}: {failure}"), pause)
        await asyncio.sleep(pause)


async def _from_service(observation: Observation, part: _Part, stall_timeout: float) -> None:
    """Bring `part` to full length, going on where it ends.

    Bytes of two versions are never joined: the server is asked to go on only if the file
    still is the one that the tag names, and to send all of it otherwise.
    """
    headers = {"Accept-Encoding": "identity"}
    if part.size and part.tag:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.tag}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_timeout, sock_read=stall_timeout)
    # With the proxies of the environment, which compute nodes may need, as the query has.
    filesystem = fsspec.filesystem(
        observation.download_url.partition(":")[0], client_kwargs={"trust_env": True}
    )
    # Not `open_async`, whose file forgets the headers and the timeout (fsspec 2026.9).
    session = await filesystem.set_session()
    url = filesystem.encode_url(observation.download_url)
    async with _followed(session, url, headers=headers, timeout=timeout) as response:
        response.raise_for_status()
        tag = response.headers.get("ETag")
        if response.content_type == "text/html":
            raise FrameError("an HTML page came in place of the file")
        goes_on = response.status == 206
        if goes_on and (
            "Range" not in headers
            or tag != part.tag
            or not response.headers.get("Content-Range", "").startswith(f"bytes {part.size}-")
        ):
            raise FrameError("the server sent another range than was asked for")
        if not goes_on:
            part.size = 0
        if response.content_length is not None:
            _announce(observation, part.size + response.content_length)
        # A weak tag says nothing about bytes.
        part.tag = tag if tag and not tag.startswith("W/") else None
        async for chunk in response.content.iter_any():
            part.append(chunk)


async def _from_bucket(observation: Observation, part: _Part, stall_timeout: float) -> None:
    """Bring `part` to full length out of an object store, going on where it ends."""
    url = observation.download_url
    goes_on = bool(part.size and part.tag)
    try:
        filesystem = _bucket(url.split("/")[2], stall_timeout)
        bucket, key, _ = filesystem.split_path(url)
        asked = {"Bucket": bucket, "Key": key}
        if goes_on:
            asked |= {"Range": f"bytes={part.size}-", "IfMatch": part.tag}
        else:
            part.size = 0
        # This takes a while the first time, for no fault of the store.
        await filesystem.set_session()
        answer = await asyncio.wait_for(filesystem._call_s3("get_object", **asked), stall_timeout)
        with closing(answer["Body"]) as body:
            sent = answer.get("ContentRange", "")
            if goes_on and not (
                answer["ETag"] == part.tag and sent.startswith(f"bytes {part.size}-")
            ):
                raise FrameError("the store sent another range than was asked for")
            part.tag = answer["ETag"]
            _announce(observation, part.size + answer["ContentLength"])
            while chunk := await asyncio.wait_for(body.read(CHUNK_BYTES), stall_timeout):
                part.append(chunk)
    except (FileNotFoundError, PermissionError, TimeoutError, aiohttp.ClientError, SpxdaskError):
        raise
    except OSError as error:
        if goes_on and error.errno == errno.EINVAL:
            raise FrameError("the file changed while it came") from error
        raise
    except ImportError as error:
        raise ArchiveError(f"{url}: {error}") from error
    except Exception as error:
        # Of the store's own library, whose errors have nothing in common.
        if "Credentials" in type(error).__name__:
            raise ArchiveError(f"{url}: {error}") from error
        raise StoreError(f"{type(error).__name__}: {error}") from error


@functools.lru_cache
def _bucket(name: str, stall_timeout: float) -> Any:
    """Return a file system that leaves trying again to us."""
    # We give up first, and know why.
    times = {"connect_timeout": stall_timeout, "read_timeout": 2 * stall_timeout}
    options = s3_options(**times, retries={"max_attempts": 0})
    if name == PUBLIC_BUCKET:
        options["anon"] = True
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    filesystem.retries = 1
    return filesystem


async def _from_mirror(observation: Observation, part: _Part, stall_timeout: float) -> None:
    """Bring `part` to full length from a disk, which has no time limit."""

    def read() -> None:
        path = local_path(observation.download_url)
        assert path is not None
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            _announce(observation, size)
            part.size = 0
            while part.size < size:
                count = file.readinto(part.memory[part.size : size])
                if not count:
                    raise FrameError(f"the file ended after {part.size} of {size} bytes")
                part.size += count

    await asyncio.to_thread(read)


_TRANSFERS = {
    "http": _from_service,
    "https": _from_service,
    "s3": _from_bucket,
    "file": _from_mirror,
}


@asynccontextmanager
async def _followed(session: aiohttp.ClientSession, url: str, **options):
    """Get a URL, redirects included, as long as they do not lead into a private network."""
    archive = url = URL(url, encoded=True)
    for _ in range(MAX_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False, **options) as response:
            if response.status not in REDIRECTS:
                yield response
                return
            location = response.headers.get("Location", "")
        try:
            to = URL(location, encoded=True)
            target = url.join(to)
            if not location or (to.scheme in ("http", "https") and not to.host):
                raise ValueError("a host is missing")
            # Without a user's name and password, as this goes into the ledger.
            shown = target.with_user(None) if target.host else f"{target.scheme}:{target.path}"
            if target.scheme not in ("http", "https"):
                raise ArchiveError(f"{archive}: redirected to {shown}, which is not followed")
            inwards = target.host != archive.host and await _is_private(target)
        except ValueError as error:
            raise ArchiveError(
                f"{archive}: redirected to {location!r}, which is no URL: {error}"
            ) from error
        if inwards and not await _is_private(archive):
            raise ArchiveError(
                f"{archive}: redirected to {shown}, a private address, which is not followed"
            )
        url = target
    raise ArchiveError(f"{archive}: redirected without end")


async def _is_private(url: URL) -> bool:
    """Tell whether a host is, or may be, one that only our own network knows."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    except OSError:
        # Not to be reached from here; behind a proxy, that is the proxy's concern.
        return False
    return not all(_is_global(ip_address(address[0].partition("%")[0])) for *_, address in found)


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether an address is public, as is the IPv4 address that it leads to, if any."""
    if isinstance(address, IPv6Address):
        if any(address in network for network in _ENDING_IN_IPV4):
            return IPv4Address(int(address) & 0xFFFFFFFF).is_global
        if address.sixtofour is not None:
            return address.sixtofour.is_global
    return address.is_global and address not in _LOCAL_NAT64


def _open(observation: Observation, part: _Part) -> Frame:
    """Open a fetched frame, once it is whole and the right one."""
    _check_length(observation, part.size)
    frame = open_frame(part.content, observation.filename)
    part.checksum = f"{verify(part.content):08x}"
    if frame.band != observation.band:
        raise FrameError(f"the file is of band {frame.band}, not {observation.band}")
    return frame


def _announce(observation: Observation, size: int) -> None:
    """Check the length that a server says a file has."""
    _check_length(observation, size)
    if size > MAX_FRAME_BYTES:
        raise ArchiveError(f"{observation.download_url}: {size} bytes are no frame")


def _check_length(observation: Observation, size: int) -> None:
    if observation.size_bytes not in (None, size):
        raise FrameError(f"{size} bytes came, the archive says {observation.size_bytes}")
