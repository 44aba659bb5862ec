"""The SPHEREx archive on 127.0.0.1: a TAP service and a file server that can be made to fail.

It answers the requests that spxdask sends to IRSA, and to its bucket, from lists of frames and
calibration products, with the faults that archives show in practice, so that a whole run can be
tried and tested without a network.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import math
import os
import random
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from aiohttp import web
from aiohttp.typedefs import Handler

from spxdask.simulate.detector import NOMINAL_LIMITS_UM
from spxdask.simulate.frames import Exposure, Window
from spxdask.simulate.listing import (
    bucket_listing,
    entity_tag,
    folder_listing,
    list_children,
    page_for_people,
)
from spxdask.simulate.products import SERVICE_PREFIX, ArchivedProduct
from spxdask.simulate.tap import (
    TABLE_COLUMNS,
    QueryError,
    SpherexTables,
    error_votable,
    footprint_text,
    result_votable,
)

__all__ = [
    "BUCKET",
    "ArchivedFrame",
    "Fault",
    "LoggedRequest",
    "SimulatedArchive",
    "Traffic",
    "make_mirror",
]

logger = logging.getLogger(__name__)

# The archive's bucket, which has what is below `SERVICE_PREFIX` at its root.
BUCKET = "nasa-irsa-spherex"
# Where folders below `SERVICE_PREFIX` are listed, for programs and for people.
LISTING_PREFIX = "ibe/dir/list/spherex"
_VOTABLE_TYPE = "application/x-votable+xml"
_UWS = 'xmlns:uws="http://www.ivoa.net/xml/UWS/v1.0" xmlns:xlink="http://www.w3.org/1999/xlink"'
_CHUNK_SIZE = 256 * 1024
# How much later than it should be a chunk may be sent without loss of bandwidth.
_LONGEST_LAG_S = 0.1
_ACTIVE_PHASES = {"PENDING", "QUEUED", "EXECUTING"}
# How long a transfer may still take when the archive stops.
_SHUTDOWN_TIMEOUT_S = 0.1
# Turns of the event loop within which an accepted connection reaches the server's runner.
_TURNS_TO_CONNECT = 5


@dataclass(frozen=True, kw_only=True)
class ArchivedFrame:
    """One file as the archive lists it.

    Attributes
    ----------
    obs_id : str
        Exposure, like "2025W51_1A_0684_2".
    detector : int
        1 to 6.
    collection : str
        Like "spherex_qr2" or "spherex_qr2_deep". Collections may share a file: frames may have
        the same `uri`.
    uri : str
        Path below the archive's URL, like "ibe/data/spherex/qr2/level2/...fits".
    path : Path
        File on disk served under `uri`. One file may serve many URIs.
    mjd_begin, mjd_end : float
        Start and end of the exposure, MJD.
    wavelength_min_um, wavelength_max_um : float
        Range of the whole detector, um.
    polygon : tuple of (float, float)
        Corners of the footprint, ICRS degrees.
    """

    obs_id: str
    detector: int
    collection: str
    uri: str
    path: Path
    mjd_begin: float
    mjd_end: float
    wavelength_min_um: float
    wavelength_max_um: float
    polygon: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, exposure: Exposure, path: Path, window: Window | None = None) -> ArchivedFrame:
        """Describe the file that contains an exposure, or a window of it.

        Parameters
        ----------
        exposure : Exposure
            The exposure.
        path : Path
            The file.
        window : (x0, y0, nx, ny), optional
            Cut-out of the frame that the file contains; the full frame by default.

        Returns
        -------
        ArchivedFrame
            The file under the exposure's URI.
        """
        shortest, longest = NOMINAL_LIMITS_UM[exposure.detector]
        return cls(
            obs_id=exposure.obs_id,
            detector=exposure.detector,
            collection=exposure.collection,
            uri=exposure.uri,
            path=path,
            mjd_begin=exposure.mjd_begin,
            mjd_end=exposure.mjd_end,
            wavelength_min_um=shortest,
            wavelength_max_um=longest,
            polygon=exposure.footprint(window),
        )


def make_mirror(
    folder: Path, frames: Iterable[ArchivedFrame] = (), products: Iterable[ArchivedProduct] = ()
) -> None:
    """Make a tree of files in the layout of the archive's bucket, which a file: URL can name.

    Parameters
    ----------
    folder : Path
        Root of the tree.
    frames : iterable of ArchivedFrame
        Frames; their files are linked, or copied from another disk.
    products : iterable of ArchivedProduct
        Calibration products; those that `make_products` wrote into this folder are in their place.

    Raises
    ------
    FileExistsError
        If another file is in the place of one of them.
    """
    files = {frame.uri: frame.path for frame in frames}
    files |= {product.uri: product.path for product in products}
    for uri, path in files.items():
        place = folder / uri.removeprefix(SERVICE_PREFIX)
        if place.exists():
            if not place.samefile(path):
                raise FileExistsError(f"{place} is there already, and is not {path}")
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request; `Fault()` is normal service.

    Attributes
    ----------
    status : int, optional
        Answer with this HTTP status and an error page.
    retry_after_s : float, optional
        Only with `status`: value of the Retry-After header, in seconds.
    truncate : int, optional
        Announce the whole body, send this many bytes of it and close the connection.
    short : int, optional
        Serve this many bytes from the beginning as if they were the whole file.
    stall : int, optional
        Send this many bytes of the body, then nothing until the client leaves or the archive stops.
    html : bool
        Answer with an HTML page and status 200.
    garbage : bool
        Send random bytes of the right length.
    redirect : str, optional
        Redirect (302) to this URL.
    no_range : bool
        Ignore the Range header and send the whole file.
    range_status : int, optional
        Answer a request for a range with this HTTP status, and serve others.
    changed : bool
        The file is of another version: ETag and Last-Modified differ, and an If-Range or If-Match
        header that names the usual one does not hold.
    unconditional : bool
        As `changed`, and If-Range and If-Match are ignored.
    short_range : int, optional
        Send this many bytes of the range that is asked for, as if they were asked for.
    wrong_range : int, optional
        Send the range that begins so many bytes later.
    multipart : bool
        Send the range as the only part of a multipart/byteranges body.
    no_version : bool
        Leave out ETag and Last-Modified.

    Raises
    ------
    ValueError
        If more than one fault is given.
    """

    status: int | None = None
    retry_after_s: float | None = None
    truncate: int | None = None
    short: int | None = None
    stall: int | None = None
    html: bool = False
    garbage: bool = False
    redirect: str | None = None
    no_range: bool = False
    range_status: int | None = None
    changed: bool = False
    unconditional: bool = False
    short_range: int | None = None
    wrong_range: int | None = None
    multipart: bool = False
    no_version: bool = False

    def __post_init__(self) -> None:
        values = (getattr(self, item.name) for item in fields(self) if item.name != "retry_after_s")
        # A number may be 0.
        if sum(value is not None and value is not False for value in values) > 1:
            raise ValueError(f"one request can have only one fault: {self}")
        if self.retry_after_s is not None and self.status is None:
            raise ValueError("retry_after_s needs a status")


