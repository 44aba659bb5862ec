"""Extract: measure every catalogue source in every frame."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from spxdask.archive.observation import is_level2_name, parse_filename
from spxdask.errors import DiskFullError, FrameError, StoreError
from spxdask.run.ledger import Outcome
from spxdask.science.catalogue import Catalogue
from spxdask.science.level2.frame import Frame, open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure
from spxdask.storage import Store, locate_file, open_store
from spxdask.tables.per_image import encode_rows

logger = logging.getLogger(__name__)

# Raised whenever the numbers or the columns change, so that older rows are made again.
MEASUREMENT_VERSION = 2

_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What all tasks of the stage share.

    Attributes
    ----------
    catalogue : str
        A file written by `Catalogue.save`, which every worker maps.
    photometry : PhotometryConfig
    fingerprint : str
        Of catalogue, options and code; see `fingerprint`.
    serial : bool
        Measure one frame at a time in a process, however many threads it has. For the
        embedded cluster, whose workers have threads to spare for downloads.
    format : str
        Of the tables, ``csv`` or ``parquet``.
    """

    catalogue: str
    photometry: PhotometryConfig
    fingerprint: str
    serial: bool
    format: str = "csv"


def fingerprint(catalogue: Catalogue, photometry: PhotometryConfig) -> str:
    """Return a hash of all that the rows of a frame depend on besides the frame."""
    return _hash(catalogue.fingerprint, photometry)


def sources_fingerprint(catalogue: Catalogue, near: np.ndarray, photometry) -> str:
    """Return a hash of all that rows depend on when only some sources are near the frame.

    With another catalogue that is the same near the frame, its table would be the same.
    """
    return _hash(catalogue.digest(near), photometry)


def _hash(sources: str | bytes, photometry: PhotometryConfig) -> str:
    text = f"({MEASUREMENT_VERSION!r}, {sources!r}, {_legacy_repr(photometry)})"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# In the order that they once had, which older fingerprints depend on.
_LEGACY_OPTIONS = (
    *("aperture_method", "aperture_diameter", "fwhm_multiplier", "background_method"),
    *("window_size", "subtract_zodi", "zodi_scale_min", "zodi_scale_max", "min_usable_pixels"),
    *("bg_sigma_clip_sigma", "bg_sigma_clip_maxiters", "annulus_inner_offset"),
    *("min_annulus_area", "max_outer_radius", "max_annulus_attempts", "annulus_expansion_step"),
    *("pixel_scale_fallback", "bad_flags"),
)


def _legacy_repr(photometry: PhotometryConfig) -> str:
    """Return the text of the options that fingerprints of earlier runs were made from."""
    values = {name: getattr(photometry, name) for name in _LEGACY_OPTIONS}
    values["bad_flags"] = list(values["bad_flags"])
    return f"PhotometryConfig({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def table_name(filename: str, format: str = "csv") -> str:
    """Return the name of a frame's per-image table."""
    return f"{Path(filename).stem}_photometry.{format}"


def extract(image: str, per_image: str, options: ExtractOptions) -> Outcome:
    """Measure one frame and write its table; the task of the extract stage.

    Parameters
    ----------
    image : str
        The frame, on disk or in a store.
    per_image : str
        Folder of the tables. The frame's appears in it whole, without rows when no source
        of the catalogue is on the frame.
    options : ExtractOptions

    Returns
    -------
    Outcome
        ``failed`` with the reason for a frame that cannot be measured.
    """
    store, name = locate_file(image)
    return _extract(name, lambda: _open(store, name), per_image, options)


def extract_frame(frame: Frame, per_image: str, options: ExtractOptions) -> Outcome:
    """Measure a frame that is open; otherwise as `extract`."""
    return _extract(frame.filename, lambda: frame, per_image, options)


def _extract(
    filename: str, opened: Callable[[], Frame], per_image: str, options: ExtractOptions
) -> Outcome:
    started = time.monotonic()
    rows, size, skipped, warnings, reason, cap, sources = 0, 0, {}, (), None, None, None
    try:
        with _one_at_a_time if options.serial else nullcontext():
            frame, catalogue = opened(), _catalogue(options.catalogue)
            cap = frame.bounding_circle
            near = catalogue.within(*cap)
            sources = sources_fingerprint(catalogue, near, options.photometry)
            columns, skipped, warnings = measure_catalogue(
                frame, catalogue, near, options.photometry
            )
            rows = len(columns["target_id"])
            content = encode_rows(columns, options.format)
        open_store(per_image).put(table_name(filename, options.format), content)
        size = len(content)
    except DiskFullError:
        raise
    except (FrameError, StoreError, OSError) as error:
        reason = str(error)
    except Exception as error:
        # One frame must not cost the run, whatever is in it; the log has the traceback.
        logger.exception("%s: unexpected error", filename)
        reason = f"unexpected {type(error).__name__}: {error}".partition("\n")[0]
    return Outcome(
        stage="extract",
        filename=filename,
        status="failed" if reason else "done",
        reason=reason,
        seconds=time.monotonic() - started,
        bytes=0 if reason else size,
        rows=0 if reason else rows,
        skipped=skipped,
        warnings=warnings,
        fingerprint=options.fingerprint,
        sources_fingerprint=None if reason else sources,
        bounding_circle=None if reason else cap,
    )


def _open(store: Store, name: str) -> Frame:
    """Open a frame; set one aside that does not open, so that it is fetched again.

    It did open when it was fetched, so what is wrong with it happened here.
    """
    try:
        if store.local_path is not None:
            return open_frame(store.local_path / name)
        return open_frame(memoryview(store.get(name)), name)
    except FrameError as error:
        aside = f"{name}.unreadable"
        store.rename(name, aside)
        raise FrameError(f"{error}; set aside as {aside}") from error


def measure_catalogue(
    frame: Frame, catalogue: Catalogue, near: np.ndarray, photometry: PhotometryConfig
):
    """Measure those of some sources of a catalogue that are on a frame.

    Returns
    -------
    columns : dict of str to (n,) array or to one value for all rows
        The per-image table, in the order of the catalogue's file.
    skipped : dict of str to int
        Sources on the frame without a row, by reason.
    warnings : tuple of str
        Repairs and fallbacks.
    """
    ra, dec = catalogue.ra[near], catalogue.dec[near]
    measured = measure(frame, ra, dec, photometry)
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
        "aperture_radius": measured.radius,
        "filename": frame.filename,
    }
    return columns, measured.skipped, warnings


@functools.lru_cache(maxsize=2)
def _catalogue(path: str) -> Catalogue:
    """Map the catalogue once a process. Its name holds its fingerprint, so it cannot age."""
    store, name = locate_file(path)
    return Catalogue.open(store.local_copy(name))
