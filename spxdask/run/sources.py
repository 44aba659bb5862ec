"""The sources of a run: those of a catalogue, or one target."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from spxdask.config import BatchConfig, LiteralPath
from spxdask.run.folder import RunFolder
from spxdask.run.summary import StageReport
from spxdask.science.catalogue import Catalogue
from spxdask.tables.catalogue import (
    CatalogueColumns,
    CatalogueReader,
    encode_catalogue,
    encode_skipped_rows,
)
from spxdask.tables.target import make_target_catalogue

__all__ = ["RunSources"]


class RunSources:
    """Where the sources of a run come from, and what of them is kept in its folder.

    Parameters
    ----------
    config : BatchConfig
        The run.
    folder : RunFolder
        Its folder. A catalogue that cannot be read again, an object or a pipe, is kept there.

    Attributes
    ----------
    config : BatchConfig
        The configuration that reads the same sources again, also in another process.
    folder : RunFolder
        The folder.
    """

    def __init__(self, config: BatchConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self._target: Catalogue | None = None
        self._reader: CatalogueReader | None = None
        self._contaminants: CatalogueReader | None = None
        if config.target is not None:
            self._target = make_target_catalogue(config.target)
            return
        assert config.catalog_path is not None, "a configuration has one of the two"
        columns = CatalogueColumns(
            target_id=config.id_column, ra=config.ra_column, dec=config.dec_column
        )
        self._reader = CatalogueReader(config.catalog_path, columns, config.on_bad_row)
        if not self._reader.can_be_read_again:
            # From here on, it is the file that will be kept of it, with columns of usual names.
            self.config = dataclasses.replace(
                config,
                catalog_path=LiteralPath(folder.given_catalogue_path),
                id_column=None,
                ra_column=None,
                dec_column=None,
            )

    def read(self) -> Catalogue:
        """Return the sources, read and checked, and read again when their file has changed.

        Returns
        -------
        Catalogue

        Raises
        ------
        CatalogueError
            If the catalogue cannot be used.
        """
        if self._reader is None:
            assert self._target is not None
            return self._target
        assert self.config.catalog_path is not None
        self.folder.refuse_within(self.config.catalog_path)
        return self._reader.read()

    def read_contaminants(self) -> Catalogue | None:
        """Return the sources that take part in the solution for PSF fluxes and get no rows.

        Returns
        -------
        Catalogue or None
            None if the configuration names none, or no PSF fluxes are measured.

        Raises
        ------
        CatalogueError
            If the catalogue cannot be used.
        """
        path = self.config.contaminants_path
        if path is None or self.config.photometry.psf == "none":
            return None
        if self._contaminants is None:
            self.folder.refuse_within(path)
            self._contaminants = CatalogueReader(path)
        return self._contaminants.read()

    def choose(self, stages: Collection[str]) -> Catalogue | None:
        """Return the sources that stages which go frame by frame depend on.

        Parameters
        ----------
        stages : collection of str
            What is about to be done.

        Returns
        -------
        Catalogue or None
            A download needs none but that of the query, as the user's may be elsewhere, and
            not even that if all frames are fetched.
        """
        if "extract" in stages:
            return self.read()
        return None if self.config.fetches_empty_frames else self.folder.saved_catalogue()

    def keep(self, stages: Collection[str], report: StageReport) -> None:
        """Keep in the folder what is not in the user's file, or was left out of it.

        Parameters
        ----------
        stages : collection of str
            What is about to be done.
        report : StageReport
            Gets the number of rows that were left out.
        """
        reader = self._reader
        # A download by itself needs no catalogue, but names it in the saved configuration.
        if reader is None or (reader.can_be_read_again and not {"query", "extract"} & {*stages}):
            return
        catalogue = self.read()
        if not reader.can_be_read_again:
            self.folder.keep_given_catalogue(encode_catalogue(catalogue))
        elif self.config.catalog_path == self.folder.given_catalogue_path:
            # What was left out of it is known to the run that was given it.
            return
        skipped = reader.skipped
        self.folder.save_skipped_rows(encode_skipped_rows(skipped) if skipped else b"")
        if report.stage in ("query", "extract"):
            report.skipped_sources = len(skipped)
