"""Calibration products in the stages: which are used, what they do to fluxes, and when they count.

The frames are cut-outs of a scene with all that products are for: a PSF that varies, solid angles
of each pixel, the gains of before QR3 and shifted wavelengths.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import astropy.units as u
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import simulated
from astropy.coordinates import EarthLocation, SkyCoord
from astropy.io import fits
from astropy.time import Time
from astropy.utils import iers
from outputs import output_of, read_per_image

from spxdask import BatchConfig, BatchPipeline, PhotometryConfig
from spxdask.archive.observation import Observation, frame_url
from spxdask.archive.outage import OutagePolicy
from spxdask.errors import FrameError, InputError, RunFolderError
from spxdask.run.folder import RunFolder
from spxdask.run.plan import MeasurementInputs, table_name
from spxdask.run.summary import StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.science.level2.frame import open_frame
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive
from spxdask.simulate.frames import CALIBRATED_SCENE, Exposure, Planes, make_planes, write_frame
from spxdask.simulate.products import ArchivedProduct, make_products
from spxdask.stages.calibration import fetch_products, prepare_calibration
from spxdask.stages.extract import ExtractOptions, extract, measure_catalogue
from spxdask.tables.schema import APERTURE_ONLY, WITH_PSF

pytestmark = pytest.mark.slow

QR3 = {"release": "qr3", "version": 30, "year": 2026, "day": 90}
SCENE = replace(CALIBRATED_SCENE, crowding=0.3)
TOKENS = {
    "solid_angle_pixel_map": "cal-sapm-v3-2026-191",
    "spectral_wcs": "cal-swcs-v5-2026-191",
    "epsf": "cal-epsf-v2-2026-191",
    "l3_flux_corrections": "cal-flxc-v1-2026-191",
}


@dataclass(frozen=True)
class Calibrated:
    """A frame of QR2 and one of QR3 of the same field, and the products of their detector."""

    exposures: list[Exposure]
    planes: list[Planes]
    paths: list[Path]
    archived: list[ArchivedFrame]
    products: list[ArchivedProduct]
    catalogue: Catalogue

    @property
    def observations(self) -> list[Observation]:
        return [
            Observation(
                obs_id=exposure.obs_id,
                band=exposure.band,
                mjd=exposure.mjd_begin,
                wavelength_um=2.0,
                uri=exposure.uri,
                download_url=frame_url("http://127.0.0.1", exposure.uri),
                size_bytes=path.stat().st_size,
            )
            for exposure, path in zip(self.exposures, self.paths, strict=True)
        ]


def make_catalogue(ids, ra, dec, motions=None) -> Catalogue:
    return Catalogue.from_arrays(
        pa.array(ids, pa.large_string()), np.asarray(ra, float), np.asarray(dec, float), motions
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Calibrated:
    folder = tmp_path_factory.mktemp("calibrated")
    sky = simulated.make_sky(
        *simulated.CENTER,
        0.2,
        n_sources=60,
        min_separation_arcsec=60,
        amplitude_ujy=(5000.0, 50000.0),
        seed=11,
    )
    exposures = [simulated.exposure(0), simulated.exposure(1, **QR3)]
    planes, paths = [], []
    for exposure in exposures:
        planes.append(make_planes(exposure, sky, SCENE, window=simulated.WINDOW))
        paths.append(folder / exposure.filename)
        write_frame(paths[-1], exposure, planes[-1], window=simulated.WINDOW)
    archived = [
        ArchivedFrame.of(exposure, path, simulated.WINDOW)
        for exposure, path in zip(exposures, paths, strict=True)
    ]
    products = make_products(folder / "products", detectors=(3,), tokens=TOKENS.values())
    catalogue = make_catalogue([str(i) for i in range(len(sky))], sky.ra, sky.dec)
    return Calibrated(exposures, planes, paths, archived, products, catalogue)


@pytest.fixture(scope="module")
def archive(calibrated):
    with SimulatedArchive(calibrated.archived, products=calibrated.products) as archive:
        yield archive


@pytest.fixture
def make_config(archive, tmp_path):
    def make(**options) -> BatchConfig:
        defaults = simulated.run_options(tmp_path / "sources.csv", archive, tmp_path / "out")
        return BatchConfig(**(defaults | {"calibration": "archive"} | options))

    return make


def prepare(config, observations, *, is_new=True):
    folder = RunFolder(config.output_dir)
    folder.state.make()
    report = StageReport(stage="query") if is_new else None
    return prepare_calibration(folder, config, observations, report)


def measure(calibrated, config, calibration, number, folder, **options) -> pd.DataFrame:
    """Measure a frame with its products, as the task of the extract stage does."""
    observation = calibrated.observations[number]
    folder.mkdir(exist_ok=True)
    path = folder / "catalogue.arrow"
    calibrated.catalogue.save(path)
    products = calibration.choose(observation.band, observation.is_early).values()
    outcome = extract(
        str(calibrated.paths[number]),
        str(folder),
        ExtractOptions(
            catalogue=str(path),
            photometry=config.photometry,
            recipe="recipe",
            catalogue_fingerprint=calibrated.catalogue.identity,
            serial=False,
            products=tuple(products),
            product_source=calibration.source,
            **options,
        ),
    )
    assert outcome.status == "done", outcome.reason
    return pd.read_csv(folder / table_name(observation.filename, "csv"))


def truth_of(planes: Planes, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The true fluxes and wavelengths of the rows."""
    flux = dict(zip(planes.source, planes.flux_ujy, strict=True))
    wavelength = dict(zip(planes.source, planes.wavelength_um, strict=True))
    ids = rows["target_id"].astype(int)
    return np.array([flux[i] for i in ids]), np.array([wavelength[i] for i in ids])


