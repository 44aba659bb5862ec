"""Query stage: which frames cover the field, from the archive's TAP service."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from astropy.table import Table

from spxdask.archive.observation import (
    Observation,
    check_uri,
    frame_url,
    is_level2_name,
    parse_filename,
    parse_release,
)
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.tap import TapOptions, run_adql
from spxdask.config import BatchConfig
from spxdask.errors import InputError, TruncatedAnswerError
from spxdask.run.folder import RunFolder
from spxdask.run.summary import StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.text import format_count

logger = logging.getLogger(__name__)

COLUMNS = (
    "p.obs_publisher_did",
    "p.energy_bounds_lower",
    "p.energy_bounds_upper",
    "p.time_bounds_lower",
    "p.time_bounds_upper",
    "a.uri",
    "a.contentlength",
)
# A source farther than this from the field is on none of its frames, which are 3.5 deg wide.
FRAME_REACH_DEG = 6.0
# Length of a QR2 frame, taken where the archive does not state one.
TYPICAL_FRAME_BYTES = 71_600_000


def find_observations(
    config: BatchConfig, *, tap_options: TapOptions | None = None
) -> list[Observation]:
    """Query the archive for the frames of a run.

    Parameters
    ----------
    config : BatchConfig
        The run.
    tap_options : TapOptions, optional
        Patience and limits of the query; by default with the run's ``max_retries``.

    Returns
    -------
    list of Observation
        Each exposure and detector once (each file once with ``release="all"``), sorted by
        time, observation and band. Empty when nothing covers the field.

    Raises
    ------
    ArchiveError
        If the archive rejects the query, or does not answer it after all retries.
    TruncatedAnswerError
        If it answers only in part.
    InputError
        If more frames than ``max_images`` were found.
    """
    if tap_options is None:
        tap_options = TapOptions(retry=RetryPolicy(max_retries=config.max_retries))
    try:
        answer = run_adql(config.tap_url, build_adql(config), tap_options)
    except TruncatedAnswerError as error:
        raise TruncatedAnswerError(
            f"{error.reason}; choose a smaller radius, fewer bands or a shorter mjd_range",
            path=error.path,
        ) from error
    observations = select_observations(answer, config)
    check_count(observations, config)
    return observations


def build_adql(config: BatchConfig) -> str:
    """Return the query of a run, in ADQL 2.0.

    Parameters
    ----------
    config : BatchConfig
        The run.

    Returns
    -------
    str
        A query for `COLUMNS`, in their order.
    """
    position = ", ".join(map(_format_number, (config.center_ra, config.center_dec, config.radius)))
    circle = f"CIRCLE('ICRS', {position})"
    conditions = [
        f"INTERSECTS(p.poly, {circle}) = 1"
        if config.coverage_mode == "any"
        else f"CONTAINS({circle}, p.poly) = 1"
    ]
    if config.bands is not None:
        names = ", ".join(f"'SPHEREx-{band}'" for band in config.bands)
        conditions.append(f"p.energy_bandpassname IN ({names})")
    if config.mjd_range is not None:
        # Every exposure whose middle may be in the range; `select_observations` is exact.
        first, last = map(_format_number, config.mjd_range)
        conditions += [f"p.time_bounds_upper >= {first}", f"p.time_bounds_lower <= {last}"]
    return (
        f"SELECT {', '.join(COLUMNS)} "
        "FROM spherex.plane AS p INNER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
        f"WHERE {' AND '.join(conditions)}"
    )


def _format_number(value: float) -> str:
    """Return a number without an exponent, as ADQL's grammar has none with a small e."""
    return np.format_float_positional(value, trim="0")


