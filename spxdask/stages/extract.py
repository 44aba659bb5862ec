"""Extract: measure every catalogue source in every frame."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from spxdask.archive.calibration import Product, ProductSource, open_in_cache
from spxdask.archive.observation import is_level2_name, parse_filename
from spxdask.errors import (
    ArchiveError,
    DiskFullError,
    FrameError,
    InputError,
    MissingBytesError,
    MissingRowsError,
    StoreError,
)
from spxdask.run.ledger import Outcome
from spxdask.run.plan import table_name
from spxdask.run.recipe import FEW_ROWS_VERSION
from spxdask.science.astrometry import (
    DEFAULT_REF_EPOCH,
    Observer,
    find_bjd_tdb,
    locate_observer,
    move_to_epoch,
)
from spxdask.science.calibration import NO_CALIBRATION, DetectorCalibration, open_products
from spxdask.science.catalogue import Catalogue
from spxdask.science.level2.fits import verify
from spxdask.science.level2.frame import Frame, map_file, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import Measurement, find_needed_rows, measure
from spxdask.science.psf.offsets import Astrometry
from spxdask.stages.reading import RowRule
from spxdask.storage import Store, locate_file, open_store
from spxdask.tables.per_image import encode_rows, hash_table
from spxdask.tables.provenance import Provenance

logger = logging.getLogger(__name__)

_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What all tasks of the stage share.

    Attributes
    ----------
    catalogue : str
        A file written by `Catalogue.save`, which every worker maps.
    photometry : PhotometryConfig
        How a source is measured.
    recipe : str
        Digest of the recipe that these options stand for; see `spxdask.run.recipe`.
    catalogue_fingerprint : str
        That of the catalogue.
    serial : bool
        Measure one frame at a time in a process, however many threads it has. For the
        embedded cluster, whose workers have threads to spare for downloads.
    format : str
        Of the tables, ``csv`` or ``parquet``.
    products : tuple of Product
        Calibration products of the frame's detector.
    product_source : ProductSource or None
        Where a machine that does not have them fetches them.
    contaminants : str or None
        File of a catalogue whose sources get no rows.
    row_rule : RowRule or None
        Of which frames only the rows are used that their sources need, however the frames came.
    provenance : Provenance or None
        What tables in Parquet say of how they were made.
    """

    catalogue: str
    photometry: PhotometryConfig
    recipe: str
    catalogue_fingerprint: str
    serial: bool
    format: str = "csv"
    products: tuple[Product, ...] = ()
    product_source: ProductSource | None = None
    contaminants: str | None = None
    row_rule: RowRule | None = None
    provenance: Provenance | None = None


def extract(
    image: str, per_image: str, options: ExtractOptions, fetched: Outcome | None = None
) -> Outcome:
    """Measure one frame and write its table; the task of the extract stage.

    Parameters
    ----------
    image : str
        The frame, on disk or in a store.
    per_image : str
        Folder of the tables. The frame's appears in it whole, without rows when no source
        of the catalogue is on the frame.
    options : ExtractOptions
        What all tasks share.
    fetched : Outcome, optional
        That of the frame's download, which has checked its sums. They are checked here for a
        frame that came into the folder in another way.

    Returns
    -------
    Outcome
        ``failed`` with the reason for a frame that cannot be measured.

    Raises
    ------
    DiskFullError
        If there is no room for the table.
    """
    store, name = locate_file(image)
    measured = _extract(name, lambda: _open_stored(store, name, fetched), per_image, options)
    if fetched is not None and fetched.file_bytes == measured.frame_bytes:
        return list_outcomes(fetched, measured)[1]
    return measured


def list_outcomes(downloaded: Outcome, extracted: Outcome | None) -> list[Outcome]:
    """Return the outcomes of a frame, of which the second says what the first was of.

    Parameters
    ----------
    downloaded : Outcome
        Of its download.
    extracted : Outcome or None
        Of its extraction, if there was a frame.

    Returns
    -------
    list of Outcome
        One or two.
    """
    if extracted is None:
        return [downloaded]
    origin = {name: getattr(downloaded, name) for name in ("read", "etag", "modified")}
    return [downloaded, dataclasses.replace(extracted, **origin)]


