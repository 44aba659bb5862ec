from __future__ import annotations

import itertools
import math
import mmap

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from spxdask.errors import FrameError
from spxdask.science.kernels.checksum import sum_words
from spxdask.science.level2.fits import BLOCK, add_sums, scan, verify
from spxdask.science.level2.frame import open_frame
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

WINDOW = (900, 900, 40, 30)
NAMES = {
    "qr2": ["PRIMARY", "IMAGE", "FLAGS", "VARIANCE", "ZODI", "PSF", "WCS-WAVE"],
    "qr3": ["PRIMARY", "IMAGE", "FLAGS", "VARIANCE", "ZODI", "EPSF", "WCS-WAVE"],
}


@pytest.fixture(scope="module", params=["qr2", "qr3"])
def path(request, tmp_path_factory):
    exposure = Exposure(
        obs_id="2025W51_1A_0684_2", detector=3, ra=10.0, dec=40.0, roll_deg=5.0, mjd_begin=61027.0
    )
    sky = make_sky(10.0, 40.0, 0.2, n_sources=5, min_separation_arcsec=60.0, seed=1)
    planes = make_planes(exposure, sky, SceneOptions(), window=WINDOW)
    path = tmp_path_factory.mktemp("fits") / f"{request.param}.fits"
    write_frame(path, exposure, planes, window=WINDOW, layout=request.param)
    return path