@pytest.mark.parametrize("number", [0, 1], ids=["qr2", "qr3"])
def test_total_fluxes_and_wavelengths_are_right(calibrated, make_config, tmp_path, number):
    config = make_config()
    calibration = prepare(config, calibrated.observations)
    assert calibration.missing == {}
    rows = measure(calibrated, config, calibration, number, tmp_path / "with")
    flux, wavelength = truth_of(calibrated.planes[number], rows)
    assert len(rows) > 10
    np.testing.assert_allclose(rows["wavelength"], wavelength, rtol=1e-5)
    corrected = rows["flux"] * rows["aperture_correction"]
    for total in (corrected, rows["psf_flux"]):
        assert np.nanmedian(total / flux) == pytest.approx(1.0, abs=0.003)
    pull = (rows["psf_flux"] - flux) / rows["psf_flux_error"]
    assert abs(np.nanmedian(pull)) < 1.0
    # Nothing but what is in the frame leaves the gains of QR2, and the shift of its wavelengths.
    plain = measure(calibrated, config, prepare(make_config(calibration="frame"), []), number,
                    tmp_path / "without")  # fmt: skip
    if number == 0:
        assert abs(np.nanmedian(plain["psf_flux"] / flux) - 1) > 0.005
        assert np.median(np.abs(plain["wavelength"] - wavelength)) > 2e-4


def test_recipes_name_product_and_token(calibrated, make_config):
    config = make_config()
    calibration = prepare(config, calibrated.observations)
    inputs = MeasurementInputs(
        photometry=config.photometry, catalogue=calibrated.catalogue, calibration=calibration
    )
    early, late = (inputs.find_recipe(one).steps for one in calibrated.observations)
    checksums = {product.family: product.checksum for product in calibration.products}
    steps = {
        "solid_angle": "solid_angle_pixel_map",
        "wavelength": "spectral_wcs",
        "psf": "epsf",
        "flux_scale": "l3_flux_corrections",
    }
    for step, family in steps.items():
        assert early[step]["product"] == [TOKENS[family], checksums[family]]
    assert late == {name: step for name, step in early.items() if name != "flux_scale"}


def test_products_are_those_of_the_query_until_the_next(calibrated, make_config, archive):
    config = make_config()
    first = prepare(config, calibrated.observations)
    n_requests = len(archive.requests)
    again = prepare(config, calibrated.observations, is_new=False)
    assert again.products == first.products
    assert len(archive.requests) == n_requests
    pinned = make_config(calibration_pins={"epsf": "cal-epsf-v9-2026-191"})
    with pytest.raises(InputError, match=r"calibration_pins: epsf: .* cal-epsf-v9-2026-191"):
        prepare(pinned, calibrated.observations, is_new=False)


def test_a_family_that_is_missing_is_said_once(calibrated, make_config, caplog):
    without = [p for p in calibrated.products if p.family != "epsf"]
    with SimulatedArchive(calibrated.archived, products=without) as archive:
        config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
        with caplog.at_level(logging.WARNING, logger="spxdask"):
            found = prepare(config, calibrated.observations)
    assert found.missing.keys() == {"epsf"}
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "epsf" in caplog.text
    # Without PSF fluxes nobody needs it.
    config = make_config(photometry=PhotometryConfig(psf="none"))
    assert "epsf" not in prepare(config, calibrated.observations).tokens