def extract_frame(frame: Frame, per_image: str, options: ExtractOptions) -> Outcome:
    """Measure a frame that is open, and write its table.

    Parameters
    ----------
    frame : Frame
        The frame. Of a whole one, the rows are used that the options' rule says. Where no source
        is on it, its head will do.
    per_image : str
        Folder of the tables.
    options : ExtractOptions
        What all tasks share.

    Returns
    -------
    Outcome
        As that of `extract`.

    Raises
    ------
    MissingRowsError, MissingBytesError
        If parts are needed of a frame of which some rows came, and did not come.
    """
    return _extract(frame.filename, lambda: frame, per_image, options)


def record_failure(
    filename: str, error: Exception, per_image: str, options: ExtractOptions
) -> Outcome:
    """Return the outcome of a frame whose measurement has raised an error before it began.

    Parameters
    ----------
    filename : str
        Of the frame.
    error : Exception
        The error.
    per_image : str
        Folder of the tables.
    options : ExtractOptions
        What all tasks share.

    Returns
    -------
    Outcome
        As that of `extract`, failed.
    """

    def fail() -> Frame:
        raise error

    return _extract(filename, fail, per_image, options)


def _extract(
    filename: str, open_it: Callable[[], Frame], per_image: str, options: ExtractOptions
) -> Outcome:
    started = time.monotonic()
    try:
        with _one_at_a_time if options.serial else nullcontext():
            measured = _measure(open_it(), options)
        name = table_name(filename, options.format)
        open_store(per_image).put(name, measured.pop("content"))
        result: dict[str, Any] = {"status": "done", **measured}
    except (DiskFullError, MissingRowsError, MissingBytesError):
        raise
    except (ArchiveError, FrameError, InputError, StoreError, OSError) as error:
        result = {"status": "failed", "reason": str(error)}
    except Exception as error:
        # One frame must not cost the run, whatever is in it; the log has the traceback.
        logger.exception("%s: unexpected error", filename)
        reason = f"unexpected {type(error).__name__}: {error}".partition("\n")[0]
        result = {"status": "failed", "reason": reason}
    return Outcome(
        stage="extract",
        filename=filename,
        seconds=time.monotonic() - started,
        recipe=options.recipe,
        catalogue=options.catalogue_fingerprint,
        **result,
    )


def find_rows(frame: Frame, options: ExtractOptions) -> np.ndarray:
    """Return the rows of pixels that the sources on a frame need.

    Parameters
    ----------
    frame : Frame
        The frame, or its head.
    options : ExtractOptions
        Sources, and how they are measured.

    Returns
    -------
    (ny,) bool array
        None of them if no source is on the frame that would get a row in its table.
    """
    catalogue, others, calibration, circle = _open_inputs(frame, options)
    observer = locate_observer(frame.mjd, frame.observer_km)
    ra, dec = find_positions(catalogue, catalogue.within(*circle), observer)
    contaminants = _find_contaminants(frame, others, observer)
    return find_needed_rows(frame, ra, dec, options.photometry, calibration, contaminants)


def _has_few_rows(frame: Frame, options: ExtractOptions) -> bool:
    """Return whether no more rows of a frame are used than its sources need."""
    rule = options.row_rule
    if frame.rows is not None or rule is None or frame.file_bytes < rule.least_file_bytes:
        return frame.rows is not None
    # A whole frame that could have come by rows.
    return rule.applies(find_rows(frame, options), frame.file_bytes)


def _open_inputs(
    frame: Frame, options: ExtractOptions
) -> tuple[Catalogue, Catalogue | None, DetectorCalibration, tuple[float, float, float]]:
    """Return sources, contaminants, calibration, and the circle that sources on it are within."""
    catalogue = _open_catalogue(options.catalogue)
    others = None if options.contaminants is None else _open_catalogue(options.contaminants)
    calibration = open_calibration(options.products, options.product_source, frame.band)
    ra, dec, radius = frame.bounding_circle
    return catalogue, others, calibration, (ra, dec, radius + catalogue.largest_shift_deg)


