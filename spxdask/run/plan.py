"""What is left to do for each frame, decided from plain data.

This is the one answer to "is this frame done?": the stages that go frame by frame, the
aggregation's choice of tables and `spxdask status` all use it. Nothing here reads a disk,
sends a request or depends on Dask; the code that executes a plan records the outcomes.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

from spxdask.archive.received import FileVersion
from spxdask.run.recipe import FEW_ROWS_VERSION, Recipe, RecipeInputs, make_recipe

if TYPE_CHECKING:
    from spxdask.archive.calibration import CalibrationSet
    from spxdask.archive.observation import Observation
    from spxdask.run.ledger import Outcome
    from spxdask.science.catalogue import Catalogue
    from spxdask.science.options import PhotometryConfig

__all__ = [
    "NO_SOURCE",
    "FrameState",
    "MeasurementInputs",
    "PlannedFrame",
    "TableChoice",
    "choose_tables",
    "find_empty",
    "has_failed",
    "is_other_file",
    "plan_frames",
    "table_name",
]


# Why a frame that was found is neither fetched nor measured.
NO_SOURCE = "no source on the frame"
# Frames whose footprints are compared with the sources at once.
BATCH_SIZE = 1000


class FrameState(enum.IntEnum):
    """What is left to do for a frame. Fits a byte, as there may be a million of them."""

    EXCLUDED = 0
    """Not part of this run."""
    DONE = 1
    """Nothing is left to do."""
    FETCH = 2
    """To be fetched; its table is there, or not asked for."""
    MEASURE = 3
    """To be measured; it is on disk."""
    FETCH_AND_MEASURE = 4
    """To be fetched, and measured in memory."""
    MISSING = 5
    """To be measured, but not on disk, and fetching is not part of this run."""
    FAILED = 6
    """Tried with the present inputs, in vain, and not to be tried again by itself."""
    EMPTY = 7
    """Neither to be fetched nor measured, as no source can lie on it."""


class Outcomes(Protocol):
    """Where the outcomes of each frame and stage are found: the ledger."""

    def get(self, stage: str, filename: str) -> Outcome | None:
        """Return the last outcome of a stage for a frame.

        Parameters
        ----------
        stage : str
            Name of the stage.
        filename : str
            Name of the frame's file.

        Returns
        -------
        Outcome or None
            None when there is none.
        """

    def get_done(self, stage: str, filename: str) -> Outcome | None:
        """Return the last success of a stage for a frame, which a failure may have followed.

        Parameters
        ----------
        stage : str
            Name of the stage.
        filename : str
            Name of the frame's file.

        Returns
        -------
        Outcome or None
            None when there is none.
        """


class PlannedFrame(NamedTuple):
    """A frame of the plan.

    Attributes
    ----------
    observation : Observation
        The frame.
    state : FrameState
        What is left to do for it.
    measured : Outcome or None
        The outcome behind its table, if that is there and up to date.
    """

    observation: Observation
    state: FrameState
    measured: Outcome | None


@dataclass(frozen=True, kw_only=True)
class MeasurementInputs:
    """What the rows of a frame depend on besides the frame: a recipe and a catalogue.

    Attributes
    ----------
    photometry : PhotometryConfig
        How a source is measured.
    catalogue : Catalogue or None
        The sources; None if unknown: then every catalogue matches.
    calibration : CalibrationSet or None
        The products; None for nothing but what is in the frames.
    contaminants : Catalogue or None
        Sources of the solution for PSF fluxes that get no rows.
    """

    photometry: PhotometryConfig
    catalogue: Catalogue | None
    calibration: CalibrationSet | None = None
    contaminants: Catalogue | None = None
    # A copy with other inputs has other recipes.
    _recipes: dict[tuple[str, bool], Recipe] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def find_recipe(self, observation: Observation) -> Recipe:
        """Return the recipe for a frame.

        Parameters
        ----------
        observation : Observation
            The frame.

        Returns
        -------
        Recipe
            The same for frames of one detector, but for those of early releases.
        """
        key = observation.band, observation.is_early
        if key not in self._recipes:
            products = {}
            if self.calibration is not None:
                chosen = self.calibration.choose(observation.band, observation.is_early)
                products = {name: (p.token, p.checksum) for name, p in chosen.items()}
            contaminants = None if self.contaminants is None else self.contaminants.identity
            self._recipes[key] = make_recipe(
                RecipeInputs(
                    photometry=self.photometry, products=products, contaminants=contaminants
                )
            )
        return self._recipes[key]

    def identify(self, observation: Observation) -> dict[str, str | None]:
        """Return the fields of an outcome that identify what it was made with.

        Parameters
        ----------
        observation : Observation
            The frame.

        Returns
        -------
        dict of str to str or None
            The digest of the recipe and the identity of the catalogue, None without one.
        """
        identity = None if self.catalogue is None else self.catalogue.identity
        return {"recipe": self.find_recipe(observation).digest, "catalogue": identity}

    def match(self, observation: Observation, outcome: Outcome) -> bool:
        """Return whether an outcome is of this recipe and of these sources.

        Parameters
        ----------
        observation : Observation
            The frame.
        outcome : Outcome
            Of its extraction.

        Returns
        -------
        bool
            Also true when the catalogue was another one that is the same near the frame.
        """
        if outcome.recipe != self.find_recipe(observation).digest:
            return False
        if _has_other_fit(outcome):
            return False
        if self.catalogue is None or outcome.catalogue == self.catalogue.identity:
            return True
        # Whether a source that moves comes near depends on the time.
        if outcome.bounding_circle is None or self.catalogue.has_motions:
            return False
        near = self.catalogue.within(*outcome.bounding_circle)
        return self.catalogue.digest(near).hex() == outcome.sources_fingerprint


def _has_other_fit(outcome: Outcome) -> bool:
    """Return whether a frame was measured with an earlier fit to few of its rows."""
    found = outcome.properties
    return bool(found.get("fit_rows")) and found.get("fit_version", 1) != FEW_ROWS_VERSION


def table_name(filename: str, table_format: str) -> str:
    """Return the name of a frame's per-image table.

    Parameters
    ----------
    filename : str
        Of the frame.
    table_format : str
        ``csv`` or ``parquet``.

    Returns
    -------
    str
        Such as ``level2_..._photometry.csv``.
    """
    stem = filename.rpartition(".")[0] or filename
    return f"{stem}_photometry.{table_format}"


def has_failed(outcomes: Outcomes, filename: str) -> bool:
    """Return whether the last outcome of any stage for a frame is a failure.

    Parameters
    ----------
    outcomes : Outcomes
        The ledger.
    filename : str
        Of the frame.

    Returns
    -------
    bool
        False for a frame without outcomes.
    """
    found = (outcomes.get(stage, filename) for stage in ("download", "extract"))
    return any(outcome is not None and outcome.status == "failed" for outcome in found)


def plan_frames(
    observations: Iterable[Observation],
    outcomes: Outcomes,
    inputs: MeasurementInputs,
    *,
    image_sizes: Mapping[str, int],
    table_sizes: Mapping[str, int],
    stages: Collection[str] = ("download", "extract"),
    keep_images: bool = True,
    table_format: str = "csv",
    skip_existing: bool = True,
    only_failed: bool = False,
    retry_failed: bool = True,
    replaced: Container[str] = (),
    fetch_empty: bool = True,
) -> Iterator[PlannedFrame]:
    """Decide what is left to do for each frame of a query.

    Parameters
    ----------
    observations : iterable of Observation
        The frames, read as fast as the plan is.
    outcomes : Outcomes
        The ledger.
    inputs : MeasurementInputs
        What tables have to be made with.
    image_sizes, table_sizes : mapping of str to int
        Length of each file in images/ and in per_image/, by name.
    stages : collection of str
        Those that are to be done, of ``download`` and ``extract``.
    keep_images : bool
        Whether frames are wanted on disk, measured or not.
    table_format : str
        ``csv`` or ``parquet``.
    skip_existing : bool
        Whether a table that is up to date counts.
    only_failed : bool
        Whether frames that have not failed are excluded.
    retry_failed : bool
        Whether what failed with the present inputs is to be tried again.
    replaced : container of str
        Names of files that the archive has replaced since they were fetched.
    fetch_empty : bool
        Whether frames on which no source can lie are fetched and measured, too. If not, the
        frames are read in batches of `BATCH_SIZE`.

    Yields
    ------
    PlannedFrame
        One a frame, in their order.
    """
    sources = None if fetch_empty else inputs.catalogue
    for observation, is_empty in find_empty(observations, sources):
        filename = observation.filename
        extracted = measured = None
        if "extract" in stages:
            extracted = outcomes.get("extract", filename)
            table = table_sizes.get(table_name(filename, table_format)) if skip_existing else None
            # A failure with other inputs does not make a table wrong that is still there.
            measured = extracted if table is not None else None
            if measured is not None and measured.status != "done":
                measured = outcomes.get_done("extract", filename)
            if measured is not None and not (
                measured.bytes == table
                and inputs.match(observation, measured)
                and not _was_replaced(observation, measured, outcomes)
                # Where the frame is kept, its content decides, once it is fetched.
                and (keep_images or filename not in replaced)
            ):
                measured = None
        state = _decide(
            observation,
            outcomes,
            inputs,
            extracted=extracted,
            is_measured=measured is not None,
            is_on_disk=observation.is_complete(image_sizes) and filename not in replaced,
            is_empty=is_empty,
            stages=stages,
            keep_images=keep_images,
            only_failed=only_failed,
            retry_failed=retry_failed,
        )
        yield PlannedFrame(observation, state, measured)


def find_empty(
    observations: Iterable[Observation], sources: Catalogue | None
) -> Iterator[tuple[Observation, bool]]:
    """Tell which frames no source can lie on.

    Parameters
    ----------
    observations : iterable of Observation
        The frames, read in batches of `BATCH_SIZE`.
    sources : Catalogue or None
        The sources; None if every frame is to be taken.

    Yields
    ------
    observation : Observation
        Each frame, in order.
    is_empty : bool
        Whether none of the sources can lie on it.
    """
    if sources is None:
        yield from ((observation, False) for observation in observations)
        return
    left = iter(observations)
    while batch := list(islice(left, BATCH_SIZE)):
        is_empty = sources.sky.find_empty([observation.footprint for observation in batch])
        yield from zip(batch, is_empty.tolist(), strict=True)


def _decide(
    observation: Observation,
    outcomes: Outcomes,
    inputs: MeasurementInputs,
    *,
    extracted: Outcome | None,
    is_measured: bool,
    is_on_disk: bool,
    is_empty: bool,
    stages: Collection[str],
    keep_images: bool,
    only_failed: bool,
    retry_failed: bool,
) -> FrameState:
    if only_failed and not has_failed(outcomes, observation.filename):
        return FrameState.EXCLUDED
    to_measure = "extract" in stages and not is_measured
    to_fetch = "download" in stages and not is_on_disk and (keep_images or to_measure)
    if not to_measure and not to_fetch:
        return FrameState.DONE
    if is_empty:
        return FrameState.EMPTY
    if not retry_failed:
        failed_here = (
            to_measure
            and extracted is not None
            and extracted.status == "failed"
            and inputs.match(observation, extracted)
        )
        fetched = outcomes.get("download", observation.filename) if to_fetch else None
        if failed_here or (fetched is not None and fetched.status == "failed"):
            return FrameState.FAILED
    if to_fetch:
        return FrameState.FETCH_AND_MEASURE if to_measure else FrameState.FETCH
    return FrameState.MEASURE if is_on_disk else FrameState.MISSING


def _was_replaced(observation: Observation, measured: Outcome, outcomes: Outcomes) -> bool:
    """Return whether the archive has another file under the name than was measured."""
    latest = outcomes.get_done("download", observation.filename)
    if latest is not None and is_other_file(latest, measured):
        return True
    if measured.frame_bytes:
        return observation.size_bytes not in (None, measured.frame_bytes)
    # Earlier versions did not record the length of what was measured.
    fetched = outcomes.get("download", observation.filename)
    if fetched is None or fetched.status != "done" or not observation.size_bytes:
        return False
    return fetched.file_bytes != observation.size_bytes


def is_other_file(fetched: Outcome, measured: Outcome) -> bool:
    """Return whether a frame that was fetched is, or may be, of another content than was measured.

    Parameters
    ----------
    fetched : Outcome
        Of its last download that succeeded.
    measured : Outcome
        Of its extraction.

    Returns
    -------
    bool
        Whole files are told apart by the hashes of their contents. Of a file of which only some
        rows came there is none, and the versions decide that the archive stated; where it states
        none, two that came by rows count as the same.
    """
    if "rows" in (fetched.read, measured.read):
        before = FileVersion(measured.etag, measured.modified)
        differs = before.differs(FileVersion(fetched.etag, fetched.modified))
        if differs is None:
            return fetched.read != measured.read
        return differs
    # What a version without hashes measured may be another file, too.
    return fetched.content_hash not in (None, measured.frame_checksum)


@dataclass(kw_only=True)
class TableChoice:
    """The per-image tables that light curves are made of.

    Attributes
    ----------
    tables : list of (str, int, int, str or None, str)
        Name, length in bytes, number of rows, checksum and release of each.
    stale : list of str
        Names of tables that were made with other inputs, or changed or removed since.
    stale_reason : str
        What is wrong with the first of these.
    left_out : int
        Frames without a table that can be taken.
    """

    tables: list[tuple[str, int, int, str | None, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    stale_reason: str = ""
    left_out: int = 0


def choose_tables(
    planned: Iterable[PlannedFrame],
    outcomes: Outcomes,
    inputs: MeasurementInputs,
    *,
    recipes: Mapping[str, dict],
    table_sizes: Mapping[str, int],
    table_format: str,
) -> TableChoice:
    """Choose the tables to aggregate.

    Parameters
    ----------
    planned : iterable of PlannedFrame
        A plan of the stage ``extract`` in which what failed is not tried again.
    outcomes : Outcomes
        The ledger.
    inputs : MeasurementInputs
        What tables have to be made with.
    recipes : mapping of str to dict
        Steps of the recipes that are known, by digest.
    table_sizes : mapping of str to int
        Length of each file in per_image/, by name.
    table_format : str
        ``csv`` or ``parquet``.

    Returns
    -------
    TableChoice
        A frame that failed with the present inputs is left out and makes nothing stale.
    """
    choice = TableChoice()
    for observation, state, measured in planned:
        name = table_name(observation.filename, table_format)
        if measured is not None:
            table = name, measured.bytes, measured.rows, measured.checksum, observation.release
            choice.tables.append(table)
            continue
        if state == FrameState.EMPTY:
            continue
        choice.left_out += 1
        if state == FrameState.FAILED:
            continue
        earlier = outcomes.get_done("extract", observation.filename)
        if name in table_sizes or earlier is not None:
            if not choice.stale:
                choice.stale_reason = _explain(
                    observation, earlier, inputs, recipes, table_sizes.get(name)
                )
            choice.stale.append(name)
    return choice


def _explain(
    observation: Observation,
    outcome: Outcome | None,
    inputs: MeasurementInputs,
    recipes: Mapping[str, dict],
    size: int | None,
) -> str:
    """Describe why a table is stale."""
    if outcome is None:
        return "no record says how it was made"
    recipe = inputs.find_recipe(observation)
    if outcome.recipe is None:
        return "it was made by an earlier version"
    if outcome.recipe != recipe.digest:
        steps = recipes.get(outcome.recipe)
        differences = recipe.compare(Recipe(steps)) if steps is not None else []
        return "; ".join(differences) or "it was made with other options"
    if _has_other_fit(outcome):
        return "zodi: fitted to other rows of the frame"
    if not inputs.match(observation, outcome):
        return "it was made with other sources or options"
    if size is None:
        return "it was removed"
    if size != outcome.bytes:
        return f"it has {size} bytes, {outcome.bytes} were written"
    return "the archive has replaced the frame"
