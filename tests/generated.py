"""The output folder of a run that never was: tables of made-up numbers, of any size, quickly.

Fluxes follow a power law of the wavelength, and scatter by the errors that they state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from spxdask import BatchConfig
from spxdask.archive.observation import Observation
from spxdask.run.folder import RunFolder
from spxdask.run.ledger import Outcome
from spxdask.run.plan import MeasurementInputs, table_name
from spxdask.run.query_summary import Field
from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import Circle, pack_footprint
from spxdask.tables.per_image import encode_rows, hash_table

BAND_LIMITS_UM = ((0.75, 1.1), (1.11, 1.64), (1.65, 2.41), (2.43, 3.81), (3.82, 4.41), (4.42, 5.0))
BLOOM, SOURCE = 1 << 26, 1 << 21
CENTER = (270.0, 66.56)


def make_run(
    path: Path,
    *,
    n_frames: int,
    n_sources: int,
    rows_per_frame: int | None = None,
    ids: list[str] | None = None,
    table_format: str = "csv",
    failed: dict[int, str] | None = None,
    early_scale: float = 1.0,
    scatter: float = 1.0,
    shifts: dict[str, tuple[float, float]] | None = None,
    seed: int = 1,
) -> RunFolder:
    """Make a folder as a run leaves it before light curves are made.

    Frames are in six bands and two releases; each has the next `rows_per_frame` sources, without
    the last one of the catalogue. `failed` are reasons by number of the frame. The fluxes of
    releases before QR3 are multiplied by `early_scale`, and scatter by `scatter` times the
    errors that they state. `shifts` are offsets of stars by band, pixels.
    """
    rng = np.random.default_rng(seed)
    ids = ids if ids is not None else [f"s{i}" for i in range(n_sources)]
    ra = CENTER[0] + rng.uniform(-1, 1, n_sources)
    dec = CENTER[1] + rng.uniform(-0.5, 0.5, n_sources)
    catalogue = Catalogue.from_arrays(pa.array(ids, pa.large_string()), ra, dec)
    config = BatchConfig(
        catalog_path=str(path / "sources.csv"),
        center_ra=CENTER[0],
        center_dec=CENTER[1],
        radius=0.5,
        output_dir=str(path),
        per_image_format=table_format,
        calibration="frame",
    )
    folder = RunFolder(config.output_dir)
    observations = [_make_observation(i, n_frames) for i in range(n_frames)]
    inputs = MeasurementInputs(photometry=config.photometry, catalogue=catalogue)
    amplitude = 10 ** rng.uniform(2.0, 4.5, n_sources)
    n_rows = rows_per_frame or n_sources - 1
    with folder.locked():
        circle = Field(mode="circle", circles=[Circle(*CENTER, 0.5)], n_sources=n_sources)
        folder.save_query(observations, config, circle, "0", [False] * n_frames)
        folder.save_config(config)
        folder.save_catalogue(catalogue)
        for number, observation in enumerate(observations):
            recipe = inputs.find_recipe(observation)
            folder.ledger.add_recipe(recipe.digest, recipe.steps)
            outcome = {"stage": "extract", "filename": observation.filename}
            if reason := (failed or {}).get(number):
                folder.ledger.add(Outcome(**outcome, status="failed", reason=reason))
                continue
            source = (number * n_rows + np.arange(n_rows)) % (n_sources - 1)
            scale = early_scale if observation.is_early else 1.0
            columns = _make_columns(
                rng, observation, source, catalogue, amplitude[source], scale, scatter
            )
            content = encode_rows(columns, table_format)
            folder.per_image.put(table_name(observation.filename, table_format), content)
            folder.ledger.add(
                Outcome(
                    **outcome,
                    status="done",
                    rows=n_rows,
                    bytes=len(content),
                    checksum=hash_table(content),
                    frame_bytes=72_000_000,
                    seconds=0.25,
                    skipped={"too few pixels for the background": 2},
                    properties={
                        "mjd": observation.mjd,
                        "zodi_scale": 1.08 + 0.001 * rng.normal(),
                        "is_zodi_fitted": True,
                        "aperture_radius": 1.2,
                        "psf": "epsf product",
                        "n_sources": n_rows,
                        "background": 0.01 * rng.normal(),
                        "background_scatter": 0.01,
                        **_describe_offsets(number, (shifts or {}).get(observation.band, (0, 0))),
                    },
                    **inputs.identify(observation),
                )
            )
        folder.ledger.flush()
    return folder


def _describe_offsets(number: int, shift: tuple[float, float]) -> dict[str, float]:
    """Return the offset of a frame, which differs from the shift by a hundredth of a pixel."""
    angle = 2.4 * number
    return {
        "astrometry_stars": 20,
        "astrometry_dx": shift[0] + 0.01 * np.cos(angle),
        "astrometry_dy": shift[1] + 0.01 * np.sin(angle),
        "astrometry_scatter": 0.03,
        "astrometry_error": 0.02,
    }


def _make_observation(number: int, n_frames: int) -> Observation:
    band = 1 + number % 6
    release, version = ("qr2", "v21-2025-354") if number < n_frames / 2 else ("qr3", "v30-2026-090")
    obs_id = f"2025W51_1A_{number:04d}_1"
    name = f"level2_{obs_id}D{band}_spx_l2b-{version}.fits"
    ra, dec = CENTER[0], CENTER[1] + 0.3 * np.sin(number)
    corners = [ra - 4, dec - 1.7, ra + 4, dec - 1.7, ra + 4, dec + 1.7, ra - 4, dec + 1.7]
    uri = f"ibe/data/spherex/{release}/level2/{name}"
    return Observation(
        obs_id=obs_id,
        band=f"D{band}",
        mjd=61000.0 + 180.0 * number / n_frames,
        wavelength_um=float(np.mean(BAND_LIMITS_UM[band - 1])),
        uri=uri,
        download_url=f"https://127.0.0.1/{uri}",
        size_bytes=72_000_000,
        footprint=pack_footprint(np.array(corners)),
    )


def _make_columns(
    rng: np.random.Generator,
    observation: Observation,
    source: np.ndarray,
    catalogue: Catalogue,
    amplitude: np.ndarray,
    scale: float,
    scatter: float,
) -> dict:
    """Return a table; one row in ten has the flag BLOOM."""
    n = len(source)
    low, high = BAND_LIMITS_UM[int(observation.band[1]) - 1]
    wavelength = rng.uniform(low, high, n)
    true = scale * amplitude * wavelength**-0.5
    error = 3.0 + 0.003 * true
    psf_flux = true + scatter * error * rng.normal(size=n)
    aperture = 0.8 * (true + scatter * error * rng.normal(size=n))
    flag = np.where(np.arange(n) % 10 == 0, BLOOM | SOURCE, SOURCE)
    return {
        "target_id": catalogue.target_id.take(pa.array(source)),
        "ra": catalogue.ra[source],
        "dec": catalogue.dec[source],
        "obs_id": observation.obs_id,
        "band": observation.band,
        "mjd": observation.mjd,
        "x": rng.uniform(30, 2000, n),
        "y": rng.uniform(30, 2000, n),
        "flux": aperture,
        "flux_error": 0.8 * error,
        "mag_ab": np.full(n, 15.0),
        "mag_ab_error": np.full(n, 0.1),
        "wavelength": wavelength,
        "bandwidth": wavelength / 40,
        "flag": flag,
        "bg_level": rng.normal(size=n) * 0.01,
        "bg_error": np.full(n, 0.001),
        "aperture_radius": 1.2,
        "filename": observation.filename,
        "aperture_correction": np.full(n, 1.25),
        "psf_flux": psf_flux,
        "psf_flux_error": error,
        "psf_chi2": np.ones(n),
        "psf_fraction": np.ones(n),
        "neighbour_flux": np.zeros(n),
        "bad_fraction": np.zeros(n),
        "bjd_tdb": np.full(n, observation.mjd + 2400000.5),
    }
