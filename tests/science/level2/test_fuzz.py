"""Damaged frames in the extract task are refused with a reason, or read as astropy reads them."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import simulated
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from spxdask.errors import FrameError
from spxdask.run.plan import table_name
from spxdask.science.level2.fits import BLOCK, CARD, verify
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import margin
from spxdask.simulate.frames import make_planes, write_frame
from spxdask.stages.extract import ExtractOptions, extract
from spxdask.tables.catalogue import read_catalogue
from spxdask.tables.csv import read_csv

LONG = os.environ.get("SPXDASK_TESTS") == "long"
# CPU time for one small frame, many times what it takes; a loop without end takes more.
MAX_CPU_S = 5.0
# Only a timeout by a thread can end a process that hangs in compiled code.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200 if LONG else 60, method="thread"),
    pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning"),
    # In a run these warnings are no errors, either.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

WINDOW = (960, 970, 120, 100)
CONFIG = PhotometryConfig(window_size=25)
RELEASES = ("qr2", "qr3")
# The layouts of the two releases, one with its matrix in CD cards, and one whose flags are
# compressed such that astropy has to read them.
LAYOUTS = (*RELEASES, "cd", "tiled")


def examples(n: int):
    return settings() if LONG else settings(max_examples=n)


# Files in pieces.


@dataclass
class Unit:
    """An extension: its cards without END, and its data with the padding."""

    cards: list[bytes]
    data: bytes

    def to_bytes(self) -> bytes:
        return pad(b"".join(self.cards) + b"END".ljust(CARD), b" ") + self.data

    def find(self, keyword: str) -> int | None:
        hits = (i for i, card in enumerate(self.cards) if get_keyword(card) == keyword)
        return next(hits, None)

    def integer(self, keyword: str) -> int:
        at = self.find(keyword)
        return 0 if at is None else int(self.cards[at][10:30])

    @property
    def data_size(self) -> int:
        sides = [self.integer(f"NAXIS{i + 1}") for i in range(self.integer("NAXIS"))]
        elements = int(np.prod(sides)) + self.integer("PCOUNT") if sides else 0
        return abs(self.integer("BITPIX")) // 8 * elements


def get_keyword(card: bytes) -> str:
    if card.startswith(b"HIERARCH"):
        return card[9:].partition(b"=")[0].decode("latin-1").strip()
    return card[:8].decode("latin-1").rstrip()


def pad(content: bytes, filler: bytes = b"\0") -> bytes:
    return content.ljust(-(-len(content) // BLOCK) * BLOCK, filler)


def take_apart(path: Path) -> dict[str, Unit]:
    """Split a sound file into the units that astropy finds in it."""
    content = path.read_bytes()
    units = {}
    with fits.open(path, disable_image_compression=True) as hdus:
        for hdu in hdus:
            info = hdu.fileinfo()
            head = content[info["hdrLoc"] : info["datLoc"]]
            cards = [head[i : i + CARD] for i in range(0, len(head), CARD)]
            end = cards.index(b"END".ljust(CARD))
            data = content[info["datLoc"] : info["datLoc"] + info["datSpan"]]
            units[hdu.name] = Unit(cards[:end], data)
    return units


def put_together(units: dict[str, Unit]) -> bytes:
    return b"".join(unit.to_bytes() for unit in units.values())


def copy_units(units: dict[str, Unit]) -> dict[str, Unit]:
    return {name: Unit(list(unit.cards), unit.data) for name, unit in units.items()}


def rename_matrix_to_cd(units: dict[str, Unit]) -> dict[str, Unit]:
    """Return units with CD cards in place of PC and CDELT cards; the steps are 1."""
    units = copy_units(units)
    cards = [card for card in units["IMAGE"].cards if not card.startswith(b"CDELT")]
    units["IMAGE"].cards = [re.sub(rb"^PC(\d_\d )", rb"CD\1", card) for card in cards]
    return units


def verify_or_error(content: bytes) -> object:
    try:
        return verify(content)
    except FrameError as error:
        return error


class Bench:
    """A folder in which one file is measured many times, each time with other bytes."""

    def __init__(self, folder: Path) -> None:
        self.sky = simulated.make_sky(
            *simulated.CENTER, 0.12, n_sources=30, min_separation_arcsec=50, seed=11
        )
        ids = [f"s{i}" for i in range(len(self.sky))]
        csv = simulated.write_catalogue(folder / "sources.csv", ids, self.sky.ra, self.sky.dec)
        catalogue = read_catalogue(csv)
        catalogue.save(folder / "catalogue.arrow")
        self.options = ExtractOptions(
            catalogue=str(folder / "catalogue.arrow"),
            photometry=CONFIG,
            recipe="recipe",
            catalogue_fingerprint=catalogue.fingerprint,
            serial=False,
        )
        self.per_image = folder / "per_image"
        self.per_image.mkdir()
        self.path = folder / simulated.exposure(0).filename
        self.table = self.per_image / table_name(self.path.name, "csv")
        self.units = {}
        planes = make_planes(simulated.exposure(0), self.sky, simulated.OPTIONS, window=WINDOW)
        for release in RELEASES:
            exposure = simulated.exposure(0, release=release)
            write_frame(self.path, exposure, planes, window=WINDOW)
            units = take_apart(self.path)
            # The PSF is left out: it is most of the file, and never read.
            self.units[release] = {k: unit for k, unit in units.items() if "PSF" not in k}
        self.units["cd"] = rename_matrix_to_cd(self.units["qr2"])
        tiled = fits.CompImageHDU(
            planes.flags, name="FLAGS", compression_type="RICE_1", tile_shape=(10, 50)
        )
        fits.HDUList([fits.PrimaryHDU(), tiled]).writeto(self.path, overwrite=True)
        self.units["tiled"] = self.units["qr2"] | {"FLAGS": take_apart(self.path)["FLAGS"]}
        # Compiling the loops may take longer than measuring.
        self.max_cpu_s = 50.0
        self.sound = {}
        for layout, units in self.units.items():
            assert self.check(put_together(units)).rows > 5
            self.sound[layout] = self.table.read_bytes()
            assert np.isfinite(AstropyFrame(self.path).wavelengths(60.0, 50.0)).all()
        self.max_cpu_s = MAX_CPU_S

    def extract(self, content: bytes | None):
        """Measure a file of these bytes, and check what must hold for any bytes."""
        if content is not None:
            self.clear()
            self.path.write_bytes(content)
            assert "\n" not in str(verify_or_error(content))
        started = time.process_time()
        outcome = extract(str(self.path), str(self.per_image), self.options)
        assert time.process_time() - started < self.max_cpu_s
        assert list(self.per_image.iterdir()) == ([self.table] if outcome.status == "done" else [])
        assert "\n" not in "".join(outcome.warnings)
        if outcome.status == "failed":
            assert re.fullmatch(r"[^\n]*\w[^\n]*", outcome.reason)
            assert not outcome.reason.startswith("unexpected "), outcome.reason
            assert outcome.rows == outcome.bytes == 0
        else:
            assert (outcome.status, outcome.reason) == ("done", None)
            assert outcome.bytes == self.table.stat().st_size
            assert self.path.is_file()
        return outcome

    def clear(self) -> None:
        for path in [*self.per_image.iterdir(), *self.path.parent.glob("level2_*")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def check(self, content: bytes):
        """Measure a file, and compare its table, if there is one, with what astropy reads."""
        outcome = self.extract(content)
        if outcome.status == "done":
            self.compare(outcome)
        return outcome

    def is_table_unchanged(self, layout: str) -> bool:
        """Compare with the table of the sound frame here, as pytest would print the difference."""
        return self.table.read_bytes() == self.sound[layout]

    def compare(self, outcome) -> None:
        found = read_csv(self.table)
        assert len(found) == outcome.rows
        rows = {name: found.column(name).to_numpy() for name in found.column_names}
        for name, column in rows.items():
            if column.dtype.kind == "f":
                assert not np.isinf(column).any(), name
        for name in ("ra", "dec", "mjd", "x", "y", "wavelength", "bandwidth", "bg_level"):
            assert not np.isnan(rows[name]).any(), name
        try:
            seen = AstropyFrame(self.path)
        # Astropy raises errors of any type for cards that the measurement does not need.
        except Exception:
            return
        flags = seen.flags
        assert seen.image.shape == flags.shape == seen.zodi.shape == seen.variance.shape
        assert (flags.dtype.kind, flags.itemsize) == ("i", 4)
        for header in seen.headers:
            assert (header.get("BZERO", 0), header.get("BSCALE", 1)) == (0, 1)
        which = np.array([int(one[1:]) for one in rows["target_id"]], int)
        assert np.array_equal(rows["ra"], self.sky.ra[which])
        assert np.array_equal(rows["dec"], self.sky.dec[which])
        for name, value in seen.constants.items():
            assert (rows[name] == value).all(), name

        ny, nx = seen.image.shape
        low, high_x, high_y = margin(CONFIG), nx - margin(CONFIG), ny - margin(CONFIG)
        x, y = rows["x"], rows["y"]
        assert ((x >= low) & (x < high_x) & (y >= low) & (y < high_y)).all()
        expected_x, expected_y, converged = seen.pixels(self.sky.ra, self.sky.dec)
        good = converged[which]
        np.testing.assert_allclose(x[good], expected_x[which][good], rtol=0, atol=1e-6)
        np.testing.assert_allclose(y[good], expected_y[which][good], rtol=0, atol=1e-6)
        # The way back needs no iteration, so that it holds where astropy's does not converge.
        there = np.array(seen.wcs.all_pix2world(x, y, 0))
        step = np.hypot(*np.hypot(*seen.wcs.pixel_scale_matrix))
        assert (separation(*there, rows["ra"], rows["dec"]) < 2e-6 * step + 1e-11).all()
        inside = converged & (expected_x > low + 1e-6) & (expected_x < high_x - 1e-6)
        inside &= (expected_y > low + 1e-6) & (expected_y < high_y - 1e-6)
        lacking = set(np.flatnonzero(inside).tolist()) - set(which.tolist())
        assert len(lacking) <= sum(outcome.skipped.values()), (lacking, outcome.skipped)

        wavelength, bandwidth = seen.wavelengths(x, y)
        # Far outside the lattice an extrapolation may lose all digits; it is not compared.
        for name, values in (("wavelength", wavelength), ("bandwidth", bandwidth)):
            within = np.isfinite(values)
            np.testing.assert_allclose(rows[name][within], values[within], rtol=1e-9)
        row, column = np.indices(flags.shape)
        for k in range(outcome.rows):
            within = (column - x[k]) ** 2 + (row - y[k]) ** 2 <= rows["aperture_radius"][k] ** 2
            bits = np.bitwise_or.reduce(flags[within], initial=0)
            assert rows["flag"][k] == int(bits) & 0xFFFFFFFF
            for plane in (seen.image, seen.zodi):
                if not np.isfinite(plane[within]).all():
                    assert np.isnan(rows["flux"][k])


IMAGES = (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU)
CELESTIAL = re.compile(
    r"WCSAXES|(CRPIX|CRVAL|CDELT|CUNIT|CTYPE|CROTA)[1-9]|(PC|CD|PV)\d_\d|LONPOLE|LATPOLE|"
    r"[AB]_(ORDER|\d_\d)"
)


def separation(ra1, dec1, ra2, dec2):
    """Return the distance in deg of positions that are close to one another."""
    dra = (ra1 - ra2 + 180.0) % 360.0 - 180.0
    return np.hypot(dra * np.cos(np.deg2rad(dec1)), dec1 - dec2)


class AstropyFrame:
    """A file as astropy reads it, which may raise any error."""

    def __init__(self, path: Path) -> None:
        with fits.open(path, memmap=False, do_not_scale_image_data=True) as hdus:
            units = [hdus[name] for name in ("IMAGE", "FLAGS", "ZODI", "VARIANCE")]
            self.image, self.flags, self.zodi, self.variance = (unit.data for unit in units)
            self.headers = [unit.header for unit in units]
            if not all(isinstance(unit, IMAGES) for unit in units):
                raise ValueError("of two XTENSION cards, astropy takes the second as well")
            table = hdus["WCS-WAVE"].data
            self.lattice = [np.array(table[name][0], float) for name in ("X", "Y", "VALUES")]
        header, cards = self.headers[0], {}
        for card in header.cards:
            if CELESTIAL.fullmatch(card.keyword):
                if card.image[:10] != f"{card.keyword:8}= ":
                    raise ValueError("astropy mends keywords that are not in capitals")
                # Of equal keywords the first counts, as in a look-up.
                cards.setdefault(card.keyword, card.value)
        if "SIP" not in cards["CTYPE1"]:
            # Coefficients have no meaning without the suffix, but astropy would use them.
            cards = {k: v for k, v in cards.items() if k[:2] not in ("A_", "B_")}
        self.wcs = WCS(fits.Header(cards), key=" ")
        self.constants = {
            "obs_id": header["OBSID"],
            "band": f"D{header['DETECTOR']}",
            "mjd": (header["MJD-BEG"] + header["MJD-END"]) / 2,
            "filename": path.name,
        }
        self.first = [1.0 - header.get(f"CRPIX{i}A", 1.0) for i in (1, 2)]

    def pixels(self, ra, dec):
        """Return 0-based pixels, and whether the way back leads to the same position."""
        x, y = self.wcs.all_world2pix(ra, dec, 0, tolerance=1e-9, quiet=True)
        return x, y, separation(*self.wcs.all_pix2world(x, y, 0), ra, dec) < 1e-9

    def wavelengths(self, x, y):
        lattice_x, lattice_y, values = self.lattice
        values = values.reshape(len(lattice_y), len(lattice_x), 2)
        at = RegularGridInterpolator((lattice_y, lattice_x), values, bounds_error=False)
        return at((y + self.first[1] + 1.0, x + self.first[0] + 1.0)).T


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("fuzz"))


def test_the_sound_frames_are_as_astropy_sees_them(bench):
    assert bench.sound["cd"] == bench.sound["tiled"] == bench.sound["qr2"]


# Cards.

WCS_CARDS = (
    *(f"{name}{i}" for name in ("CRVAL", "CRPIX", "CDELT", "CTYPE", "CUNIT") for i in (1, 2)),
    *(f"{name}{i}_{j}" for name in ("PC", "CD") for i in (1, 2) for j in (1, 2)),
    "LONPOLE", "LATPOLE", "PV1_3", "PV2_1", "CROTA2",
)  # fmt: skip
SIP_CARDS = tuple(
    f"{name}_{which}"
    for name in "AB"
    for which in ("ORDER", *(f"{p}_{q}" for p in range(5) for q in range(5 - p)))
)
ARRAY_CARDS = (
    "XTENSION", "BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "NAXIS3", "PCOUNT", "GCOUNT", "EXTNAME",
    "BZERO", "BSCALE", "BLANK",
)  # fmt: skip
META_CARDS = (
    "BUNIT", "DETECTOR", "OBSID", "MJD-BEG", "MJD-END", "L2DQAFLG", "FINAST", "PSF_FWHM",
    "CRPIX1A", "CRPIX2A",
)  # fmt: skip
FLAGS_CARDS = (
    "ZIMAGE", "ZCMPTYPE", "ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZNAXIS2", "ZTILE1", "ZTILE2", "ZBLANK",
    "ZNAME1", "ZVAL1", "ZNAME2", "ZVAL2", "TFIELDS", "TFORM1", "TTYPE1", "THEAP", "ZZERO", "ZSCALE",
    "MSKN0021", "MP_SOURCE",
)  # fmt: skip
WAVE_CARDS = (
    *(f"{name}{n}" for name in ("TTYPE", "TFORM", "TSCAL", "TZERO") for n in (1, 2, 3)),
    "TFIELDS", "TDIM3",
)  # fmt: skip
CARDS = {
    "projection": {"IMAGE": WCS_CARDS + SIP_CARDS},
    "arrays": dict.fromkeys(
        ("PRIMARY", "IMAGE", "FLAGS", "VARIANCE", "ZODI", "WCS-WAVE"), ARRAY_CARDS
    ),
    "meaning": {"IMAGE": META_CARDS, "FLAGS": FLAGS_CARDS, "WCS-WAVE": WAVE_CARDS},
}

ODD = (
    "", "NaN", "inf", "-inf", "+", "-", ".", "0", "-0.0", "1", "-1", "2", "3", "8", "16", "64",
    "-32", "1E999", "-1E308", "1E308", "1E-308", "5E-324", "1D2", "1d-2", "1 2", "(1, 2)", "1/2",
    "0x10", "1_0", "T", "F", "''", "'", "' '", "'NaN'", "'1'", "'deg'", "'arcsec'", "'a''b'",
    "'\xe9'", "\xb2", "'a\tb'", "'a,\"b'", "'\r\n'", "a\nb", "\0", "99999999999999999999",
    "9" * 65, "-999999999999999999", "2147483648", "4294967295", "1000000000000", "'IMAGE'",
    "'FLAGS'", "'1J'", "'242D'", "'1PB'", "'1QB(300)'", "'0D'", "'11E'", "'RICE_1'", "'GZIP_1'",
    "'GZIP_2'", "'NOCOMPRESS'", "'RA---TAN'", "'DEC--TAN'", "'RA---SIN-SIP'",
)  # fmt: skip
TEXTS = (
    st.sampled_from(ODD)
    | st.integers(-200, 200).map(str)
    | st.integers().map(str)
    | st.floats(-10, 10).map(repr)
    | st.floats().map(repr)
    | st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=12)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12).map(
        lambda text: "'" + text.replace("'", "''") + "'"
    )
)
CHANGES = st.one_of(
    st.tuples(st.just("set"), TEXTS),
    st.tuples(st.just("scale"), st.floats(0.9, 1.1) | st.sampled_from((-1.0, 0.0, 2.0, 1e10))),
    st.tuples(st.just("step"), st.integers(-3, 3)),
    st.tuples(st.sampled_from(("remove", "double")), st.just("")),
    st.tuples(st.sampled_from(("before", "behind")), TEXTS),
)


def change_card(unit: Unit, keyword: str, how: str, value) -> None:
    at = unit.find(keyword)
    if how == "step" and at is not None:
        number = unit.cards[at][10:].partition(b"/")[0].strip()
        how, value = "set", str(int(number) + value) if number.isdigit() else "1"
    elif how in ("scale", "step"):
        try:
            number = float(unit.cards[at][10:].partition(b"/")[0])
        except (TypeError, ValueError):
            number = 1.0
        how, value = "set", repr(number * value).replace("e", "E")
    card = f"{keyword:8}= {value:>20}"[:CARD].ljust(CARD).encode("latin-1")
    if how == "remove":
        unit.cards = [card for card in unit.cards if get_keyword(card) != keyword]
    elif how == "double":
        unit.cards += [card for card in unit.cards if get_keyword(card) == keyword]
    elif how == "behind":
        unit.cards.append(card)
    elif how == "before":
        unit.cards.insert(min(5, len(unit.cards)) if at is None else at, card)
    elif at is None:
        unit.cards.append(card)
    else:
        unit.cards[at] = card


def change_cards(units: dict[str, Unit], changes) -> bytes:
    units = copy_units(units)
    for (name, keyword), (how, value) in changes:
        change_card(units[name], keyword, how, value)
    return put_together(units)


def cards_of(group: str) -> list[tuple[str, str]]:
    return [(name, keyword) for name, keywords in CARDS[group].items() for keyword in keywords]


@pytest.mark.parametrize("group", CARDS)
@given(st.sampled_from(LAYOUTS), st.data())
@examples(30)
def test_cards(bench, group, layout, data):
    cards = st.tuples(st.sampled_from(cards_of(group)), CHANGES)
    changes = data.draw(st.lists(cards, min_size=1, max_size=3))
    bench.check(change_cards(bench.units[layout], changes))


@pytest.mark.parametrize(
    "change", [("scale", 1.001), ("step", 1), ("step", -1), ("remove", "")], ids=str
)
def test_small_change_of_every_card(bench, change):
    """Most sources stay on the frame; random changes are rarely so small."""
    outcomes = []
    for layout, units in bench.units.items():
        for name, keyword in {card for group in CARDS for card in cards_of(group)}:
            # Units that are the same as in QR2 are changed there only.
            own = layout == "qr2" or name == "FLAGS" or keyword.startswith("CD")
            if not own or units[name].find(keyword) is None:
                continue
            content = change_cards(units, [((name, keyword), change)])
            # A step up or down from what is no integer is the same.
            up = change_cards(units, [((name, keyword), ("step", 1))])
            if change != ("step", -1) or content != up:
                outcomes.append(bench.check(content))
    assert {outcome.status for outcome in outcomes} == {"done", "failed"}
    assert any(outcome.rows > 5 for outcome in outcomes)


# Bytes and blocks.

BYTES = st.sampled_from(b" =/'.0123456789-+EDTFN\0\n\xff") | st.integers(0, 255)
FRACTIONS = st.floats(0, 1, exclude_max=True)
KINDS = st.sampled_from(("replace", "insert", "delete"))


def find_header_byte(units: dict[str, Unit], fraction: float) -> int:
    """Turn a fraction into a byte of some header, all headers counted as one."""
    spans, start = [], 0
    for unit in units.values():
        spans.append((start, CARD * (len(unit.cards) + 1)))
        start += len(unit.to_bytes())
    inside = int(fraction * sum(size for _, size in spans))
    for first, size in spans:
        if inside < size:
            return first + inside
        inside -= size
    raise AssertionError


@given(
    st.sampled_from(RELEASES),
    st.lists(st.tuples(FRACTIONS, KINDS, BYTES), min_size=1, max_size=4),
    st.booleans(),
)
@examples(40)
def test_bytes_of_the_headers(bench, release, changes, keep_length):
    content = bytearray(put_together(bench.units[release]))
    for fraction, kind, byte in changes:
        at = find_header_byte(bench.units[release], fraction)
        # The rest of the header moves; with `keep_length`, only the rest of the card does.
        end = at - at % CARD + CARD if keep_length else len(content)
        piece = content[at:end]
        piece = bytes([byte]) + piece[kind == "replace" :] if kind != "delete" else piece[1:]
        content[at:end] = piece[: end - at].ljust(end - at, b" ") if keep_length else piece
    bench.check(bytes(content))


@given(st.sampled_from(RELEASES), st.data())
@examples(40)
def test_files_cut_anywhere(bench, release, data):
    content = put_together(bench.units[release])
    cut = data.draw(st.integers(0, len(content) - 1))
    near = data.draw(st.sampled_from((None, -1, 0, 1)))
    if near is not None:
        cut = min(max(cut // BLOCK * BLOCK + near, 0), len(content) - 1)
    outcome = bench.check(content[:cut])
    # Only the padding of the last unit may be missing.
    wave = bench.units[release]["WCS-WAVE"]
    whole = len(content) - len(wave.data) + wave.data_size
    assert outcome.status == ("done" if cut >= whole else "failed")
    if outcome.status == "done":
        assert bench.is_table_unchanged(release)
    else:
        set_aside = bench.path.with_name(bench.path.name + ".unreadable")
        assert set_aside.read_bytes() == content[:cut]
        assert not bench.path.exists()


@given(
    st.sampled_from(RELEASES),
    st.lists(
        st.tuples(FRACTIONS, FRACTIONS, st.sampled_from(("swap", "drop", "double"))), max_size=3
    ),
    st.booleans(),
)
@examples(40)
def test_blocks_out_of_order(bench, release, changes, headers):
    content = put_together(bench.units[release])
    blocks = [content[i : i + BLOCK] for i in range(0, len(content), BLOCK)]
    for one, other, how in changes:
        i, j = (int(fraction * len(blocks)) for fraction in (one, other))
        if headers:
            i = find_header_byte(bench.units[release], one) // BLOCK % len(blocks)
        if how == "swap":
            blocks[i], blocks[j] = blocks[j], blocks[i]
        elif how == "drop":
            del blocks[i]
        else:
            blocks.insert(j, blocks[i])
    bench.check(b"".join(blocks))


@given(st.sampled_from(RELEASES), st.permutations(range(1, 6)), st.integers(0, 5))
@examples(20)
def test_extensions_in_any_order(bench, release, order, dropped):
    units = bench.units[release]
    names = list(units)
    kept = {names[i]: units[names[i]] for i in (0, *order) if i == 0 or i != dropped}
    outcome = bench.check(put_together(kept))
    if dropped:
        assert outcome.reason.startswith(f"no extension named {names[dropped]}")
    else:
        assert bench.is_table_unchanged(release)


HARMLESS = st.one_of(
    st.tuples(
        st.sampled_from(("COMMENT", "HISTORY", "")), st.text(st.characters(max_codepoint=255))
    ).map(lambda pair: f"{pair[0]:8}{pair[1]}"),
    st.tuples(st.sampled_from(("ZZTOP", "DATASUMS", "VX_SC", "AP_1_0")), TEXTS).map(
        lambda pair: f"{pair[0]:8}= {pair[1]}"
    ),
)


@given(
    st.sampled_from(RELEASES),
    st.lists(st.tuples(st.integers(1, 5), FRACTIONS, HARMLESS), max_size=40),
    st.binary(min_size=1, max_size=8),
    st.integers(0, 2 * BLOCK),
)
@examples(40)
def test_parts_that_are_not_read_do_not_matter(bench, release, cards, filler, tail):
    units = copy_units(bench.units[release])
    for which, fraction, text in cards:
        unit = list(units.values())[which]
        # Mandatory cards come first in a fixed order.
        at = 8 + int(fraction * (len(unit.cards) - 7))
        unit.cards.insert(at, text.encode("latin-1")[:CARD].ljust(CARD))
    for name, unit in units.items():
        size = bench.units[release][name].data_size
        unit.data = (unit.data[:size] + filler * BLOCK)[: len(unit.data)]
    # Bytes after the last unit that do not look like a unit are ignored.
    content = put_together(units) + (b"\0" + filler * tail)[:tail]
    outcome = bench.extract(content)
    assert outcome.status == "done", outcome.reason
    assert bench.is_table_unchanged(release)


WORDS = st.sampled_from(
    (
        0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF,
        0x00000001, 0x80000001, 0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0xFFFFFFFF,
    )
) | st.integers(0, 2**32 - 1)  # fmt: skip
SPREADS = st.sampled_from((0.001, 0.03, 0.3, 0.9, 1.0))


@given(
    st.sampled_from(RELEASES),
    st.lists(
        st.tuples(
            st.sampled_from(("IMAGE", "VARIANCE", "ZODI", "FLAGS")),
            st.lists(WORDS, min_size=1, max_size=5),
            SPREADS,
            st.integers(0, 2**32),
        ),
        min_size=1,
        max_size=4,
    ),
)
@examples(30)
def test_any_pixels(bench, release, changes):
    units = copy_units(bench.units[release])
    for name, words, share, seed in changes:
        unit = units[name]
        if name == "FLAGS" and release == "qr3":
            continue
        pixels = np.frombuffer(unit.data, ">u4").copy()
        rng = np.random.default_rng(seed)
        hit = rng.uniform(size=len(pixels)) < share
        pixels[hit] = rng.choice(words, hit.sum())
        unit.data = pixels.tobytes()
    outcome = bench.check(put_together(units))
    if outcome.status == "failed":
        assert outcome.reason in (
            "IMAGE has no finite pixel",
            "VARIANCE has no finite positive pixel",
        )


@pytest.mark.parametrize("layout", ["qr3", "tiled"])
@given(st.lists(st.tuples(FRACTIONS, BYTES), min_size=1, max_size=20), st.booleans())
@examples(30)
def test_bytes_of_compressed_flags(bench, layout, changes, descriptors):
    units = copy_units(bench.units[layout])
    unit = units["FLAGS"]
    data = bytearray(unit.data)
    size = 8 * unit.integer("NAXIS2") if descriptors else unit.data_size
    for fraction, byte in changes:
        data[int(fraction * size)] = byte
    unit.data = bytes(data)
    outcome = bench.check(put_together(units))
    if outcome.status == "failed":
        assert outcome.reason.startswith("FLAGS cannot be decompressed: ")


@pytest.mark.parametrize("what", ["empty", "folder", "loop", "nothing", "secret", "dangling"])
def test_path_that_is_no_readable_file(bench, what):
    bench.clear()
    path = bench.path
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what == "dangling":
        path.symlink_to(path.with_name("level2_elsewhere"))
    elif what == "secret":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.touch(mode=0)
    assert bench.extract(None).status == "failed"
