"""Reports of the stages and the summary of a run, for people and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from spxdask.archive.observation import EARLY_RELEASES
from spxdask.science.families import FLUX_CORRECTION
from spxdask.text import format_count, format_html_table, split_report

MAX_FAILURES_SHOWN = 10
MAX_WARNINGS_SHOWN = 3
NO_SOURCES = (
    "no source of the catalogue lies on any of these frames, and a run fetches none: check that "
    "ra and dec are in degrees and not exchanged, and the field"
)


@dataclass(kw_only=True, repr=False)
class StageReport:
    """What one stage did.

    Attributes
    ----------
    stage : str
        query, download, extract or aggregate.
    total : int
        Frames that the stage had to process; for query, those found; for aggregate, light curves.
    done : int
        How many of them this run made.
    reused : int
        How many of them an earlier run had made.
    failed : dict of str to str
        Reason by file name of the frame.
    releases : Counter
        For query, frames of each release, such as qr2.
    excluded : Counter
        Frames of the query that are neither fetched nor measured, by reason.
    without_source : int
        For query, frames on which no source lies, whether or not they are excluded.
    skipped_sources : int
        For query, and for extract by itself, rows of the user's catalogue that are not used.
    outside : int
        For query, sources of the catalogue outside the circle of the query.
    rechecked : int
        Frames of which the archive was asked whether it has replaced them.
    replaced : int
        How many of them it has replaced.
    not_rechecked : Counter
        Of how many it is not known, by reason.
    left_out : int
        For aggregate, frames of the query that have no table.
    removed : int
        For aggregate, light curves removed because no table has a row of their source.
    rows : int
        Rows in all tables, those of earlier runs included.
    skipped : Counter
        How many sources that lie on a frame have no row for it, by reason.
    psf_empty : Counter
        Rows without a PSF flux, by reason.
    products, missing_products : dict of str to str
        For query, by family of calibration products, the tokens of those that are used, and
        why others are not.
    warnings : dict of str to tuple of str
        Warnings by file name of the frame.
    bytes : int
        For download, bytes that came; for query, bytes of all frames found that are not excluded.
    file_bytes : int
        For download and extract, length of the files that this is of.
    by_rows : int
        For download and extract, frames of which only some rows of pixels came.
    refusal : str or None
        What the archive answered when it was asked for a part of a file, and did not send it.
    seconds : float
        Wall time, s.
    """

    stage: str
    total: int = 0
    done: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    releases: Counter = field(default_factory=Counter)
    excluded: Counter = field(default_factory=Counter)
    without_source: int = 0
    skipped_sources: int = 0
    outside: int = 0
    rechecked: int = 0
    replaced: int = 0
    not_rechecked: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    removed: int = 0
    rows: int = 0
    skipped: Counter = field(default_factory=Counter)
    psf_empty: Counter[str] = field(default_factory=Counter)
    products: dict[str, str] = field(default_factory=dict)
    missing_products: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bytes: int = 0
    file_bytes: int = 0
    by_rows: int = 0
    refusal: str | None = None
    seconds: float = 0.0

    @property
    def has_sources(self) -> bool:
        """Whether a source of the catalogue lies on any frame that the query found."""
        return self.without_source < self.total

    def __repr__(self) -> str:
        # A notebook displays the value of the last expression of a cell.
        return describe_stage(self)

    def _repr_html_(self) -> str:
        return format_html_table(self.stage, split_report(describe_stage(self)))


@dataclass(kw_only=True, repr=False)
class RunSummary:
    """What a run did.

    Attributes
    ----------
    stages : dict of str to StageReport
        Report by name of each stage that ran.
    n_sources : int
        Sources in the catalogue.
    output : str
        The output folder.
    report : str
        What is to be said of `report.html`; empty if it was not to be made.
    replaced_workers : int
        Number of workers that were frozen, or whose tasks hung, and were replaced.
    """

    stages: dict[str, StageReport]
    n_sources: int
    output: str
    report: str = ""
    replaced_workers: int = 0

    @property
    def n_measured(self) -> int:
        """Number of sources with a light curve."""
        return self.stages["aggregate"].total if "aggregate" in self.stages else 0

    @property
    def failed(self) -> dict[str, str]:
        """Stage and reason by file name of every frame that failed."""
        failed: dict[str, str] = {}
        for report in self.stages.values():
            for filename, reason in report.failed.items():
                failed.setdefault(filename, f"{report.stage}: {reason}")
        return failed

    def __str__(self) -> str:
        lines = [describe_stage(report) for report in self.stages.values()]
        if "aggregate" in self.stages:
            lines.append(
                _line(
                    "sources",
                    f"{self.n_measured:,} with a measurement, "
                    f"{self.n_sources - self.n_measured:,} without",
                )
            )
        if self.failed:
            lines.append(_line("failed", format_count(len(self.failed), "frame")))
            reasons = [f"{filename}: {reason}" for filename, reason in self.failed.items()]
            lines += [_line("", reason) for reason in reasons[:MAX_FAILURES_SHOWN]]
            if len(reasons) > MAX_FAILURES_SHOWN:
                more = len(reasons) - MAX_FAILURES_SHOWN
                lines.append(_line("", f"and {more:,} more, see the ledger in state/"))
        else:
            lines.append(_line("failed", "none"))
        if self.replaced_workers:
            count = format_count(self.replaced_workers, "frozen one")
            lines.append(_line("workers", f"{count} replaced, see state/stacks/"))
        if self.report:
            lines.append(_line("report", self.report))
        lines.append(_line("output", self.output))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return format_html_table("run", split_report(str(self)))


def describe_stage(report: StageReport) -> str:
    """Describe what a stage did.

    Parameters
    ----------
    report : StageReport
        The report of the stage.

    Returns
    -------
    str
        Its line of the summary, and lines for what is missing from its results.
    """
    text, speed = _count_results(report)
    lines = [_line(report.stage, f"{text:<40} {report.seconds:7.1f} s  {speed}".rstrip())]
    lines += [_line("", note) for note in _list_notes(report)]
    return "\n".join(lines)


def _count_results(report: StageReport) -> tuple[str, str]:
    """Return what a stage has made or found, and its speed if it made anything."""
    seconds = max(report.seconds, 1e-9)
    if report.stage == "query":
        if not report.total:
            return "no frame covers the field: check positions, bands and mjd_range", ""
        found = f"{format_count(report.total, 'frame')} found"
        if n_excluded := report.excluded.total():
            found += f", {report.total - n_excluded:,} with a source"
        return f"{found}, {report.bytes / 1e9:.3g} GB", ""
    if report.stage == "aggregate":
        results = format_count(report.total, "light curve")
        speed = f"{report.rows / seconds:,.0f} rows/s"
    else:
        if not report.total:
            return "nothing to do", ""
        results = format_count(report.total, "frame")
        speed = f"{report.done / seconds:.1f} frames/s"
    if report.stage == "download":
        rows = ""
        speed = f"{report.bytes / 1e9:.2f} GB, {report.bytes / 1e6 / seconds:.0f} MB/s"
    else:
        rows = f", {format_count(report.rows, 'row')}"
    if report.reused == report.total > 0:
        return f"{results}{rows} (already there)", ""
    if report.stage == "aggregate":
        return f"{results}{rows}", speed
    reused = f" ({report.reused:,} already there)" if report.reused else ""
    return f"{report.done + report.reused:,} of {results}{reused}{rows}", speed


def describe_calibration(products: Mapping[str, str], missing: Mapping[str, str]) -> list[str]:
    """Return what is to be said of the calibration products of a run.

    Parameters
    ----------
    products, missing : mapping of str to str
        By family, the tokens of those that are used, and why others are not.

    Returns
    -------
    list of str
        Lines.
    """
    names = ", ".join(tokens for _, tokens in sorted(products.items()))
    used = [f"calibrated with {names}"] if products else []
    return used + [
        f"not calibrated with {family}: {reason}" for family, reason in sorted(missing.items())
    ]


def describe_reading(came: int, file_bytes: int, by_rows: int, total: int) -> list[str]:
    """Return what is to be said of frames of which only some rows came.

    Parameters
    ----------
    came, file_bytes : int
        Bytes that came, and the length of the files.
    by_rows, total : int
        Frames of which some rows came, and all that were fetched.

    Returns
    -------
    list of str
        A line, or none where all came whole.
    """
    if not by_rows:
        return []
    some = "" if by_rows == total else f"{by_rows:,} of {format_count(total, 'frame')} "
    sizes = f"{came / 1e9:.3g} GB of {file_bytes / 1e9:.3g} GB"
    return [f"fetched {sizes}, {some}by rows"]


def _list_notes(report: StageReport) -> list[str]:
    """Return a line for each thing that users should know of the results of a stage."""
    notes = []
    early = EARLY_RELEASES & report.releases.keys()
    is_corrected = FLUX_CORRECTION in report.products
    if early and report.releases.keys() - early and not is_corrected:
        counts = ", ".join(f"{n:,} of {name}" for name, n in sorted(report.releases.items()))
        scale = f"{' and '.join(sorted(early))} has another flux scale, by a few percent"
        notes.append(f"{counts}: {scale}")
    notes += describe_calibration(report.products, report.missing_products)
    for reason, count in sorted(report.excluded.items()):
        verb = "measured" if report.stage == "extract" else "fetched"
        notes.append(f"{format_count(count, 'frame')} not {verb}: {reason}")
    if report.skipped_sources:
        rows = format_count(report.skipped_sources, "row")
        notes.append(f"{rows} of the catalogue skipped, see skipped_rows.csv")
    if report.without_source == report.total > 0:
        notes.append(NO_SOURCES)
    if report.outside and report.total:
        sources = format_count(report.outside, "source")
        notes.append(f"{sources} outside the circle: measured only on frames that touch it")
    if report.rechecked:
        asked = format_count(report.rechecked, "frame")
        notes.append(f"{asked} rechecked: {report.replaced:,} replaced in the archive")
    for reason, count in sorted(report.not_rechecked.items()):
        notes.append(f"{format_count(count, 'frame')} not rechecked: {reason}")
    if report.stage == "download":
        notes += describe_reading(report.bytes, report.file_bytes, report.by_rows, report.done)
        if report.refusal is not None:
            notes.append(f"the archive sends no parts of files, all came whole: {report.refusal}")
    if report.left_out:
        notes.append(f"{format_count(report.left_out, 'frame')} not included: not measured")
    if report.removed:
        curves = format_count(report.removed, "light curve")
        notes.append(f"{curves} removed: no row of the source in the tables")
    for reason, count in sorted(report.skipped.items()):
        notes.append(f"{format_count(count, 'measurement')} left out: {reason}")
    for reason, count in sorted(report.psf_empty.items()):
        notes.append(f"{format_count(count, 'row')} without psf_flux: {reason}")
    frames = Counter(text for warnings in report.warnings.values() for text in warnings)
    for text, count in frames.most_common(MAX_WARNINGS_SHOWN):
        notes.append(f"{format_count(count, 'frame')}: {text}")
    if len(frames) > MAX_WARNINGS_SHOWN:
        more = format_count(len(frames) - MAX_WARNINGS_SHOWN, "other warning")
        notes.append(f"and {more}, see the ledger in state/")
    return notes


def _line(name: str, text: str) -> str:
    return f"{name:<11} {text}"
