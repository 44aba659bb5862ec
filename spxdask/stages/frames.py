"""Download and extraction, frame by frame: a plan is executed and each outcome recorded."""

from __future__ import annotations

import functools
import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import dask
import dask.bag as db
from dask.delayed import Delayed

from spxdask.archive.calibration import CalibrationSet
from spxdask.archive.observation import Observation
from spxdask.archive.outage import ArchiveQueue, OutagePolicy, Request
from spxdask.archive.received import FileVersion
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.urls import strip_credentials
from spxdask.archive.version import MAX_CONCURRENT_REQUESTS, ask_versions
from spxdask.cluster.page import ProgressPublisher
from spxdask.cluster.tasks import (
    as_task,
    is_killed_worker,
    make_share,
    make_thread_window,
    run_window,
)
from spxdask.config import BatchConfig
from spxdask.errors import ClusterError, DiskFullError, InputError
from spxdask.run.aggregation import discard_aggregation
from spxdask.run.description import describe_frame
from spxdask.run.folder import RunFolder
from spxdask.run.frame_table import save_frame_table
from spxdask.run.ledger import Outcome
from spxdask.run.observations import Observations
from spxdask.run.plan import (
    NO_SOURCE,
    FrameState,
    MeasurementInputs,
    has_failed,
    is_other_file,
    plan_frames,
)
from spxdask.run.sources import RunSources
from spxdask.run.summary import StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.science.compiled import is_cached
from spxdask.stages import download, extract, stream
from spxdask.stages.calibration import fetch_products, prepare_calibration
from spxdask.stages.reading import ReadOption, make_row_rule
from spxdask.stages.recheck import recheck_frames

if TYPE_CHECKING:
    from spxdask.cluster.session import Client, ClusterSession

logger = logging.getLogger(__name__)

FETCHING = (FrameState.FETCH, FrameState.FETCH_AND_MEASURE)
MEASURING = (FrameState.MEASURE, FrameState.FETCH_AND_MEASURE)
# Frames in any other state need no task.
TASK_STATES = (FrameState.MEASURE, *FETCHING)

Job = tuple[Observation, FrameState]