def test_products_that_are_gone_from_the_cache_are_waited_for(
    calibrated, make_config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    epsf = next(p for p in calibrated.products if p.family == "epsf")
    policy = OutagePolicy(patience_s=60, first_pause_s=0.01, longest_pause_s=0.01)
    waits = []
    with SimulatedArchive(calibrated.archived, products=calibrated.products) as archive:
        config = make_config(
            tap_url=archive.tap_url, archive_url=archive.archive_url, max_retries=0
        )
        found = prepare(config, calibrated.observations)
        n_requests = len(archive.requests)
        fetch_products(found, [("D3", True), ("D3", False)], policy, waits.append)
        assert (len(archive.requests), waits) == (n_requests, [])
        for path in (tmp_path / "cache" / "products").glob("*epsf*"):
            path.unlink()
        archive.add_faults(epsf.uri, [Fault(status=503)] * 3)
        with caplog.at_level(logging.WARNING, logger="spxdask"):
            fetch_products(found, [("D3", True)], policy, waits.append)
        assert [wait is None for wait in waits] == [False] * 3 + [True]
        assert "503" in waits[0]
        assert [r.getMessage() for r in caplog.records] == [waits[0], "the archive answers again"]
        # No patience would help where it is not there.
        for path in (tmp_path / "cache" / "products").glob("*epsf*"):
            path.unlink()
        archive.add_faults(epsf.uri, [Fault(status=404)] * 9)
        fetch_products(found, [("D3", True)], policy, waits.append)
        assert len(waits) == 4


def test_a_changed_product_measures_frames_of_its_detector_again(calibrated, make_config, tmp_path):
    """The archive replaces the wavelengths of D3; those of D4, and its frame, stay."""
    other = simulated.exposure(2, 4, **QR3)
    path = tmp_path / other.filename
    write_frame(path, other, calibrated.planes[0], window=simulated.WINDOW)
    both = replace(
        calibrated,
        exposures=[*calibrated.exposures, other],
        paths=[*calibrated.paths, path],
    )
    tokens = ["cal-swcs-v5-2026-191"]
    first = make_products(tmp_path / "products", detectors=(3, 4), tokens=tokens)

    def find_inputs() -> MeasurementInputs:
        with SimulatedArchive(calibrated.archived, products=first) as archive:
            config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
            config = replace(config, calibration=archive.archive_url)
            calibration = prepare(config, both.observations)
        return MeasurementInputs(
            photometry=config.photometry, catalogue=calibrated.catalogue, calibration=calibration
        )

    before = find_inputs()
    assert before.calibration.tokens.keys() == {"spectral_wcs"}
    [product] = [p for p in first if p.detector == 3]
    with fits.open(product.path, mode="update") as hdus:
        hdus["CWAVE"].data[0, 0] *= 1.0001
        hdus["CWAVE"].header["COMMENT"] = "another file"
        for hdu in hdus:
            for name in ("CHECKSUM", "DATASUM"):
                hdu.header.remove(name, ignore_missing=True)
    after = find_inputs()
    recipes = [(before.find_recipe(one), after.find_recipe(one)) for one in both.observations]
    assert [then == now for then, now in recipes] == [False, False, True]
    [difference] = recipes[0][1].compare(recipes[0][0])
    assert difference.startswith("wavelength: product was ['cal-swcs-v5-2026-191', ")


def test_a_run_without_psf_writes_the_old_columns_and_layouts_do_not_mix(
    calibrated, make_config, client, tmp_path
):
    ra, dec, ids = (getattr(calibrated.catalogue, name) for name in ("ra", "dec", "target_id"))
    simulated.write_catalogue(tmp_path / "sources.csv", ids.to_pylist(), ra, dec)
    config = make_config(photometry=PhotometryConfig(psf="none"))
    pipeline = BatchPipeline(config, client=client)
    summary = pipeline.run_all()
    assert summary.failed == {}
    assert set(summary.stages["query"].products) == TOKENS.keys() - {"epsf"}
    folder = output_of(pipeline)
    assert tuple(read_per_image(folder.per_image).columns) == APERTURE_ONLY.per_image
    for curve in folder.lightcurves.iterdir():
        header = curve.read_text().partition("\n")[0]
        assert tuple(header.split(",")) == APERTURE_ONLY.light_curve
    assert summary.stages["aggregate"].rows == summary.stages["extract"].rows > 20
    again = BatchPipeline(config, client=client).run_all()
    assert again.stages["extract"].reused == 2
    # A table of a run with PSF fluxes among the others.
    with_psf = measure(calibrated, make_config(), prepare(make_config(calibration="frame"), []), 0,
                       tmp_path / "psf")  # fmt: skip
    assert tuple(with_psf.columns) == WITH_PSF.per_image
    name = table_name(calibrated.exposures[0].filename, "csv")
    mixed = RunFolder(tmp_path / "mixed")
    for each in (mixed.per_image, mixed.lightcurves, mixed.state):
        each.make()
    for table in folder.per_image.iterdir():
        (tmp_path / "mixed" / "per_image" / table.name).write_bytes(table.read_bytes())
    (tmp_path / "mixed" / "per_image" / name).write_bytes((tmp_path / "psf" / name).read_bytes())
    with pytest.raises((FrameError, RunFolderError), match="per-image table"):
        BatchPipeline(make_config(output_dir=tmp_path / "mixed"), client=client).run_aggregate()


def test_contaminants_change_the_fluxes_of_their_neighbours(calibrated, make_config):
    """Of two blended sources one is in the catalogue, the other a contaminant."""
    frame = open_frame(calibrated.paths[1])
    everything = calibrated.catalogue
    near = everything.within(*frame.bounding_circle)
    alone = measure_catalogue(frame, everything, near, PhotometryConfig()).columns
    row = int(np.argmax(alone["psf_flux"]))
    ra, dec = alone["ra"][row], alone["dec"][row]
    # A source without flux a pixel from the brightest, the light of which it seems to have.
    shifted = make_catalogue(["faint"], [ra], [dec + 6.2 / 3600])

    def flux_of_faint(contaminants):
        found = measure_catalogue(
            frame, shifted, np.array([0]), PhotometryConfig(), contaminants=contaminants
        )
        assert found.columns["target_id"].to_pylist() == ["faint"]
        return found.columns["psf_flux"][0]

    bright = alone["psf_flux"][row]
    # Without the bright one as a contaminant, its light is taken for that of the faint one.
    assert flux_of_faint(None) > 0.1 * bright
    assert abs(flux_of_faint(everything)) < 0.03 * bright


def test_sources_are_measured_where_they_are_at_the_time_of_the_frame(calibrated):
    frame = open_frame(calibrated.paths[1])
    plain = calibrated.catalogue
    n = len(plain)
    motions = {
        "pmra": np.linspace(-3000, 3000, n),
        "pmdec": np.linspace(2000, -1000, n),
        "ref_epoch": np.full(n, 2016.0),
    }
    ids, ra, dec = plain.target_id.to_pylist(), plain.ra, plain.dec
    moving = make_catalogue(ids, ra, dec, motions)
    found = measure_catalogue(
        frame, moving, moving.within(*frame.bounding_circle), PhotometryConfig()
    ).columns
    row = {target: i for i, target in enumerate(moving.target_id.to_pylist())}
    index = [row[target] for target in found["target_id"].to_pylist()]
    assert len(index) > 10
    start = SkyCoord(
        moving.ra[index] * u.deg,
        moving.dec[index] * u.deg,
        pm_ra_cosdec=moving.pmra[index] * u.mas / u.yr,
        pm_dec=moving.pmdec[index] * u.mas / u.yr,
        distance=20 * u.pc,
        obstime=Time(2016.0, format="jyear", scale="tdb"),
    )
    expected = start.apply_space_motion(Time(frame.mjd, format="mjd", scale="utc"))
    there = SkyCoord(found["ra"] * u.deg, found["dec"] * u.deg)
    assert there.separation(SkyCoord(expected.ra, expected.dec)).to_value(u.mas).max() < 1.0
    moved = there.separation(SkyCoord(start.ra, start.dec)).to_value(u.arcsec)
    assert moved.max() > 10
    x, y = frame.wcs.sky_to_pixel(found["ra"], found["dec"])
    np.testing.assert_array_equal((found["x"], found["y"]), (x, y))


def test_barycentric_times_against_astropy(calibrated):
    frame = open_frame(calibrated.paths[1])
    # Sources of the field have the same delay of nearly nothing, so the same pixels elsewhere.
    frame = replace(frame, wcs=replace(frame.wcs, crval=np.array([90.0, 20.0])))
    x, y = (a.ravel() for a in np.meshgrid([40.0, 120.0, 200.0], [40.0, 120.0, 200.0]))
    ra, dec = frame.wcs.pixel_to_sky(x, y)
    catalogue = make_catalogue([str(i) for i in range(9)], ra, dec)
    near = catalogue.within(*frame.bounding_circle)
    found = measure_catalogue(frame, catalogue, near, PhotometryConfig()).columns
    assert len(found["bjd_tdb"]) == 9
    # From the centre of the Earth; the orbit is 0.03 s of light away at most.
    center = EarthLocation.from_geocentric(0, 0, 0, u.m)
    time = Time(frame.mjd, format="mjd", scale="utc", location=center)
    sky = SkyCoord(found["ra"] * u.deg, found["dec"] * u.deg)
    with iers.conf.set_temp("auto_download", False):
        delay = time.light_travel_time(sky, ephemeris="builtin").to_value(u.s)
    assert delay.min() > 450
    got = (found["bjd_tdb"] - time.tdb.jd) * 86400
    np.testing.assert_allclose(got, delay, rtol=0, atol=0.04)
