"""The run: four stages in a row on a Dask cluster."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from itertools import takewhile
from typing import Any

import dask
import dask.bag as db
import pandas as pd
from dask.delayed import Delayed
from distributed import Client, KilledWorker

from spxdask.archive.observation import Observation
from spxdask.cluster.connect import check_versions, connect
from spxdask.cluster.embedded import embedded_client, require_main_guard
from spxdask.cluster.jobqueue import jobqueue_client
from spxdask.cluster.page import ProgressPublisher, show_page
from spxdask.cluster.shuffle import compute_shuffle, unregister_stale_plugins
from spxdask.cluster.tasks import as_task, make_thread_window, run_one, run_window
from spxdask.config import BatchConfig
from spxdask.errors import (
    ClusterError,
    ConfigError,
    DiskFullError,
    RunFolderError,
    SpxdaskError,
    StoreError,
)
from spxdask.progress import Bars, Progress, Silent
from spxdask.run.folder import TABLE_GROUPS_NAME, RunFolder
from spxdask.run.ledger import Outcome
from spxdask.run.observations import Observations
from spxdask.run.summary import RunSummary, StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.stages import aggregate, download, extract, query, stream
from spxdask.storage import locate_file, raise_disk_full
from spxdask.storage.files import raise_disk_full
from spxdask.tables.catalogue import read_catalogue

logger = logging.getLogger(__name__)

# A source farther than this from the field is on none of its frames, which are 3.5 deg wide.
FRAME_DEG = 6.0
# What a frame needs.
_NOTHING, _MEASURE, _FETCH, _STREAM = range(4)


class _NothingMeasuredError(RunFolderError):
    """There is nothing to make light curves of."""


class BatchPipeline:
    """Query, download, extract, aggregate: a run in an output folder.

    Each stage leaves its result in the folder and takes that of the stage before from
    there, so stages can run on different days and in different processes, and a stage
    run again does only what is not done.

    Parameters
    ----------
    config : BatchConfig
    client : distributed.Client, optional
        Cluster to use; it stays open.
    scheduler : str, optional
        Address of a scheduler, or its scheduler file, to connect to instead.
    jobqueue : path, optional
        YAML file of a batch system, whose jobs are to be the workers; see
        `spxdask.cluster.jobqueue`. With none of the three, each stage starts a cluster of this
        machine's size and closes it at its end; in ``with pipeline:`` and in `run_all`, one
        serves all stages.
    progress : bool or Progress, optional
        True draws a bar a stage; an object gets told what it asks for.

    Attributes
    ----------
    summary : RunSummary or None
        The account of the last `run_all`.
    reports : dict of str to StageReport
        The account of each stage that ran, by name.

    Examples
    --------
    >>> from spxdask import BatchConfig, BatchPipeline
    >>> config = BatchConfig(
    ...     catalog_path="sources.csv", center_ra=270.0, center_dec=66.56, radius=1.0
    ... )
    >>> pipeline = BatchPipeline(config)
    >>> summary = pipeline.run_all()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: BatchConfig,
        *,
        client: Client | None = None,
        scheduler: str | None = None,
        jobqueue: str | os.PathLike | None = None,
        progress: bool | Progress = False,
    ) -> None:
        if not isinstance(config, BatchConfig):
            raise ConfigError(f"config is {config!r}; allowed is a BatchConfig")
        if [client, scheduler, jobqueue].count(None) < 2:
            raise ConfigError("give a client, a scheduler or a jobqueue file, not two of them")
        if client is not None and (not isinstance(client, Client) or client.asynchronous):
            raise ConfigError(f"client is {client!r}; allowed is a synchronous distributed.Client")
        self.config = config
        self.folder = RunFolder(config.output_dir)
        self.reports: dict[str, StageReport] = {}
        self.summary: RunSummary | None = None
        self._catalogue_was: str | None = None
        self._given_client = client
        self._scheduler = scheduler
        self._jobqueue = jobqueue
        self._client: Client | None = None
        self._page: tuple[str, str | None] | None = None
        self._open = ExitStack()
        bars: Progress = Bars() if progress is True else progress or Silent()
        self._progress = ProgressPublisher(bars, self.folder.path)

    def __repr__(self) -> str:
        if self.summary is not None:
            return str(self.summary)
        return f"BatchPipeline in {self.folder.path}"

    def __enter__(self) -> BatchPipeline:
        self._open.enter_context(self._cluster())
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def dashboard_link(self) -> str | None:
        """The address of the Dask dashboard, while there is a cluster."""
        client = self._client or self._given_client
        return client.dashboard_link if client is not None else None

    @property
    def page_link(self) -> str | None:
        """The address of the page about the run beside the dashboard, while there is one."""
        return self._page[1] if self._page is not None and self.dashboard_link else None

    @property
    def links(self) -> str:
        """Lines that name the two pages, for people."""
        page = f"\nframes      {self.page_link}" if self.page_link else ""
        return f"dashboard   {self.dashboard_link}{page}"

    @cached_property
    def catalogue(self) -> Catalogue:
        """The catalogue, read and checked; each stage reads it again if its file has changed."""
        self.folder.refuse_within(self.config.catalog_path)
        self._catalogue_was = self._catalogue_is()
        return read_catalogue(self.config.catalog_path)

    @property
    def observations(self) -> db.Bag:
        """The frames of the last query, a bag of Observation.

        Raises
        ------
        RunFolderError
            Before the first query.
        """
        return _bag(self._observations())

    @property
    def images(self) -> db.Bag:
        """The observations whose frames are on disk, a bag of Observation."""
        return self.observations.filter(
            functools.partial(Observation.is_complete, sizes=self.folder.images.list_sizes())
        )

    def run_query(self) -> list[Observation]:
        """Ask the archive which frames cover the field.

        Returns
        -------
        list of Observation
            Sorted by time; also in query_summary.yaml.

        Raises
        ------
        CatalogueError
            If the catalogue cannot be used.
        ArchiveError
            If the archive does not answer in full.
        InputError
            If there are more frames than ``max_images``.
        """
        # First, so that a mistake in it costs no query.
        self._look_again()
        inside = self.catalogue.within(
            self.config.center_ra, self.config.center_dec, self.config.radius
        )
        with self._work("query", "query", lambda: 1) as (client, report):
            found = run_one(
                client, query.find_observations, self.config, key=("query", uuid.uuid4().hex)
            )
            self.folder.save_query(found, self.config)
            self.folder.save_config(self.config)
            report.total = report.done = len(found)
            report.bytes = sum(o.size_bytes or 0 for o in found)
            report.outside = len(self.catalogue) - len(inside)
            report.releases.update(f"qr{o.recency[0]}" for o in found)
            if found:
                self._check_catalogue()
            self._progress.advance()
        return found

    def run_download(self) -> StageReport:
        """Fetch the frames of the query that are not yet in images/.

        Returns
        -------
        StageReport
            Failed frames are in it with their reasons.
        """
        if not self.config.keep_images:
            raise ConfigError("keep_images is false: only a whole run can do without images/")
        self._frames("download")
        return self.reports["download"]

    def run_extract(self, skip_existing: bool = True) -> StageReport:
        """Measure the catalogue in every frame that is in images/.

        Parameters
        ----------
        skip_existing : bool
            Leave frames that were measured with the same catalogue and options as they
            are. False measures all again.

        Returns
        -------
        StageReport
            Failed frames, and those not on disk, are in it with their reasons.
        """
        self._frames("extract", skip_existing=skip_existing)
        return self.reports["extract"]

    def run_aggregate(self) -> StageReport:
        """Turn the per-image tables into one light curve a source.

        The tables of the last query's frames are taken; all in per_image/ when no query
        was made in this folder.

        Returns
        -------
        StageReport
            ``total`` is the number of light curves.

        Raises
        ------
        RunFolderError
            If tables were made with another catalogue or other options, or lost rows.
        """
        folder, buckets = self.folder.lightcurves, self.folder.buckets
        keep = self.config.keep_bucket_files
        if keep:
            buckets.make()
        options = aggregate.CurveOptions(
            per_image=str(self.folder.per_image),
            manifest=self.folder.state.path_to(TABLE_GROUPS_NAME),
            lightcurves=str(folder),
            format=self.config.lightcurve_format,
            buckets=str(buckets) if keep else None,
        )
        found: list[aggregate.Table] = []
        count = left_out = 0

        def look() -> int:
            nonlocal found, count, left_out
            found, left_out = self._tables()
            count = aggregate.partitions(found, self.config.num_buckets)
            return count

        with self._work("aggregate", "buckets", look) as (client, report):
            n_groups = aggregate.save_groups(found, options.manifest)
            with raise_disk_full(self.folder.path):
                parts = compute_shuffle(
                    client,
                    lambda run: aggregate.light_curves(
                        n_groups, count, dataclasses.replace(options, run=run)
                    ),
                    check=self.folder.raise_if_lock_lost,
                    on_result=lambda _: self._progress.advance(),
                    on_restart=lambda: self._progress.start("aggregate", count, "buckets"),
                )
            written = pd.concat(parts, ignore_index=True)
            report.left_out = left_out
            report.rows = int(written["rows"].sum())
            report.total = report.done = len(written)
            expected = [table.rows for table in found]
            if None not in expected and report.rows != sum(expected):
                raise SpxdaskError(
                    f"{sum(expected):,} rows went into the shuffle and {report.rows:,} came out; "
                    "the light curves are not to be trusted, run aggregate again"
                )
            # What the store says counts, not what the tasks said of it.
            of_buckets = {aggregate.bucket_name(n) for n in range(count)}
            names = of_buckets
            if options.format == "csv":
                names = {aggregate.light_curve_name(t) for t in written["target_id"]}
            missing, removed = aggregate.keep_only(folder, names, aggregate.find_light_curves)
            if options.format == "csv":
                report.removed = sum(name.endswith(".csv") for name in removed)
            if missing:
                raise SpxdaskError(
                    f"{len(missing):,} light curves were written and are not in {folder}, "
                    f"{min(missing)} for one; does its file system tell upper from lower case?"
                )
            aggregate.keep_only(buckets, of_buckets if keep else set(), aggregate.find_buckets)
        return report

    def run_all(self, retry_failed: bool = False) -> RunSummary:
        """Run the four stages.

        Parameters
        ----------
        retry_failed : bool
            Take the frames of the last query that failed, and no others, and bring the
            light curves up to date.

        Returns
        -------
        RunSummary
            Its text is what the command line prints.
        """
        self.reports = {}
        # Before a cluster is started for it.
        _ = self.catalogue
        with self._cluster():
            # Nothing found, or measured, is more often a mistake than a reason to drop
            # light curves.
            if self._observations() if retry_failed else self.run_query():
                self._frames("download", "extract", only_failed=retry_failed)
                try:
                    self.run_aggregate()
                except _NothingMeasuredError as error:
                    logger.warning("%s", error)
        self.summary = RunSummary(
            stages=self.reports,
            n_sources=len(self.catalogue),
            output=self.folder.path,
        )
        return self.summary

    @property
    def _embedded(self) -> bool:
        return self._given_client is None and self._scheduler is None and self._jobqueue is None

    @contextmanager
    def _cluster(self) -> Iterator[Client]:
        """Give the client in use, or a new one for as long as the block lasts."""
        if self._client is not None or self._given_client is not None:
            client = self._client or self._given_client
            self._prepare(client)
            yield client
            return
        if self._jobqueue is not None:
            made = jobqueue_client(self._jobqueue)
        else:
            made = connect(self._scheduler) if self._scheduler else self._embedded_client()
        with made as client:
            self._prepare(client)
            self._client = client
            try:
                yield client
            finally:
                self._client = None

    def _embedded_client(self) -> AbstractContextManager[Client]:
        return embedded_client(
            max_processes=self.config.max_extract_workers,
            n_downloads=self.config.max_download_workers,
        )

    def _prepare(self, client: Client) -> None:
        """Look, once, whether a cluster can be used, and have its scheduler show the run."""
        if self._page is not None and self._page[0] == client.id:
            return
        if not self._embedded and not check_versions(client) and self._jobqueue is None:
            address = client.scheduler.address
            logger.warning("%s has no worker yet; waiting for the first", address)
        if not self._embedded:
            unregister_stale_plugins(client)
        self._page = client.id, show_page(client)
        self._progress.client = client

    @contextmanager
    def _work(
        self, name: str, unit: str, count: Callable[[], int], *stages: str
    ) -> Iterator[tuple]:
        """Give the client and a report for each stage, and time what is done to them.

        `count` is asked for the number of units once the folder is ours and what others did
        in it is known. `stages` are those that `name` stands for, if it is none itself.
        """
        reports = [StageReport(stage=stage) for stage in stages or (name,)]
        started = time.monotonic()
        with ExitStack() as held:
            if self._embedded:
                require_main_guard()
            held.enter_context(self.folder.locked())
            # Another run, or the user, may have been at work since.
            self.folder.ledger.refresh()
            self._look_again()
            total = count()
            client = held.enter_context(self._cluster())
            if name != "query":
                self.folder.save_config(self.config)
            self._progress.start(name, total, unit)
            try:
                yield client, *reports
            finally:
                self._progress.finish()
                # What is another's now is written by that one alone.
                if not self.folder.is_lock_lost:
                    self.folder.ledger.flush()
            # Of workers that died on the way.
            self.folder.delete_partial_files()
        for report in reports:
            report.seconds = time.monotonic() - started
            self.reports[report.stage] = report

    def _frames(self, *stages: str, skip_existing: bool = True, only_failed: bool = False) -> None:
        """Do download, or extract, or both at once: the stages that go frame by frame."""
        observations = self._observations()
        bag = _bag(observations)
        has_failed = self.folder.ledger.has_failed

        def count() -> int:
            if only_failed:
                return sum(has_failed(o.filename) for o in _walk(bag))
            return len(observations)

        name = stages[0] if len(stages) == 1 else "frames"
        with self._work(name, "frames", count, *stages) as (client, *reports):
            report = {each.stage: each for each in reports}
            fetch, measure = self._fetch_options(), None
            if "extract" in report:
                measure = self._extract_options()
            images, per_image = str(self.folder.images), str(self.folder.per_image)
            keep = images if self.config.keep_images else None
            left_out = (lambda o: not has_failed(o.filename)) if only_failed else lambda o: False
            needs, fetch_bytes = self._needs(_walk(bag), report, skip_existing, left_out)
            if keep:
                self._check_room(fetch_bytes)

            def needing(*kinds: int) -> Iterator[tuple[Observation, int]]:
                # Read again, as a million of them would fill our memory.
                pairs = zip(_walk(bag), needs, strict=True)
                return (pair for pair in pairs if pair[1] in kinds)

            def task(o: Observation, need: int) -> Delayed:
                if need == _MEASURE:
                    image = f"{images}/{o.filename}"
                    return _task("extract", o, extract.extract, image, per_image, measure)
                if need == _FETCH:
                    return _task("download", o, download.download, o, images, fetch)
                call = (o, keep, per_image, fetch, measure)
                return _task("download-extract", o, stream.stream, *call)

            # What is on disk first: it waits for nobody.
            suspects: list[tuple[Observation, int]] = []
            for kinds, window in (
                ((_MEASURE,), make_thread_window(client)),
                ((_FETCH, _STREAM), lambda: self.config.max_download_workers),
            ):
                tasks = ((pair, task(*pair)) for pair in needing(*kinds))
                self._collect(client, report, tasks, window, suspects)
            # One by one, which tells those that kill workers from those that were beside them.
            tasks = ((pair, task(*pair)) for pair in suspects)
            self._collect(client, report, tasks, lambda: 1)

    def _needs(
        self,
        observations: Iterable[Observation],
        report: dict[str, StageReport],
        skip_existing: bool,
        left_out: Callable[[Observation], bool],
    ) -> tuple[bytearray, int]:
        """Account for the frames that need nothing, and tell what the others need.

        Returns
        -------
        needs : bytearray
            A byte a frame: nothing, to be measured, to be fetched, or both.
        fetch_bytes : int
            Length of the frames to be fetched.
        """
        keep = self.config.keep_images
        images = self.folder.images.list_sizes()
        tables = self.folder.per_image.list_sizes() if "extract" in report else {}
        needs, fetch_bytes = bytearray(), 0
        for o in observations:
            if left_out(o):
                needs.append(_NOTHING)
                continue
            for each in report.values():
                each.total += 1
            on_disk = o.is_complete(images)
            unmeasured = "extract" in report
            if unmeasured and skip_existing and (outcome := self._measured(o, tables)) is not None:
                unmeasured = False
                report["extract"].reused += 1
                self._account(report["extract"], outcome)
            wanted = "download" in report and not on_disk and (keep or unmeasured)
            if "download" in report and not wanted:
                report["download"].reused += 1
            need = _NOTHING
            if wanted:
                need = _STREAM if unmeasured else _FETCH
                fetch_bytes += o.size_bytes or 0
            elif unmeasured and on_disk:
                need = _MEASURE
            else:
                if unmeasured:
                    self._account(report["extract"], self._absent(o))
                self._progress.advance(failed=unmeasured)
            needs.append(need)
        return needs, fetch_bytes

    def _collect(
        self,
        client: Client,
        report: dict[str, StageReport],
        tasks: Iterator[tuple[tuple[Observation, int], Delayed]],
        window: Callable[[], int],
        suspects: list[tuple[Observation, int]] | None = None,
    ) -> None:
        """Run tasks, and put what became of each frame in the ledger and the reports.

        Those whose workers died again and again go to `suspects`, if that is given.
        """
        full: DiskFullError | None = None
        tasks = takewhile(lambda _: full is None, tasks)
        for (observation, need), result in run_window(client, tasks, window):
            self.folder.raise_if_lock_lost()
            if isinstance(result, DiskFullError):
                # What is in flight may still find room; no more is asked for.
                full = result
                continue
            if isinstance(result, ClusterError):
                raise result
            if isinstance(result, KilledWorker) and suspects is not None:
                suspects.append((observation, need))
                continue
            if isinstance(result, BaseException):
                # The task itself reports what it can; this is a worker that died of it.
                reason = f"{type(result).__name__}: {result}"
                if isinstance(result, KilledWorker):
                    reason = (
                        "each worker that took it died, of too little memory perhaps (KilledWorker)"
                    )
                result = Outcome(
                    stage=list(report)[-1],
                    filename=observation.filename,
                    status="failed",
                    reason=reason,
                    fingerprint=self._fingerprint if "extract" in report else None,
                )
            outcomes = result if isinstance(result, list) else [result]
            for outcome in outcomes:
                self.folder.ledger.add(outcome)
                report[outcome.stage].done += outcome.status == "done"
                self._account(report[outcome.stage], outcome)
            failed = outcomes[-1].status == "failed"
            if failed and need == _STREAM and outcomes[-1].stage == "download":
                self._account(report["extract"], self._absent(observation))
            reason = f"{observation.filename}: {outcomes[-1].reason}" if failed else None
            self._progress.advance(failed=failed, reason=reason)
        if full is not None:
            raise full

    def _check_catalogue(self) -> None:
        """Warn when all of the catalogue is far from the field, before frames are fetched."""
        config = self.config
        ra, dec, reach = config.center_ra, config.center_dec, config.radius + FRAME_DEG
        if not len(self.catalogue.within(ra, dec, reach)):
            logger.warning(
                "%s: none of the %s sources lies within %g deg of the field's centre (%g, %g); "
                "are ra and dec in degrees, and the right way round?",
                *(config.catalog_path, f"{len(self.catalogue):,}", reach, ra, dec),
            )

    def _check_room(self, needed: int) -> None:
        """Raise DiskFullError unless there is room for frames to be kept."""
        free = self.folder.images.free_bytes()
        if needed > free:
            raise DiskFullError(
                f"the frames to fetch have {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free "
                f"in {self.folder.images}: make room, choose another output_dir, or do not keep "
                "them (keep_images=False, --no-keep-images)"
            )

    def _account(self, report: StageReport, outcome: Outcome) -> None:
        """Add what became of a frame to the report."""
        report.rows += outcome.rows
        report.bytes += outcome.bytes
        report.skipped.update(outcome.skipped)
        if outcome.warnings:
            report.warnings[outcome.filename] = outcome.warnings
        if outcome.status == "failed":
            report.failed[outcome.filename] = outcome.reason

    def _fetch_options(self) -> download.FetchOptions:
        return download.FetchOptions(
            retry=RetryPolicy(max_retries=self.config.max_retries),
            stall_timeout_s=self.config.stall_timeout,
            scratch_bytes=self.config.scratch_gb * 1e9,
        )

    def _extract_options(self) -> extract.ExtractOptions:
        return extract.ExtractOptions(
            catalogue=self.folder.save_catalogue(self.catalogue),
            photometry=self.config.photometry,
            fingerprint=self._fingerprint,
            format=self.config.per_image_format,
            serial=self._embedded,
        )

    def _observations(self) -> Observations:
        """Return the last query's frames, at the archive that the configuration names."""
        observations = self.folder.load_observations(self.config)
        if observations is None:
            raise RunFolderError(f"no query was made in {self.folder.path}: run query first")
        return observations

    def _catalogue_is(self) -> str | None:
        """Return what changes with the catalogue's file, None where that is not known."""
        store, name = locate_file(self.config.catalog_path)
        try:
            return store.get_version(name)
        except (OSError, StoreError):
            # Whoever reads it reports this.
            return None

    def _look_again(self) -> None:
        """Forget a catalogue that was edited, and what was made of it."""
        if self._catalogue_was != self._catalogue_is():
            vars(self).pop("catalogue", None)
            vars(self).pop("_fingerprint", None)

    @cached_property
    def _fingerprint(self) -> str:
        return extract.fingerprint(self.catalogue, self.config.photometry)

    def _measured(self, observation: Observation, tables: Mapping[str, int]) -> Outcome | None:
        """Return the outcome of a frame whose table is there, among those, and up to date."""
        outcome = self.folder.ledger.get("extract", observation.filename)
        name = extract.table_name(observation.filename, self.config.per_image_format)
        there = outcome is not None and outcome.status == "done" and name in tables
        if not there or not self._is_current(outcome, tables[name]):
            return None
        # The archive may have put another file under the name since.
        fetched = self.folder.ledger.get("download", observation.filename)
        known = fetched is not None and fetched.status == "done" and observation.size_bytes
        return None if known and fetched.bytes != observation.size_bytes else outcome

    def _is_current(self, outcome: Outcome, size: int) -> bool:
        """Tell whether a frame's table is as it was, of this catalogue and these options.

        Also when it was made with another catalogue that is the same near the frame.
        """
        if outcome.bytes != size:
            return False
        if outcome.fingerprint == self._fingerprint:
            return True
        if outcome.bounding_circle is None:
            return False
        near = self.catalogue.within(*outcome.bounding_circle)
        return outcome.sources_fingerprint == extract.sources_fingerprint(
            self.catalogue, near, self.config.photometry
        )

    def _absent(self, observation: Observation) -> Outcome:
        """Put it down that a frame cannot be measured as it is not on disk."""
        fetched = self.folder.ledger.get("download", observation.filename)
        failed = fetched is not None and fetched.status == "failed"
        outcome = Outcome(
            stage="extract",
            filename=observation.filename,
            status="failed",
            reason=f"not downloaded: {fetched.reason if failed else 'run download first'}",
            fingerprint=self._fingerprint,
        )
        self.folder.ledger.add(outcome)
        return outcome

    def _tables(self) -> tuple[list[aggregate.Table], int]:
        """The per-image tables to aggregate, and how many of the query's frames have none."""
        suffix = self.config.per_image_format
        there = self.folder.per_image.list_sizes()
        observations = self.folder.load_observations(self.config)
        if observations is None:
            names = sorted(n for n in there if n.endswith(extract.table_name("", suffix)))
            if not names:
                raise RunFolderError(f"no per-image tables in {self.folder.per_image}: run extract")
            return [_table(name, there[name], None) for name in names], 0
        found, stale, left_out = [], [], 0
        for observation in observations:
            name = extract.table_name(observation.filename, suffix)
            outcome = self._measured(observation, there)
            if outcome is not None:
                found.append(_table(name, outcome.bytes, outcome.rows))
                continue
            left_out += 1
            known = name in there or self._was_measured(observation)
            if known and not self._failed(observation):
                stale.append(name)
        if stale:
            raise RunFolderError(
                f"{len(stale)} per-image tables are not those of this catalogue and these "
                f"options, or were changed or removed since, {stale[0]} for one: run extract first"
            )
        if not found:
            raise _NothingMeasuredError(
                f"none of the {left_out:,} frames of the query is measured, so the light curves in "
                f"{self.folder.lightcurves} are left as they are"
            )
        return found, left_out

    def _was_measured(self, observation: Observation) -> bool:
        """Tell whether a frame had a table, of whatever catalogue, options and format."""
        outcome = self.folder.ledger.get("extract", observation.filename)
        return outcome is not None and outcome.status == "done"

    def _failed(self, observation: Observation) -> bool:
        """Tell whether a frame was tried with this catalogue and these options, in vain."""
        outcome = self.folder.ledger.get("extract", observation.filename)
        return (
            outcome is not None
            and outcome.status == "failed"
            and outcome.fingerprint == self._fingerprint
        )