# The fault of the request that is being answered.
_current_fault: ContextVar[Fault] = ContextVar("fault")


class LoggedRequest(NamedTuple):
    """A request to which the archive has begun to respond."""

    method: str
    path: str
    status: int


class Traffic(NamedTuple):
    """Number of answers of one kind, and of bytes in their bodies that were sent."""

    answers: int = 0
    sent_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.answers:,} answers, {self.sent_bytes / 1e6:,.1f} MB"


@dataclass(kw_only=True)
class _Job:
    """One asynchronous query; each change of phase sets the event `changed` and replaces it."""

    job_id: str
    parameters: dict[str, str]
    phase: str = "PENDING"
    votable: bytes = b""
    error: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    run: asyncio.Task[None] | None = None

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.changed.set()
        self.changed = asyncio.Event()


class SimulatedArchive:
    """An archive of SPHEREx frames on 127.0.0.1, served by a separate thread.

    Folders of its files are listed below ``ibe/dir/list/spherex``. The files are also objects of
    the bucket `BUCKET`, for clients with ``AWS_ENDPOINT_URL`` set to `url`.

    Use it as a context manager, or call `start` and `stop`. A stopped archive can be started
    again at the same address.

    Parameters
    ----------
    frames : iterable of ArchivedFrame
        The archive's content. There is one plane for each collection, exposure and detector,
        described by its first frame, and one artifact for each frame.
    port : int
        Port on 127.0.0.1; with 0 the system chooses a free one.
    maxrec : int
        Largest number of rows that a query returns.
    sync_limit_rows : int, optional
        A lower limit for synchronous queries.
    faults : mapping of str to iterable of Fault, optional
        Faults by URI of a file, or by path: "TAP/sync", "TAP/async", the folder of a listing such
        as "ibe/dir/list/spherex/qr3/epsf", and "nasa-irsa-spherex" for listings of the bucket; with
        or without a leading slash. Each request to that path uses up one; normal service follows.
        ``itertools.repeat(fault)`` makes a fault permanent.
    bandwidth : float, optional
        Bytes per second for all files together; unlimited if None.
    latency_s : float
        Seconds before each answer begins. They pass at the same time for requests that are made
        at the same time.
    extra_artifacts : iterable of (ArchivedFrame, str, Path)
        Further files (frame they belong to, URI, file on disk), listed as artifacts of that
        frame's plane.
    query_error_status : int
        HTTP status of a response that reports a query error. Some services use 200.
    products : iterable of ArchivedProduct
        Calibration products; the tables do not list them.

    Attributes
    ----------
    requests : list of LoggedRequest
        All requests in the order in which their responses began; paths have a leading slash.
    open_connections, peak_connections : int
        Number of requests for files in progress, and its largest value so far.
    traffic : dict of str to Traffic
        What was sent so far of whole files ("file"), of ranges of files ("range"), and of anything
        else ("other"), such as listings and answers to queries. What a client has not read of an
        answer may be among it.

    Raises
    ------
    ValueError
        If one URI names two files.
    """

    def __init__(
        self,
        frames: Iterable[ArchivedFrame],
        *,
        port: int = 0,
        maxrec: int = 100_000,
        sync_limit_rows: int | None = None,
        faults: Mapping[str, Iterable[Fault]] | None = None,
        bandwidth: float | None = None,
        latency_s: float = 0.0,
        extra_artifacts: Iterable[tuple[ArchivedFrame, str, Path]] = (),
        query_error_status: int = 400,
        products: Iterable[ArchivedProduct] = (),
    ) -> None:
        self._port = port
        self._maxrec = maxrec
        self._sync_limit = maxrec if sync_limit_rows is None else min(maxrec, sync_limit_rows)
        self._bandwidth = bandwidth
        self._bandwidth_free_at = 0.0
        self._latency_s = latency_s
        self._query_error_status = query_error_status
        self._rows, self._files = _archive_tables(frames, extra_artifacts)
        self._files |= {product.uri: product.path for product in products}

        # Protects everything that tests read or change while the server runs.
        self._state = threading.Condition()
        self._faults: dict[str, Iterator[Fault]] = {}
        for path, plan in (faults or {}).items():
            self.add_faults(path, plan)
        self.requests: list[LoggedRequest] = []
        self.open_connections = 0
        self.peak_connections = 0
        self.traffic = {kind: Traffic() for kind in ("file", "range", "other")}

        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Base URL of the archive.

        Returns
        -------
        str
            Without a trailing slash; a file is at ``f"{url}/{uri}"``.
        """
        return f"http://127.0.0.1:{self._port}"

    @property
    def archive_url(self) -> str:
        """Base URL of the files.

        Returns
        -------
        str
            The same as `url`.
        """
        return self.url

    @property
    def tap_url(self) -> str:
        """Base URL of the TAP service.

        Returns
        -------
        str
            Without a trailing slash.
        """
        return f"{self.url}/TAP"

    @property
    def sent_bytes(self) -> int:
        """Number of bytes in the bodies of all answers so far.

        Returns
        -------
        int
        """
        with self._state:
            return sum(traffic.sent_bytes for traffic in self.traffic.values())

    def __enter__(self) -> SimulatedArchive:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve until `stop` is called.

        Raises
        ------
        RuntimeError
            If the archive is running.
        ValueError
            If a footprint is not a convex polygon.
        OSError
            If the port is taken.
        """
        if self._thread is not None:
            raise RuntimeError("the archive is already running")
        self._tables = SpherexTables(**self._rows)
        started: Future[int] = Future()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="simulated-archive", daemon=True
        )
        thread.start()
        self._port = started.result()
        self._thread = thread

    def stop(self) -> None:
        """Close all connections and end the thread; do nothing if the archive is not running."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None

    def add_faults(self, path: str, faults: Iterable[Fault]) -> None:
        """Add faults for future requests to a path, after those that are planned already.

        Parameters
        ----------
        path : str
            URI of a file, "TAP/sync" or "TAP/async".
        faults : iterable of Fault
            One for each request; may be infinite.
        """
        path = path.strip("/")
        with self._state:
            self._faults[path] = itertools.chain(self._faults.get(path, ()), faults)

    def add_products(self, products: Iterable[ArchivedProduct]) -> None:
        """Add calibration products, or replace those of the same URI.

        Parameters
        ----------
        products : iterable of ArchivedProduct
            The products.
        """
        # A new mapping, as the server may be reading the old one.
        self._files = self._files | {product.uri: product.path for product in products}

    def replace_file(self, uri: str, path: Path) -> None:
        """Serve another file under a URI from now on, without changing the tables.

        Parameters
        ----------
        uri : str
            The URI.
        path : Path
            The file on disk.

        Raises
        ------
        KeyError
            If there is no such URI.
        """
        if uri not in self._files:
            raise KeyError(uri)
        self._files = self._files | {uri: path}

    def remove_file(self, uri: str) -> None:
        """Forget a file, without changing the tables.

        Parameters
        ----------
        uri : str
            The file.

        Raises
        ------
        KeyError
            If there is no such file.
        """
        files = dict(self._files)
        del files[uri]
        self._files = files

    def wait_for(
        self, predicate: Callable[[SimulatedArchive], bool], *, timeout_s: float = 10.0
    ) -> None:
        """Wait until the archive is in a certain state.

        Parameters
        ----------
        predicate : callable
            Called with the archive whenever a response begins, and when a request for a file
            arrives or ends. It must not block.
        timeout_s : float
            Longest time to wait, in seconds.

        Raises
        ------
        TimeoutError
            If the state is not reached in time.
        """
        with self._state:
            if not self._state.wait_for(lambda: predicate(self), timeout_s):
                raise TimeoutError(f"the archive did not reach the state within {timeout_s} s")

    async def _serve(self, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._jobs: dict[str, _Job] = {}
        self._job_ids = itertools.count(1)
        app = web.Application(middlewares=[self._inject_fault])
        app.on_response_prepare.append(self._log_request)
        app.add_routes(
            [
                web.get("/TAP/sync", self._sync),
                web.post("/TAP/sync", self._sync),
                web.post("/TAP/async", self._create_job),
                web.get("/TAP/async/{job_id}", self._get_job),
                web.delete("/TAP/async/{job_id}", self._delete_job),
                web.get("/TAP/async/{job_id}/phase", self._get_phase),
                web.post("/TAP/async/{job_id}/phase", self._set_phase),
                web.get("/TAP/async/{job_id}/parameters", self._get_parameters),
                web.post("/TAP/async/{job_id}/parameters", self._set_parameters),
                web.get("/TAP/async/{job_id}/results", self._get_results),
                web.get("/TAP/async/{job_id}/results/result", self._get_result),
                web.get("/TAP/async/{job_id}/error", self._get_error),
                web.get("/TAP/availability", self._availability),
                web.get("/TAP/capabilities", self._capabilities),
                web.get("/TAP/tables", self._tableset),
                web.get("/" + LISTING_PREFIX + "{folder:(/.*)?}", self._list_folder),
                web.get("/" + BUCKET, self._list_bucket),
                web.get("/" + BUCKET + "/", self._list_bucket),
                web.get("/" + BUCKET + "/{key:.+}", self._object),
                web.get("/{uri:.+}", self._file),
            ]
        )
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        try:
            listener = socket.create_server(("127.0.0.1", self._port))
            await web.SockSite(runner, listener).start()
        except OSError as error:
            started.set_exception(error)
        else:
            started.set_result(runner.addresses[0][1])
            logger.debug("simulated archive serves at %s", runner.addresses[0])
            await self._stopping.wait()
            # asyncio loses a connection that was accepted in the turn of the event loop in which
            # the listener is closed, and its client would wait without end. So the archive first
            # stops accepting, then gives the last connections time to reach the runner, which
            # closes them.
            self._loop.remove_reader(listener)
            for _ in range(_TURNS_TO_CONNECT):
                await asyncio.sleep(0)
        await runner.cleanup()
        self._tables.close()

    async def _log_request(self, request: web.Request, response: web.StreamResponse) -> None:
        record = LoggedRequest(request.method, request.path, response.status)
        logger.debug("%s %s: %d", *record)
        with self._state:
            self.requests.append(record)
            self._state.notify_all()

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        with self._state:
            self.open_connections += 1
            self.peak_connections = max(self.peak_connections, self.open_connections)
            self._state.notify_all()
        try:
            yield
        finally:
            with self._state:
                self.open_connections -= 1
                self._state.notify_all()

    # Responses, with or without a fault

    @web.middleware
    async def _inject_fault(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        with self._state:
            fault = next(self._faults.get(request.path.strip("/"), iter(())), Fault())
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        status = fault.status
        if "Range" in request.headers and fault.range_status is not None:
            status = fault.range_status
        if status is not None:
            headers = {}
            if fault.retry_after_s is not None:
                headers["Retry-After"] = f"{fault.retry_after_s:g}"
            page = f"<html><body><h1>Error {status}</h1></body></html>"
            return web.Response(status=status, text=page, content_type="text/html", headers=headers)
        if fault.redirect is not None:
            return web.Response(status=302, headers={"Location": fault.redirect})
        if fault.html:
            page = "<html><body>The archive is down for scheduled maintenance.</body></html>"
            return web.Response(text=page, content_type="text/html")
        _current_fault.set(fault)
        return await handler(request)

    async def _send(
        self,
        request: web.Request,
        body: BinaryIO,
        *,
        content_type: str,
        status: int = 200,
        validators: Mapping[str, str] | None = None,
    ) -> web.StreamResponse:
        """Send a body; with the validators ETag and Last-Modified, also ranges of it."""
        fault = _current_fault.get()
        if fault.short is not None:
            body = io.BytesIO(body.read(fault.short))
        size = body.seek(0, io.SEEK_END)
        if fault.garbage:
            noise = random.Random(0).randbytes(4096)
            body = io.BytesIO((noise * (size // len(noise) + 1))[:size])

        start, stop = 0, size
        headers = dict(validators or {})
        kind = "file" if validators else "other"
        if validators and not fault.no_range:
            headers["Accept-Ranges"] = "bytes"
            if_range = request.headers.get("If-Range")
            holds = if_range is None or if_range in validators.values() or fault.unconditional
            if "Range" in request.headers and holds:
                try:
                    start, stop, _ = request.http_range.indices(size)
                except ValueError:
                    start = size
                if start >= stop:
                    headers["Content-Range"] = f"bytes */{size}"
                    return web.Response(status=416, headers=headers)
                status, kind = 206, "range"
                if fault.short_range is not None:
                    stop = min(stop, start + fault.short_range)
                if fault.wrong_range is not None:
                    start, stop = (min(end + fault.wrong_range, size) for end in (start, stop))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                if fault.multipart:
                    body, start, stop = _as_multipart(body, start, stop, headers)
                    content_type = "multipart/byteranges; boundary=part"
        if fault.no_version:
            headers = {name: headers[name] for name in headers if name not in (validators or {})}

        response = web.StreamResponse(status=status, headers=headers)
        response.content_type = content_type
        response.content_length = stop - start
        # Counted before, so that a client that has the bytes finds them counted.
        self._count(kind, Traffic(answers=1))
        cut = fault.truncate if fault.truncate is not None else fault.stall
        count = stop - start if cut is None else min(cut, stop - start)
        body.seek(start)
        # A client may leave when it has heard enough.
        with suppress(ConnectionResetError):
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            async for chunk in self._chunks(body, count):
                self._count(kind, Traffic(sent_bytes=len(chunk)))
                await response.write(chunk)
        if fault.stall is not None:
            await self._stopping.wait()
        if cut is not None and request.transport is not None:
            request.transport.close()
        return response

    def _count(self, kind: str, traffic: Traffic) -> None:
        with self._state:
            so_far = self.traffic[kind]
            self.traffic[kind] = Traffic(*(a + b for a, b in zip(so_far, traffic, strict=True)))

    async def _chunks(self, body: BinaryIO, count: int) -> AsyncIterator[bytes]:
        """Yield the next `count` bytes, no faster than the bandwidth allows."""
        begun, chunk_size = self._loop.time(), _CHUNK_SIZE
        if self._bandwidth is not None:
            chunk_size = min(chunk_size, math.ceil(self._bandwidth / 50))
        while count > 0 and (chunk := body.read(min(chunk_size, count))):
            count -= len(chunk)
            # Without a delay the sleep still lets other requests proceed.
            delay = 0.0
            if self._bandwidth is not None:
                # All transfers share the same bandwidth, one chunk after the other.
                now = self._loop.time()
                # A chunk that is late, as the machine is busy, leaves the next no later.
                start = max(begun, now - _LONGEST_LAG_S, self._bandwidth_free_at)
                self._bandwidth_free_at = start + len(chunk) / self._bandwidth
                delay = self._bandwidth_free_at - now
            await asyncio.sleep(delay)
            yield chunk

    # Files

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = self._files.get(request.path.lstrip("/"))
        if path is None:
            raise web.HTTPNotFound
        return await self._send_file(request, path)

    async def _send_file(self, request: web.Request, path: Path) -> web.StreamResponse:
        fault = _current_fault.get()
        etag, modified = entity_tag(path), path.stat().st_mtime
        if fault.changed or fault.unconditional:
            etag, modified = f'"changed-{etag[1:]}', modified + 1
        if request.headers.get("If-Match", "*") not in ("*", etag) and not fault.unconditional:
            return _s3_error(412, "PreconditionFailed", "The file has changed.")
        with path.open("rb") as body, self._transfer():
            return await self._send(
                request,
                body,
                content_type="application/fits",
                validators={"ETag": etag, "Last-Modified": formatdate(modified, usegmt=True)},
            )

    async def _list_folder(self, request: web.Request) -> web.StreamResponse:
        folder = request.match_info["folder"].strip("/")
        children = list_children(self._bucket_files(), folder)
        if not children:
            raise web.HTTPNotFound
        if "text/html" in request.headers.get("Accept", ""):
            return web.Response(text=page_for_people(folder), content_type="text/html")
        return await self._send(
            request,
            io.BytesIO(folder_listing(children).encode()),
            content_type="application/x-ndjson",
        )

    # The bucket

    def _bucket_files(self) -> dict[str, Path]:
        """Return the files below `SERVICE_PREFIX`, by the rest of their URI."""
        return {
            uri.removeprefix(SERVICE_PREFIX): path
            for uri, path in self._files.items()
            if uri.startswith(SERVICE_PREFIX)
        }

    async def _list_bucket(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("list-type") != "2":
            return _s3_error(400, "InvalidArgument", "Only ListObjectsV2 is supported.")
        try:
            listing = bucket_listing(self._bucket_files(), BUCKET, request.query)
        except ValueError as error:
            return _s3_error(400, "InvalidArgument", str(error))
        return await self._send(
            request, io.BytesIO(listing.encode()), content_type="application/xml"
        )

    async def _object(self, request: web.Request) -> web.StreamResponse:
        path = self._files.get(SERVICE_PREFIX + request.match_info["key"])
        if path is None:
            return _s3_error(404, "NoSuchKey", "The specified key does not exist.")
        return await self._send_file(request, path)

    # TAP

    async def _answer(self, parameters: Mapping[str, str], limit: int) -> bytes:
        """Run the query of a request in another thread and return its VOTable."""
        if "QUERY" not in parameters:
            raise QueryError("The parameter QUERY is missing.")
        if not parameters.get("LANG", "").upper().startswith("ADQL"):
            raise QueryError("The parameter LANG must be ADQL.")
        requested = parameters.get("MAXREC", str(limit))
        if not requested.isdecimal():
            raise QueryError("The parameter MAXREC must be a whole number.")
        maxrec = min(limit, int(requested))

        def answer() -> bytes:
            return result_votable(self._tables.query(parameters["QUERY"], maxrec=maxrec))

        return await asyncio.to_thread(answer)

    async def _sync(self, request: web.Request) -> web.StreamResponse:
        status = 200
        try:
            votable = await self._answer(await _parameters(request), self._sync_limit)
        except QueryError as error:
            votable, status = error_votable(str(error)), self._query_error_status
        return await self._send(
            request, io.BytesIO(votable), content_type=_VOTABLE_TYPE, status=status
        )

    async def _create_job(self, request: web.Request) -> web.StreamResponse:
        parameters = await _parameters(request)
        job = _Job(job_id=str(next(self._job_ids)), parameters=parameters)
        self._jobs[job.job_id] = job
        if parameters.get("PHASE") == "RUN":
            self._start(job)
        return self._see_job(job)

    def _start(self, job: _Job) -> None:
        async def run() -> None:
            try:
                job.votable = await self._answer(job.parameters, self._maxrec)
            except QueryError as error:
                job.error = str(error)
            finally:
                if job.phase == "EXECUTING":
                    job.enter("COMPLETED" if job.votable else "ERROR")

        job.enter("EXECUTING")
        job.run = asyncio.create_task(run())

    def _job(self, request: web.Request) -> _Job:
        try:
            return self._jobs[request.match_info["job_id"]]
        except KeyError:
            raise web.HTTPNotFound(text="There is no such job.") from None

    def _see_job(self, job: _Job) -> web.Response:
        return web.Response(status=303, headers={"Location": f"{self.tap_url}/async/{job.job_id}"})

    async def _get_job(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if "WAIT" in request.query and job.phase in _ACTIVE_PHASES:
            seconds = float(request.query["WAIT"])
            with suppress(TimeoutError):
                async with asyncio.timeout(None if seconds < 0 else seconds):
                    await job.changed.wait()
        content = [
            f"<uws:jobId>{job.job_id}</uws:jobId>",
            f"<uws:phase>{job.phase}</uws:phase>",
            "<uws:executionDuration>0</uws:executionDuration>",
            f"<uws:parameters>{self._parameter_items(job)}</uws:parameters>",
            f"<uws:results>{self._result_items(job)}</uws:results>",
        ]
        if job.error is not None:
            content.append(
                '<uws:errorSummary type="fatal" hasDetail="true">'
                f"<uws:message>{escape(job.error)}</uws:message></uws:errorSummary>"
            )
        return _xml_response(f'<uws:job {_UWS} version="1.1">{"".join(content)}</uws:job>')

    async def _delete_job(self, request: web.Request) -> web.Response:
        job = self._job(request)
        del self._jobs[job.job_id]
        job.enter("ABORTED")
        return web.Response(status=303, headers={"Location": f"{self.tap_url}/async"})

    async def _get_phase(self, request: web.Request) -> web.Response:
        return web.Response(text=self._job(request).phase)

    async def _set_phase(self, request: web.Request) -> web.Response:
        job = self._job(request)
        phase = (await _parameters(request)).get("PHASE")
        if phase == "RUN" and job.phase == "PENDING":
            self._start(job)
        elif phase == "ABORT" and job.phase in _ACTIVE_PHASES:
            job.enter("ABORTED")
        else:
            raise web.HTTPBadRequest(text=f"A job in phase {job.phase} cannot do {phase}.")
        return self._see_job(job)

    async def _get_parameters(self, request: web.Request) -> web.Response:
        items = self._parameter_items(self._job(request))
        return _xml_response(f"<uws:parameters {_UWS}>{items}</uws:parameters>")

    async def _set_parameters(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if job.phase != "PENDING":
            raise web.HTTPBadRequest(text="The job has been started.")
        job.parameters.update(await _parameters(request))
        return self._see_job(job)

    async def _get_results(self, request: web.Request) -> web.Response:
        items = self._result_items(self._job(request))
        return _xml_response(f"<uws:results {_UWS}>{items}</uws:results>")

    async def _get_result(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        if job.phase != "COMPLETED":
            raise web.HTTPNotFound(text="The job has no result.")
        return await self._send(request, io.BytesIO(job.votable), content_type=_VOTABLE_TYPE)

    async def _get_error(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if job.error is None:
            raise web.HTTPNotFound(text="The job has no error.")
        return web.Response(body=error_votable(job.error), content_type=_VOTABLE_TYPE)

    def _parameter_items(self, job: _Job) -> str:
        return "".join(
            f"<uws:parameter id={quoteattr(name)}>{escape(value)}</uws:parameter>"
            for name, value in job.parameters.items()
        )

    def _result_items(self, job: _Job) -> str:
        if job.phase != "COMPLETED":
            return ""
        href = f"{self.tap_url}/async/{job.job_id}/results/result"
        return f'<uws:result id="result" xlink:type="simple" xlink:href="{href}"/>'

    async def _availability(self, request: web.Request) -> web.Response:
        return _xml_response(
            '<vosi:availability xmlns:vosi="http://www.ivoa.net/xml/VOSIAvailability/v1.0">'
            "<vosi:available>true</vosi:available></vosi:availability>"
        )

    async def _capabilities(self, request: web.Request) -> web.Response:
        return _xml_response(
            '<vosi:capabilities xmlns:vosi="http://www.ivoa.net/xml/VOSICapabilities/v1.0"'
            ' xmlns:vs="http://www.ivoa.net/xml/VODataService/v1.1"'
            ' xmlns:tr="http://www.ivoa.net/xml/TAPRegExt/v1.0"'
            ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
            '<capability standardID="ivo://ivoa.net/std/TAP" xsi:type="tr:TableAccess">'
            '<interface role="std" xsi:type="vs:ParamHTTP">'
            f'<accessURL use="base">{self.tap_url}</accessURL></interface>'
            '<language><name>ADQL</name><version ivo-id="ivo://ivoa.net/std/ADQL#v2.0">2.0'
            "</version></language>"
            f"<outputFormat><mime>{_VOTABLE_TYPE}</mime></outputFormat>"
            f'<outputLimit><hard unit="row">{self._maxrec}</hard></outputLimit>'
            "</capability></vosi:capabilities>"
        )

    async def _tableset(self, request: web.Request) -> web.Response:
        tables = ""
        for table, columns in TABLE_COLUMNS.items():
            items = "".join(
                f'<column><name>{name}</name><dataType xsi:type="vs:VOTableType">{datatype}'
                "</dataType></column>"
                for name, datatype in columns.items()
            )
            tables += f"<table><name>spherex.{table}</name>{items}</table>"
        return _xml_response(
            '<vosi:tableset xmlns:vosi="http://www.ivoa.net/xml/VOSITables/v1.0"'
            ' xmlns:vs="http://www.ivoa.net/xml/VODataService/v1.1"'
            ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
            f"<schema><name>spherex</name>{tables}</schema></vosi:tableset>"
        )


def _as_multipart(
    body: BinaryIO, start: int, stop: int, headers: dict[str, str]
) -> tuple[BinaryIO, int, int]:
    """Return a body of one part, and its first byte and its length."""
    body.seek(start)
    content = (
        b"--part\r\nContent-Type: application/fits\r\nContent-Range: "
        + headers.pop("Content-Range").encode()
        + b"\r\n\r\n"
        + body.read(stop - start)
        + b"\r\n--part--\r\n"
    )
    return io.BytesIO(content), 0, len(content)


def _xml_response(document: str) -> web.Response:
    return web.Response(
        text=f'<?xml version="1.0" encoding="UTF-8"?>\n{document}', content_type="application/xml"
    )


def _s3_error(status: int, code: str, message: str) -> web.Response:
    return web.Response(
        status=status,
        text=f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{escape(message)}</Message></Error>",
        content_type="application/xml",
    )


async def _parameters(request: web.Request) -> dict[str, str]:
    """Return the parameters in URL and form, in upper case as TAP ignores their case."""
    form = await request.post() if request.method == "POST" else {}
    return {name.upper(): str(value) for name, value in [*request.query.items(), *form.items()]}


def _archive_tables(
    frames: Iterable[ArchivedFrame], extra_artifacts: Iterable[tuple[ArchivedFrame, str, Path]]
) -> tuple[dict[str, list[tuple[Any, ...]]], dict[str, Path]]:
    """Return the rows of the three tables, and the file of each URI."""
    observations: dict[tuple[str, str], tuple[Any, ...]] = {}
    planes: dict[tuple[str, str, int], tuple[Any, ...]] = {}
    artifacts: list[tuple[Any, ...]] = []
    files: dict[str, Path] = {}
    science = ((frame, frame.uri, frame.path) for frame in frames)
    for frame, uri, path in itertools.chain(science, extra_artifacts):
        exposure = (frame.collection, frame.obs_id)
        obsid, *_ = observations.setdefault(
            exposure, (len(observations) + 1, frame.obs_id, frame.collection)
        )
        planeid, *_ = planes.setdefault(
            (*exposure, frame.detector), (len(planes) + 1, obsid, *_plane_values(frame))
        )
        if files.setdefault(uri, path) != path:
            raise ValueError(f"{uri} names two files: {files[uri]} and {path}")
        artifacts.append((planeid, uri, path.stat().st_size))
    rows = {
        "observations": list(observations.values()),
        "planes": list(planes.values()),
        "artifacts": artifacts,
    }
    return rows, files


def _plane_values(frame: ArchivedFrame) -> tuple[Any, ...]:
    return (
        f"ivo://irsa.ipac/{frame.collection}?{frame.obs_id}/D{frame.detector}",
        f"SPHEREx-D{frame.detector}",
        frame.wavelength_min_um * 1e-6,
        frame.wavelength_max_um * 1e-6,
        frame.mjd_begin,
        frame.mjd_end,
        footprint_text(frame.polygon),
    )
