"""What a stage did and what a run came to, for people and for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True, repr=False)
class StageReport:
    """The account of one stage.

    Attributes
    ----------
    stage : str
        query, download, extract or aggregate.
    total : int
        Frames the stage had to see to; light curves for aggregate.
    done : int
        Made in this run.
    reused : int
        Found finished from an earlier one.
    failed : dict of str to str
        Reason by file name.
    releases : Counter
        For query, frames of each release, such as qr2.
    outside : int
        For query, sources of the catalogue that do not lie in the circle.
    left_out : int
        For aggregate, frames of the query that have no table.
    removed : int
        For aggregate, light curves of sources that are not in the tables any more.
    rows : int
        Rows in all tables, reused ones included.
    skipped : Counter
        Sources on a frame without a row, by reason.
    warnings : dict of str to tuple of str
        By file name.
    bytes : int
        Bytes fetched, or that the query found.
    seconds : float
        Wall time.
    """

    stage: str
    total: int = 0
    done: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    releases: Counter = field(default_factory=Counter)
    outside: int = 0
    left_out: int = 0
    removed: int = 0
    rows: int = 0
    skipped: Counter = field(default_factory=Counter)
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        # For the end of a notebook's cell.
        return describe(self)


@dataclass(kw_only=True, repr=False)
class RunSummary:
    """The account of a run.

    Attributes
    ----------
    stages : dict of str to StageReport
        Those that ran, by name.
    n_sources : int
        Sources in the catalogue.
    output : str
        The output folder.
    """

    stages: dict[str, StageReport]
    n_sources: int
    output: str

    @property
    def n_measured(self) -> int:
        """Sources with a light curve."""
        return self.stages["aggregate"].total if "aggregate" in self.stages else 0

    @property
    def failed(self) -> dict[str, str]:
        """Reason by file name of every frame that did not make it."""
        failed: dict[str, str] = {}
        for report in self.stages.values():
            for filename, reason in report.failed.items():
                failed.setdefault(filename, f"{report.stage}: {reason}")
        return failed

    def __str__(self) -> str:
        lines = [describe(report) for report in self.stages.values()]
        if "aggregate" in self.stages:
            lines.append(
                _line(
                    "sources",
                    f"{self.n_measured:,} with a measurement, "
                    f"{self.n_sources - self.n_measured:,} without",
                )
            )
        if self.failed:
            lines.append(_line("failed", f"{len(self.failed):,} frames"))
            reasons = list(self.failed.items())
            lines += [f"            {filename}: {reason}" for filename, reason in reasons[:10]]
            if len(reasons) > 10:
                lines.append(f"            and {len(reasons) - 10:,} more, see the ledger")
        else:
            lines.append(_line("failed", "none"))
        lines.append(_line("output", self.output))
        return "\n".join(lines)

    __repr__ = __str__


def describe(report: StageReport) -> str:
    """Return a stage's line of the summary, and lines for what it left out."""
    rate = max(report.seconds, 1e-9)
    kept = f" ({report.reused:,} already there)" if report.reused else ""
    if report.stage == "query":
        text = f"{report.total:,} frames found, {report.bytes / 1e9:.3g} GB"
        if not report.total:
            text = "no frame covers the field: check centre, radius, bands and mjd_range"
        speed = ""
    elif report.stage == "download":
        text = f"{report.done + report.reused:,} of {report.total:,} frames{kept}"
        speed = f"{report.bytes / 1e9:.2f} GB, {report.bytes / 1e6 / rate:.0f} MB/s"
    elif report.stage == "extract":
        frames = f"{report.done + report.reused:,} of {report.total:,} frames{kept}"
        text = f"{frames}, {report.rows:,} rows"
        speed = f"{report.done / rate:.1f} frames/s"
    else:
        text = f"{report.total:,} light curves, {report.rows:,} rows"
        speed = f"{report.rows / rate:,.0f} rows/s"
    lines = [_line(report.stage, f"{text:<52} {report.seconds:8.1f} s   {speed}".rstrip())]
    if len(report.releases) > 1:
        of = ", ".join(f"{n:,} of {name}" for name, n in sorted(report.releases.items()))
        lines.append(_line("", f"{of}: their flux scales differ by some percent"))
    if report.outside and report.total:
        have = "have only the frames that touch the circle"
        lines.append(_line("", f"{report.outside:,} sources lie outside: they {have}"))
    if report.left_out:
        lines.append(_line("", f"{report.left_out:,} frames are not in them: not measured"))
    if report.removed:
        lines.append(_line("", f"{report.removed:,} of sources without a row now were removed"))
    for reason, count in sorted(report.skipped.items()):
        lines.append(_line("", f"{count:,} measurements left out: {reason}"))
    if report.warnings:
        said = Counter(w for warnings in report.warnings.values() for w in warnings)
        lines += [_line("", f"{n:,} frames: {text}") for text, n in said.most_common(3)]
        if len(said) > 3:
            lines.append(_line("", f"and {len(said) - 3:,} other warnings, see the ledger"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<11} {text}"
