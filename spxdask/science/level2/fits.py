"""The layout of a FITS file: headers as cards, data as byte ranges.

Frames are opened millions of times. Therefore headers are scanned once and planes are
mapped from the file; `astropy.io.fits` does everything that is not on that path.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spxdask.errors import FrameError, MissingBytesError
from spxdask.science.kernels.checksum import sum_words
from spxdask.science.level2.spans import Span, Spans

Buffer = bytes | bytearray | memoryview | mmap.mmap

# Bytes of a block and of a card (FITS 4.0, sections 3.1 and 4.1).
BLOCK = 2880
CARD = 80
# What is asked for of a header of a file that is read in parts, blocks: most Level 2 headers are
# shorter.
ASKED_HEADER_BLOCKS = 4
# Level 2 headers have a few hundred cards; without END in this many blocks it is no header.
MAX_HEADER_BLOCKS = 4096

# Decimal digits of a 32-bit number; 16 characters that encode one.
_DATASUM = re.compile(r"\d{1,10}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9A-Za-z]{16}")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([EeDd][+-]?\d+)?$")


@dataclass(frozen=True, slots=True)
class Hdu:
    """One header-data unit of a FITS file.

    Attributes
    ----------
    name : str
        EXTNAME, in upper case.
    header : Header
        Its cards.
    data_start, data_size : int
        Where its data begin in the file, and their length without padding, bytes.
    """

    name: str
    header: Header
    data_start: int
    data_size: int


class Header(Mapping[str, Any]):
    """The cards of one header by keyword; a value is parsed when it is read.

    Parameters
    ----------
    cards : dict of bytes to bytes
        Value field by keyword, padded to eight bytes.
    """

    __slots__ = ("_cards",)

    def __init__(self, cards: dict[bytes, bytes]) -> None:
        # Cards are decoded and parsed when they are read, because few ever are.
        self._cards = cards

    def __getitem__(self, keyword: str) -> Any:
        return _value(self._cards[_key(keyword)])

    def __contains__(self, keyword: object) -> bool:
        return isinstance(keyword, str) and _key(keyword) in self._cards

    def __iter__(self) -> Iterator[str]:
        return (key.decode("latin-1").rstrip() for key in self._cards)

    def __len__(self) -> int:
        return len(self._cards)

    def integer(self, keyword: str, default: int | None = None) -> int:
        """Return the value of a card that must be an integer.

        Parameters
        ----------
        keyword : str
            Name of the card.
        default : int, optional
            Returned when there is no such card.

        Returns
        -------
        int
            The value.

        Raises
        ------
        FrameError
            If it is missing, without a default, or not an integer.
        """
        value = self.get(keyword, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FrameError(f"header keyword {keyword} must be an integer, got {value!r}")
        return value

    def number(self, keyword: str, default: float | None = None) -> float:
        """Return the value of a card that must be a number.

        Parameters
        ----------
        keyword : str
            Name of the card.
        default : float, optional
            Returned when there is no such card.

        Returns
        -------
        float
            The value, finite.

        Raises
        ------
        FrameError
            If it is missing, without a default, or not a finite number.
        """
        value = self.get(keyword, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise FrameError(f"header keyword {keyword} must be a number, got {value!r}")
        return float(value)


def _key(keyword: str) -> bytes:
    return keyword.encode("latin-1", "replace").ljust(8)


def has_fits_start(buffer: Buffer) -> bool:
    """Return whether bytes begin as a FITS file does.

    Parameters
    ----------
    buffer : bytes-like
        The bytes.

    Returns
    -------
    bool
    """
    return bytes(buffer[:9]) == b"SIMPLE  ="


def scan(buffer: Buffer, held: Spans | None = None) -> list[Hdu]:
    """Find every header-data unit of a FITS file.

    Parameters
    ----------
    buffer : bytes-like
        The whole file, usually mapped.
    held : Spans, optional
        Which bytes of it are there, if not all.

    Returns
    -------
    list of Hdu
        In file order, the primary first, named ``"PRIMARY"`` if it has no EXTNAME.

    Raises
    ------
    FrameError
        If the bytes are not a FITS file or end before the data do.
    MissingBytesError
        If bytes of a header are not held.
    """
    return list(walk(buffer, held))


def walk(buffer: Buffer, held: Spans | None = None) -> Iterator[Hdu]:
    """Find the header-data units of a FITS file, one after the other.

    Parameters
    ----------
    buffer : bytes-like
        The whole file.
    held : Spans, optional
        Which bytes of it are there, if not all.

    Yields
    ------
    Hdu
        In file order, the primary first, named ``"PRIMARY"`` if it has no EXTNAME.

    Raises
    ------
    FrameError, MissingBytesError
        As `scan` does.
    """
    size = len(buffer)
    _require_header(held, 0, 0, size)
    if not has_fits_start(buffer):
        raise FrameError("not a FITS file")
    start = count = 0
    # Padding may follow the last unit; every later unit starts with XTENSION.
    while start < size:
        _require_header(held, start, start, size)
        if count and bytes(buffer[start : start + 8]) != b"XTENSION":
            return
        header, data_start = _read_header(buffer, start, held)
        data_size = _data_size(header)
        if data_start + data_size > size:
            raise FrameError(
                f"file is cut short: {size} bytes, extension {count} needs {data_start + data_size}"
            )
        name = header.get("EXTNAME", "" if count else "PRIMARY")
        yield Hdu(str(name).strip().upper(), header, data_start, data_size)
        start = data_start + pad(data_size)
        count += 1


def pad(size: int) -> int:
    """Return the length of data with their padding.

    Parameters
    ----------
    size : int
        Bytes without it.

    Returns
    -------
    int
        The next multiple of a block.
    """
    return -(-size // BLOCK) * BLOCK


def require(held: Spans | None, spans: Iterable[Span]) -> None:
    """Raise an error unless bytes of a file are there.

    Parameters
    ----------
    held : Spans or None
        Which bytes are there; None for all.
    spans : iterable of (int, int)
        Which bytes are needed.

    Raises
    ------
    MissingBytesError
        If some of them are not held; it has all that are missing.
    """
    missing = held.find_missing(spans) if held is not None else []
    if missing:
        raise MissingBytesError(
            f"{sum(stop - start for start, stop in missing):,} bytes of the frame are needed that "
            "were not read",
            spans=missing,
        )


def _require_header(held: Spans | None, start: int, offset: int, size: int) -> None:
    """Require the block at an offset of the header that begins at `start`."""
    if held is not None and not held.holds(offset, min(offset + BLOCK, size)):
        # A long header is asked for in parts that grow.
        more = max(ASKED_HEADER_BLOCKS * BLOCK, offset - start)
        require(held, [(offset, min(offset + more, size))])


def verify(buffer: Buffer) -> tuple[str, ...]:
    """Check the sums that a file contains (FITS 4.0, section 4.4.2.7).

    Parameters
    ----------
    buffer : bytes-like
        The whole file.

    Returns
    -------
    tuple of str
        A warning if CHECKSUM of an extension disagrees although its DATASUM agrees: its header
        is not the one that was written. Archives mend headers and leave CHECKSUM as it was.

    Raises
    ------
    FrameError
        If DATASUM of an extension disagrees, or CHECKSUM of one without DATASUM.
    """
    words = np.frombuffer(buffer, "<u4", len(buffer) // 4)
    stale, start = [], 0
    for hdu in scan(buffer):
        stop = hdu.data_start + pad(hdu.data_size)
        expected = _read_sum(hdu.header, "DATASUM", _DATASUM)
        has_checksum = _read_sum(hdu.header, "CHECKSUM", _CHECKSUM) is not None
        header, start = words[start // 4 : hdu.data_start // 4], stop
        if not expected and not has_checksum:
            continue
        data = sum_words(words[hdu.data_start // 4 : stop // 4])
        if expected and int(expected) != data:
            raise FrameError(
                f"the data of {hdu.name!r} have the sum {data}, DATASUM is {expected!r}"
            )
        if has_checksum and add_sums(sum_words(header), data) not in (0, 0xFFFFFFFF):
            if not expected:
                raise FrameError(f"{hdu.name!r} does not have the sum that its CHECKSUM stands for")
            stale.append(hdu.name)
    if not stale:
        return ()
    names = ", ".join(stale)
    return (f"CHECKSUM of {names} disagrees with the header; the data agree with DATASUM",)


def _read_sum(header: Header, keyword: str, form: re.Pattern[str]) -> str | None:
    """Return a sum as its card has it, None where there is none in the form of the standard."""
    value = header.get(keyword)
    return value if isinstance(value, str) and form.fullmatch(value) else None


def map_image(buffer: memoryview, hdu: Hdu, bitpix: int, dtype: str) -> np.ndarray:
    """Map a two-dimensional image where it lies in the file.

    Parameters
    ----------
    buffer : memoryview
        The whole file.
    hdu : Hdu
        The extension.
    bitpix : int
        The BITPIX that it must have.
    dtype : str
        The numpy type of such pixels.

    Returns
    -------
    (ny, nx) array
        Nothing is copied, and nothing is read before it is used.

    Raises
    ------
    FrameError
        If the extension is not such an image.
    """
    header = hdu.header
    if header.get("XTENSION", "IMAGE") != "IMAGE":
        raise FrameError(f"{hdu.name} must be an 'IMAGE' extension, got {header['XTENSION']!r}")
    if header.get("NAXIS") != 2 or header.get("BITPIX") != bitpix:
        raise FrameError(
            f"{hdu.name} must have NAXIS 2 and BITPIX {bitpix}, "
            f"got {header.get('NAXIS')} and {header.get('BITPIX')}"
        )
    if header.number("BZERO", 0.0) != 0 or header.number("BSCALE", 1.0) != 1:
        raise FrameError(f"{hdu.name} is scaled by BZERO and BSCALE, which Level 2 files do not do")
    shape = header.integer("NAXIS2"), header.integer("NAXIS1")
    if min(shape) < 2:
        raise FrameError(f"{hdu.name} is only {shape} pixels")
    return np.frombuffer(buffer, dtype, shape[0] * shape[1], hdu.data_start).reshape(shape)


def locate_rows(hdu: Hdu, rows: np.ndarray) -> list[Span]:
    """Return where some rows of an image are in the file.

    Parameters
    ----------
    hdu : Hdu
        An image of two dimensions.
    rows : (ny,) bool array
        Which rows; those that it does not have are left out.

    Returns
    -------
    list of (int, int)
        One span for rows that follow one another: its first byte, and the one after the last.

    Raises
    ------
    FrameError
        If its header does not say how long a row is.
    """
    header = hdu.header
    width = abs(header.integer("BITPIX")) // 8 * header.integer("NAXIS1")
    end = hdu.data_start + hdu.data_size
    edges = np.flatnonzero(np.diff(rows.astype(np.int8), prepend=0, append=0)).tolist()
    spans = (
        (hdu.data_start + first * width, min(hdu.data_start + last * width, end))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    )
    return [span for span in spans if span[0] < span[1]]


def add_sums(one: int, other: int) -> int:
    """Add ones' complement sums.

    Parameters
    ----------
    one, other : int
        32-bit numbers.

    Returns
    -------
    int
        Their sum, with the carry added at the low end.
    """
    total = one + other
    return (total & 0xFFFFFFFF) + (total >> 32)


def _read_header(buffer: Buffer, start: int, held: Spans | None) -> tuple[Header, int]:
    cards: dict[bytes, bytes] = {}
    for block_number in range(MAX_HEADER_BLOCKS):
        offset = start + block_number * BLOCK
        _require_header(held, start, offset, len(buffer))
        block = bytes(buffer[offset : offset + BLOCK])
        if len(block) < BLOCK:
            break
        for i in range(0, BLOCK, CARD):
            keyword = block[i : i + 8]
            if block[i + 8 : i + 10] == b"= ":
                cards.setdefault(keyword, block[i + 10 : i + CARD])
            elif keyword == b"HIERARCH":
                name, _, value = block[i + 9 : i + CARD].partition(b"=")
                cards.setdefault(name.strip().ljust(8), value)
            elif keyword == b"END     ":
                return Header(cards), offset + BLOCK
    raise FrameError(f"the header at byte {start} has no END card")


def _data_size(header: Header) -> int:
    axes = header.integer("NAXIS")
    if not 0 <= axes <= 999:
        raise FrameError(f"header keyword NAXIS is {axes}")
    if axes == 0:
        return 0
    elements = 1
    for axis in range(1, axes + 1):
        length = header.integer(f"NAXIS{axis}")
        if length < 0:
            raise FrameError(f"header keyword NAXIS{axis} is {length}")
        elements *= length
    parameters, groups = header.integer("PCOUNT", 0), header.integer("GCOUNT", 1)
    if parameters < 0 or groups < 1:
        raise FrameError(f"header keywords PCOUNT and GCOUNT are {parameters} and {groups}")
    return abs(header.integer("BITPIX")) // 8 * groups * (parameters + elements)


def _value(raw: bytes) -> Any:
    """Parse the value field of a card (FITS 4.0, section 4.2); None when undefined."""
    field = raw.lstrip()
    if field.startswith(b"'"):
        text = bytearray()
        i = 1
        while i < len(field):
            if field[i : i + 1] == b"'":
                if field[i + 1 : i + 2] != b"'":
                    break
                i += 1
            text.append(field[i])
            i += 1
        return text.decode("latin-1").rstrip()
    field = field.partition(b"/")[0].strip()
    if field in (b"T", b"F"):
        return field == b"T"
    if _NUMBER.match(field):
        number = field.decode("ascii")
        if number.lstrip("+-").isdigit():
            return int(number)
        return float(number.upper().replace("D", "E"))
    return field.decode("latin-1") or None
