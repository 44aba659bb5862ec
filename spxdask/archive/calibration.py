"""Calibration products: which there are, which of them a run uses, and their files.

A product is one file a detector, constant in time, and named by a token. A frame does not name
its products. Of each family, the newest at the archive is used for frames of every release.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from spxdask.archive.listing import Entry, list_folder
from spxdask.archive.observation import EARLY_RELEASES, SERVICE_PREFIX, frame_url
from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.transfer import fetch_file
from spxdask.archive.urls import strip_credentials
from spxdask.errors import ArchiveError, FrameError, InputError
from spxdask.science.calibration import check_product
from spxdask.science.families import CHANNELS, FAMILIES, FLUX_CORRECTION
from spxdask.storage import LocalStore, raise_disk_full
from spxdask.storage.cache import cache_folder

__all__ = [
    "CalibrationSet",
    "LocatedProduct",
    "Product",
    "ProductSource",
    "find_channels",
    "find_in_cache",
    "find_products",
    "find_releases",
    "obtain_calibration",
    "obtain_product",
    "open_in_cache",
    "products_folder",
]

_TOKEN = re.compile(r"cal-[a-z0-9]{1,16}-v(?P<version>\d{1,6})-(?P<year>\d{4})-(?P<day>\d{3})")
_RELEASE = re.compile(r"[a-z][a-z0-9]{0,15}")
# For an archive whose releases cannot be listed.
KNOWN_RELEASES = ("qr2", "qr3", "dr1")
# The longest is about 50 MB; a longer file is not a product.
MAX_PRODUCT_BYTES = 512 << 20
# Requests at the same time: file servers refuse more than a few.
MAX_CONCURRENT_REQUESTS = 3


@dataclass(frozen=True, kw_only=True)
class ProductSource:
    """Where products come from, and how patient their transfers are.

    Attributes
    ----------
    url : str
        Base URL of the archive (http, https), the bucket (s3) or a tree on disk (file).
    retry : RetryPolicy
        Number of attempts and the delays between them.
    stall_timeout_s : float
        Longest time without a byte, in seconds.
    endpoint : str or None
        URL of the S3 server, where that is not the usual one.
    """

    url: str
    retry: RetryPolicy
    stall_timeout_s: float
    endpoint: str | None = None

    def list_folder(self, folder: str) -> dict[str, Entry]:
        """List a folder.

        Parameters
        ----------
        folder : str
            Path below the releases; empty for the releases themselves.

        Returns
        -------
        dict of str to Entry
            By name; empty if there is no such folder.

        Raises
        ------
        ArchiveError
            If the archive does not answer, or not with a listing.
        """
        entries = list_folder(
            self.url,
            folder,
            retry=self.retry,
            stall_timeout_s=self.stall_timeout_s,
            endpoint=self.endpoint,
        )
        return {entry.name: entry for entry in entries}


@dataclass(frozen=True, kw_only=True)
class LocatedProduct:
    """A file of the archive.

    Attributes
    ----------
    family : str
        Such as ``epsf``.
    band : str
        ``D1`` to ``D6``.
    release, token : str
        The folders that it is in, such as ``qr3`` and ``cal-epsf-v1-2026-191``.
    url : str
        Where it is.
    size : int or None
        Its length in bytes, None where the listing does not state it.
    modified : str
        When it was last changed, as the listing states it.
    """

    family: str
    band: str
    release: str
    token: str
    url: str
    size: int | None
    modified: str

    @property
    def record_name(self) -> str:
        """Name of the file in a cache that tells what it holds of this one."""
        stamp = json.dumps([self.url, self.size, self.modified])
        return f"{_hash(stamp.encode())}.json"


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product that a run uses.

    Attributes
    ----------
    family, band, release, token, url : str
        See `LocatedProduct`.
    size : int
        Its length in bytes.
    checksum : str
        BLAKE2b of its content, 32 hexadecimal digits.
    """

    family: str
    band: str
    release: str
    token: str
    url: str
    size: int
    checksum: str

    @property
    def filename(self) -> str:
        """Its name in a cache, which is different for different content."""
        return f"{self.family}_{self.band}_{self.token}_{self.checksum}.fits"


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The products that the frames of a run are measured with.

    Attributes
    ----------
    products : tuple of Product
        All of them.
    missing : dict of str to str
        Families that are not used, and why.
    kept : dict of str to str
        Families whose products are those of an earlier query, and why; this is not saved.
    source : ProductSource or None
        Where a machine without the files fetches them.
    """

    products: tuple[Product, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    source: ProductSource | None = None

    def choose(self, band: str, is_early: bool) -> dict[str, Product]:
        """Return the products for a frame.

        Parameters
        ----------
        band : str
            Of the frame.
        is_early : bool
            Whether it has the flux scale of before QR3, which a product corrects.

        Returns
        -------
        dict of str to Product
            By family.
        """
        return {
            product.family: product
            for product in self.products
            if product.band == band and (is_early or product.family != FLUX_CORRECTION)
        }

    @property
    def tokens(self) -> dict[str, str]:
        """The tokens of each family, such as ``cal-epsf-v1-2026-191 (D3: ...)``."""
        found: dict[str, dict[str, list[str]]] = {}
        for product in self.products:
            found.setdefault(product.family, {}).setdefault(product.token, []).append(product.band)
        texts = {}
        for family, bands in found.items():
            most, *others = sorted(bands, key=lambda token: (-len(bands[token]), token))
            rest = ", ".join(f"{' '.join(bands[token])}: {token}" for token in others)
            texts[family] = f"{most} ({rest})" if rest else most
        return texts

    def to_json(self) -> str:
        """Return the products and what is missing as a text that `from_json` reads.

        Returns
        -------
        str
        """
        products = [dataclasses.asdict(product) for product in self.products]
        return json.dumps({"products": products, "missing": dict(self.missing)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, source: ProductSource | None = None) -> CalibrationSet:
        """Read a set that was saved.

        Parameters
        ----------
        text : str or bytes
            What `to_json` returned.
        source : ProductSource, optional
            Where a machine without the files fetches them.

        Returns
        -------
        CalibrationSet

        Raises
        ------
        ValueError, TypeError, KeyError
            If it is anything else.
        """
        found = json.loads(text)
        products = tuple(Product(**product) for product in found["products"])
        return cls(products=products, missing=dict(found["missing"]), source=source)


def find_products(
    source: ProductSource,
    family: str,
    bands: Collection[str],
    *,
    releases: Iterable[str],
    pins: Collection[str] = (),
) -> dict[str, LocatedProduct]:
    """Find the newest product of a family for each band.

    Parameters
    ----------
    source : ProductSource
        The archive.
    family : str
        Such as ``epsf``.
    bands : collection of str
        Of ``D1`` to ``D6``.
    releases : iterable of str
        The releases to search.
    pins : collection of str, optional
        Tokens; no others are taken.

    Returns
    -------
    dict of str to LocatedProduct
        By band; a band for which there is none is not in it. Versions come before dates.

    Raises
    ------
    ArchiveError
        If the archive does not answer.
    """
    tokens = []
    for release in releases:
        for token in source.list_folder(f"{release}/{family}"):
            match = _TOKEN.fullmatch(token)
            if match and (not pins or token in pins):
                age = tuple(int(match[part]) for part in ("version", "year", "day"))
                tokens.append((age, release, token))
    found: dict[str, LocatedProduct] = {}
    for _, release, token in sorted(tokens, reverse=True):
        wanted = [band for band in bands if band not in found]
        folders = source.list_folder(f"{release}/{family}/{token}") if wanted else {}
        for band in wanted:
            detector = band[1:]
            if detector not in folders:
                continue
            folder = f"{release}/{family}/{token}/{detector}"
            name = f"{family}_{band}_spx_{token}.fits"
            file = source.list_folder(folder).get(name)
            if file is not None:
                found[band] = LocatedProduct(
                    family=family,
                    band=band,
                    release=release,
                    token=token,
                    url=frame_url(source.url, f"{SERVICE_PREFIX}{folder}/{name}"),
                    size=file.size,
                    modified=file.modified,
                )
    return found


def find_channels(source: ProductSource) -> tuple[str, str] | None:
    """Find the newest product of spectral channels, which is one file for all detectors.

    Parameters
    ----------
    source : ProductSource
        The archive, or a tree of products.

    Returns
    -------
    token, url : str
        Its name, and where it is; None if there is none.

    Raises
    ------
    ArchiveError
        If the archive does not answer.
    """
    tokens = []
    for release in find_releases(source, []):
        for token in source.list_folder(f"{release}/{CHANNELS}"):
            if match := _TOKEN.fullmatch(token):
                age = tuple(int(match[part]) for part in ("version", "year", "day"))
                tokens.append((age, release, token))
    for _, release, token in sorted(tokens, reverse=True):
        folder = f"{release}/{CHANNELS}/{token}"
        stem = f"{CHANNELS}_spx_{token}.fits"
        files = source.list_folder(folder)
        for name in (f"{stem}.gz", stem):
            if name in files:
                return token, frame_url(source.url, f"{SERVICE_PREFIX}{folder}/{name}")
    return None


def find_releases(source: ProductSource, observed: Iterable[str]) -> list[str]:
    """Return the releases of an archive.

    Parameters
    ----------
    source : ProductSource
        The archive.
    observed : iterable of str
        Releases that are known to be there.

    Returns
    -------
    list of str
        Sorted; those that can be listed, and those observed. If none can be listed, the
        releases that are known of.

    Raises
    ------
    ArchiveError
        If the archive does not answer.
    """
    try:
        names = {*filter(_RELEASE.fullmatch, source.list_folder(""))}
    except ArchiveError as error:
        # A server may show folders, but not what is above them.
        if not error.reason.startswith("HTTP 403"):
            raise
        names = set()
    return sorted((names or {*KNOWN_RELEASES}) | {*filter(_RELEASE.fullmatch, observed)})


def obtain_calibration(
    source: ProductSource,
    *,
    bands: Collection[str],
    releases: Collection[str],
    pins: Mapping[str, Collection[str]],
    skipped: Collection[str] = (),
    recorded: CalibrationSet | None = None,
    folder: Path | None = None,
) -> CalibrationSet:
    """Find and fetch the newest products for the frames of a run.

    Parameters
    ----------
    source : ProductSource
        The archive, or another tree of products.
    bands, releases : collection of str
        Those of the frames.
    pins : mapping of str to collection of str
        By family, tokens that alone are taken.
    skipped : collection of str
        Families that are not needed.
    recorded : CalibrationSet, optional
        What the run used before. Of a family that cannot be had now, those of its products that
        are in the cache are used again, so that an outage does not change the numbers of a run.
    folder : Path, optional
        The cache; by default that of the user.

    Returns
    -------
    CalibrationSet
        A family of which one band has no usable product is used for no frame, so that all
        frames are measured alike; `missing` says why.

    Raises
    ------
    InputError
        If a product that was pinned is not there.
    DiskFullError
        If there is no room for a product.
    """
    needed = [
        family
        for family in FAMILIES
        if family not in skipped
        and (family != FLUX_CORRECTION or any(release in EARLY_RELEASES for release in releases))
    ]
    bands = sorted(bands)
    obtained: dict[str, list[Product] | str]
    try:
        searched = find_releases(source, releases)
    except ArchiveError as error:
        obtained = dict.fromkeys(needed, f"the archive cannot be listed ({error})")
    else:
        obtain = functools.partial(
            _obtain_family, source, bands=bands, releases=searched, pins=pins, folder=folder
        )
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
            obtained = dict(zip(needed, threads.map(obtain, needed), strict=True))
    products: list[Product] = []
    missing, kept = {}, {}
    for family, result in obtained.items():
        if not isinstance(result, str):
            products += result
            continue
        earlier = [] if recorded is None else recorded.products
        earlier = [p for p in earlier if p.family == family and p.band in bands]
        if len(earlier) == len(bands) and all(_is_in_cache(p, folder) for p in earlier):
            kept[family] = result
            products += earlier
        elif family in pins:
            raise InputError(f"calibration_pins: {family}: {result}")
        else:
            missing[family] = result
    return CalibrationSet(products=tuple(products), missing=missing, kept=kept, source=source)


def _obtain_family(
    source: ProductSource,
    family: str,
    *,
    bands: list[str],
    releases: list[str],
    pins: Mapping[str, Collection[str]],
    folder: Path | None,
) -> list[Product] | str:
    """Return the product of a family for each band, or why not all of them can be had."""
    pinned = pins.get(family, ())
    try:
        located = find_products(source, family, bands, releases=releases, pins=pinned)
        absent = [band for band in bands if band not in located]
        if absent:
            wanted = f" named {' or '.join(sorted(pinned))}" if pinned else ""
            shown = strip_credentials(source.url)
            return f"there is no product{wanted} for {', '.join(absent)} at {shown}"
        return [obtain_product(located[band], source, folder=folder) for band in bands]
    except ArchiveError as error:
        return str(error)


def obtain_product(
    located: LocatedProduct, source: ProductSource, *, folder: Path | None = None
) -> Product:
    """Return a product whose file is in the cache; fetch it if it is not, or has changed.

    Parameters
    ----------
    located : LocatedProduct
        Where it is at the archive.
    source : ProductSource
        How patient the transfer is.
    folder : Path, optional
        The cache; by default that of the user.

    Returns
    -------
    Product

    Raises
    ------
    ArchiveError
        If it cannot be had, or is not a product of this family.
    InputError
        If the cache cannot be written.
    DiskFullError
        If there is no room for it.
    """
    folder = folder or products_folder()
    record = folder / located.record_name
    known = _read_record(record, folder)
    if known is not None:
        # Before the lock, so that a cache need not be writable if it has what is needed.
        return known
    with _lock(folder, record.stem):
        known = _read_record(record, folder)
        if known is not None:
            return known
        content, checksum = _fetch(located, source)
        product = Product(
            family=located.family,
            band=located.band,
            release=located.release,
            token=located.token,
            url=located.url,
            size=len(content),
            checksum=checksum,
        )
        _put(folder, product.filename, content)
        path = folder / product.filename
        found = {"product": dataclasses.asdict(product), "mtime_ns": path.stat().st_mtime_ns}
        _put(folder, record.name, json.dumps(found).encode())
    return product


def find_in_cache(located: LocatedProduct) -> Product | None:
    """Return a product whose file is in the cache.

    Parameters
    ----------
    located : LocatedProduct
        What the archive has now.

    Returns
    -------
    Product or None
        None if its file is not there, or the archive has another one now.
    """
    folder = products_folder()
    return _read_record(folder / located.record_name, folder)


def open_in_cache(product: Product, source: ProductSource | None) -> Path:
    """Return the file of a product on this machine, fetched if it is not there.

    Parameters
    ----------
    product : Product
        The product.
    source : ProductSource or None
        How patient the transfer is; None to fetch nothing.

    Returns
    -------
    Path
        The file, which is never changed.

    Raises
    ------
    ArchiveError
        If it cannot be had, or is another file by now.
    InputError
        If the cache cannot be written.
    DiskFullError
        If there is no room for it.
    """
    folder = products_folder()
    path = folder / product.filename
    if _is_there(path, product.size):
        return path
    with _lock(folder, product.checksum):
        if _is_there(path, product.size):
            return path
        if source is None:
            raise ArchiveError(f"{product.filename} is not in {folder}", path=product.url)
        located = LocatedProduct(
            family=product.family,
            band=product.band,
            release=product.release,
            token=product.token,
            url=product.url,
            size=product.size,
            modified="",
        )
        content, checksum = _fetch(located, source)
        if checksum != product.checksum:
            raise ArchiveError(
                "the archive has replaced the product since the query: run query again",
                path=product.url,
            )
        _put(folder, product.filename, content)
    return path


def products_folder() -> Path:
    """Return the folder of products in the cache of the user.

    Returns
    -------
    Path
    """
    return cache_folder() / "products"


def _fetch(located: LocatedProduct, source: ProductSource) -> tuple[memoryview, str]:
    """Return the content of a product that passed all checks, and its checksum."""
    size = MAX_PRODUCT_BYTES if located.size is None else located.size
    if not 0 < size <= MAX_PRODUCT_BYTES:
        raise ArchiveError(f"a product does not have {size} bytes", path=located.url)
    # Mapped memory is taken only as it is filled, where the length is not known.
    received = ReceivedFile(memoryview(mmap.mmap(-1, size)), expected_size=located.size)
    doubtful: set[str] = set()

    def check(whole: ReceivedFile) -> str:
        whole.check_size(whole.size)
        checksum = _hash(whole.content)
        try:
            check_product(located.family, located.band, whole.content)
        except FrameError as error:
            if checksum in doubtful:
                # No further transfer would bring other bytes.
                raise ArchiveError(f"not a usable product: {error}") from error
            doubtful.add(checksum)
            raise
        return checksum

    checksum = fetch_file(
        located.url,
        received,
        check,
        retry=source.retry,
        stall_timeout_s=source.stall_timeout_s,
        endpoint=source.endpoint,
    )
    return received.content, checksum


def _hash(content: memoryview | bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _put(folder: Path, name: str, content: bytes | memoryview) -> None:
    """Write a file of the cache."""
    try:
        with raise_disk_full(folder):
            LocalStore(folder).put(name, content)
    except OSError as error:
        raise _make_cache_error(folder, error) from error


def _make_cache_error(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"the cache {folder} cannot be written ({error.strerror or error}): name another folder "
        "in the environment variable SPXDASK_CACHE"
    )


def _read_record(path: Path, folder: Path) -> Product | None:
    """Return the product that a record names if its file is as it was written."""
    try:
        found = json.loads(path.read_bytes())
        product, mtime_ns = Product(**found["product"]), found["mtime_ns"]
        file = folder / product.filename
        if not _is_there(file, product.size):
            return None
        # A file that was copied or written again is as good if its content is the same.
        is_intact = file.stat().st_mtime_ns == mtime_ns or _hash(file.read_bytes()) == (
            product.checksum
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return product if is_intact else None


def _is_in_cache(product: Product, folder: Path | None) -> bool:
    return _is_there((folder or products_folder()) / product.filename, product.size)


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process of this machine at a time fetch a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _make_cache_error(folder, error) from error
    try:
        # Some network file systems have no locks; then several processes may fetch it.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
