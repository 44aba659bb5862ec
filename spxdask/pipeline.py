"""The run: four stages in a row on a Dask cluster."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dask.bag as db

from spxdask.archive.observation import Observation
from spxdask.archive.outage import OutagePolicy
from spxdask.cluster.frozen import FrozenTimes
from spxdask.cluster.page import ProgressPublisher
from spxdask.cluster.session import Client, ClusterSession
from spxdask.config import BatchConfig
from spxdask.errors import ConfigError
from spxdask.progress import Progress, Silent, make_progress
from spxdask.report.make import make_report_of_run
from spxdask.run.folder import RunFolder
from spxdask.run.sources import RunSources
from spxdask.run.summary import RunSummary, StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.stages import aggregate, query
from spxdask.stages.calibration import prepare_calibration
from spxdask.stages.context import open_stages
from spxdask.stages.frames import make_bag, prepare_frames
from spxdask.text import format_html_table, split_report

logger = logging.getLogger(__name__)


class BatchPipeline:
    """Query, download, extract, aggregate: a run in an output folder.

    Each stage leaves its result in the folder and takes that of the stage before from
    there, so stages can run on different days and in different processes, and a stage
    that runs again does only what is not done. A cluster is started when there is work for it.

    Parameters
    ----------
    config : BatchConfig or RunSources
        The run; with sources that have been read, they are not read again.
    client : distributed.Client, optional
        Cluster to use; it stays open.
    scheduler : str, optional
        Address of a scheduler, or its scheduler file, to connect to instead.
    jobqueue : path, optional
        YAML file of a batch system whose jobs are to be the workers; see
        `spxdask.cluster.jobqueue`. With none of the three, each stage starts a cluster of this
        machine's size and closes it at its end; in ``with pipeline:`` and in `run_all`, one
        serves all stages.
    progress : bool or Progress, optional
        True draws a bar a stage; an object is called as `Progress` describes.
    frozen_times : FrozenTimes, optional
        When a worker counts as frozen, and is replaced.

    Attributes
    ----------
    summary : RunSummary or None
        The account of the last `run_all`.
    reports : dict of str to StageReport
        The account of each stage that ran, by name.

    Raises
    ------
    ConfigError
        If an argument cannot be used.
    """

    def __init__(
        self,
        config: BatchConfig | RunSources,
        *,
        client: Client | None = None,
        scheduler: str | None = None,
        jobqueue: str | os.PathLike[str] | None = None,
        progress: bool | Progress = False,
        frozen_times: FrozenTimes | None = None,
    ) -> None:
        if not isinstance(config, BatchConfig | RunSources):
            raise ConfigError(option="config", rule="a BatchConfig", value=config)
        if isinstance(config, BatchConfig):
            config = RunSources(config, RunFolder(config.output_dir))
        self._sources, self.folder, self.config = config, config.folder, config.config
        self.reports: dict[str, StageReport] = {}
        self.summary: RunSummary | None = None
        shown: Progress = make_progress() if progress is True else progress or Silent()
        self._progress = ProgressPublisher(shown, self.folder.path)
        self._session = ClusterSession(
            max_processes=self.config.max_extract_workers,
            n_downloads=self.config.max_download_workers,
            client=client,
            scheduler=scheduler,
            jobqueue=jobqueue,
            on_connect=self._progress.connect,
            save_stacks=self.folder.save_stacks,
            frozen_times=frozen_times,
        )
        self._held = ExitStack()
        self._outage_policy = OutagePolicy(patience_s=self.config.outage_patience)

    def __repr__(self) -> str:
        return str(self.summary or f"BatchPipeline in {self.folder.path}")

    def _repr_html_(self) -> str:
        text = f"{self}\n{self._session.links}" if self.dashboard_link else str(self)
        return format_html_table("BatchPipeline", split_report(text))

    def __enter__(self) -> BatchPipeline:
        # Whoever writes `with` wants the cluster, and its dashboard, from the beginning.
        with ExitStack() as stack:
            stack.enter_context(self._session.hold())
            self._session.connect()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    dashboard_link = property(lambda self: self._session.dashboard_link)
    """The address of the Dask dashboard, None while there is no cluster."""

    page_link = property(lambda self: self._session.page_link)
    """The address of the page about the run beside the dashboard, None while there is none."""

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue, read and checked, and read again when its file has changed."""
        return self._sources.read()

    @property
    def observations(self) -> db.Bag:
        """The frames of the last query, a bag of Observation.

        Raises
        ------
        RunFolderError
            Before the first query.
        """
        return make_bag(self.folder.require_observations(self.config))

    @property
    def images(self) -> db.Bag:
        """The observations whose frames are on disk, a bag of Observation."""
        sizes = self.folder.images.list_sizes()
        return self.observations.filter(functools.partial(Observation.is_complete, sizes=sizes))

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
        # Read before the query, so that a mistake in it is found at once.
        catalogue, config = self.catalogue, self.config
        with self._stage_context("query") as (report,):
            self._progress.start("query", 1, "query")
            field = query.make_field(config, catalogue)
            found = query.find_patiently(
                config,
                field.circles,
                policy=self._outage_policy,
                run_once=functools.partial(self._session.run_once, "query"),
                on_wait=self._progress.wait,
                may_be_mistaken=not self.folder.has_query(),
            )
            query.record_query(self.folder, config, catalogue, field, found, report)
            prepare_calibration(self.folder, config, found, report)
            self._progress.advance()
        return found

    def run_download(self, *, recheck: bool = False) -> StageReport:
        """Fetch the frames of the query that are not yet in images/.

        Parameters
        ----------
        recheck : bool
            Ask the archive which frames it has replaced, and fetch those again.

        Returns
        -------
        StageReport
            Failed frames are in it with their reasons.

        Raises
        ------
        ConfigError
            If frames are not to be kept.
        """
        if not self.config.keep_images:
            raise ConfigError("keep_images is false: only a whole run can do without images/")
        return self._run_frames("download", recheck=recheck)["download"]

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
        return self._run_frames("extract", skip_existing=skip_existing)["extract"]

    def run_aggregate(self) -> StageReport:
        """Turn the per-image tables into one light curve a source.

        The tables of the last query's frames are taken; all in per_image/ when no query
        was made in this folder. Nothing is done when light curves of the same tables are there.

        Returns
        -------
        StageReport
            ``total`` is the number of light curves.

        Raises
        ------
        RunFolderError
            If tables were made with another catalogue or other options, or lost rows.
        """
        with self._stage_context("aggregate") as (report,):
            run = aggregate.Aggregation(self.folder, self.config, report, self._progress)
            run.choose_tables(self._sources)
            self.folder.save_config(self.config)
            if not run.is_up_to_date():
                run.compute(self._session.connect())
        return report

    def run_all(self, retry_failed: bool = False, *, recheck: bool = False) -> RunSummary:
        """Run the four stages.

        Parameters
        ----------
        retry_failed : bool
            Take the frames of the last query that failed, and no others, and bring the
            light curves up to date.
        recheck : bool
            Ask the archive which frames it has replaced since they were fetched, fetch those
            again and measure those whose content is another.

        Returns
        -------
        RunSummary
            Its text is what the command line prints.
        """
        self.reports = {}
        with self._session.hold():
            if not retry_failed:
                self.run_query()
            # Nothing found or measured is more often a mistake than a reason to remove curves.
            if retry_failed or self.reports["query"].has_sources:
                self._run_frames("download", "extract", only_failed=retry_failed, recheck=recheck)
                try:
                    self.run_aggregate()
                except aggregate.NothingMeasuredError as error:
                    logger.warning("%s", error)
            self.summary = RunSummary(
                stages=self.reports,
                n_sources=len(self.catalogue),
                output=self.folder.path,
                replaced_workers=self._session.n_replaced,
            )
            if self.config.report:
                self.summary.report = make_report_of_run(self.summary, self._session.connect)
        return self.summary

    def _run_frames(
        self, *stages: str, recheck: bool = False, **options: bool
    ) -> dict[str, StageReport]:
        """Run download, extract, or both at once, frame by frame; see `FrameRun.plan`."""
        with self._stage_context(*stages) as reports:
            run = prepare_frames(
                self.folder, self._sources, reports, self._progress, self._outage_policy
            )
            run.complete(self._session, recheck=recheck, **options)
        return run.reports

    @contextmanager
    def _stage_context(self, *stages: str) -> Iterator[list[StageReport]]:
        """Hold cluster and folder for stages; yield a report for each of them."""
        self._session.require_main_guard()
        with (
            self._session.hold(),
            open_stages(stages, self.folder, self._sources, self._progress) as reports,
        ):
            yield reports
        self.reports |= {report.stage: report for report in reports}
