"""Frames read in parts: what is asked for, in how many rounds, and what is never used."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from partly import PartlyRead, pick

from spxdask.errors import FrameError, MissingBytesError, MissingRowsError
from spxdask.science.level2.fits import BLOCK, scan
from spxdask.science.level2.frame import open_frame, open_head
from spxdask.science.level2.partial import Layouts, is_large
from spxdask.science.level2.spans import Spans
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

WINDOW = (900, 880, 120, 100)
NY = 100
ROWS = pick(NY, (20, 41), (70, 75))
PLANES = ("image", "variance", "zodi", "flags")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[bytes]]:
    """Two frames of each layout."""
    folder = tmp_path_factory.mktemp("partly")
    found: dict[str, list[bytes]] = {"qr2": [], "qr3": []}
    for k in range(2):
        exposure = Exposure(
            obs_id=f"2025W51_1A_0684_{k + 1}",
            detector=3,
            ra=10.0,
            dec=40.0,
            roll_deg=25.0,
            mjd_begin=61027.25 + k,
        )
        ra, dec = exposure.wcs(WINDOW).all_pix2world(60, 50, 0)
        sky = make_sky(float(ra), float(dec), 0.05, n_sources=5, min_separation_arcsec=30, seed=k)
        planes = make_planes(exposure, sky, SceneOptions(seed=k), window=WINDOW)
        for layout, contents in found.items():
            path = folder / f"{layout}.fits"
            write_frame(path, exposure, planes, window=WINDOW, layout=layout)
            contents.append(path.read_bytes())
    return found


@pytest.fixture(params=["qr2", "qr3"])
def pair(request, files) -> list[bytes]:
    return files[request.param]


def assert_same(part, content: bytes, rows=ROWS) -> None:
    """That a frame has these rows of a file, and all else."""
    whole = open_frame(memoryview(content), "a.fits")
    for name in PLANES:
        assert getattr(part, name)[rows].tobytes() == getattr(whole, name)[rows].tobytes(), name
    assert np.array_equal(part.rows, rows)
    assert np.array_equal(part.wavelengths.values, whole.wavelengths.values)
    for name in ("filename", "band", "mjd", "origin", "psf_fwhm", "flag_bits", "file_bytes"):
        assert getattr(part, name) == getattr(whole, name), name


def test_the_first_frame_is_read_header_by_header_and_the_next_ones_in_few_rounds(pair):
    layouts = Layouts()
    flags = {hdu.name: hdu for hdu in scan(pair[0])}["FLAGS"]
    rounds = []
    for content in pair:
        one = PartlyRead(content)
        assert_same(one.read(lambda head: ROWS, layouts), content)
        rounds.append(len(one.rounds))
        # Less than the headers, the lattice and these rows with a few blocks.
        assert one.held.total < 4 * 4 * 120 * ROWS.sum() + 45 * BLOCK
    assert rounds[0] > 5
    assert rounds[1] == (3 if flags.header.get("ZIMAGE") else 2)


def test_the_length_of_compressed_flags_moves_what_is_behind_them(files):
    content, layouts = files["qr3"][0], Layouts()
    PartlyRead(content).read(lambda head: ROWS, layouts)
    # The heap is longer by some blocks, as that of other flags would be.
    flags = {hdu.name: hdu for hdu in scan(content)}["FLAGS"]
    end = flags.data_start + -(-flags.data_size // BLOCK) * BLOCK
    more = end - flags.data_start - flags.data_size + 7 * BLOCK
    card = content.rindex(b"PCOUNT  ", 0, flags.data_start)
    text = f"PCOUNT  = {flags.header['PCOUNT'] + more:20d}".encode()
    start, middle = content[:card], content[card + len(text) : end]
    longer = start + text + middle + bytes(7 * BLOCK) + content[end:]
    part = PartlyRead(longer)
    assert_same(part.read(lambda head: ROWS, layouts), longer)
    assert len(part.rounds) == 3


@pytest.mark.parametrize("change", ["an extension more", "other order", "longer header"])
def test_a_wrong_guess_costs_a_round_and_no_number(pair, change):
    layouts = Layouts()
    PartlyRead(pair[0]).read(lambda head: ROWS, layouts)
    content = pair[1]
    starts = [0]
    for hdu in scan(content):
        starts.append(hdu.data_start + -(-hdu.data_size // BLOCK) * BLOCK)
    units = [content[a:b] for a, b in pairwise(starts)]
    if change == "an extension more":
        more = b"".join(
            card.ljust(80)
            for card in (
                b"XTENSION= 'IMAGE   '",
                b"BITPIX  =                    8",
                b"NAXIS   =                    1",
                b"NAXIS1  =                50000",
                b"EXTNAME = 'NEW     '",
                b"END",
            )
        )
        units.insert(2, more.ljust(BLOCK) + bytes(-(-50000 // BLOCK) * BLOCK))
    elif change == "other order":
        units[3], units[4] = units[4], units[3]
        units[2], units[5] = units[5], units[2]
    else:
        at = scan(content)[3].data_start - starts[3]
        end = units[3].rindex(b"END     ", 0, at)
        many = b"".join(f"COMMENT {k}".encode().ljust(80) for k in range(200))
        header = units[3][:end] + many + b"END".ljust(80)
        units[3] = header.ljust(-(-len(header) // BLOCK) * BLOCK) + units[3][at:]
    changed = b"".join(units)
    part = PartlyRead(changed)
    assert_same(part.read(lambda head: ROWS, layouts), changed)
    assert len(part.rounds) <= 12
    # The next one like it is guessed rightly.
    again = PartlyRead(changed)
    assert_same(again.read(lambda head: ROWS, layouts), changed)
    assert len(again.rounds) <= 3


def test_a_frame_without_a_source_is_done_with_its_head(pair):
    seen = []
    part = PartlyRead(pair[0])
    assert part.read(seen.append) is None
    assert len(part.rounds) == 1
    assert part.held.total < 40_000
    (head,) = seen
    whole = open_frame(memoryview(pair[0]), "a.fits")
    assert head.shape == whole.shape
    assert head.bounding_circle == whole.bounding_circle
    assert (head.mjd, head.band, head.file_bytes) == (whole.mjd, whole.band, len(pair[0]))
    assert not head.rows.any()
    inside = whole.wcs.pixel_to_sky([60.0], [50.0])
    config = PhotometryConfig(window_size=25)
    with pytest.raises(MissingRowsError) as caught:
        measure(head, *inside, config)
    assert caught.value.rows.all()
    none = measure(head, np.empty(0), np.empty(0), config, few_rows=True)
    assert len(none.index) == 0
    assert set(none.psf_columns) == set(measure(whole, *inside, config).psf_columns)


def test_cut_outs_are_read_whole(pair):
    part = PartlyRead(pair[0])
    frame = part.read(lambda head: ROWS, may_be_small=False)
    assert frame.rows is None
    assert not is_large(frame)
    assert part.held.total == len(pair[0])
    assert len(part.rounds) == 2


def test_what_is_held_is_not_asked_for(pair):
    part = PartlyRead(pair[0])
    part.content[:] = part.whole
    part.held.add(0, len(pair[0]))
    assert_same(part.read(lambda head: ROWS), pair[0])
    assert part.rounds == []


def test_rows_are_added_when_a_measurement_finds_them_missing(pair):
    part = PartlyRead(pair[0])
    frame = part.read(lambda head: ROWS)
    seen = []

    def ask(frame):
        seen.append(frame.rows.copy())
        if not frame.rows[90:].all():
            raise MissingRowsError("rows", rows=pick(NY, (90, 95) if len(seen) < 2 else (93, NY)))
        return frame

    both = part.measure(frame, ask)
    assert len(seen) == 3
    assert_same(both, pair[0], ROWS | pick(NY, (90, NY)))
    # The frame of before is as it was.
    assert np.array_equal(frame.rows, ROWS)

    def never(frame):
        raise MissingRowsError("rows", rows=ROWS)

    with pytest.raises(FrameError, match="missing 8 times"):
        part.measure(frame, never)


def test_a_file_that_is_none_or_cut_short_is_an_error(pair):
    for content in (b"<html>" * 9000, pair[0][: len(pair[0]) // 2], pair[0][:5000]):
        with pytest.raises(FrameError) as caught:
            PartlyRead(content).read(lambda head: ROWS)
        with pytest.raises(FrameError) as whole:
            open_frame(memoryview(content), "a.fits")
        assert str(caught.value) == str(whole.value)
        assert not isinstance(caught.value, MissingBytesError)


def test_missing_bytes_are_named(pair):
    content = memoryview(pair[0])
    with pytest.raises(MissingBytesError) as caught:
        open_head(content, "a.fits", held=Spans())
    assert caught.value.spans == ((0, 4 * BLOCK),)
    everything = Spans([(0, len(content))])
    image = {hdu.name: hdu for hdu in scan(content)}["IMAGE"]
    held = Spans([(0, image.data_start + 480), (image.data_start + 960, len(content))])
    assert open_frame(content, "a.fits", held=held, rows=pick(NY, (0, 1), (2, NY))).rows.sum() == 99
    with pytest.raises(MissingBytesError) as caught:
        open_frame(content, "a.fits", held=held)
    assert caught.value.spans == ((image.data_start + 480, image.data_start + 960),)
    assert open_frame(content, "a.fits", held=everything).rows is None


def test_a_driver_that_brings_nothing_is_a_bug(pair):
    part = PartlyRead(pair[0])
    part.whole = memoryview(bytes(len(pair[0])))
    part.held = type("Holdless", (Spans,), {"add": lambda self, start, stop: None})()
    with pytest.raises(RuntimeError, match="without the bytes"):
        part.read(lambda head: ROWS)
