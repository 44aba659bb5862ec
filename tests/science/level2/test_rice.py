"""RICE_1 against astropy's own compression and decompression."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spxdask.errors import FrameError
from spxdask.science.level2.fits import Hdu, Header, scan
from spxdask.science.level2.rice import decompress, is_row_compressed


def compress(path, image, **options):
    how = {"compression_type": "RICE_1", "tile_shape": (1, image.shape[1])} | options
    hdus = [fits.PrimaryHDU(), fits.CompImageHDU(image, name="FLAGS", **how)]
    fits.HDUList(hdus).writeto(path, overwrite=True)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, scan(mapped)[1]


def flags(rng, shape):
    """Return flags as frames have them: runs of SOURCE, single bits, a sign bit."""
    image = np.zeros(shape, np.int32)
    image[:, ::3] |= 1 << 21
    image[rng.random(shape) < 0.01] |= 1 << 6
    image[rng.random(shape) < 0.001] = -(1 << 31)
    image[shape[0] // 2] = 0
    return image


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (3, 32), (3, 33), (40, 300), (5, 2040)])
@pytest.mark.parametrize("kind", ["flags", "zero", "noise", "extremes", "ramp"])
def test_equals_what_was_compressed(tmp_path, shape, kind):
    rng = np.random.default_rng(1)
    info = np.iinfo(np.int32)
    image = {
        "flags": lambda: flags(rng, shape),
        "zero": lambda: np.zeros(shape, np.int32),
        "noise": lambda: rng.integers(info.min, info.max, shape, np.int32, endpoint=True),
        "extremes": lambda: rng.choice(np.array([info.min, info.max], np.int32), shape),
        "ramp": lambda: np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape),
    }[kind]()
    mapped, hdu = compress(tmp_path / "flags.fits", image)
    assert is_row_compressed(hdu)
    got = decompress(mapped, hdu)
    assert got.dtype == np.dtype(">i4")
    np.testing.assert_array_equal(got, image)


@settings(max_examples=30, deadline=None)
@given(arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 80))))
def test_equals_anything(tmp_path_factory, image):
    mapped, hdu = compress(tmp_path_factory.mktemp("rice") / "flags.fits", image)
    np.testing.assert_array_equal(decompress(mapped, hdu), image)


@pytest.mark.parametrize(
    "options",
    [
        {"compression_type": "GZIP_1"},
        {"tile_shape": (2, 64)},
        {"tile_shape": (1, 32)},
    ],
)
def test_other_ways_are_left_to_astropy(tmp_path, options):
    image = flags(np.random.default_rng(2), (8, 64))
    assert not is_row_compressed(compress(tmp_path / "flags.fits", image, **options)[1])


def test_damage_is_a_frame_error_or_other_numbers(tmp_path):
    image = flags(np.random.default_rng(3), (20, 200))
    path = tmp_path / "flags.fits"
    mapped, hdu = compress(path, image)
    rng = np.random.default_rng(4)
    reasons = []
    for _ in range(300):
        data = bytearray(mapped[:])
        for place in rng.integers(hdu.data_start, hdu.data_start + hdu.data_size, 3):
            data[place] = rng.integers(256)
        try:
            assert decompress(bytes(data), hdu).shape == image.shape
        except FrameError as error:
            reasons.append(str(error))
    assert len(reasons) > 20
    assert all(reason.startswith("FLAGS cannot be decompressed: ") for reason in reasons)


def widened(mapped, hdu, descriptor=None):
    """The same with descriptors of 64 bits, one of which may be another."""
    rows = hdu.header["NAXIS2"]
    table = np.frombuffer(mapped, ">i4", 2 * rows, hdu.data_start).reshape(rows, 2).astype(">i8")
    if descriptor:
        table[rows // 2] = descriptor
    content = table.tobytes() + mapped[hdu.data_start + 8 * rows :][: hdu.data_size - 8 * rows]
    cards = {name: str(hdu.header[name]).encode() for name in ("NAXIS2", "ZNAXIS1", "ZNAXIS2")}
    cards |= {"NAXIS1": b"16", "TFORM1": b"'1QB(300)'"}
    header = Header({name.encode().ljust(8): value for name, value in cards.items()})
    return content, Hdu("FLAGS", header, 0, len(content))


def test_wide_descriptors(tmp_path):
    image = flags(np.random.default_rng(5), (20, 200))
    np.testing.assert_array_equal(
        decompress(*widened(*compress(tmp_path / "flags.fits", image))), image
    )


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    "descriptor",
    [(-1, 0), (3, 0), (HUGE, 0), (8, HUGE), (8, -HUGE), (8, -1), (HUGE, HUGE), (0, HUGE)],
)
def test_descriptors_out_of_the_table(tmp_path, descriptor):
    image = flags(np.random.default_rng(5), (20, 200))
    content, hdu = widened(*compress(tmp_path / "flags.fits", image), descriptor)
    with pytest.raises(FrameError, match="a tile lies outside of the table"):
        decompress(content, hdu)
