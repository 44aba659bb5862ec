"""Offsets of stars in simulated Level 2 frames, whose PSF the program does not know."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from partly import PartlyRead

from spxdask.science.level2.frame import Frame, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import find_needed_rows, measure
from spxdask.science.psf.offsets import (
    MOST_STARS,
    NO_STARS,
    Astrometry,
    Offsets,
    summarise_offsets,
)
from spxdask.simulate.frames import Exposure, SceneOptions, Sky, make_planes, write_frame
from spxdask.simulate.psf import VaryingPsf

SIDE = 300
WINDOW = (60, 1700, SIDE, SIDE)


@functools.cache
def make_content(folder, layout: str, spacing: float) -> bytes:
    """Return a frame in a corner of the detector, with stars on a lattice and off pixel centres."""
    exposure = Exposure(
        obs_id="2025W51_1A_0684_2", detector=4, ra=10.0, dec=40.0, roll_deg=25.0, mjd_begin=61027.25
    )
    rng = np.random.default_rng(2)
    x, y = make_positions(spacing)
    ra, dec = exposure.wcs(WINDOW).all_pix2world(x, y, 0)
    flat = np.zeros(len(x))
    sky = Sky(
        ra=ra,
        dec=dec,
        amplitude=10 ** rng.uniform(3.3, 4.3, len(x)),
        slope=flat,
        line_strength=flat,
        line_center_um=flat + 2.0,
        line_width_um=flat + 0.1,
    )
    options = SceneOptions(psf=VaryingPsf(), crowding=0.0, diffuse_amplitude=0.0)
    planes = make_planes(exposure, sky, options, window=WINDOW)
    path = folder / f"{layout}-{spacing}.fits"
    write_frame(path, exposure, planes, window=WINDOW, layout=layout)
    return path.read_bytes()


def make_positions(spacing: float):
    rng = np.random.default_rng(1)
    along = np.arange(30.0, SIDE - 30.0, spacing)
    x, y = (a.ravel() for a in np.meshgrid(along, along))
    return x + rng.uniform(-0.5, 0.5, x.size), y + rng.uniform(-0.5, 0.5, x.size)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("offsets")


def measure_shifted(
    frame: Frame, shift: tuple[float, float], spacing: float = 22.0, *, psf="nearest", **options
) -> Astrometry | None:
    """Measure stars whose catalogue positions are where the light is, less the shift."""
    x, y = make_positions(spacing)
    ra, dec = frame.wcs.pixel_to_sky(x - shift[0], y - shift[1])
    return measure(frame, ra, dec, PhotometryConfig(psf=psf), **options).astrometry


@pytest.mark.parametrize("psf", ["nearest", "bilinear"])
@pytest.mark.parametrize("layout", ["qr2", "qr3"])
def test_a_shift_of_the_catalogue_is_recovered(folder, layout, psf):
    """The cores of the cube are up to 0.1 pixels off the middle, which is no shift of stars."""
    frame = open_frame(memoryview(make_content(folder, layout, 22.0)), "a.fits")
    for shift in ((0.0, 0.0), (0.2, 0.0), (-0.1, 0.15), (0.0, -0.5)):
        found = measure_shifted(frame, shift, psf=psf)
        assert found.stars == MOST_STARS
        # The PSF of a zone is not that of a star to 0.002 pixels.
        limit = 4 * 1.25 * found.scatter / math.sqrt(found.stars) + 0.003 + 0.02 * np.abs(shift)
        assert np.all(np.abs([found.dx - shift[0], found.dy - shift[1]]) < limit), shift
        assert found.scatter < 3 * found.error < 0.03


def test_rows_tell_what_the_whole_frame_does(folder):
    content = make_content(folder, "qr3", 22.0)
    config = PhotometryConfig(psf="nearest")
    whole = open_frame(memoryview(content), "a.fits")
    x, y = make_positions(22.0)
    few = (x < 120) & (y < 60)
    ra, dec = whole.wcs.pixel_to_sky(x[few], y[few])
    part = PartlyRead(content)
    frame = part.read(lambda head: find_needed_rows(head, ra, dec, config))
    found = part.measure(frame, lambda one: measure(one, ra, dec, config, few_rows=True))
    assert found.astrometry.stars == few.sum() == 10
    assert found.astrometry == measure(whole, ra, dec, config, few_rows=True).astrometry


def test_a_crowded_field_and_one_without_stars_have_none(folder):
    frame = open_frame(memoryview(make_content(folder, "qr3", 3.0)), "a.fits")
    assert measure_shifted(frame, (0.0, 0.0), 3.0) == Astrometry(stars=0)
    empty = np.empty(0)
    assert measure(frame, empty, empty, PhotometryConfig()).astrometry is None
    assert measure_shifted(frame, (0.0, 0.0), 3.0, psf="none") is None


def test_a_few_wrong_stars_do_not_move_the_median():
    rng = np.random.default_rng(3)
    error = np.full(20, 0.01)
    dx, dy = 0.1 + 0.01 * rng.normal(size=20), 0.01 * rng.normal(size=20)
    dx[:3], dy[:3] = 0.9, -0.7
    found = summarise_offsets(
        Offsets(index=np.arange(20), dx=dx, dy=dy, dx_error=error, dy_error=error)
    )
    assert (found.dx, found.dy) == (pytest.approx(0.1, abs=0.01), pytest.approx(0, abs=0.01))
    assert 0.005 < found.scatter < 0.02
    assert found.error == 0.01
    assert (found.dx, found.dy) == (np.median(dx), np.median(dy))
    assert summarise_offsets(NO_STARS) == Astrometry(stars=0)
    two = Offsets(index=np.arange(2), dx=dx[:2], dy=dy[:2], dx_error=dx[:2], dy_error=dy[:2])
    assert summarise_offsets(two).scatter is None
