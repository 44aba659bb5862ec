"""The numbers of a report: what `report.json` has, and what only figures need."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from spxdask import __version__
from spxdask.archive.observation import EARLY_RELEASES
from spxdask.archive.urls import strip_credentials
from spxdask.config import BatchConfig
from spxdask.errors import RunFolderError
from spxdask.report import statistics
from spxdask.report.channels import BANDS, list_channels
from spxdask.report.frames import FrameRecord, collect_frames, describe_frames
from spxdask.report.tables import Table, Tally, TallyOptions, read_tables
from spxdask.report.verdict import judge
from spxdask.run.aggregation import AggregationRecord, choose_query_tables, load_aggregation
from spxdask.run.calibration import load_calibration
from spxdask.run.folder import CATALOGUE_PREFIX, RunFolder
from spxdask.run.observations import Observations
from spxdask.run.plan import MeasurementInputs, TableChoice, table_name
from spxdask.run.query_summary import QUERY_SUMMARY_NAME, load_query_summary
from spxdask.science.catalogue import Catalogue
from spxdask.science.flags import FLAGS

__all__ = ["FORMAT", "Drawing", "SampleSpectrum", "collect_numbers"]

# Raised when keys of report.json change their meaning.
FORMAT = 1
# Rows of single sources in memory at once; where there are more, every k-th source is taken.
MAX_SAMPLE_ROWS = 2_000_000
N_SPECTRA = 12
MAGNITUDE_STEP = 0.5
# A flux is bright where it is this many times its error.
BRIGHT_SNR = 20.0
MAX_POINTS = 3000
CITATION = {
    "acknowledgment": (
        "This publication makes use of data products from the Spectro-Photometer for the History "
        "of the Universe, Epoch of Reionization and Ices Explorer (SPHEREx), which is a joint "
        "project of the Jet Propulsion Laboratory and the California Institute of Technology, and "
        "is funded by the National Aeronautics and Space Administration."
    ),
    "qr2": "https://doi.org/10.26131/IRSA652",
    "qr3": "https://doi.org/10.26131/IRSA662",
}


@dataclass(frozen=True, kw_only=True)
class SampleSpectrum:
    """All good fluxes of a source.

    Attributes
    ----------
    target_id : str
    ra, dec : float
        ICRS, deg.
    measure : str
        Which total flux: a key of `MEASURES`.
    band : (n,) int array
    wavelength, flux, error : (n,) float array
        In um and uJy.
    """

    target_id: str
    ra: float
    dec: float
    measure: str
    band: np.ndarray
    wavelength: np.ndarray
    flux: np.ndarray
    error: np.ndarray


@dataclass(kw_only=True)
class Drawing:
    """What figures need besides the numbers of `report.json`.

    Attributes
    ----------
    record : FrameRecord
        The frames.
    catalogue : Catalogue or None
        The sources.
    triplets : dict of str to (3, n) array
        By measure and source: magnitude, rms divided by the flux, and chi^2.
    measures : Ratios or None
        PSF fluxes divided by aperture-corrected ones.
    releases : dict of str to Ratios
        By the names of two releases, such as ``qr2 / qr3``.
    spectra : list of SampleSpectrum
    """

    record: FrameRecord
    catalogue: Catalogue | None = None
    triplets: dict[str, np.ndarray] = field(default_factory=dict)
    measures: statistics.Ratios | None = None
    releases: dict[str, statistics.Ratios] = field(default_factory=dict)
    spectra: list[SampleSpectrum] = field(default_factory=list)


def collect_numbers(folder: RunFolder, scheduler: Any = None) -> tuple[dict[str, Any], Drawing]:
    """Read the folder of a run, and compute what its report says.

    Parameters
    ----------
    folder : RunFolder
        The run; nothing in it is changed.
    scheduler : optional
        Where large tables are read; see `read_tables`.

    Returns
    -------
    numbers : dict
        The content of `report.json`; numbers that are not known are None.
    drawing : Drawing
        What figures need besides.

    Raises
    ------
    RunFolderError
        If it is not the output folder of a run.
    """
    config = folder.saved_config()
    folder.ledger.refresh()
    observations = folder.load_observations(config) if folder.has_query() else None
    catalogue = folder.saved_catalogue()
    sources = None if config.fetches_empty_frames else catalogue
    record = collect_frames(folder, observations, sources)
    choice = _choose_tables(folder, config, observations, catalogue)
    releases = sorted(set(record.frames["release"].dropna()))
    tally, stride = _tally(folder, config, record, choice, catalogue, releases, scheduler)
    drawing = Drawing(record=record, catalogue=catalogue)

    frames = describe_frames(record, folder.path)
    aggregation = load_aggregation(folder.state)
    rows = _describe_rows(tally, choice)
    numbers: dict[str, Any] = {
        "format": FORMAT,
        "made_of": identify(folder, config),
        "run": _describe_run(folder, config, observations, catalogue, record, frames),
        "frames": frames,
        "rows": rows | {"sources_left_out": frames.pop("sources_left_out")},
        "coverage": _describe_coverage(tally),
        "light_curves": {
            "is_up_to_date": aggregation is not None,
            "n": aggregation.n_light_curves if aggregation else None,
            "rows": aggregation.n_rows if aggregation else None,
        },
        "checks": _check(tally, stride, catalogue, releases, drawing),
        "missing_sources": _list_missing(tally, catalogue),
        "configuration": _describe_config(config),
        "calibration": {
            "asked_for": config.calibration,
            "used": frames.pop("calibration"),
            "missing": _find_missing_products(folder, config),
            "psf": frames.pop("psf"),
        },
        "timings": _describe_timings(record, aggregation),
        "citation": CITATION,
    }
    numbers["verdict"] = judge(numbers)
    return numbers, drawing


def identify(folder: RunFolder, config: BatchConfig) -> dict[str, Any]:
    """Return what the report of a folder depends on, as far as it is quickly known.

    Parameters
    ----------
    folder : RunFolder
        The run; its ledger is up to date.
    config : BatchConfig
        Its saved configuration.

    Returns
    -------
    dict
        Equal for reports that would be the same.
    """
    aggregation = load_aggregation(folder.state)
    query_time = None
    if folder.has_query() and (found := folder.load_observations(config)) is not None:
        query_time = found.query_time
    options = hashlib.blake2b(repr(_describe_config(config)).encode(), digest_size=16)
    catalogues = [n for n in folder.state.list_sizes() if n.startswith(CATALOGUE_PREFIX)]
    return {
        "format": FORMAT,
        "spxdask": __version__,
        "ledger": folder.ledger.position,
        "query_time": query_time,
        "catalogue": sorted(catalogues),
        "tables": None if aggregation is None else aggregation.tables,
        "light_curves": None if aggregation is None else aggregation.files,
        "configuration": options.hexdigest(),
    }


def _choose_tables(
    folder: RunFolder,
    config: BatchConfig,
    observations: Observations | None,
    catalogue: Catalogue | None,
) -> TableChoice:
    """Choose the tables that light curves are made of, or would be."""
    table_format = config.per_image_format
    sizes = folder.per_image.list_sizes()
    if observations is None:
        end = table_name("", table_format)
        names = sorted(name for name in sizes if name.endswith(end))
        return TableChoice(tables=[(name, sizes[name], 0, None, "") for name in names])
    inputs = MeasurementInputs(
        photometry=config.photometry,
        catalogue=catalogue,
        calibration=load_calibration(folder.state, config),
        contaminants=folder.saved_contaminants(),
    )
    return choose_query_tables(folder, config, observations, inputs)


def _tally(
    folder: RunFolder,
    config: BatchConfig,
    record: FrameRecord,
    choice: TableChoice,
    catalogue: Catalogue | None,
    releases: Sequence[str],
    scheduler: Any,
) -> tuple[Tally, int]:
    """Read the tables; return their tally, and of which sources it has the rows."""
    if catalogue is None:
        return Tally.make_empty(0), 1
    numbers = {name: i for i, name in enumerate(releases)}
    frames = record.frames
    release_of = {
        table_name(filename, config.per_image_format): numbers.get(release, -1)
        for filename, release in zip(frames["filename"], frames["release"], strict=True)
    }
    tables = [
        Table(name=name, bytes=size, release=release_of.get(name, -1))
        for name, size, *_ in choice.tables
    ]
    n_rows = sum(rows for _, _, rows, *_ in choice.tables)
    stride = max(1, -(-n_rows // MAX_SAMPLE_ROWS))
    options = TallyOptions(
        per_image=str(folder.per_image),
        catalogue=folder.state.path_to(f"{CATALOGUE_PREFIX}{catalogue.identity}.arrow"),
        stride=stride,
    )
    return read_tables(tables, options, scheduler), stride


def _describe_run(
    folder: RunFolder,
    config: BatchConfig,
    observations: Observations | None,
    catalogue: Catalogue | None,
    record: FrameRecord,
    frames: dict[str, Any],
) -> dict[str, Any]:
    region: dict[str, Any] = {}
    if folder.root.exists(QUERY_SUMMARY_NAME):
        try:
            region = load_query_summary(folder.root.path_to(QUERY_SUMMARY_NAME)).get("region", {})
        except RunFolderError:
            region = {}
    return {
        "output": folder.path,
        "region": region or {"mode": config.region},
        "catalogue": None if config.catalog_path is None else str(config.catalog_path),
        "target": config.target,
        "contaminants": config.contaminants_path,
        "n_sources": 0 if catalogue is None else len(catalogue),
        "skipped_catalogue_rows": folder.count_skipped_rows(),
        "query_time": None if observations is None else observations.query_time,
        "first_mjd": frames.pop("first_mjd"),
        "last_mjd": frames.pop("last_mjd"),
        "first_outcome": record.first_time,
        "last_outcome": record.last_time,
        "versions": {
            "spxdask": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
    }


def _describe_config(config: BatchConfig) -> dict[str, Any]:
    options = config.to_dict()
    return {
        name: strip_credentials(value) if isinstance(value, str) and "://" in value else value
        for name, value in options.items()
    }


def _find_missing_products(folder: RunFolder, config: BatchConfig) -> dict[str, str]:
    calibration = load_calibration(folder.state, config)
    return {} if calibration is None else dict(sorted(calibration.missing.items()))


def _describe_rows(tally: Tally, choice: TableChoice) -> dict[str, Any]:
    flags = {flag.bit: flag for flag in FLAGS}
    found = []
    for bit, count in enumerate(tally.flags.tolist()):
        flag = flags.get(bit)
        if count or flag is not None:
            found.append(
                {
                    "name": flag.name if flag else f"BIT{bit}",
                    "bit": bit,
                    "meaning": flag.meaning if flag else "a bit without a name",
                    "rejects": bool(flag and flag.rejects),
                    "rows": count,
                    "fraction": count / tally.rows if tally.rows else None,
                }
            )
    found.sort(key=lambda flag: (-flag["rows"], flag["bit"]))
    return {
        "tables": tally.n_tables,
        "tables_not_read": dict(sorted(tally.unreadable.items())),
        "stale_tables": len(choice.stale),
        "stale_reason": choice.stale_reason or None,
        "total": tally.rows,
        "with_flux": tally.with_flux,
        "with_psf_flux": tally.with_psf_flux,
        "good": tally.good,
        "rejected_by_flags": tally.rejected,
        "of_unknown_sources": tally.unknown,
        "flags": found,
    }


def _describe_coverage(tally: Tally) -> dict[str, Any]:
    all_rows, good = (counts.reshape(-1).tolist() for counts in tally.channels)
    channels = [
        {"band": band, "channel": number, "wavelength": round(centre, 4), "rows": n, "good": m}
        for (band, number, centre), n, m in zip(list_channels(), all_rows, good, strict=True)
    ]
    bands = []
    for band, counts in zip(BANDS, tally.per_source, strict=True):
        has_row = counts[counts > 0]
        if len(has_row):
            bands.append(
                {
                    "band": band,
                    "sources": len(has_row),
                    "rows": int(has_row.sum()),
                    "median_rows_per_source": float(np.median(has_row)),
                    "max_rows_per_source": int(has_row.max()),
                }
            )
    per_source = tally.per_source.sum(axis=0)
    numbers, sources = np.unique(per_source, return_counts=True)
    return {
        "channels": channels,
        "covered_channels": sum(n > 0 for n in all_rows),
        "bands": bands,
        "rows_per_source": [
            {"rows": n, "sources": m}
            for n, m in zip(numbers.tolist(), sources.tolist(), strict=True)
        ],
        "median_rows_per_source": float(np.median(per_source)) if len(per_source) else None,
    }


def _list_missing(tally: Tally, catalogue: Catalogue | None) -> dict[str, Any]:
    if catalogue is None:
        return {"n": 0, "ids": []}
    index = np.flatnonzero(tally.per_source.sum(axis=0) == 0)
    # In the order of the user's file.
    index = index[np.argsort(catalogue.row[index], kind="stable")]
    return {"n": len(index), "ids": catalogue.target_id.take(pa.array(index)).to_pylist()}


def _describe_timings(record: FrameRecord, aggregation: AggregationRecord | None) -> dict[str, Any]:
    return {
        "download_seconds": round(record.seconds["download"], 3),
        "extract_seconds": round(record.seconds["extract"], 3),
        "aggregate_seconds": aggregation.seconds if aggregation else None,
        "bytes_fetched": record.bytes_fetched,
        "bytes_of_tables": record.bytes_written,
    }


def _check(
    tally: Tally,
    stride: int,
    catalogue: Catalogue | None,
    releases: Sequence[str],
    drawing: Drawing,
) -> dict[str, Any]:
    """Check the numbers by themselves; fill the drawing with what figures need."""
    rows = statistics.isolate(tally.sample)
    has_psf = bool(np.isfinite(rows["psf_flux"]).any())
    measures = list(statistics.MEASURES) if has_psf else ["aperture"]
    errors = {}
    for measure in measures:
        errors[measure], drawing.triplets[measure] = _check_errors(rows, measure)
    if has_psf:
        drawing.measures = statistics.compare_measures(rows)
    pairs = [
        (one, other)
        for one in releases
        for other in releases
        if one in EARLY_RELEASES and other not in EARLY_RELEASES
    ]
    ratios = {}
    for one, other in pairs:
        name = f"{one} / {other}"
        found = statistics.compare_releases(
            rows, measures[0], releases.index(one), releases.index(other)
        )
        if len(found.ratio):
            drawing.releases[name] = found
            ratios[name] = statistics.describe_ratios(found)
    if catalogue is not None:
        drawing.spectra = _choose_spectra(rows, catalogue, measures[0])
    return {
        "every_nth_source": stride,
        "rows": len(tally.sample["source"]),
        "rows_of_isolated_sources": len(rows["source"]),
        "errors": errors,
        "psf_over_aperture": (
            [] if drawing.measures is None else statistics.describe_ratios(drawing.measures)
        ),
        "releases": ratios,
    }


def _check_errors(rows: statistics.Rows, measure: str) -> tuple[dict[str, Any], np.ndarray]:
    """Compare the scatter of fluxes with their errors, by magnitude; also return it by source."""
    triplets = statistics.find_triplets(rows, measure)
    magnitude = statistics.to_magnitude(triplets.flux)
    with np.errstate(invalid="ignore"):
        is_bright = np.isfinite(magnitude) & (triplets.error * BRIGHT_SNR < triplets.flux)
    number = np.floor(np.nan_to_num(magnitude, nan=-99.0) / MAGNITUDE_STEP)
    bins = [
        {
            "magnitude": [float(one) * MAGNITUDE_STEP, float(one + 1) * MAGNITUDE_STEP],
            **_summarise_errors(triplets, number == one),
        }
        for one in np.unique(number[np.isfinite(magnitude)])
    ]
    found = {
        "flux": statistics.MEASURES[measure],
        # The scatter of sources of all magnitudes together would be that of the faintest.
        "bright": _summarise_errors(triplets, is_bright) | {"rms": None},
        "by_magnitude": bins,
    }
    _, _, means = statistics.summarise_by(
        triplets.source, triplets.flux, triplets.scatter**2, triplets.residual**2
    )
    flux, scatter, chi2 = means
    with np.errstate(invalid="ignore", divide="ignore"):
        return found, np.array([statistics.to_magnitude(flux), np.sqrt(scatter) / flux, chi2])


def _summarise_errors(triplets: statistics.Triplets, which: np.ndarray) -> dict[str, Any]:
    """Compare scatter and errors of some fluxes, robustly, and by the mean chi^2 as well."""
    n = int(which.sum())
    if not n:
        return {"sources": 0, "fluxes": 0, "rms": None, "error": None, "chi2": None}
    flux, residual = triplets.flux[which], triplets.residual[which]
    return {
        "sources": len(np.unique(triplets.source[which])),
        "fluxes": n,
        "rms": statistics.find_scatter(triplets.scatter[which] / flux),
        "error": float(np.median(triplets.error[which] / flux)),
        "chi2": statistics.find_scatter(residual) ** 2,
        "mean_chi2": float(np.mean(residual**2)),
    }


def _choose_spectra(
    rows: statistics.Rows, catalogue: Catalogue, measure: str
) -> list[SampleSpectrum]:
    """Choose well covered sources, from bright to faint."""
    flux, error = statistics.measure_total(rows, measure)
    kept = np.isfinite(flux) & (error > 0)
    source, flux, error = rows["source"][kept].astype(np.int64), flux[kept], error[kept]
    band, wavelength = rows["band"][kept].astype(np.int64), rows["wavelength"][kept]
    sources, counts, (mean,) = statistics.summarise_by(source, flux)
    well_covered = np.flatnonzero(counts >= 0.6 * counts.max()) if len(counts) else counts
    if not len(well_covered):
        return []
    by_brightness = well_covered[np.argsort(-mean[well_covered], kind="stable")]
    places = np.linspace(0, len(by_brightness) - 1, min(N_SPECTRA, len(by_brightness)))
    found = []
    for one in sources[by_brightness[np.round(places).astype(int)]].tolist():
        which = np.flatnonzero(source == one)
        which = which[np.argsort(wavelength[which], kind="stable")]
        found.append(
            SampleSpectrum(
                target_id=catalogue.target_id[one].as_py(),
                ra=float(catalogue.ra[one]),
                dec=float(catalogue.dec[one]),
                measure=measure,
                band=band[which],
                wavelength=wavelength[which].astype(np.float64),
                flux=flux[which],
                error=error[which],
            )
        )
    return found