def _measure(frame: Frame, options: ExtractOptions) -> dict[str, Any]:
    """Return the content of a frame's table, and the fields of its outcome that go with it."""
    catalogue, others, calibration, circle = _open_inputs(frame, options)
    near = catalogue.within(*circle)
    few_rows = _has_few_rows(frame, options)
    found = measure_catalogue(
        frame,
        catalogue,
        near,
        options.photometry,
        calibration,
        contaminants=others,
        few_rows=few_rows,
    )
    content = encode_rows(found.columns, options.format, options.provenance)
    measured = found.measured
    levels = measured.columns["bg_level"]
    spread = np.percentile(levels, (16, 50, 84)) if len(levels) else np.full(3, np.nan)
    return {
        "content": content,
        "bytes": len(content),
        "rows": len(found.columns["target_id"]),
        "skipped": measured.skipped,
        "warnings": found.warnings,
        "psf_empty": measured.psf_empty,
        "sources_fingerprint": catalogue.digest(near).hex(),
        "bounding_circle": circle,
        "frame_bytes": frame.file_bytes,
        "frame_checksum": frame.checksum,
        "checksum": hash_table(content),
        "properties": {
            "fit_rows": measured.fit_rows if few_rows else None,
            "fit_version": FEW_ROWS_VERSION if few_rows else None,
            "mjd": frame.mjd,
            "zodi_scale": measured.zodi_scale,
            "is_zodi_fitted": measured.is_zodi_fitted,
            "aperture_radius": measured.radius,
            "psf": measured.psf_name,
            "n_sources": len(near),
            "background": _round_off(spread[1]),
            "background_scatter": _round_off((spread[2] - spread[0]) / 2),
            **_describe_astrometry(measured.astrometry),
        },
    }


def _describe_astrometry(found: Astrometry | None) -> dict[str, Any]:
    """Return what the record of a frame says of the offsets of its stars."""
    if found is None:
        return {}
    numbers = {name: getattr(found, name) for name in ("dx", "dy", "scatter", "error")}
    rounded = {f"astrometry_{name}": _round_off(value) for name, value in numbers.items()}
    return {"astrometry_stars": found.stars, **rounded}


def _round_off(value: float | None) -> float | None:
    """Return a number with six digits, None for NaN, which JSON does not have."""
    return None if value is None or np.isnan(value) else float(f"{value:.6g}")


def _open_stored(store: Store, name: str, fetched: Outcome | None) -> Frame:
    """Open a frame; set one aside that cannot be measured, so that it is fetched again.

    It could be opened when it was fetched, so it was damaged since.
    """
    try:
        local = store.local_path
        content = map_file(local / name) if local else memoryview(store.get(name))
        frame = open_frame(content, name)
        if fetched is not None and fetched.file_bytes == frame.file_bytes:
            checksum, warnings = fetched.content_hash, fetched.warnings
        else:
            checksum, warnings = None, verify(content)
        return dataclasses.replace(frame, warnings=frame.warnings + warnings, checksum=checksum)
    except FrameError as error:
        aside = f"{name}.unreadable"
        try:
            store.rename(name, aside)
        except OSError as refusal:
            raise FrameError(f"{error}; it cannot be set aside: {refusal.strerror}") from error
        raise FrameError(f"{error}; set aside as {aside}") from error


@dataclass(frozen=True, kw_only=True)
class MeasuredCatalogue:
    """The sources of a catalogue on a frame.

    Attributes
    ----------
    columns : dict of str to (n,) array or to one value for all rows
        The per-image table, in the order of the catalogue's file.
    measured : Measurement
        What was measured.
    warnings : tuple of str
        Repairs and fallbacks.
    """

    columns: dict[str, Any]
    measured: Measurement
    warnings: tuple[str, ...]


