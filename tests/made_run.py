"""Output folders of runs, written without a pipeline: for what reads them, and for benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from spxdask import BatchConfig
from spxdask.archive.observation import Observation
from spxdask.run.aggregation import AggregationRecord, save_aggregation
from spxdask.run.folder import RunFolder
from spxdask.run.ledger import Outcome
from spxdask.run.query_summary import Field
from spxdask.science.catalogue import Catalogue
from spxdask.science.channels import BANDS, PUBLISHED_CHANNELS
from spxdask.science.footprint import Circle, pack_footprint
from spxdask.storage import file_stem
from spxdask.tables.csv import render_header, render_lines, slice_lines
from spxdask.tables.parquet import encode_parquet
from spxdask.tables.schema import APERTURE_ONLY, SCHEMA, WITH_PSF

CENTER = (270.0, 66.56)
MJD = 61027.0
# Of the total flux of a source, the part in the aperture.
IN_APERTURE = 0.8
# Edge of a frame, deg.
FRAME_DEG = 3.5


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points of one source: band from 0, wavelength in um, MJD, total flux and its error in uJy."""

    band: np.ndarray
    wavelength: np.ndarray
    mjd: np.ndarray
    flux: np.ndarray
    error: np.ndarray
    flag: np.ndarray | int = 0


def make_points(
    rng: np.random.Generator,
    n: int,
    spectrum: Callable[[np.ndarray], np.ndarray],
    *,
    snr: float = 30.0,
    variability: Callable[[np.ndarray], np.ndarray] = np.ones_like,
    bands: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    flag: np.ndarray | int = 0,
) -> Points:
    """Observe a source at random wavelengths and times, with noise."""
    channel = rng.choice(np.flatnonzero(np.isin(PUBLISHED_CHANNELS.band, bands)), n)
    low, high = PUBLISHED_CHANNELS.wavelength_min, PUBLISHED_CHANNELS.wavelength_max
    wavelength = rng.uniform(low[channel] + 0.005, high[channel] - 0.005)
    mjd = MJD + np.sort(rng.uniform(0.0, 400.0, n))
    true = spectrum(wavelength) * variability(mjd)
    error = np.abs(spectrum(wavelength)) / snr
    return Points(
        band=PUBLISHED_CHANNELS.band[channel],
        wavelength=wavelength,
        mjd=mjd,
        flux=true + error * rng.standard_normal(n),
        error=error,
        flag=flag,
    )


def make_rows(points: Points, *, with_psf: bool = True, release: str = "qr3") -> pa.Table:
    """Return the rows of a light curve."""
    n = len(points.flux)
    flux, error = IN_APERTURE * points.flux, IN_APERTURE * points.error
    positive = flux > 0
    columns = {
        "obs_id": [f"2025W51_1A_{i:04d}_1" for i in range(n)],
        "band": [BANDS[i] for i in points.band.tolist()],
        "mjd": points.mjd,
        "x": np.full(n, 1000.0),
        "y": np.full(n, 1000.5),
        "flux": flux,
        "flux_error": error,
        "mag_ab": np.where(positive, 23.9 - 2.5 * np.log10(np.where(positive, flux, 1)), np.nan),
        "mag_ab_error": np.where(positive, 1.0857 * error / np.where(positive, flux, 1), np.nan),
        "wavelength": points.wavelength,
        "bandwidth": points.wavelength / 41,
        "flag": np.broadcast_to(np.asarray(points.flag, np.int64), n),
        "bg_level": np.full(n, 0.1),
        "bg_error": np.full(n, 0.01),
        "aperture_radius": np.full(n, 1.5),
        "aperture_correction": np.full(n, 1 / IN_APERTURE),
        "psf_flux": points.flux,
        "psf_flux_error": points.error,
        "psf_chi2": np.full(n, 1.1),
        "psf_fraction": np.full(n, 1.0),
        "neighbour_flux": np.zeros(n),
        "bad_fraction": np.zeros(n),
        "bjd_tdb": points.mjd + 2400000.5 + 0.004,
        "filename": [f"level2_{i}.fits" for i in range(n)],
        "release": [release] * n,
    }
    names = (WITH_PSF if with_psf else APERTURE_ONLY).light_curve
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.table({name: columns[name] for name in names}, schema=schema)


