"""What a run would fetch, and how long that would take, without fetching anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from spxdask.archive.calibration import CalibrationSet
from spxdask.archive.observation import Observation
from spxdask.archive.outage import OutagePolicy
from spxdask.config import BatchConfig
from spxdask.run.calibration import load_calibration, survey_products
from spxdask.run.folder import CONFIG_NAME, RunFolder
from spxdask.run.sources import RunSources
from spxdask.run.summary import NO_SOURCES, describe_calibration
from spxdask.stages.calibration import require_products_folder
from spxdask.stages.query import (
    TYPICAL_FRAME_BYTES,
    check_count,
    find_empty,
    find_patiently,
    make_field,
)
from spxdask.text import format_count, format_duration

__all__ = ["BandEstimate", "RunEstimate", "estimate_run"]

# Bytes a second of one connection to IRSA and to the bucket, where nothing was measured.
ASSUMED_RATES = {"IRSA": 2e6, "the bucket": 20e6}


@dataclass(kw_only=True)
class BandEstimate:
    """The frames of one band.

    Attributes
    ----------
    n_frames : int
        Frames on which a source can lie.
    bytes : int
        Their length.
    days : set of int
        The MJDs on which they were taken, without fractions.
    """

    n_frames: int = 0
    bytes: int = 0
    days: set[int] = field(default_factory=set)


@dataclass(kw_only=True)
class RunEstimate:
    """What a run would do.

    Attributes
    ----------
    output : str
        The output folder; nothing in it is changed.
    n_sources : int
        Sources in the catalogue.
    n_found : int
        Frames that cover the field.
    has_sources : bool
        Whether a source lies on any of them; if not, a run ends with the query.
    n_fetched : int
        How many of those that are needed were fetched before.
    bands : dict of str to BandEstimate
        The frames that are needed, by band.
    releases : Counter
        The same by release.
    bytes : int
        Length of the frames that are still to be fetched.
    n_connections : int
        Transfers at once.
    rate : float or None
        Bytes a second of one connection, measured in this folder.
    calibration : list of str
        Which products would be used, as lines.
    """

    output: str
    n_sources: int
    n_found: int
    n_connections: int
    has_sources: bool = True
    n_fetched: int = 0
    bytes: int = 0
    bands: dict[str, BandEstimate] = field(default_factory=dict)
    releases: Counter[str] = field(default_factory=Counter)
    rate: float | None = None
    calibration: list[str] = field(default_factory=list)

    @property
    def n_frames(self) -> int:
        """Frames that would be measured."""
        return sum(band.n_frames for band in self.bands.values())

    def __str__(self) -> str:
        n_empty = self.n_found - self.n_frames
        lines = [
            ("sources", f"{self.n_sources:,}"),
            ("frames", f"{format_count(self.n_found, 'frame')} found, {self.n_frames:,} needed"),
        ]
        lines += [("", f"{format_count(n_empty, 'frame')} without a source")] if n_empty else []
        if len(self.releases) > 1:
            lines.append(("", ", ".join(f"{n:,} of {r}" for r, n in sorted(self.releases.items()))))
        if self.n_found and not self.has_sources:
            lines.append(("", NO_SOURCES))
        for name, band in sorted(self.bands.items()):
            frames, days = format_count(band.n_frames, "frame"), format_count(len(band.days), "day")
            lines.append((name, f"{frames}, {band.bytes / 1e9:.3g} GB, on {days}"))
        there = f", {self.n_fetched:,} frames are there" if self.n_fetched else ""
        lines.append(("to fetch", f"{self.bytes / 1e9:.3g} GB at most{there}"))
        lines += [("time", text) for text in self._describe_time()]
        lines += [("calibration" if not i else "", text) for i, text in enumerate(self.calibration)]
        lines.append(("output", f"{self.output} (nothing was fetched or changed)"))
        return "\n".join(f"{name:<11} {text}" for name, text in lines)

    def _describe_time(self) -> list[str]:
        if not self.bytes:
            return []
        transfers = format_count(self.n_connections, "connection")
        if self.rate is not None:
            seconds = self.bytes / self.rate / self.n_connections
            speed = f"{self.rate / 1e6:.3g} MB/s, as measured here"
            return [f"{format_duration(seconds)} over {transfers} of {speed}"]
        return [
            f"{format_duration(self.bytes / rate / self.n_connections)} over {transfers} of "
            f"{rate / 1e6:g} MB/s ({name}); nothing measured here yet"
            for name, rate in ASSUMED_RATES.items()
        ]


def estimate_run(
    config: BatchConfig,
    sources: RunSources,
    *,
    on_wait: Callable[[str | None], None] = lambda reason: None,
) -> RunEstimate:
    """Ask the archive what a run would fetch.

    Parameters
    ----------
    config : BatchConfig
        The run. Its output folder need not exist, and is not changed.
    sources : RunSources
        Its sources.
    on_wait : callable
        Called with the reason when the query waits for the archive, with None when it goes on.

    Returns
    -------
    RunEstimate

    Raises
    ------
    CatalogueError
        If the catalogue cannot be used.
    ArchiveError
        If the archive does not answer in full.
    InputError
        If there are more frames than ``max_images``.
    """
    catalogue = sources.read()
    # What a run would refuse is refused here, too.
    sources.read_contaminants()
    require_products_folder(config)
    folder = RunFolder(config.output_dir)
    found = find_patiently(
        config,
        make_field(config, catalogue).circles,
        policy=OutagePolicy(patience_s=config.outage_patience),
        run_once=lambda function, *arguments: function(*arguments),
        on_wait=on_wait,
        may_be_mistaken=not folder.has_query(),
    )
    is_empty = find_empty(config, catalogue, found)
    needed = [o for o, empty in zip(found, is_empty, strict=True) if not empty]
    check_count(needed, config)
    estimate = RunEstimate(
        output=folder.path,
        n_sources=len(catalogue),
        n_found=len(found),
        has_sources=not all(catalogue.sky.find_empty([o.footprint for o in found])),
        n_connections=config.max_download_workers,
        releases=Counter(o.release for o in needed),
    )
    is_folder = folder.state.exists(CONFIG_NAME)
    if is_folder:
        folder.ledger.refresh()
    _add_frames(estimate, needed, folder, keeps_images=config.keep_images)
    used = load_calibration(folder.state, config) if is_folder else None
    estimate.calibration = _describe_products(config, used, found)
    return estimate


def _add_frames(
    estimate: RunEstimate, needed: Sequence[Observation], folder: RunFolder, *, keeps_images: bool
) -> None:
    """Count frames by band, what is to be fetched of them, and how fast that was before."""
    sizes = folder.images.list_sizes() if keeps_images else {}
    seconds = fetched_bytes = 0.0
    for observation in needed:
        size = observation.size_bytes or TYPICAL_FRAME_BYTES
        band = estimate.bands.setdefault(observation.band, BandEstimate())
        band.n_frames += 1
        band.bytes += size
        if math.isfinite(observation.mjd):
            band.days.add(math.floor(observation.mjd))
        before = folder.ledger.get_done("download", observation.filename)
        if before is not None:
            seconds, fetched_bytes = seconds + before.seconds, fetched_bytes + before.bytes
        measured = folder.ledger.get_done("extract", observation.filename)
        is_there = observation.is_complete(sizes) if keeps_images else measured is not None
        estimate.n_fetched += is_there
        estimate.bytes += 0 if is_there else size
    if seconds > 0 and fetched_bytes > 0:
        estimate.rate = fetched_bytes / seconds


def _describe_products(
    config: BatchConfig, used: CalibrationSet | None, found: Iterable[Observation]
) -> list[str]:
    """Return which calibration products would be used, as lines."""
    if config.calibration == "frame":
        return ["none: what is in the frames is used"]
    bands = {observation.band for observation in found}
    tokens: dict[str, dict[str, None]] = {}
    missing: dict[str, str] = {}
    for status in survey_products(config, used, fetch=False):
        if status.band not in bands:
            continue
        if status.problem is not None:
            missing.setdefault(status.family, status.problem)
        elif status.newest is not None:
            tokens.setdefault(status.family, {})[status.newest] = None
    return describe_calibration({f: ", ".join(names) for f, names in tokens.items()}, missing)