def measure_catalogue(
    frame: Frame,
    catalogue: Catalogue,
    near: np.ndarray,
    photometry: PhotometryConfig,
    calibration: DetectorCalibration = NO_CALIBRATION,
    *,
    contaminants: Catalogue | None = None,
    few_rows: bool = False,
) -> MeasuredCatalogue:
    """Measure those of some sources of a catalogue that are on a frame.

    Parameters
    ----------
    frame : Frame
        The frame.
    catalogue : Catalogue
        The sources.
    near : (n,) int array
        Indices of those to measure: all within the bounding circle of the frame.
    photometry : PhotometryConfig
        How a source is measured.
    calibration : DetectorCalibration, optional
        Calibration products.
    contaminants : Catalogue, optional
        Sources of the solution for PSF fluxes that get no rows.
    few_rows : bool
        As of `spxdask.science.photometry.measure`.

    Returns
    -------
    MeasuredCatalogue
        Positions are those at the time of the frame.

    Raises
    ------
    FrameError
        If the frame cannot be measured.
    """
    observer = locate_observer(frame.mjd, frame.observer_km)
    ra, dec = find_positions(catalogue, near, observer)
    others = _find_contaminants(frame, contaminants, observer)
    measured = measure(frame, ra, dec, photometry, calibration, others, few_rows=few_rows)
    warnings = measured.warnings
    if is_level2_name(frame.filename) and parse_filename(frame.filename)[0] != frame.obs_id:
        warnings += (f"the header says that this is {frame.obs_id}",)
    index = measured.index
    columns = {
        "target_id": catalogue.target_id.take(pa.array(near[index])),
        "ra": ra[index],
        "dec": dec[index],
        "obs_id": frame.obs_id,
        "band": frame.band,
        "mjd": frame.mjd,
        **measured.columns,
        # One value for all rows is encoded once.
        "aperture_radius": measured.radius,
        "filename": frame.filename,
    }
    if measured.psf_columns:
        bjd_tdb = find_bjd_tdb(observer, ra[index], dec[index])
        columns |= {**measured.psf_columns, "bjd_tdb": bjd_tdb}
    return MeasuredCatalogue(columns=columns, measured=measured, warnings=warnings)


def _find_contaminants(
    frame: Frame, contaminants: Catalogue | None, observer: Observer
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return where contaminants near a frame are at its time, None if there is no catalogue."""
    if contaminants is None:
        return None
    ra, dec, radius = frame.bounding_circle
    near = contaminants.within(ra, dec, radius + contaminants.largest_shift_deg)
    return find_positions(contaminants, near, observer)


def find_positions(
    catalogue: Catalogue, index: np.ndarray, observer: Observer
) -> tuple[np.ndarray, np.ndarray]:
    """Return where some sources are at the time of a frame.

    Parameters
    ----------
    catalogue : Catalogue
        The sources.
    index : (n,) int array
        Which of them.
    observer : Observer
        Where and when the frame was taken.

    Returns
    -------
    ra, dec : (n,) float array
        ICRS, deg.
    """
    ra, dec = catalogue.ra[index], catalogue.dec[index]
    if not catalogue.has_motions:
        return ra, dec
    none = np.zeros(len(index))
    found = {name: values[index] for name, values in catalogue.motions.items()}
    return move_to_epoch(
        observer,
        ra,
        dec,
        pmra=found.get("pmra", none),
        pmdec=found.get("pmdec", none),
        parallax=found.get("parallax", none),
        ref_epoch=found.get("ref_epoch", DEFAULT_REF_EPOCH),
    )


@functools.lru_cache(maxsize=12)
def open_calibration(
    products: tuple[Product, ...], source: ProductSource | None, band: str
) -> DetectorCalibration:
    """Map the products of a detector, once in a process, as a file of a product never changes.

    Parameters
    ----------
    products : tuple of Product
        Of one detector.
    source : ProductSource or None
        Where a machine that does not have them fetches them.
    band : str
        ``D1`` to ``D6``.

    Returns
    -------
    DetectorCalibration

    Raises
    ------
    ArchiveError, FrameError, InputError, OSError
        If a product is not to be had.
    """
    paths = {product.family: open_in_cache(product, source) for product in products}
    return open_products(paths, band) if paths else NO_CALIBRATION


@functools.lru_cache(maxsize=4)
def _open_catalogue(path: str) -> Catalogue:
    """Map the catalogue once in a process; a file of this name never changes."""
    store, name = locate_file(path)
    return Catalogue.open(store.local_copy(name))