@dataclass(kw_only=True)
class FrameRun:
    """One pass over the frames of a query, by one or both of the stages that go frame by frame.

    Attributes
    ----------
    folder : RunFolder
        Locked by the caller.
    config : BatchConfig
        The run.
    catalogue : Catalogue or None
        The sources; None where nothing is to be measured, and all frames are to be fetched.
    observations : Observations
        The frames; read several times, part by part.
    reports : dict of str to StageReport
        The reports to fill in, by stage: download, extract or both.
    progress : ProgressPublisher
        Receives each frame that has ended.
    outage_policy : OutagePolicy
        Patience with an archive that does not answer.
    calibration : CalibrationSet
        The products that frames are measured with.
    contaminants : Catalogue or None
        Sources of the solution for PSF fluxes that get no rows.
    """

    folder: RunFolder
    config: BatchConfig
    catalogue: Catalogue | None
    observations: Observations
    reports: dict[str, StageReport]
    progress: ProgressPublisher
    outage_policy: OutagePolicy
    calibration: CalibrationSet = field(default_factory=CalibrationSet)
    contaminants: Catalogue | None = None

    @cached_property
    def inputs(self) -> MeasurementInputs:
        """What tables are made with."""
        return MeasurementInputs(
            photometry=self.config.photometry,
            catalogue=self.catalogue,
            calibration=self.calibration,
            contaminants=self.contaminants,
        )

    def __post_init__(self) -> None:
        # Frames that were fetched for their image, and turned out to be others than were measured.
        self._other_frames: list[Job] = []
        # Whether the archive has refused to send parts of files.
        self._is_refused = False
        # Options of the tasks for each recipe that is in the ledger, and detector.
        self._announced: dict[tuple[str, str, str], extract.ExtractOptions] = {}

    @cached_property
    def _bag(self) -> db.Bag:
        return make_bag(self.observations)

    def complete(self, session: ClusterSession, *, recheck: bool = False, **options: bool) -> None:
        """Plan, do what is left to do, and bring the table of frames up to date.

        Parameters
        ----------
        session : ClusterSession
            Gives the cluster, if there is anything to do.
        recheck : bool
            Whether the archive is asked which frames it has replaced.
        **options
            Those of `plan`.

        Raises
        ------
        DiskFullError, ClusterError, RunFolderError
            As `plan` and `execute`.
        """
        replaced = self.recheck(session.run_once) if recheck else set()
        states = self.plan(replaced=replaced, **options)
        if any(state in states for state in TASK_STATES):
            self.execute(session.connect(), states, serial=session.is_embedded)
        self.save_table()

    def recheck(self, run_once: Callable[..., list[FileVersion | str]]) -> set[str]:
        """Ask the archive which frames it has replaced since they were fetched.

        Parameters
        ----------
        run_once : callable
            Calls a function, whose name comes first, with arguments, from where the frames are
            fetched.

        Returns
        -------
        set of str
            Their names, for `plan`.
        """
        options = _make_fetch_options(self.config)
        question = functools.partial(
            ask_versions,
            retry=options.retry,
            stall_timeout_s=options.stall_timeout_s,
            endpoint=options.endpoint,
            max_concurrent_requests=min(MAX_CONCURRENT_REQUESTS, self.config.max_download_workers),
        )
        ask = functools.partial(run_once, "recheck", question)
        self.progress.start("recheck", len(self.observations), "frames")
        found = recheck_frames(iterate(self._bag), self.folder.ledger, ask, self.progress.advance)
        report = self.reports["download"]
        report.rechecked, report.replaced = found.n_asked, len(found.replaced)
        report.not_rechecked = found.unknown
        return found.replaced

    def plan(
        self,
        *,
        skip_existing: bool = True,
        only_failed: bool = False,
        replaced: Container[str] = (),
    ) -> bytearray:
        """Decide what is left to do, and report the frames for which that is nothing.

        Parameters
        ----------
        skip_existing : bool
            Whether a table that is up to date counts.
        only_failed : bool
            Whether frames that have not failed are excluded.
        replaced : container of str
            Names of files that the archive has replaced since they were fetched.

        Returns
        -------
        bytearray
            A `FrameState` a frame.

        Raises
        ------
        DiskFullError
            If there is no room for the frames that are to be fetched and kept.
        RunFolderError
            If the folders for what is to be written cannot be written to.
        """
        ledger = self.folder.ledger
        total = len(self.observations)
        if only_failed:
            total = sum(has_failed(ledger, frame.filename) for frame in iterate(self._bag))
        name = next(iter(self.reports)) if len(self.reports) == 1 else "frames"
        self.progress.start(name, total, "frames")
        planned = plan_frames(
            iterate(self._bag),
            ledger,
            self.inputs,
            image_sizes=self.folder.images.list_sizes(),
            table_sizes=self.folder.per_image.list_sizes() if "extract" in self.reports else {},
            stages=self.reports,
            keep_images=self.config.keep_images,
            table_format=self.config.per_image_format,
            skip_existing=skip_existing,
            only_failed=only_failed,
            replaced=replaced,
            fetch_empty=self.config.fetches_empty_frames,
        )
        states, fetch_bytes = bytearray(), 0
        for observation, state, measured in planned:
            states.append(state)
            if state == FrameState.EXCLUDED:
                continue
            if state == FrameState.EMPTY:
                for report in self.reports.values():
                    report.excluded[NO_SOURCE] += 1
                self.progress.advance()
                continue
            for report in self.reports.values():
                report.total += 1
            if state in FETCHING:
                fetch_bytes += observation.size_bytes or 0
            elif "download" in self.reports:
                self.reports["download"].reused += 1
            if measured is not None:
                self.reports["extract"].reused += 1
                self._account(measured)
            if state == FrameState.MISSING:
                self._record_missing_frame(observation)
            if state in (FrameState.DONE, FrameState.MISSING):
                self.progress.advance(failed=state == FrameState.MISSING)
        self._require_folders(states)
        if self.config.keep_images:
            self._require_room(fetch_bytes)
        return states

    def execute(self, client: Client, states: bytearray, *, serial: bool) -> None:
        """Fetch and measure the frames that need it, and record what became of each.

        Parameters
        ----------
        client : Client
            Of the cluster.
        states : bytearray
            What `plan` returned.
        serial : bool
            Whether a worker process measures one frame at a time.

        Raises
        ------
        DiskFullError
            If the disk is full. What was in flight has been recorded.
        ClusterError
            If the cluster is gone.
        RunFolderError
            If another run has taken over the folder.
        ArchiveError
            If the archive does not answer for too long.
        """
        folder, config = self.folder, self.config
        if any(state in states for state in MEASURING):
            self._fetch_products(states)
            self._announce_measurements()
            if serial and not is_cached():
                self.progress.note("compiling, once on this machine: half a minute or so")
        make_task = _TaskFactory(
            images=str(folder.images),
            per_image=str(folder.per_image),
            keep_images=config.keep_images,
            fetch=_make_fetch_options(config),
            read=lambda: "whole" if self._is_refused else config.read,
            requests_at_once=make_share(client, config.max_download_workers),
            measure=self._make_extract_options(serial) if "extract" in self.reports else None,
            find_fetched=functools.partial(folder.ledger.get_done, "download"),
        )
        suspects: list[Job] = []
        # Frames on disk come first, as they wait for no download.
        for wanted, window in (
            ((FrameState.MEASURE,), make_thread_window(client)),
            (FETCHING, lambda: config.max_download_workers),
        ):
            # The frames are read again, as a million of them would fill the memory.
            pairs = zip(iterate(self._bag), map(FrameState, states), strict=True)
            jobs = (pair for pair in pairs if pair[1] in wanted)
            self._collect(client, jobs, make_task, window, suspects)
        if self._other_frames:
            self._announce_measurements()
            again = list(self._other_frames)
            self._collect(client, again, make_task, make_thread_window(client), suspects)
        # Run one at a time, frames that kill workers are distinguished from their neighbours.
        self._collect(client, suspects, make_task, lambda: 1, None)

    def save_table(self) -> None:
        """Bring the table of frames in the folder up to date."""
        sources = None if self.config.fetches_empty_frames else self.catalogue
        save_frame_table(self.folder.state, self.observations, self.folder.ledger, sources)

    def _fetch_products(self, states: bytearray) -> None:
        """Have on this machine the products for the frames that are to be measured."""
        kinds = {
            (observation.band, observation.is_early)
            for observation, state in zip(iterate(self._bag), states, strict=True)
            if state in MEASURING
        }
        fetch_products(self.calibration, kinds, self.outage_policy, self._show_wait)

    def _announce_measurements(self) -> None:
        """Prepare the folder for tables that will replace those it has."""
        discard_aggregation(self.folder.state)
        self._announced.clear()

    def _collect(
        self,
        client: Client,
        jobs: Iterable[Job],
        make_task: _TaskFactory,
        window: Callable[[], int],
        suspects: list[Job] | None,
    ) -> None:
        """Run the tasks of jobs and record their outcomes.

        Frames whose workers died again and again are appended to `suspects` if it is given.
        """
        full: DiskFullError | None = None
        queue = ArchiveQueue(
            jobs,
            self.outage_policy,
            get_key=lambda job: job[0].filename,
            find_reference=self._find_fetched,
        )

        def feed() -> Iterator[tuple[Request[Job], Delayed] | None]:
            while full is None and not queue.is_finished:
                request = queue.take()
                yield None if request is None else (request, make_task(request))

        def settle(request: Request[Job], result: Any) -> None:
            queue.settle(request, result, *_judge(request, result))

        def record() -> None:
            for (observation, state), result in queue.ended:
                if is_killed_worker(result) and suspects is not None:
                    suspects.append((observation, state))
                elif isinstance(result, DiskFullError | ClusterError | InputError):
                    # These concern all frames.
                    continue
                elif isinstance(result, BaseException):
                    failure = self._make_failure(observation, state, result)
                    self._record(observation, state, [failure])
                else:
                    self._record(observation, state, _list_outcomes(result))
            queue.ended.clear()

        waiting = False
        try:
            for _, result in run_window(
                client, feed(), window, settle=settle, pause=lambda: queue.pause_s
            ):
                self.folder.raise_if_lock_lost()
                record()
                if isinstance(result, DiskFullError):
                    # What is in flight may still find room; nothing more is started.
                    full = result
                elif isinstance(result, ClusterError | InputError):
                    raise result
                waiting = self._report_outage(queue, waiting)
        finally:
            self._report_outage(None, waiting)
        record()
        if full is not None:
            raise full

    def _report_outage(self, queue: ArchiveQueue[Job] | None, waiting: bool) -> bool:
        """Tell the user when an outage begins and ends; return whether there is one."""
        outage = queue.outage if queue is not None and queue.is_announced else None
        if outage is not None:
            reason = str(outage)
            self._show_wait(reason)
            if not waiting:
                logger.warning(reason)
                # It may last, and what is done is safe.
                self.folder.ledger.flush()
        elif waiting:
            self._show_wait(None)
            if queue is not None:
                logger.warning("the archive answers again")
        return outage is not None

    def _show_wait(self, reason: str | None) -> None:
        """Show why the run waits, or with None that it does not, in its progress and status."""
        self.folder.set_waiting(reason)
        self.progress.wait(reason)

    def _find_fetched(self) -> Job | None:
        """Return a frame that the archive served in this run or an earlier one."""
        ledger = self.folder.ledger
        for observation in iterate(self._bag):
            if ledger.get_done("download", observation.filename) is not None:
                return observation, FrameState.FETCH
        return None

    def _record(self, observation: Observation, state: FrameState, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            logger.debug("%s", outcome)
            self.folder.ledger.add(outcome)
            self.reports[outcome.stage].done += outcome.status == "done"
            self._account(outcome)
        last = outcomes[-1]
        failed = last.status == "failed"
        if state == FrameState.FETCH and not failed and self._withdraw_measurement(last):
            self._other_frames.append((observation, FrameState.MEASURE))
            return
        if failed and last.stage == "download" and state == FrameState.FETCH_AND_MEASURE:
            self._record_missing_frame(observation)
        reason = f"{observation.filename}: {last.reason}" if failed else None
        fetched = sum(outcome.bytes for outcome in outcomes if outcome.stage == "download")
        self.progress.advance(failed=failed, reason=reason, n_bytes=fetched)

    def _withdraw_measurement(self, fetched: Outcome) -> bool:
        """Take an earlier measurement out of the report if it was of another file.

        That a table is up to date is known only when the frame is there again.
        """
        report = self.reports.get("extract")
        measured = self.folder.ledger.get_done("extract", fetched.filename)
        if report is None or measured is None or not is_other_file(fetched, measured):
            return False
        report.reused -= 1
        report.rows -= measured.rows
        report.bytes -= measured.bytes
        report.file_bytes -= measured.file_bytes
        report.by_rows -= measured.read == "rows"
        report.skipped -= Counter(measured.skipped)
        report.psf_empty -= Counter(measured.psf_empty)
        report.warnings.pop(fetched.filename, None)
        return True

    def _make_failure(
        self, observation: Observation, state: FrameState, error: BaseException
    ) -> Outcome:
        """Return the outcome of a task that could not report one."""
        reason = f"{type(error).__name__}: {error}"
        if is_killed_worker(error):
            reason = (
                "every worker that began it died or hung, perhaps for lack of memory (KilledWorker)"
            )
        # The last stage of the task is the one that is to be done again.
        stage = "download" if state == FrameState.FETCH else "extract"
        return self._fail(stage, observation, reason)

    def _record_missing_frame(self, observation: Observation) -> None:
        """Record that a frame cannot be measured, as it is not there."""
        fetched = self.folder.ledger.get("download", observation.filename)
        has_failed = fetched is not None and fetched.status == "failed"
        reason = fetched.reason if fetched is not None and has_failed else "run download first"
        outcome = self._fail("extract", observation, f"not downloaded: {reason}")
        self.folder.ledger.add(outcome)
        self._account(outcome)

    def _fail(self, stage: str, observation: Observation, reason: str) -> Outcome:
        inputs: dict[str, Any] = {}
        if stage == "extract":
            inputs = self.inputs.identify(observation)
        return Outcome(
            stage=stage, filename=observation.filename, status="failed", reason=reason, **inputs
        )

    def _account(self, outcome: Outcome) -> None:
        """Add what became of a frame to the report of its stage."""
        report = self.reports[outcome.stage]
        report.rows += outcome.rows
        report.bytes += outcome.bytes
        report.file_bytes += outcome.file_bytes
        report.by_rows += outcome.read == "rows"
        if outcome.refusal is not None and not self._is_refused:
            self._is_refused = True
            report.refusal = outcome.refusal
            logger.warning("%s: all frames are fetched whole", outcome.refusal)
        report.skipped.update(outcome.skipped)
        report.psf_empty.update(outcome.psf_empty)
        # The measurement of a frame repeats the warnings of its download.
        if outcome.warnings and (outcome.stage == "extract" or "extract" not in self.reports):
            report.warnings[outcome.filename] = outcome.warnings
        if outcome.status == "failed":
            report.failed[outcome.filename] = outcome.reason or ""

    def _require_folders(self, states: bytearray) -> None:
        """Raise an error now if the frames could not be written when they are there."""
        folder = self.folder
        if self.config.keep_images and any(state in states for state in FETCHING):
            folder.require_writable(folder.images)
        if any(state in states for state in MEASURING):
            folder.require_writable(folder.per_image)
            if "download" in self.reports:
                # A whole run, which goes on to light curves.
                folder.require_writable(folder.lightcurves)

    def _require_room(self, needed: int) -> None:
        free = self.folder.images.free_bytes()
        if needed > free:
            raise DiskFullError(
                f"the frames to fetch have {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free "
                f"in {self.folder.images}: make room, choose another output_dir, or do not keep "
                "them (keep_images=False, --no-keep-images)"
            )

    def _make_extract_options(
        self, serial: bool
    ) -> Callable[[Observation], extract.ExtractOptions]:
        """Return what gives the options of a frame's task, and records its recipe."""
        catalogue, contaminants = self.inputs.catalogue, self.inputs.contaminants
        assert catalogue is not None
        others = None if contaminants is None else self.folder.save_contaminants(contaminants)
        common = extract.ExtractOptions(
            catalogue=self.folder.save_catalogue(catalogue),
            photometry=self.inputs.photometry,
            recipe="",
            catalogue_fingerprint=catalogue.identity,
            serial=serial,
            format=self.config.per_image_format,
            product_source=self.calibration.source,
            contaminants=others,
            row_rule=make_row_rule(self.config.read, is_kept=self.config.keep_images),
        )

        def choose(observation: Observation) -> extract.ExtractOptions:
            recipe = self.inputs.find_recipe(observation)
            key = recipe.digest, observation.band, observation.release
            if key not in self._announced:
                self.folder.ledger.add_recipe(recipe.digest, recipe.steps)
                products = self.calibration.choose(observation.band, observation.is_early)
                self._announced[key] = replace(
                    common,
                    recipe=recipe.digest,
                    products=tuple(products.values()),
                    provenance=describe_frame(recipe, products, observation.release),
                )
            return self._announced[key]

        return choose


def prepare_frames(
    folder: RunFolder,
    sources: RunSources,
    reports: Sequence[StageReport],
    progress: ProgressPublisher,
    outage_policy: OutagePolicy,
) -> FrameRun:
    """Return a pass over the frames of the last query, with all that it depends on.

    Parameters
    ----------
    folder : RunFolder
        Locked by the caller. The configuration is saved in it.
    sources : RunSources
        The sources, and the configuration.
    reports : sequence of StageReport
        Those of the stages: download, extract or both.
    progress : ProgressPublisher
        Receives each frame that has ended.
    outage_policy : OutagePolicy
        Patience with an archive that does not answer.

    Returns
    -------
    FrameRun

    Raises
    ------
    RunFolderError
        If there was no query, or one for other sources or options.
    InputError
        If calibration products that are to be used cannot be had.
    """
    config, stages = sources.config, [report.stage for report in reports]
    if config.read == "rows" and config.keep_images and "download" in stages:
        logger.warning(
            "frames are fetched whole, as they are kept: keep_images must be false for read: rows"
        )
    catalogue = sources.choose(stages)
    run = FrameRun(
        folder=folder,
        config=config,
        catalogue=catalogue,
        observations=folder.require_observations(config, catalogue),
        reports={report.stage: report for report in reports},
        progress=progress,
        outage_policy=outage_policy,
    )
    if "extract" in stages:
        run.contaminants = sources.read_contaminants()
        run.calibration = prepare_calibration(folder, config, run.observations)
    folder.save_config(config)
    if config.lightcurve_format == "csv" and "extract" in stages:
        # Long before the first light curve is written.
        folder.find_refused_characters(catalogue)
    return run


def _make_fetch_options(config: BatchConfig) -> download.FetchOptions:
    """Return how patient the downloads of a run are.

    Parameters
    ----------
    config : BatchConfig
        The run.

    Returns
    -------
    FetchOptions
    """
    return download.FetchOptions(
        retry=RetryPolicy(max_retries=config.max_retries),
        stall_timeout_s=config.stall_timeout,
        scratch_bytes=config.scratch_gb * 1e9,
        endpoint=config.archive_endpoint,
        run=uuid.uuid4().hex,
    )


def _list_outcomes(result: Any) -> list[Outcome]:
    """Return the outcomes that a task returned."""
    return result if isinstance(result, list) else [result]


def _judge(
    request: Request[Job], result: Any
) -> tuple[Literal["served", "answered", "archive", "access", "unknown"], str, int]:
    """Return what a result tells of the archive, what was wrong, and how often it was asked."""
    observation, state = request.job
    if isinstance(result, BaseException) or state == FrameState.MEASURE:
        return "unknown", "", 0
    fetched = _list_outcomes(result)[0]
    if fetched.status == "done":
        return "served", "", 1
    reason = (fetched.reason or "").removeprefix(f"{strip_credentials(observation.download_url)}: ")
    reason = re.sub(r" \(after \d+ attempts?\)$", "", reason)
    if fetched.blame == "archive":
        return "archive", reason, fetched.attempts
    return ("access" if fetched.blame == "access" else "answered"), reason, fetched.attempts


@dataclass(frozen=True, kw_only=True)
class _TaskFactory:
    """Makes the task of a frame."""

    images: str
    per_image: str
    keep_images: bool
    fetch: download.FetchOptions
    read: Callable[[], ReadOption]
    requests_at_once: Callable[[], int]
    measure: Callable[[Observation], extract.ExtractOptions] | None
    find_fetched: Callable[[str], Outcome | None]

    def __call__(self, request: Request[Job]) -> Delayed:
        observation, state = request.job
        fetch = self.fetch
        if request.purpose != "job":
            # One request at a time.
            fetch = replace(fetch, retry=replace(fetch.retry, max_retries=0))
        if not self.keep_images:
            at_once = self.requests_at_once() if request.purpose == "job" else 1
            fetch = replace(fetch, read=self.read(), requests_at_once=at_once)
        if request.purpose == "reference":
            return _as_frame_task("probe", observation, download.probe, observation, fetch)
        measure = None if self.measure is None else self.measure(observation)
        if state == FrameState.MEASURE:
            image = f"{self.images}/{observation.filename}"
            fetched = self.find_fetched(observation.filename)
            return _as_frame_task(
                "extract",
                observation,
                extract.extract,
                image,
                self.per_image,
                measure,
                fetched,
            )
        if state == FrameState.FETCH:
            return _as_frame_task(
                "download", observation, download.download, observation, self.images, fetch
            )
        return _as_frame_task(
            "download-extract",
            observation,
            stream.stream,
            observation,
            self.images if self.keep_images else None,
            self.per_image,
            fetch,
            measure,
        )


def _as_frame_task(
    stage: str, observation: Observation, function: Callable, *arguments: Any
) -> Delayed:
    """Return a delayed call that the dashboard shows under the stage's name.

    The key is new each time: a key that the scheduler still knows would not run again.
    """
    return as_task((stage, f"{observation.stem}-{uuid.uuid4().hex[:8]}"), function, *arguments)


def make_bag(observations: Observations) -> db.Bag:
    """Return observations as a bag.

    Parameters
    ----------
    observations : Observations
        They are read when the bag is computed.

    Returns
    -------
    dask.bag.Bag of Observation
        One partition per part.
    """
    parts = range(observations.n_parts)
    return db.from_delayed([dask.delayed(observations.part)(number) for number in parts])


def iterate(bag: db.Bag) -> Iterator[Any]:
    """Yield the items of a bag partition by partition, so that few are in memory.

    Parameters
    ----------
    bag : dask.bag.Bag
        Computed in this process.

    Yields
    ------
    object
        Each item, in order.
    """
    for partition in bag.to_delayed():
        yield from partition.compute(scheduler="sync")