def run_batch(
    config: BatchConfig | None = None,
    *,
    catalog: str | os.PathLike | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    jobqueue: str | os.PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> BatchPipeline:
    """Run the four stages in one call.

    Parameters
    ----------
    config : BatchConfig, optional
        The run; or give its options by name.
    catalog : path, optional
        Short for the option ``catalog_path``.
    client, scheduler, jobqueue, progress
        As in `BatchPipeline`.
    **options
        Options of `BatchConfig`, such as ``center_ra``, ``radius`` or ``bands``.

    Returns
    -------
    BatchPipeline
        Finished; its `summary` says what happened.

    Raises
    ------
    ConfigError
        If an option is unknown, missing or not allowed.

    Examples
    --------
    >>> from spxdask import run_batch
    >>> pipeline = run_batch(
    ...     catalog="sources.csv", center_ra=270.0, center_dec=66.56, radius=1.0, bands=["D3"]
    ... )  # doctest: +SKIP
    """
    if catalog is not None:
        options["catalog_path"] = catalog
    if config is None:
        config = BatchConfig.from_dict(options)
    elif options:
        raise ConfigError(f"give a config or options, not both: {', '.join(options)}")
    pipeline = BatchPipeline(
        config, client=client, scheduler=scheduler, jobqueue=jobqueue, progress=progress
    )
    pipeline.run_all()
    return pipeline


def _table(name: str, size: int, rows: int | None) -> aggregate.Table:
    return aggregate.Table(name=name, bytes=aggregate.csv_bytes(name, size, rows), rows=rows)


def _bag(observations: Observations) -> db.Bag:
    parts = range(observations.n_parts)
    return db.from_delayed([dask.delayed(observations.part)(i) for i in parts])


def _walk(bag: db.Bag) -> Iterable:
    """Yield the items of a bag partition by partition, so that few are in memory."""
    for partition in bag.to_delayed():
        yield from partition.compute(scheduler="sync")


def _task(stage: str, observation: Observation, function, *arguments: Any) -> Delayed:
    """A delayed call that the dashboard shows under the stage's name.

    The key is new each time: one still known to the scheduler would not run again.
    """
    key = (stage, f"{observation.stem}-{uuid.uuid4().hex[:8]}")
    return as_task(key, function, *arguments)
