"""Aggregate: from one table a frame to one light curve a source."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from spxdask.cluster.page import ProgressPublisher
from spxdask.cluster.shuffle import compute_shuffle
from spxdask.config import BatchConfig
from spxdask.errors import RunFolderError, SpxdaskError
from spxdask.results.hats import remove_catalogue, write_hats
from spxdask.run.aggregation import (
    AggregationRecord,
    choose_query_tables,
    discard_aggregation,
    load_aggregation,
    save_aggregation,
)
from spxdask.run.calibration import load_calibration
from spxdask.run.description import describe_run, save_description
from spxdask.run.folder import HATS_NAME, TABLE_GROUPS_NAME, RunFolder
from spxdask.run.plan import MeasurementInputs, table_name
from spxdask.run.sources import RunSources
from spxdask.run.summary import StageReport
from spxdask.stages import light_curves
from spxdask.storage import describe_temporary_folder, raise_disk_full
from spxdask.text import format_count

if TYPE_CHECKING:
    from spxdask.cluster.session import Client

# Raised whenever the same tables give other light curves.
AGGREGATION_VERSION = 2


class NothingMeasuredError(RunFolderError):
    """There is no table to make light curves of."""


class Aggregation:
    """One pass of the stage.

    Parameters
    ----------
    folder : RunFolder
        Locked by the caller.
    config : BatchConfig
        The run.
    report : StageReport
        The report to fill in.
    progress : ProgressPublisher
        Receives each partition that has ended.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: BatchConfig,
        report: StageReport,
        progress: ProgressPublisher,
    ) -> None:
        self._folder, self._config = folder, config
        self._report, self._progress = report, progress
        self._tables: list[light_curves.Table] = []
        self._refused_characters = ""

    @property
    def _writes_hats(self) -> bool:
        return self._config.lightcurve_format == "hats"

    @property
    def _n_partitions(self) -> int:
        return light_curves.count_partitions(self._tables, self._config.num_buckets)

    def choose_tables(self, sources: RunSources) -> None:
        """Choose the per-image tables of the last query's frames; all without a query.

        Parameters
        ----------
        sources : RunSources
            What the tables of a query's frames have to be made with. Without a query, it is not
            read.

        Raises
        ------
        RunFolderError
            If there are none, or some are stale.
        NothingMeasuredError
            If no frame of the query has a table.
        """
        folder, table_format = self._folder, self._config.per_image_format
        observations = folder.load_observations(self._config)
        catalogue = None
        if observations is not None:
            catalogue = sources.read()
            folder.require_observations(self._config, catalogue)
        if self._config.lightcurve_format == "csv":
            self._refused_characters = folder.find_refused_characters(catalogue)
        sizes = folder.per_image.list_sizes()
        if observations is None:
            names = sorted(name for name in sizes if name.endswith(table_name("", table_format)))
            if not names:
                raise RunFolderError(
                    f"no per-image tables in {folder.per_image}: run extract first"
                )
            self._tables = [light_curves.describe_table(name, sizes[name], None) for name in names]
            return
        inputs = MeasurementInputs(
            photometry=self._config.photometry,
            catalogue=catalogue,
            calibration=load_calibration(folder.state, self._config),
            contaminants=sources.read_contaminants(),
        )
        choice = choose_query_tables(folder, self._config, observations, inputs)
        if choice.stale:
            count = format_count(len(choice.stale), "per-image table")
            verb = "is" if len(choice.stale) == 1 else "are"
            raise RunFolderError(
                f"{count} {verb} stale, such as {choice.stale[0]} ({choice.stale_reason}): "
                "run extract first"
            )
        if not choice.tables:
            raise NothingMeasuredError(
                "no frame of the query is measured: the light curves in "
                f"{folder.lightcurves} are unchanged"
            )
        self._report.left_out = choice.left_out
        self._tables = [light_curves.describe_table(*table) for table in choice.tables]

    def is_up_to_date(self) -> bool:
        """Return whether the light curves of these tables are there, and report them if so.

        Returns
        -------
        bool
        """
        record = load_aggregation(self._folder.state)
        if record is None or record.tables != self._digest_tables():
            return False
        if record.files != self._digest_files():
            return False
        if self._writes_hats and not (self._folder.root / HATS_NAME).exists("hats.properties"):
            return False
        self._report.total = self._report.reused = record.n_light_curves
        self._report.rows = record.n_rows
        return True

    def compute(self, client: Client) -> None:
        """Write the light curves, and remove those of sources that have no row any more.

        Parameters
        ----------
        client : Client
            Of the cluster.

        Raises
        ------
        SpxdaskError
            If rows were lost, or light curves are not where they were written.
        """
        started = time.monotonic()
        folder, config, report = self._folder, self._config, self._report
        folder.require_writable(folder.lightcurves)
        if config.keep_bucket_files:
            folder.buckets.make()
            folder.require_writable(folder.buckets)
        discard_aggregation(folder.state)
        if folder.root.local_path is not None:
            # It is of other light curves from here on.
            remove_catalogue(folder.root.local_path / HATS_NAME)
        provenance = describe_run(
            config,
            load_calibration(folder.state, config),
            (table.release for table in self._tables),
        )
        options = light_curves.CurveOptions(
            per_image=str(folder.per_image),
            table_groups=folder.state.path_to(TABLE_GROUPS_NAME),
            lightcurves=str(folder.lightcurves),
            # The catalogue is made of the dataset.
            format="parquet" if self._writes_hats else config.lightcurve_format,
            buckets=str(folder.buckets) if config.keep_bucket_files else None,
            layout=light_curves.find_layout(folder.per_image, self._tables[0].name),
            refused_characters=self._refused_characters,
            provenance=provenance,
        )
        n_partitions = self._n_partitions
        n_groups = light_curves.save_table_groups(
            self._tables, folder.state.path_to(TABLE_GROUPS_NAME)
        )
        self._progress.start("aggregate", n_partitions, "partitions")
        # Tasks that write to the run's folders name these themselves.
        with raise_disk_full(describe_temporary_folder()):
            parts = compute_shuffle(
                client,
                lambda run: light_curves.build_light_curves(
                    n_groups, n_partitions, dataclasses.replace(options, run=run)
                ),
                check=folder.raise_if_lock_lost,
                on_result=lambda _: self._progress.advance(),
                on_restart=lambda: self._progress.start("aggregate", n_partitions, "partitions"),
            )
        folder.raise_if_lock_lost()
        written = pd.concat(parts, ignore_index=True)
        report.rows = int(written["rows"].sum())
        report.total = report.done = len(written)
        expected = [table.rows for table in self._tables]
        n_expected = sum(n for n in expected if n is not None)
        if None not in expected and report.rows != n_expected:
            raise SpxdaskError(
                f"{format_count(n_expected, 'row')} entered the shuffle and {report.rows:,} came "
                "out, so the light curves are incomplete: run aggregate again"
            )
        self._remove_leftovers(written, n_partitions)
        folder.raise_if_lock_lost()
        save_description(folder.root, provenance, options.layout)
        if self._writes_hats:
            path = folder.root.path_to(HATS_NAME)
            self._progress.start("hats", 1, "catalogue")
            with raise_disk_full(path):
                write_hats(folder.path, path, name=Path(folder.path).name)
            self._progress.advance()
            folder.raise_if_lock_lost()
        save_aggregation(
            folder.state,
            AggregationRecord(
                tables=self._digest_tables(),
                files=self._digest_files(),
                n_light_curves=report.total,
                n_rows=report.rows,
                seconds=round(time.monotonic() - started, 3),
            ),
        )

    def _remove_leftovers(self, written: pd.DataFrame, n_partitions: int) -> None:
        """Remove light curves and partitions of earlier passes; require those of this one."""
        folder, config = self._folder, self._config
        partitions = {light_curves.bucket_name(n) for n in range(n_partitions)}
        names = partitions
        if config.lightcurve_format == "csv":
            refused = self._refused_characters
            names = {light_curves.light_curve_name(t, refused) for t in written["target_id"]}
        # What the store lists counts, not what the tasks reported.
        missing, removed = light_curves.remove_others(
            folder.lightcurves, names, light_curves.find_light_curves
        )
        if config.lightcurve_format == "csv":
            self._report.removed = sum(name.endswith(".csv") for name in removed)
        if missing:
            raise SpxdaskError(
                f"{format_count(len(missing), 'light curve')} written but not in "
                f"{folder.lightcurves}, such as {min(missing)}: its file system may not "
                "distinguish upper from lower case"
            )
        keep = partitions if config.keep_bucket_files else set()
        light_curves.remove_others(folder.buckets, keep, light_curves.find_buckets)

    def _digest_tables(self) -> str:
        """Return a hash of all that light curves are made of: tables and options."""
        config = self._config
        lines = [
            f"{AGGREGATION_VERSION} {config.lightcurve_format} {config.keep_bucket_files} "
            f"{self._n_partitions}"
        ]
        if self._refused_characters:
            lines.append(self._refused_characters)
        return _digest(
            [
                *lines,
                *(f"{t.name} {t.bytes} {t.rows} {t.checksum} {t.release}" for t in self._tables),
            ]
        )

    def _digest_files(self) -> str:
        """Return a hash of which light curves there are, and how long they are."""
        folders = self._folder.lightcurves, self._folder.buckets
        sizes: Iterable[Mapping[str, int]] = (folder.list_sizes() for folder in folders)
        # Names that begin with a dot are of files that are not yet whole.
        return _digest(
            f"{name} {size}"
            for found in sizes
            for name, size in sorted(found.items())
            if not name.startswith(".")
        )


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
