"""The extract task: a frame and a catalogue in, a table and an outcome out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import simulated
from astropy.io import fits

from spxdask.run.ledger import Outcome
from spxdask.science.level2.frame import open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.stages.extract import (
    ExtractOptions,
    extract,
    measure_catalogue,
    table_name,
)
from spxdask.tables.catalogue import read_catalogue
from spxdask.tables.csv import read_csv, render_lines, slice_lines
from spxdask.tables.schema import PER_IMAGE


def measured(frame, catalogue):
    near = catalogue.within(*frame.bounding_circle)
    return measure_catalogue(frame, catalogue, near, PhotometryConfig()).columns


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    sky = simulated.field_sky()
    qr3 = {"release": "qr3", "version": 30}
    exposures = [simulated.exposure(0, 3), simulated.exposure(0, 3, **qr3)]
    folder = tmp_path_factory.mktemp("frames")
    one, _ = simulated.simulate(folder, exposures, sky)
    # The second frame shows the same scene in the layout of the other release.
    both = [one, simulated.SimulatedFrame(exposures[1], one.planes, folder / exposures[1].filename)]
    simulated.write_frame(both[1].path, exposures[1], one.planes, window=simulated.WINDOW)
    return sky, both


@pytest.fixture(scope="module")
def catalogue(frames, tmp_path_factory):
    sky = frames[0]
    ids = [f"s{i}" for i in range(len(sky))]
    path = tmp_path_factory.mktemp("catalogue") / "sources.csv"
    return read_catalogue(simulated.write_catalogue(path, ids, sky.ra, sky.dec))


@pytest.fixture
def options(catalogue, tmp_path):
    catalogue.save(tmp_path / "catalogue.arrow")
    return ExtractOptions(
        catalogue=str(tmp_path / "catalogue.arrow"),
        photometry=PhotometryConfig(),
        recipe="recipe",
        catalogue_fingerprint=catalogue.fingerprint,
        serial=False,
    )


def test_table_and_outcome(frames, catalogue, options, tmp_path):
    frame = frames[1][0]
    outcome = extract(str(frame.path), str(tmp_path), options)
    table = pd.read_csv(tmp_path / table_name(frame.path.name, "csv"))
    assert outcome.status == "done"
    assert outcome.rows == len(table) > 5
    assert outcome.recipe == options.recipe
    assert outcome.catalogue == catalogue.fingerprint
    near = catalogue.within(*outcome.bounding_circle)
    assert outcome.sources_fingerprint == catalogue.digest(near).hex()
    assert outcome.reason is None
    assert 3 <= outcome.properties["astrometry_stars"] <= len(table)
    assert abs(outcome.properties["astrometry_dx"]) < 0.03
    assert abs(outcome.properties["astrometry_dy"]) < 0.03
    assert 0 < outcome.properties["astrometry_error"] < 0.02
    assert outcome.properties["astrometry_scatter"] < 0.03
    assert tuple(table.columns) == PER_IMAGE
    assert set(table["filename"]) == {frame.path.name}
    # Rows are in the order of the catalogue's file.
    numbers = table["target_id"].str[1:].astype(int)
    assert numbers.is_monotonic_increasing
    sky = frames[0]
    np.testing.assert_array_equal(table["ra"], sky.ra[numbers])
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_tables_of_either_format_hold_the_same(frames, options, tmp_path, how):
    frame = frames[1][0]
    extract(str(frame.path), str(tmp_path), options)
    outcome = extract(str(frame.path), str(tmp_path), replace(options, format=how))
    path = tmp_path / f"{frame.path.stem}_photometry.{how}"
    assert path.name == table_name(frame.path.name, how)
    assert (outcome.status, outcome.bytes) == ("done", path.stat().st_size)
    text = read_csv(tmp_path / table_name(frame.path.name, "csv"))
    found = read_csv(path) if how == "csv" else pq.read_table(path)
    assert found.equals(text)
    assert outcome.rows == len(text) > 5
    # Another run writes the same bytes.
    before = path.read_bytes()
    extract(str(frame.path), str(tmp_path), replace(options, format=how))
    assert path.read_bytes() == before


def test_both_layouts_give_the_same_numbers(frames, catalogue):
    columns = [measured(open_frame(f.path), catalogue) for f in frames[1]]
    assert len(columns[0]["x"]) > 5
    for name in PER_IMAGE:
        if name in ("filename", "wavelength", "bandwidth", "psf_chi2"):
            continue
        if name in ("aperture_correction", "psf_flux", "psf_flux_error"):
            # The PSF of QR2 is in samples of a tenth of a pixel, that of QR3 is integrated.
            np.testing.assert_allclose(columns[0][name], columns[1][name], rtol=0.004)
            continue
        np.testing.assert_array_equal(columns[0][name], columns[1][name], err_msg=name)
    # The lattices differ between the releases, the wavelengths hardly.
    np.testing.assert_allclose(columns[0]["wavelength"], columns[1]["wavelength"], atol=0.01)


@pytest.mark.slow
def test_many_other_sources_change_nothing(frames, catalogue, tmp_path):
    sky, (frame, _) = frames
    rng = np.random.default_rng(8)
    n = 200_000
    ra, dec = rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))
    # No other source is near the frame; some are at its antipode and just beyond its corners.
    near = np.hypot((ra - 270.0) * np.cos(np.deg2rad(66.56)), dec - 66.56) < 1.0
    ra, dec = ra[~near], dec[~near]
    ra[:1000] = 90.0 + rng.uniform(-0.3, 0.3, 1000)
    dec[:1000] = -66.56 + rng.uniform(-0.1, 0.1, 1000)
    ra[1000:2000] = 270.0 + rng.uniform(-9, 9, 1000)
    dec[1000:2000] = 66.56 + rng.choice([-1.5, 1.5], 1000)
    rows = np.sort(rng.choice(len(ra), len(sky), replace=False))
    ids = np.array([f"o{i}" for i in range(len(ra))], dtype=object)
    ids[rows] = [f"s{i}" for i in range(len(sky))]
    ra[rows], dec[rows] = sky.ra, sky.dec
    path = tmp_path / "all.csv"
    pd.DataFrame({"targetid": ids, "ra": ra, "dec": dec}).to_csv(path, index=False)
    everything = read_catalogue(path)
    few, all_ = (measured(open_frame(frame.path), c) for c in (catalogue, everything))
    assert bytes(slice_lines(render_lines(few))) == bytes(slice_lines(render_lines(all_)))
    assert len(few["x"]) > 5


def write_changed(frame, path, change):
    with fits.open(frame.path) as hdus:
        change(hdus)
        hdus.writeto(path)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.pop("WCS-WAVE"), "no extension named WCS-WAVE"),
        (lambda h: h["IMAGE"].header.set("CTYPE1", "GLON-CAR"), "no usable celestial WCS"),
        (lambda h: h["IMAGE"].data.fill(np.nan), "IMAGE has no finite pixel"),
        (lambda h: h["VARIANCE"].data.fill(0.0), "VARIANCE has no finite positive pixel"),
        (lambda h: h["IMAGE"].header.set("DETECTOR", 7), "DETECTOR must be 1 to 6, got 7"),
    ],
)
def test_bad_frames_fail_with_a_reason(frames, options, tmp_path, change, reason):
    path = write_changed(frames[1][0], tmp_path / "bad.fits", change)
    outcome = extract(str(path), str(tmp_path), options)
    assert outcome.status == "failed"
    assert reason in outcome.reason
    assert "\n" not in outcome.reason
    assert outcome.rows == 0
    assert not (tmp_path / table_name("bad.fits", "csv")).exists()


@pytest.fixture
def in_images(frames, tmp_path):
    """A frame with sums that somebody has put into images/, as bytes and as a path."""
    path = tmp_path / "images" / frames[1][0].path.name
    path.parent.mkdir()
    with fits.open(frames[1][0].path, disable_image_compression=True) as hdus:
        hdus.writeto(path, checksum=True)
    return path


def change_byte(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_mended_header_of_a_file_in_images_is_a_warning(in_images, options, tmp_path):
    # Within the comment of a card of the primary header.
    change_byte(in_images, in_images.read_bytes().index(b"CHECKSUM") + 75)
    outcome = extract(str(in_images), str(tmp_path), options)
    assert outcome.status == "done"
    assert [text for text in outcome.warnings if "CHECKSUM of PRIMARY disagrees" in text]


def test_damaged_data_of_a_file_in_images_are_a_failure(in_images, options, tmp_path):
    change_byte(in_images, -1)
    outcome = extract(str(in_images), str(tmp_path), options)
    assert outcome.status == "failed"
    assert "DATASUM" in outcome.reason
    assert [path.suffix for path in in_images.parent.iterdir()] == [".unreadable"]


def test_what_its_download_has_checked_is_not_summed_again(in_images, options, tmp_path):
    change_byte(in_images, -1)
    fetched = Outcome(
        stage="download",
        filename=in_images.name,
        status="done",
        bytes=in_images.stat().st_size,
        checksum="xxh64:0",
        warnings=("CHECKSUM of IMAGE disagrees",),
    )
    outcome = extract(str(in_images), str(tmp_path), options, fetched)
    assert (outcome.status, outcome.frame_checksum) == ("done", "xxh64:0")
    assert "CHECKSUM of IMAGE disagrees" in outcome.warnings
    # An earlier version recorded a sum, which identifies nothing.
    outcome = extract(str(in_images), str(tmp_path), options, replace(fetched, checksum="f" * 8))
    assert (outcome.status, outcome.frame_checksum) == ("done", None)
    # Another file than that which was fetched.
    outcome = extract(str(in_images), str(tmp_path), options, replace(fetched, bytes=1))
    assert outcome.status == "failed"


def test_unexpected_error_is_a_failure_of_the_frame(frames, options, tmp_path, monkeypatch, caplog):
    def raise_unexpected(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("spxdask.stages.extract.measure_catalogue", raise_unexpected)
    outcome = extract(str(frames[1][0].path), str(tmp_path), options)
    assert outcome.reason == "unexpected ZeroDivisionError: a bug"
    assert "Traceback" in caplog.text


def test_missing_frame_and_missing_folder(frames, options, tmp_path):
    outcome = extract(str(tmp_path / "none.fits"), str(tmp_path), options)
    assert "No such file" in outcome.reason
    outcome = extract(str(frames[1][0].path), str(tmp_path / "nowhere"), options)
    assert outcome.status == "failed"


def test_header_of_another_frame_is_a_warning(frames, options, tmp_path):
    original = frames[1][0].path
    assert extract(str(original), str(tmp_path), options).warnings == ()
    other = tmp_path / original.name.replace("2025W51_1A_0000_1", "2025W51_1A_0009_1")
    other.write_bytes(original.read_bytes())
    outcome = extract(str(other), str(tmp_path), options)
    assert outcome.status == "done"
    assert outcome.warnings == ("the header says that this is 2025W51_1A_0000_1",)
