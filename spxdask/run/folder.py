"""The output folder of a run: its layout, saved configuration, catalogue and lock."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import string
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

from spxdask.archive.observation import Observation
from spxdask.config import BatchConfig, LiteralPath
from spxdask.errors import RunFolderError, StoreError
from spxdask.run.ledger import Ledger, open_ledger
from spxdask.run.lock import RunLock, open_lock
from spxdask.run.observations import Observations, save_observations
from spxdask.run.query_summary import QUERY_SUMMARY_NAME, Field, save_query_summary
from spxdask.science.catalogue import Catalogue
from spxdask.storage import NEVER_IN_NAMES, Store, file_stem, locate_file, open_store

logger = logging.getLogger(__name__)

WAITING_NAME = "waiting.txt"
CONFIG_NAME = "config.yaml"
# The folder of `RunFolder.save_stacks`.
STACKS_NAME = "stacks"
OBSERVATIONS_NAME = "observations.parquet"
TABLE_GROUPS_NAME = "tables.parquet"
CATALOGUE_PREFIX, CONTAMINANTS_PREFIX = "catalogue-", "contaminants-"
FILE_NAMES_NAME = "file_names.json"
# Characters that every file system takes.
PLAIN_CHARACTERS = f"{string.ascii_letters}{string.digits}._-"
# A catalogue that was given as an object or by a pipe.
GIVEN_CATALOGUE_NAME = "given_catalogue.parquet"
SKIPPED_ROWS_NAME = "skipped_rows.csv"
# What describes the light curves.
README_NAME, COLUMNS_NAME = "README.txt", "columns.yaml"
# The catalogue of `lightcurve_format: hats`.
HATS_NAME = "hats"
# What `spxdask inject` writes.
INJECTION_TABLE_NAME, INJECTION_FIGURE_NAME = "injection.csv", "injection.png"
# What `spxdask report` and each run write.
REPORT_NAMES = ("report.html", "report.json")


class RunFolder:
    """The output folder of a run. Creating the object reads and writes nothing.

    Parameters
    ----------
    path : path
        A folder on disk, or the URL of one in an object store.

    Attributes
    ----------
    root : Store
        The folder.
    path : str
        The folder as text, absolute on disk.
    images, per_image, lightcurves, buckets, state : Store
        Folders within it.
    lock : RunLock
        The lock that one run at a time holds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = open_store(path)
        self.path = str(self.root)
        self.images = self.root / "images"
        self.per_image = self.root / "per_image"
        self.lightcurves = self.root / "lightcurves"
        self.buckets = self.root / "buckets"
        self.state = self.root / "state"
        self.lock: RunLock = open_lock(self.state, self.path)

    @property
    def _subfolders(self) -> tuple[Store, ...]:
        return self.images, self.per_image, self.lightcurves, self.buckets, self.state

    def refuse_within(self, path: str | os.PathLike[str]) -> None:
        """Raise an error for a file of the user that a run could overwrite.

        Parameters
        ----------
        path : path
            The file.

        Raises
        ------
        RunFolderError
            If it lies in one of the folders that the run writes.
        """
        if os.fspath(path) == self.given_catalogue_path:
            return
        names = (
            QUERY_SUMMARY_NAME,
            SKIPPED_ROWS_NAME,
            COLUMNS_NAME,
            README_NAME,
            HATS_NAME,
            INJECTION_TABLE_NAME,
            INJECTION_FIGURE_NAME,
            *REPORT_NAMES,
        )
        files = (self.root / name for name in names)
        for written in (*self._subfolders, *files):
            if written.contains(os.fspath(path)):
                raise RunFolderError(f"lies where the run writes ({written}): move it", path=path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if necessary, and hold its lock during the block.

        Raises
        ------
        RunFolderError
            If the folder cannot be made, or another run holds the lock.
        """
        with ExitStack() as stack:
            try:
                for folder in (self.images, self.per_image, self.lightcurves, self.state):
                    folder.make()
                stack.enter_context(self.lock.hold())
            except StoreError as error:
                raise RunFolderError(f"output_dir {error}") from error
            except OSError as error:
                raise RunFolderError(f"output_dir {self.path}: {error.strerror}") from error
            self.delete_partial_files()
            yield

    def require_writable(self, *folders: Store) -> None:
        """Raise an error if folders of the run cannot be written to.

        Parameters
        ----------
        *folders : Store
            Some of the folders, which have been made.

        Raises
        ------
        RunFolderError
            With the reason.
        DiskFullError
            If there is no room even for a file without content.
        """
        for folder in folders:
            try:
                folder.require_writable()
            except OSError as error:
                raise RunFolderError(
                    f"cannot be written to ({error.strerror}): change its permissions, or choose "
                    "another output_dir",
                    path=str(folder),
                ) from error

    def find_refused_characters(self, catalogue: Catalogue | None) -> str:
        """Find and record which characters of ids the names of light curves cannot have.

        CIFS and exFAT, for example, refuse quotation marks and colons.

        Parameters
        ----------
        catalogue : Catalogue or None
            The sources; None tries all punctuation.

        Returns
        -------
        str
            Those found now or recorded before, so that a file keeps its name.
        """
        recorded = ""
        if self.state.exists(FILE_NAMES_NAME):
            recorded = json.loads(self.state.get(FILE_NAMES_NAME))["refused_characters"]
        characters = set(string.punctuation + " ") if catalogue is None else catalogue.id_characters
        untried = sorted(characters - set(PLAIN_CHARACTERS + recorded) - set(NEVER_IN_NAMES))
        found = self.lightcurves.find_refused_characters("".join(untried))
        if found:
            logger.warning(
                "names of files in %s cannot have %s: ids with them are percent-encoded in the "
                "names of light curves",
                self.lightcurves,
                " ".join(found),
            )
            record = {"refused_characters": recorded + found}
            self.state.put(FILE_NAMES_NAME, json.dumps(record).encode())
        return recorded + found

    @property
    def is_lock_lost(self) -> bool:
        """Whether another run has taken over the lock that this run held."""
        return self.lock.is_lost

    def raise_if_lock_lost(self) -> None:
        """Raise an error if another run has taken over the lock.

        Raises
        ------
        RunFolderError
            If that is so.
        """
        if self.is_lock_lost:
            raise RunFolderError(
                "another run has taken over, because this run did not renew its lock in time: "
                "this run stops",
                path=self.path,
            )

    def find_lock_holder(self) -> str | None:
        """Return which process holds the lock.

        Returns
        -------
        str or None
            Its process id and host; None when no process holds it.
        """
        return self.lock.find_holder()

    def set_waiting(self, reason: str | None) -> None:
        """Record that the run waits, for `spxdask status`.

        Parameters
        ----------
        reason : str or None
            What it waits for, in words; None when it goes on.
        """
        if reason is None:
            self.state.delete_many([WAITING_NAME])
        else:
            self.state.put(WAITING_NAME, reason.encode(), durable=False)

    def save_stacks(self, name: str, stacks: str) -> str:
        """Save what a worker process was doing when it was frozen.

        Parameters
        ----------
        name : str
            Any text that tells the process from others; a later text of the same name replaces
            the earlier one.
        stacks : str
            The text.

        Returns
        -------
        str
            Path or URL of the file.
        """
        store, filename = self.state / STACKS_NAME, f"{file_stem(name)}.txt"
        store.make()
        store.put(filename, stacks.encode("utf-8", "surrogateescape"), durable=False)
        return store.path_to(filename)

    def find_waiting(self) -> str | None:
        """Return what the run that is at work waits for, in words.

        Returns
        -------
        str or None
            None if it does not wait.
        """
        try:
            return self.state.get(WAITING_NAME).decode()
        except FileNotFoundError:
            return None

    def delete_partial_files(self) -> None:
        """Delete the partial files of killed writers; only to be called while none writes."""
        for folder in (self.root, *self._subfolders):
            folder.delete_partial_files()

    def save_config(self, config: BatchConfig) -> None:
        """Save the configuration for later stages.

        Parameters
        ----------
        config : BatchConfig
            The configuration. It is saved with absolute paths, so that later stages may be
            started in another working directory.
        """
        config = dataclasses.replace(config, output_dir=LiteralPath(self.path))
        if config.catalog_path is not None:
            catalogue_folder, catalogue_name = locate_file(config.catalog_path)
            catalog_path = LiteralPath(catalogue_folder.path_to(catalogue_name))
            config = dataclasses.replace(config, catalog_path=catalog_path)
        with self.state.atomic_path(CONFIG_NAME) as part:
            config.to_yaml(part)

    def saved_config(self) -> BatchConfig:
        """Return the configuration of the last run.

        Returns
        -------
        BatchConfig
            Its output_dir is this folder, even if the folder was moved.

        Raises
        ------
        RunFolderError
            If no configuration was saved.
        """
        try:
            exists = self.state.exists(CONFIG_NAME)
        except StoreError as error:
            raise RunFolderError(f"output_dir {error}") from error
        if not exists:
            raise RunFolderError(
                f"{self.path} is not the output folder of a run: start with `spxdask run` or "
                "`spxdask query`, or name the folder of one"
            )
        saved = BatchConfig.from_yaml(LiteralPath(self.state.path_to(CONFIG_NAME)))
        was = RunFolder(LiteralPath(saved.output_dir))
        is_given = saved.catalog_path == was.given_catalogue_path
        return dataclasses.replace(
            saved,
            output_dir=LiteralPath(self.path),
            catalog_path=LiteralPath(self.given_catalogue_path) if is_given else saved.catalog_path,
        )

    @property
    def given_catalogue_path(self) -> str:
        """Where a catalogue is kept that was given as an object or by a pipe."""
        return self.state.path_to(GIVEN_CATALOGUE_NAME)

    def keep_given_catalogue(self, content: bytes) -> None:
        """Keep a catalogue that cannot be read again for later stages.

        Parameters
        ----------
        content : bytes
            The file; the one that is there is replaced if it differs.
        """
        name = GIVEN_CATALOGUE_NAME
        if not self.state.exists(name) or self.state.get(name) != content:
            self.state.put(name, content)

    def save_skipped_rows(self, content: bytes) -> None:
        """Write which rows of the catalogue are not used, for the user.

        Parameters
        ----------
        content : bytes
            The file; if it is empty, that of an earlier catalogue is deleted.
        """
        if content:
            self.root.put(SKIPPED_ROWS_NAME, content)
        elif self.root.exists(SKIPPED_ROWS_NAME):
            self.root.delete_many([SKIPPED_ROWS_NAME])

    def count_skipped_rows(self) -> int:
        """Count the rows of the catalogue that are not used.

        Returns
        -------
        int
        """
        with suppress(FileNotFoundError):
            text = self.root.get(SKIPPED_ROWS_NAME).decode()
            return len(list(csv.reader(io.StringIO(text, newline="")))) - 1
        return 0

    @cached_property
    def ledger(self) -> Ledger:
        """The recorded outcomes of all frames."""
        return open_ledger(self.state)

    def save_catalogue(self, catalogue: Catalogue) -> str:
        """Save the sorted catalogue to a file that workers map into memory.

        Parameters
        ----------
        catalogue : Catalogue
            It replaces the catalogue that was saved before.

        Returns
        -------
        str
            Path or URL of the file. Its name contains the fingerprint of the catalogue.
        """
        return self._save_sources(CATALOGUE_PREFIX, catalogue)

    def save_contaminants(self, contaminants: Catalogue) -> str:
        """Save the sources that get no rows, as `save_catalogue` does the others.

        Parameters
        ----------
        contaminants : Catalogue
            They replace those that were saved before.

        Returns
        -------
        str
            Path or URL of the file.
        """
        return self._save_sources(CONTAMINANTS_PREFIX, contaminants)

    def saved_catalogue(self) -> Catalogue | None:
        """Return the catalogue of the last query or extraction.

        Returns
        -------
        Catalogue or None
            None when there is none.
        """
        return self._open_sources(CATALOGUE_PREFIX)

    def saved_contaminants(self) -> Catalogue | None:
        """Return the sources without rows of the last extraction.

        Returns
        -------
        Catalogue or None
            None when there are none.
        """
        return self._open_sources(CONTAMINANTS_PREFIX)

    def _save_sources(self, prefix: str, catalogue: Catalogue) -> str:
        name = f"{prefix}{catalogue.identity}.arrow"
        found = {n for n in self.state.list_sizes() if n.startswith(prefix)}
        if name not in found:
            with self.state.atomic_path(name) as part:
                catalogue.save(part)
        self.state.delete_many(found - {name})
        return self.state.path_to(name)

    def _open_sources(self, prefix: str) -> Catalogue | None:
        names = [n for n in self.state.list_sizes() if n.startswith(prefix)]
        # A run in progress may delete a catalogue after it was listed.
        for name in names:
            with suppress(FileNotFoundError):
                return Catalogue.open(self.state.local_copy(name))
        return None

    def save_query(
        self,
        observations: Sequence[Observation],
        config: BatchConfig,
        field: Field,
        fingerprint: str,
        is_empty: Sequence[bool],
    ) -> None:
        """Save the result of the query, for the later stages and for the user.

        Parameters
        ----------
        observations : sequence of Observation
            The frames found, in order of time.
        config : BatchConfig
            The configuration with the options of the query.
        field : Field
            Where the frames were looked for.
        fingerprint : str
            That of the catalogue.
        is_empty : sequence of bool
            Which of the frames are not fetched, as no source can lie on them.
        """
        options = _query_options(config) | {"catalogue": fingerprint}
        save_observations(self.state, OBSERVATIONS_NAME, observations, options)
        save_query_summary(self.root, observations, config, field, is_empty)

    def has_query(self) -> bool:
        """Return whether a query was made in the folder.

        Returns
        -------
        bool
        """
        return self.state.exists(OBSERVATIONS_NAME)

    def load_observations(
        self, config: BatchConfig, catalogue: Catalogue | None = None
    ) -> Observations | None:
        """Return the result of the last query.

        Parameters
        ----------
        config : BatchConfig
            The current configuration.
        catalogue : Catalogue, optional
            The current sources. They decide which frames are found where no circle does.

        Returns
        -------
        Observations or None
            None before the first query.

        Raises
        ------
        RunFolderError
            If the options of the last query differ from those of the configuration, or its
            sources do where they matter.
        """
        if not self.state.exists(OBSERVATIONS_NAME):
            return None
        found = Observations(self.state, OBSERVATIONS_NAME, config.archive_url)
        for name, value in _query_options(config).items():
            was = found.query_options.get(name)
            if was != value:
                raise RunFolderError(
                    f"the frames in {self.path} were found with {name} {was!r}, the configuration "
                    f"has {value!r}: run query first"
                )
        is_other = (
            catalogue is not None
            and config.region != "circle"
            and found.query_options.get("catalogue") != catalogue.fingerprint
        )
        if is_other:
            raise RunFolderError(
                f"the frames in {self.path} were found for other sources than those of the "
                "catalogue now: run query first"
            )
        return found

    def require_observations(
        self, config: BatchConfig, catalogue: Catalogue | None = None
    ) -> Observations:
        """Return the result of the last query, as `load_observations`.

        Parameters
        ----------
        config : BatchConfig
            What is requested now.
        catalogue : Catalogue, optional
            The sources that are to be measured, as for `load_observations`.

        Returns
        -------
        Observations
            The frames, at the archive that the configuration names.

        Raises
        ------
        RunFolderError
            If there was no query, or another one than the configuration asks for.
        """
        observations = self.load_observations(config, catalogue)
        if observations is None:
            raise RunFolderError(f"no query was made in {self.path}: run query first")
        return observations


def _query_options(config: BatchConfig) -> dict[str, Any]:
    """Return the options that decide which frames are found."""
    options = config.to_dict()
    names = ("center_ra", "center_dec", "radius", "coverage_mode", "bands", "mjd_range", "release")
    return {name: options[name] for name in names}
