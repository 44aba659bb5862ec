"""Recheck: the archive is asked which of the frames that were fetched it has replaced since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from spxdask.archive.observation import Observation
from spxdask.archive.received import FileVersion
from spxdask.run.ledger import Ledger, Outcome

# Files that are asked about in one call.
BATCH_SIZE = 100

AskVersions = Callable[[Sequence[str]], list[FileVersion | str]]


@dataclass(kw_only=True)
class Recheck:
    """What the archive said of the frames of a run.

    Attributes
    ----------
    n_asked : int
        Frames that the archive was asked about: those that were fetched or measured.
    replaced : set of str
        Names of those that it has replaced.
    unknown : Counter of str
        Number of those of which that is not known, by reason.
    """

    n_asked: int = 0
    replaced: set[str] = field(default_factory=set)
    unknown: Counter[str] = field(default_factory=Counter)


def recheck_frames(
    observations: Iterable[Observation],
    ledger: Ledger,
    ask_versions: AskVersions,
    advance: Callable[[], None] = lambda: None,
) -> Recheck:
    """Ask the archive whether it has replaced frames that were fetched or measured.

    Parameters
    ----------
    observations : iterable of Observation
        The frames of the query.
    ledger : Ledger
        What became of them.
    ask_versions : callable
        Takes URLs, returns the version of each file or the reason why it is not known.
    advance : callable
        Called for each frame.

    Returns
    -------
    Recheck
        A frame is replaced if the archive states another version than it did with the
        transfer. Where no version was recorded, as by earlier versions of spxdask, it is
        replaced if it was changed after it was fetched or measured.
    """
    found = Recheck()
    left = iter(observations)
    # A few at a time, as there may be a million.
    while batch := list(islice(left, BATCH_SIZE)):
        known = [
            (observation, outcome)
            for observation in batch
            if (outcome := _find_outcome(ledger, observation.filename)) is not None
        ]
        versions = ask_versions([observation.download_url for observation, _ in known])
        for (observation, outcome), version in zip(known, versions, strict=True):
            found.n_asked += 1
            is_replaced = None if isinstance(version, str) else _is_replaced(outcome, version)
            if is_replaced:
                found.replaced.add(observation.filename)
            elif is_replaced is None:
                reason = version if isinstance(version, str) else "the archive states no version"
                found.unknown[reason] += 1
        for _ in batch:
            advance()
    return found


def _find_outcome(ledger: Ledger, filename: str) -> Outcome | None:
    """Return the outcome that says which version of a frame the run has."""
    return ledger.get_done("download", filename) or ledger.get_done("extract", filename)


def _is_replaced(outcome: Outcome, version: FileVersion) -> bool | None:
    """Return whether a version is another than that of an outcome, None if nobody knows."""
    differs = FileVersion(outcome.etag, outcome.modified).differs(version)
    if differs is not None:
        return differs
    if version.modified_at is None or outcome.time is None:
        return None
    return version.modified_at > datetime.fromisoformat(outcome.time)