def card_block(*cards: str) -> bytes:
    text = "".join(card.ljust(80) for card in (*cards, "END"))
    return text.ljust(-(-len(text) // BLOCK) * BLOCK).encode("latin-1")


def header_of(*cards: str):
    head = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   = 0")
    return scan(card_block(*head, *cards))[0].header


def same(found, value) -> bool:
    return type(found) is type(value) and found == value


def test_every_header_value_is_what_astropy_reads(path):
    with fits.open(path, disable_image_compression=True) as hdus:
        found = scan(path.read_bytes())
        assert len(found) == len(hdus)
        for ours, theirs in zip(found, hdus, strict=True):
            keywords = [k for k in theirs.header if k not in ("COMMENT", "HISTORY", "")]
            assert keywords
            assert {k.upper() for k in ours.header} == set(keywords)
            assert len(ours.header) == len(set(keywords))
            for keyword in keywords:
                value = theirs.header[keyword]
                if isinstance(value, fits.card.Undefined):
                    value = None
                assert same(ours.header[keyword], value), keyword


def test_every_unit_is_where_astropy_finds_it(path):
    with (
        fits.open(path, disable_image_compression=True) as hdus,
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        found = scan(mapped)
        assert [hdu.name for hdu in found] == NAMES[path.stem]
        assert [hdu.data_start for hdu in found] == [h.fileinfo()["datLoc"] for h in hdus]
        for ours, theirs in zip(found, hdus, strict=True):
            assert ours.data_size == theirs.size
            padded = -(-ours.data_size // BLOCK) * BLOCK
            assert padded == theirs.fileinfo()["datSpan"]


def test_units_of_every_kind(tmp_path):
    path = tmp_path / "kinds.fits"
    table = fits.BinTableHDU.from_columns(
        [fits.Column("A", "PJ()", array=np.array([[1, 2, 3], [4]], dtype=object))]
    )
    fits.HDUList(
        [
            fits.PrimaryHDU(np.zeros((3, 5, 7), np.uint8)),
            fits.ImageHDU(np.zeros((100, 100), ">f8"), name="doubles"),
            fits.ImageHDU(name="empty"),
            fits.ImageHDU(np.zeros(BLOCK // 2, ">i2"), name="whole block"),
            table,
            fits.TableHDU.from_columns([fits.Column("T", "A10", array=["a", "b"])], name="TEXT"),
        ]
    ).writeto(path)
    with fits.open(path) as hdus:
        found = scan(path.read_bytes())
        assert [hdu.data_start for hdu in found] == [h.fileinfo()["datLoc"] for h in hdus]
        assert [hdu.name for hdu in found] == [
            "PRIMARY", "DOUBLES", "EMPTY", "WHOLE BLOCK", "", "TEXT",
        ]  # fmt: skip


CARDS = [
    "KEY     = 'plain   '           / comment",
    "KEY     = 'O''Hara'            / it's",
    "KEY     = ''''                 / one quote",
    "KEY     = ''                   / empty",
    "KEY     = '        '           / blanks",
    "KEY     = '  lead'",
    "KEY     = 'a / b'              / slash within",
    "KEY     = 'T'                  / text, not true",
    "KEY     = '12'",
    "KEY     =                    T / " + "long comment " * 3,
    "KEY     =                    F",
    "KEY     = T",
    "KEY     =                   42 / int",
    "KEY     =                  -42",
    "KEY     =                  +42",
    "KEY     =                00042",
    "KEY     =   12345678901234567890",
    "KEY     =                  1.0",
    "KEY     =                   1.",
    "KEY     =                   .5 / / two",
    "KEY     =                 -0.0",
    "KEY     =               1.5E-3",
    "KEY     =               1.5D+3",
    "KEY     =                 1.D0",
    "KEY     =                 3E10",
    "KEY     =                  1D2",
    "KEY     =     0.00157606681598",
    "KEY     =                      / undefined",
    "KEY     =",
    "KEY     = " + "/" * 70,
    "KEY     = 1/2",
    "HIERARCH KEY = 12 / hierarch",
    "HIERARCH KEY = 'a=b' / equals within",
    "HIERARCH KEY=5",
]


@pytest.mark.parametrize("card", CARDS)
def test_values_as_astropy_parses_them(card):
    value = fits.Card.fromstring(card.ljust(80)).value
    if isinstance(value, fits.card.Undefined):
        value = None
    found = header_of(card)["KEY"]
    assert same(found, value)
    if isinstance(found, float):
        assert math.copysign(1, found) == math.copysign(1, value)


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
)
@settings(deadline=None)
def test_any_value_astropy_writes_comes_back(value):
    card = fits.Card("KEY", value, "comment / 'with' = signs")
    text = str(card)
    expected = fits.Card.fromstring(text).value
    assert same(header_of(text)["KEY"], expected)


def test_the_first_of_equal_keywords_counts():
    header = header_of("KEY     = 1", "KEY     = 2", "COMMENT = no value", "HIERARCH A b.c = 3")
    assert header["KEY"] == 1
    assert header["A b.c"] == 3
    assert "OTHER" not in header
    assert header.get("OTHER", 7) == 7
    with pytest.raises(KeyError):
        header["OTHER"]


@pytest.mark.parametrize("text", ["", "'a'", "T", "1 2", "(1, 2)", "NaN", "1e5x", "1E999"])
def test_what_is_no_number_is_said(text):
    header = header_of(f"KEY     = {text}")
    with pytest.raises(FrameError, match=r"^header keyword KEY must be a number, got .*$"):
        header.number("KEY")
    with pytest.raises(FrameError, match=r"^header keyword KEY must be an integer, got .*$"):
        header.integer("KEY")


def test_numbers():
    header = header_of("I       = 3", "X       = 3.0")
    assert same(header.number("I"), 3.0)
    assert same(header.integer("I"), 3)
    assert header.number("NONE", 2.5) == 2.5
    assert header.integer("NONE", 2) == 2
    with pytest.raises(FrameError, match=r"X must be an integer, got 3.0"):
        header.integer("X")
    with pytest.raises(FrameError, match="NONE must be a number, got None"):
        header.number("NONE")


@pytest.mark.parametrize(
    "content", [b"", b"S", b"SIMPLE", b"not a FITS file" * 300, b"\0" * BLOCK, b"<html>" * 1000]
)
def test_not_fits(content):
    with pytest.raises(FrameError, match=r"^not a FITS file$"):
        scan(content)


@pytest.mark.slow
def test_truncation_at_any_block(path, tmp_path):
    content = path.read_bytes()
    units = scan(content)
    ends = {hdu.data_start + -(-hdu.data_size // BLOCK) * BLOCK for hdu in units}
    cut_file = tmp_path / "cut.fits"
    for cut in range(BLOCK, len(content), BLOCK):
        if cut in ends:
            # Nothing is wrong with the units before; that one is missing is the reader's to say.
            assert len(scan(content[:cut])) < len(units)
        elif cut < units[-1].data_start + units[-1].data_size:
            with pytest.raises(FrameError):
                scan(content[:cut])
        # A few hundred blocks of PSF are alike.
        if cut in ends or cut < 40 * BLOCK or cut > len(content) - 5 * BLOCK:
            cut_file.write_bytes(content[:cut])
            with pytest.raises(FrameError):
                open_frame(cut_file)


@pytest.mark.parametrize("lacking", [1, 79, 81, BLOCK - 1])
def test_truncation_within_a_block(path, tmp_path, lacking):
    content = path.read_bytes()
    cut_file = tmp_path / "cut.fits"
    for hdu in scan(content):
        for edge in (hdu.data_start, hdu.data_start + hdu.data_size):
            cut_file.write_bytes(content[: edge - lacking])
            with pytest.raises(FrameError):
                open_frame(cut_file)


def test_padding_at_the_end_may_lack(path):
    content = path.read_bytes()
    last = scan(content)[-1]
    assert len(scan(content[: last.data_start + last.data_size])) == len(NAMES[path.stem])
    assert len(scan(content + b"\0" * 5000)) == len(NAMES[path.stem])


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("NAXIS", "-1"),
        ("NAXIS", "1000"),
        ("NAXIS", "2.0"),
        ("NAXIS", "'2'"),
        ("NAXIS1", "-5"),
        ("NAXIS1", "99999999999999999999"),
        ("BITPIX", "T"),
        ("GCOUNT", "-1"),
        ("GCOUNT", "0"),
        ("PCOUNT", "-1"),
        ("PCOUNT", "99999999999999"),
    ],
)
def test_impossible_sizes(path, tmp_path, keyword, value):
    content = path.read_bytes()
    at = content.index(f"{keyword:8}= ".encode(), scan(content)[0].data_start)
    card = f"{keyword:8}= {value}".ljust(80).encode()
    with pytest.raises(FrameError) as caught:
        scan(content[:at] + card + content[at + 80 :])
    assert "\n" not in str(caught.value)


def test_endless_header(path):
    start = card_block()[:0] + path.read_bytes()[:BLOCK].replace(b"END     ", b"        ")
    with pytest.raises(FrameError, match="the header at byte 0 has no END card"):
        scan(start + b" " * (50 * BLOCK))


MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
)


# astropy, which decompresses the flags, warns of what it does not like in any header.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning")
@given(MUTATIONS, st.sampled_from(["IMAGE", "FLAGS", "VARIANCE", "WCS-WAVE", "any"]))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_raise_frame_error_or_nothing(path, tmp_path_factory, changes, where):
    content = bytearray(path.read_bytes())
    units = {hdu.name: hdu for hdu in scan(content)}
    if where == "any":
        first, last = 0, units["ZODI"].data_start
    else:
        last = units[where].data_start
        first = last - BLOCK * (1 if where != "IMAGE" else 4)
    for place, byte in changes:
        content[first + int(place * (last - first))] = byte
    damaged = tmp_path_factory.getbasetemp() / "damaged.fits"
    damaged.write_bytes(content)
    for read in (lambda: scan(content), lambda: open_frame(damaged)):
        message = ""
        try:
            read()
        except FrameError as error:
            message = str(error)
        assert "\n" not in message


# Sums.


def plain_sum(content: bytes) -> int:
    total = sum(np.frombuffer(content, ">u4").tolist())
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


@pytest.mark.parametrize(
    "words",
    [
        [],
        [0],
        [0x01020304],
        [0xFFFFFFFF],
        [0xFFFFFFFF, 1],
        [0xFFFFFFFF] * 1000,
        np.random.default_rng(6).integers(2**32, size=100_003).tolist(),
    ],
    ids=lambda words: f"{words[:2]} {len(words)}",
)
def test_sum_of_words(words):
    content = np.array(words, ">u4").tobytes()
    for cut in (0, len(words) // 3, len(words)):
        parts = [np.frombuffer(content, "<u4")[part] for part in (slice(cut), slice(cut, None))]
        assert add_sums(*map(sum_words, parts)) == plain_sum(content)


@pytest.fixture(scope="module", params=["checksum", "datasum"])
def summed(path, request):
    """The same file with the cards of the archive's, which astropy finds sound."""
    other = path.with_name(f"{request.param}_{path.name}")
    with fits.open(path, disable_image_compression=True) as hdus:
        hdus.writeto(other, checksum=request.param if request.param == "datasum" else True)
    with fits.open(other, disable_image_compression=True, checksum=True) as hdus:
        assert all("DATASUM" in hdu.header for hdu in hdus)
        assert all(("CHECKSUM" in hdu.header) == (request.param == "checksum") for hdu in hdus)
    return request.param, other.read_bytes()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_sound_file_passes(summed):
    content = summed[1]
    assert verify(content) == verify(memoryview(content)) == ()
    assert verify(content + b"\1\2\3\xff" * 7) == ()


def test_without_cards_anything_passes(path):
    content = path.read_bytes()
    assert verify(content) == verify(flipped(content, len(content) - 1)) == ()


def test_a_flipped_bit_in_the_data_is_found(summed):
    content = summed[1]
    for hdu in scan(content):
        stop = hdu.data_start + -(-hdu.data_size // BLOCK) * BLOCK
        # First and last byte of the data, and of the padding.
        edges = hdu.data_start, hdu.data_start + hdu.data_size, stop
        for place in {e for first, end in itertools.pairwise(edges) for e in (first, end - 1)}:
            if hdu.data_start <= place < stop:
                with pytest.raises(FrameError, match=f"^the data of '{hdu.name}' have .* DATASUM"):
                    verify(flipped(content, place))


def test_a_header_that_was_changed_is_a_warning(summed):
    kind, content = summed
    start = 0
    for hdu in scan(content):
        # In a comment, and in the blanks behind END.
        for place in (start + 80 + 50, hdu.data_start - 1):
            broken = flipped(content, place)
            warnings = verify(broken)
            assert len(warnings) == (kind == "checksum")
            assert all(f"CHECKSUM of {hdu.name} disagrees" in text for text in warnings)
        start = hdu.data_start + -(-hdu.data_size // BLOCK) * BLOCK


def test_several_changed_headers_are_one_warning(summed):
    kind, content = summed
    hdus = scan(content)
    for hdu in hdus[:2]:
        content = flipped(content, hdu.data_start - 1)
    expected = f"CHECKSUM of {hdus[0].name}, {hdus[1].name} disagrees with the header"
    warnings = verify(content)
    assert [text.partition(";")[0] for text in warnings] == [expected] * (kind == "checksum")


def test_without_datasum_checksum_speaks_for_the_data(summed):
    kind, content = summed
    at = content.find(b"DATASUM = '")
    # The card has the same sum as a comment, so that CHECKSUM remains right.
    content = content[:at] + b"DATSUMA " + content[at + 8 :]
    start = scan(content)[0]
    if kind == "checksum":
        with pytest.raises(FrameError, match=f"^'{start.name}' does not have the sum"):
            verify(flipped(content, start.data_start - 1))


def test_undefined_sums_are_none(summed):
    content = summed[1]
    for keyword in (b"CHECKSUM", b"DATASUM "):
        at = content.find(keyword + b"= ")
        while at >= 0:
            content = content[:at] + (keyword + b"= ''").ljust(80) + content[at + 80 :]
            at = content.find(keyword + b"= '", at + 80)
    assert verify(content) == ()


@pytest.mark.parametrize("value", [0, -1])
def test_sums_of_uniform_data(tmp_path, value):
    hdu = fits.PrimaryHDU(np.full((BLOCK // 4, 3), value, np.int32))
    hdu.writeto(tmp_path / "uniform.fits", checksum=True)
    content = (tmp_path / "uniform.fits").read_bytes()
    assert scan(content)[0].header["DATASUM"] == str(value & 0xFFFFFFFF)
    assert verify(content) == ()