def make_observation(number: int, *, release: str = "qr3", shift_deg: float = 0.0) -> Observation:
    """Return a frame of the field, of another band for each number."""
    band = BANDS[number % 6]
    name = f"level2_2025W51_1A_{number:04d}_1{band}_spx_l2b-v30-2026-090.fits"
    ra, dec, half = CENTER[0], CENTER[1] + shift_deg, FRAME_DEG / 2
    wide = half / np.cos(np.radians(dec))
    corners = [ra - wide, dec - half, ra + wide, dec - half, ra + wide, dec + half, ra - wide]
    return Observation(
        obs_id=f"2025W51_1A_{number:04d}_1",
        band=band,
        mjd=MJD + number,
        wavelength_um=2.0,
        uri=f"ibe/data/spherex/{release}/level2/2025W51/l2b-v30-2026-090/{band[1]}/{name}",
        download_url="",
        size_bytes=72_000_000,
        footprint=pack_footprint([*corners, dec + half]),
    )


def make_run(
    folder: Path | str,
    curves: Mapping[str, pa.Table],
    *,
    positions: Mapping[str, tuple[float, float]] | None = None,
    format: str = "csv",
    n_frames: int = 6,
    failed: Mapping[int, str] | None = None,
    pending: tuple[int, ...] = (),
    observations: list[Observation] | None = None,
    partitions: int = 3,
    **options,
) -> RunFolder:
    """Write the output folder of a run: state, and light curves of sources.

    `positions` are those of the whole catalogue; by default, of the sources with a light curve,
    0.01 deg from each other. `failed` and `pending` are numbers of frames.
    """
    run = RunFolder(folder)
    for store in (run.state, run.lightcurves, run.images, run.per_image):
        store.make()
    if positions is None:
        positions = {one: (CENTER[0], CENTER[1] + 0.01 * i) for i, one in enumerate(curves)}
    catalogue = Catalogue.from_arrays(
        pa.array(list(positions), pa.large_string()),
        np.array([ra for ra, _ in positions.values()]),
        np.array([dec for _, dec in positions.values()]),
    )
    config = BatchConfig(
        **{
            "catalog_path": str(run.state.path_to("sources.csv")),
            "center_ra": CENTER[0],
            "center_dec": CENTER[1],
            "radius": 1.0,
            "output_dir": str(folder),
            "lightcurve_format": format,
            "calibration": "frame",
            "keep_images": False,
        }
        | options
    )
    run.save_config(config)
    run.save_catalogue(catalogue)
    if observations is None:
        observations = [make_observation(number) for number in range(n_frames)]
    field = Field(mode="circle", circles=[Circle(*CENTER, 1.0)], n_sources=len(catalogue))
    is_empty = [False] * len(observations)
    run.save_query(observations, config, field, catalogue.fingerprint, is_empty)
    run.ledger.refresh()
    for number, observation in enumerate(observations):
        if number in pending:
            continue
        outcome = Outcome(
            stage="extract", filename=observation.filename, status="done", rows=len(curves)
        )
        if number in (failed or {}):
            outcome = dataclasses.replace(
                outcome, status="failed", rows=0, reason=(failed or {})[number]
            )
        run.ledger.add(outcome)
    run.ledger.flush()
    write_curves(run, curves, format, partitions)
    if curves:
        n_rows = sum(map(len, curves.values()))
        record = AggregationRecord(tables="", files="", n_light_curves=len(curves), n_rows=n_rows)
        save_aggregation(run.state, record)
    return run


def write_curves(
    run: RunFolder, curves: Mapping[str, pa.Table], format: str, partitions: int = 3
) -> None:
    """Write light curves as the aggregation does."""
    if format == "csv":
        for target_id, rows in curves.items():
            columns = {name: rows.column(name).combine_chunks() for name in rows.column_names}
            text = render_header(columns) + bytes(slice_lines(render_lines(columns)))
            run.lightcurves.put(f"{file_stem(target_id)}.csv", text)
        return
    for number in range(partitions if curves else 0):
        mine = sorted(list(curves)[number::partitions])
        tables = [
            curves[one].add_column(0, "target_id", pa.array([one] * len(curves[one])))
            for one in mine
        ]
        if tables:
            table = pa.concat_tables(tables).replace_schema_metadata({"sources": str(len(mine))})
            run.lightcurves.put(f"bucket-{number:05d}.parquet", encode_parquet(table))