def select_observations(answer: Table, config: BatchConfig) -> list[Observation]:
    """Turn the rows of the archive's answer into observations.

    Parameters
    ----------
    answer : Table
        Rows with `COLUMNS` in their order, whatever their names.
    config : BatchConfig
        The run.

    Returns
    -------
    list of Observation
        As of `find_observations`.

    Raises
    ------
    ArchiveError
        If a file has a URI that is not a plain relative path.
    """
    selected: dict[tuple[str, ...], Observation] = {}
    ignored: list[str] = []
    found_releases: set[str] = set()
    wanted = None if config.release in ("latest", "all") else config.release.split(",")
    for row in answer.iterrows():
        publisher_did, *bounds, uri, size = row
        uri = str(uri)
        release = parse_release(str(publisher_did))
        if release is None or not is_level2_name(uri):
            ignored.append(f"{uri} of {publisher_did}")
            continue
        found_releases.add(release)
        if wanted is not None and release not in wanted:
            continue
        check_uri(uri)
        lower_m, upper_m, begin, end = (
            np.nan if np.ma.is_masked(bound) else float(bound) for bound in bounds
        )
        mjd = (begin + end) / 2
        if config.mjd_range and not config.mjd_range[0] <= mjd <= config.mjd_range[1]:
            continue
        obs_id, band = parse_filename(uri.rpartition("/")[2])
        observation = Observation(
            obs_id=obs_id,
            band=band,
            mjd=mjd,
            wavelength_um=(lower_m + upper_m) / 2 * 1e6,
            uri=uri,
            download_url=frame_url(config.archive_url, uri),
            size_bytes=None if np.ma.is_masked(size) or int(size) <= 0 else int(size),
        )
        # A file name states exposure, detector and version. Wide and deep collections may
        # list the same file.
        key = (observation.filename,) if config.release == "all" else (obs_id, band)
        if key not in selected or selected[key].recency < observation.recency:
            selected[key] = observation
    if ignored:
        logger.warning(
            "%s of the archive ignored, as name or collection is not understood; for example %s",
            format_count(len(ignored), "file"),
            ignored[0][:200],
        )
    absent = set(wanted or ()) - found_releases
    if absent and found_releases:
        logger.warning(
            "no frame of release %s covers the field; there are frames of %s",
            ", ".join(sorted(absent)),
            ", ".join(sorted(found_releases)),
        )
    # Frames without a time come last.
    return sorted(
        selected.values(),
        key=lambda o: (np.nan_to_num(o.mjd, nan=np.inf), o.obs_id, o.band, o.filename),
    )


def check_count(observations: list[Observation], config: BatchConfig) -> None:
    """Raise an error if there are more observations than the run allows.

    Parameters
    ----------
    observations : list of Observation
        The frames found.
    config : BatchConfig
        The run.

    Raises
    ------
    InputError
        If there are more than ``max_images``.
    """
    if len(observations) <= config.max_images:
        return
    raise InputError(
        f"{len(observations):,} frames ({sum_gigabytes(observations):,.1f} GB) cover the field, "
        f"max_images allows {config.max_images:,}; raise max_images, or choose a smaller radius, "
        "fewer bands or a shorter mjd_range"
    )


def sum_gigabytes(observations: Iterable[Observation]) -> float:
    """Return the total size of frames.

    Parameters
    ----------
    observations : iterable of Observation
        The frames.

    Returns
    -------
    float
        Size in GB, with 71.6 MB for a frame whose length the archive does not state.
    """
    return sum(o.size_bytes or TYPICAL_FRAME_BYTES for o in observations) / 1e9


def record_query(
    folder: RunFolder,
    config: BatchConfig,
    catalogue: Catalogue,
    found: Sequence[Observation],
    report: StageReport,
) -> None:
    """Save what a query found, with the catalogue and the configuration, and report it.

    Parameters
    ----------
    folder : RunFolder
        Locked by the caller.
    config : BatchConfig
        The run.
    catalogue : Catalogue
        Its sources.
    found : sequence of Observation
        The result of `find_observations`.
    report : StageReport
        The report to fill in.
    """
    folder.raise_if_lock_lost()
    folder.save_query(found, config)
    folder.save_catalogue(catalogue)
    folder.save_config(config)
    inside = catalogue.within(config.center_ra, config.center_dec, config.radius)
    report.total = report.done = len(found)
    report.bytes = sum(o.size_bytes or 0 for o in found)
    report.outside = len(catalogue) - len(inside)
    report.releases.update(o.release for o in found)
    if found:
        warn_of_distant_catalogue(catalogue, config)


def warn_of_distant_catalogue(
    catalogue: Catalogue, config: BatchConfig, reach_deg: float = FRAME_REACH_DEG
) -> None:
    """Warn when all of a catalogue is far from the field, before frames are fetched for nothing.

    Parameters
    ----------
    catalogue : Catalogue
        The sources.
    config : BatchConfig
        The run.
    reach_deg : float
        A source farther than this from the field is on none of its frames, deg.
    """
    reach = config.radius + reach_deg
    if not len(catalogue.within(config.center_ra, config.center_dec, reach)):
        logger.warning(
            "%s: none of the %s sources lies within %g deg of the field's centre (%g, %g); "
            "check that ra and dec are in degrees and not exchanged",
            *(config.catalog_path, f"{len(catalogue):,}", reach),
            *(config.center_ra, config.center_dec),
        )
