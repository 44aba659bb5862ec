"""What a run has made, from its output folder: sources, frames and light curves."""

from __future__ import annotations

import difflib
import html
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spxdask.archive.calibration import CalibrationSet, find_channels
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, ConfigError, NoSuchSourceError, RunFolderError, StoreError
from spxdask.results.curves import Curves, find_curves
from spxdask.results.light_curve import LightCurve
from spxdask.results.missing import MISSING_MEANINGS, find_missing, read_skipped_rows
from spxdask.results.sources import SOURCE_MEANINGS, summarise_sources
from spxdask.run.aggregation import load_aggregation
from spxdask.run.calibration import load_calibration, make_product_source
from spxdask.run.description import describe_run
from spxdask.run.folder import COLUMNS_NAME, CONFIG_NAME, FILE_NAMES_NAME, RunFolder
from spxdask.run.frame_table import FRAME_COLUMNS, load_frame_table
from spxdask.run.observations import Observations
from spxdask.run.status import RunStatus, read_status
from spxdask.science.catalogue import Catalogue
from spxdask.science.channels import BANDS, PUBLISHED_CHANNELS, Channels, read_channels
from spxdask.science.sphere import angular_distance
from spxdask.storage import local_path
from spxdask.tables.provenance import Provenance
from spxdask.tables.quantities import Meaning, make_qtable
from spxdask.text import format_count

if TYPE_CHECKING:
    from astropy.table import QTable

__all__ = ["Run", "open_run"]

# How far a light curve may be from a position that is asked for, arcsec.
RADIUS_ARCSEC = 3.0
# Ids among which one like another is looked for.
MAX_IDS_COMPARED = 20_000
FRAME_MEANINGS = {name: Meaning(unit, text) for name, _, unit, text in FRAME_COLUMNS}


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open the output folder of a run, to look at what it has made.

    Parameters
    ----------
    path : path
        A folder on disk, or the URL of one in an object store. The run may be at work, or not be
        complete; nothing in the folder is changed.

    Returns
    -------
    Run
        Nothing is read before it is asked for.

    Raises
    ------
    RunFolderError
        If it is not the output folder of a run.

    Examples
    --------
    >>> run = open_run("batch_output")  # doctest: +SKIP
    >>> run["39633458707826492"].spectrum().plot()  # doctest: +SKIP
    """
    run = Run(path)
    folder = run.folder
    try:
        is_run = folder.state.exists(CONFIG_NAME) or run._find_curves() is not None
    except StoreError as error:
        raise RunFolderError(f"cannot be read: {error}", path=folder.path) from error
    if is_run:
        return run
    local = folder.root.local_path
    if local is not None and not local.exists():
        raise RunFolderError("there is no such folder: name the output folder of a run", path=local)
    raise RunFolderError(
        "is not the output folder of a run: it has neither state/config.yaml nor light curves in "
        "lightcurves/",
        path=folder.path,
    )


class Run:
    """What a run has made. Made by `open_run`; nothing is read before it is asked for.

    Iteration yields the ids of the sources with a light curve, in the order of the files, so that
    ``for id in run: run[id]`` reads each file once; ``len(run)`` is their number.

    Parameters
    ----------
    path : path
        The output folder, on disk or in an object store.

    Attributes
    ----------
    folder : RunFolder
        The folder.
    path : str
        The same as text.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = RunFolder(path)
        self.path = self.folder.path

    # The light curves.

    def _find_curves(self) -> Curves | None:
        catalogue = self._catalogue
        ids = None
        if catalogue is not None:
            ids = catalogue.target_id.take(pa.array(np.argsort(catalogue.row)))
        return find_curves(self.folder.lightcurves, ids, self._refused_characters)

    @cached_property
    def curves(self) -> Curves:
        """Where the light curves are, and how they are read.

        Raises
        ------
        RunFolderError
            If there are none yet.
        """
        found = self._find_curves()
        if found is None:
            raise RunFolderError(f"there are no light curves yet{self._advise()}", path=self.path)
        return found

    def _advise(self) -> str:
        """Return how far the run is, and how to go on, for the end of a sentence."""
        try:
            counts = self._count_frames()
        except RunFolderError:
            return ": no query was made; run `spxdask run`"
        states = Counter[str]()
        for (_, state), number in counts.items():
            states[state] += number
        measured = states["measured"]
        total = format_count(states.total(), "frame")
        return (
            f": {measured:,} of {total} {'is' if measured == 1 else 'are'} measured; "
            f"finish the run with `spxdask run --output {self.path}`"
        )

    @property
    def _refused_characters(self) -> str:
        if not self.folder.state.exists(FILE_NAMES_NAME):
            return ""
        return str(json.loads(self.folder.state.get(FILE_NAMES_NAME))["refused_characters"])

    @cached_property
    def _catalogue(self) -> Catalogue | None:
        return self.folder.saved_catalogue()

    @cached_property
    def _rank(self) -> np.ndarray | None:
        """Position in the sorted catalogue of each of `ids`; None without a catalogue."""
        if self._catalogue is None:
            return None
        place = pc.index_in(self.ids, value_set=self._catalogue.target_id)
        return np.asarray(pc.fill_null(place, -1).to_numpy(zero_copy_only=False), np.int64)

    @property
    def ids(self) -> pa.Array:
        """Ids of the sources with a light curve, large_string, in the order of the files."""
        return self.curves.ids

    def __len__(self) -> int:
        record = load_aggregation(self.folder.state)
        return len(self.ids) if record is None else record.n_light_curves

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.ids), 10_000):
            yield from self.ids.slice(start, 10_000).to_pylist()

    def __contains__(self, target_id: object) -> bool:
        text = _as_id(target_id)
        return text is not None and self.curves.has(text)

    def __getitem__(self, target_id: str | int) -> LightCurve:
        text = _as_id(target_id)
        if text is None:
            raise NoSuchSourceError(
                f"{target_id!r} is no id: ids are text, to the last digit, such as "
                f"{next(iter(self), 'star 1')!r}",
                source=str(target_id),
            )
        try:
            rows = self.curves.read(text)
        except KeyError:
            raise self._make_error(text) from None
        ra, dec = self._find_position(text)
        return LightCurve(text, rows, ra=ra, dec=dec, meta=self.provenance, channels=self.channels)

    def _make_error(self, target_id: str) -> NoSuchSourceError:
        catalogue = self._catalogue
        if catalogue is not None and _find(catalogue.target_id, target_id) is not None:
            reason = f"source {target_id!r} has no row: `missing_sources` of the run says why"
            return NoSuchSourceError(reason, source=target_id)
        for row in read_skipped_rows(self.folder.root):
            if row["target_id"] == target_id:
                reason = f"source {target_id!r} was skipped: {row['reason']} in the catalogue"
                return NoSuchSourceError(reason, source=target_id)
        near = _find_near(self.ids if catalogue is None else catalogue.target_id, target_id)
        hint = f": did you mean {near!r}?" if near else ""
        return NoSuchSourceError(
            f"there is no source {target_id!r} in {self.path}{hint}", source=target_id
        )

    def _find_position(self, target_id: str) -> tuple[float | None, float | None]:
        catalogue = self._catalogue
        place = None if catalogue is None else _find(catalogue.target_id, target_id)
        if catalogue is None or place is None:
            return None, None
        return float(catalogue.ra[place]), float(catalogue.dec[place])

    def light_curve(self, ra: Any, dec: Any, *, radius_arcsec: float = RADIUS_ARCSEC) -> LightCurve:
        """Return the light curve of the source nearest to a position.

        Parameters
        ----------
        ra, dec : float or Quantity
            ICRS, deg. Positions of sources are those of the catalogue.
        radius_arcsec : float
            How far away it may be.

        Returns
        -------
        LightCurve

        Raises
        ------
        NoSuchSourceError
            If no source is as near; the message has the distance of the nearest.
        ConfigError
            If it is no position.
        RunFolderError
            If the folder has no catalogue.
        """
        ra_deg, dec_deg = _to_degrees("ra", ra), _to_degrees("dec", dec)
        if not -90 <= dec_deg <= 90:
            raise ConfigError(option="dec", value=dec, rule=">= -90 and <= 90")
        catalogue = self._catalogue
        if catalogue is None:
            raise RunFolderError(
                "positions of sources are not known, as there is no catalogue in state/: "
                "ask for an id",
                path=self.path,
            )
        distance = angular_distance(ra_deg, dec_deg, catalogue.ra, catalogue.dec) * 3600
        near = np.flatnonzero(distance <= radius_arcsec)
        near = near[np.argsort(distance[near], kind="stable")]
        for place in near.tolist():
            target_id = catalogue.target_id[place].as_py()
            if self.curves.has(target_id):
                return self[target_id]
        nearest = int(np.argmin(distance))
        name, away = catalogue.target_id[nearest].as_py(), float(distance[nearest])
        text = f"{away:.2f} arcsec" if away < 60 else f"{away / 3600:.4f} deg"
        no_row = " and has no row" if len(near) else ""
        raise NoSuchSourceError(
            f"no light curve within {radius_arcsec:g} arcsec of ({ra_deg:.6f}, {dec_deg:+.6f}): "
            f"the nearest source, {name!r}, is {text} away{no_row}",
            source=name,
        )

    # Tables.

    @cached_property
    def sources(self) -> QTable:
        """A row a source with a light curve, in the order of the catalogue.

        ``id``, ``ra``, ``dec``, ``points``, ``good``; for each band its mean ``flux_D1``,
        ``flux_error_D1`` and ``n_D1``; ``chi2`` and ``dof`` of constancy at fixed wavelength;
        ``first_mjd`` and ``last_mjd``. One pass over all light curves, made once.
        """
        found = summarise_sources(self.curves, self.channels)
        names = ["id", "points", "good"]
        for band in BANDS:
            if pc.sum(found.column(f"n_{band}")).as_py():
                names += [f"flux_{band}", f"flux_error_{band}", f"n_{band}"]
        names += ["chi2", "dof", "first_mjd", "last_mjd"]
        meta = {**self.provenance, "flux": _name_flux(found)}
        found = found.select(names)
        ra, dec = np.full(len(found), np.nan), np.full(len(found), np.nan)
        catalogue, rank = self._catalogue, self._rank
        if catalogue is not None and rank is not None:
            is_known = rank >= 0
            ra[is_known], dec[is_known] = (
                catalogue.ra[rank[is_known]],
                catalogue.dec[rank[is_known]],
            )
            row = np.where(is_known, catalogue.row[rank], len(catalogue))
            order = np.argsort(row, kind="stable")
            found, ra, dec = found.take(pa.array(order)), ra[order], dec[order]
        found = found.add_column(1, "dec", pa.array(dec)).add_column(1, "ra", pa.array(ra))
        return make_qtable(found, SOURCE_MEANINGS, meta)

    @property
    def frames(self) -> QTable:
        """A row a frame of the query: what became of it, why it failed, how it was measured.

        Raises
        ------
        RunFolderError
            If no query was made.
        """
        return make_qtable(self._frame_table, FRAME_MEANINGS, self.provenance)

    @cached_property
    def _frame_table(self) -> pa.Table:
        folder, config = self.folder, self.config
        folder.ledger.refresh()
        sources = None if config.fetches_empty_frames else self._catalogue
        return load_frame_table(folder.state, self._observations, folder.ledger, sources)

    @cached_property
    def _observations(self) -> Observations:
        return self.folder.require_observations(self.config)

    def _count_frames(self) -> dict[tuple[str, str], int]:
        """Return the number of frames by band and state."""
        table = self._frame_table.select(["band", "status"])
        counts = table.group_by(["band", "status"]).aggregate([([], "count_all")])
        columns = (counts.column(name).to_pylist() for name in ("band", "status", "count_all"))
        return {(band, state): n for band, state, n in zip(*columns, strict=True)}

    @cached_property
    def missing_sources(self) -> QTable:
        """A row a source of the catalogue without a row, by id, with the reason if it is known.

        Rows of the user's catalogue that were skipped are at the end.

        Raises
        ------
        RunFolderError
            If the folder has no catalogue.
        """
        catalogue = self._catalogue
        if catalogue is None:
            raise RunFolderError("there is no catalogue in state/", path=self.path)
        curves = self._find_curves()
        ids = pa.array([], pa.large_string()) if curves is None else curves.ids
        observations, statuses = None, {}
        if self.folder.has_query():
            observations = self._observations
            names, states = (
                self._frame_table.column(n).to_pylist() for n in ("filename", "status")
            )
            statuses = dict(zip(names, states, strict=True))
        is_aggregated = load_aggregation(self.folder.state) is not None
        found = find_missing(catalogue, ids, observations, statuses, is_aggregated=is_aggregated)
        skipped = list(read_skipped_rows(self.folder.root))
        rows = [
            {
                "id": row["target_id"],
                "ra": _to_float(row["ra"]),
                "dec": _to_float(row["dec"]),
                "frames": 0,
                "measured": 0,
                "failed": 0,
                "reason": f"skipped row {row['row'] or '?'} of the catalogue: {row['reason']}",
            }
            for row in skipped
        ]
        if rows:
            found = pa.concat_tables([found, pa.Table.from_pylist(rows, schema=found.schema)])
        return make_qtable(found, MISSING_MEANINGS, self.provenance)

    # What the run is.

    @property
    def config(self) -> BatchConfig:
        """The options of the run.

        Raises
        ------
        RunFolderError
            If they were not saved in the folder.
        """
        return self._config

    @cached_property
    def _config(self) -> BatchConfig:
        return self.folder.saved_config()

    @property
    def summary(self) -> RunStatus:
        """Where the run stands now, as `spxdask status` prints it."""
        return read_status(self.path)

    @cached_property
    def _calibration(self) -> CalibrationSet | None:
        if not self.folder.state.exists(CONFIG_NAME):
            return None
        return load_calibration(self.folder.state, self.config)

    @cached_property
    def channels(self) -> Channels:
        """The 102 channels that spectra are averaged in.

        Those of the product in the run's own tree of products, where that is on a disk; otherwise
        those of the published table, for which nothing has to be fetched.

        Raises
        ------
        InputError
            If the product is damaged.
        """
        if not self.folder.state.exists(CONFIG_NAME):
            return PUBLISHED_CHANNELS
        source = make_product_source(self.config)
        if source is None or local_path(source.url) is None:
            return PUBLISHED_CHANNELS
        try:
            found = find_channels(source)
        except ArchiveError:
            # The tree is not on this machine.
            found = None
        if found is None:
            return PUBLISHED_CHANNELS
        token, url = found
        path = local_path(url)
        assert path is not None, "the source is on a disk"
        return read_channels(path, token)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the rows were made with and of; tables have it in their ``meta``."""
        if not self.folder.state.exists(CONFIG_NAME):
            return Provenance().to_dict()
        found = describe_run(self.config, self._calibration, self._releases).to_dict()
        return found | {"software": self._software or found["software"]}

    @cached_property
    def _software(self) -> str | None:
        """What made the light curves, as it has written it beside them."""
        if not self.folder.root.exists(COLUMNS_NAME):
            return None
        try:
            text = self.folder.root.get(COLUMNS_NAME)
            made = YAML(typ="safe", pure=True).load(text)["software"]
        except (YAMLError, TypeError, KeyError):
            # Written by another program.
            return None
        return made if isinstance(made, str) else None

    @cached_property
    def _releases(self) -> list[str]:
        if not self.folder.state.exists(CONFIG_NAME) or not self.folder.has_query():
            return []
        measured = self._frame_table.filter(pc.field("status") == "measured")
        return sorted(pc.unique(measured.column("release")).to_pylist())

    @property
    def versions(self) -> dict[str, Any]:
        """Versions of spxdask, releases, processing of frames, calibration and configuration."""
        names = ("software", "releases", "calibration", "configuration_digest")
        found = {name: self.provenance[name] for name in names}
        if self.folder.state.exists(CONFIG_NAME) and self.folder.has_query():
            measured = self._frame_table.filter(pc.field("status") == "measured")
            counts = pc.value_counts(measured.column("version").combine_chunks()).to_pylist()
            found["processing"] = {item["values"]: item["counts"] for item in counts}
        return found

    def to_dask(self) -> Any:
        """Return all rows as a Dask DataFrame, read when it is computed.

        Returns
        -------
        dask.dataframe.DataFrame
            ``target_id`` and the columns of the light curves; all rows of a source are in one
            partition. Text is of pyarrow's type.
        """
        from spxdask.results.dask import make_dask_frame

        return make_dask_frame(self.curves)

    def to_hats(
        self, path: str | os.PathLike[str], *, name: str | None = None, **options: Any
    ) -> None:
        """Write a HATS catalogue of the sources with nested light curves, for LSDB.

        Parameters
        ----------
        path : path
            Folder of the catalogue, which must not exist yet.
        name : str, optional
            Of the catalogue; default: the last part of the path.
        **options : object
            Those of `spxdask.results.hats.write_hats`.
        """
        from spxdask.results.hats import write_hats

        write_hats(self, path, name=name, **options)

    def to_votable(
        self, path: str | os.PathLike[str], ids: Iterable[str | int] | str | int | None = None
    ) -> None:
        """Write light curves as one VOTable, for TOPCAT and Aladin.

        Parameters
        ----------
        path : path
            The file; it replaces one of its name.
        ids : iterable of str, or str, optional
            Ids of sources; default: all.
        """
        from spxdask.results.votable import write_votable

        write_votable(self, path, ids)

    def _describe_field(self) -> str:
        config = self.config
        if config.region == "circle":
            return (
                f"circle of {config.radius:g} deg about ({config.center_ra:g}, "
                f"{config.center_dec:+g})"
            )
        if config.region == "target":
            return f"target {config.target}"
        number = 0 if self._catalogue is None else len(self._catalogue)
        return f"what {format_count(number, 'source')} cover"

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self._describe()}>"

    def _describe(self) -> str:
        """Return in a line what there is, from records that are quick to read."""
        parts = []
        try:
            counts = self._count_frames()
            total = format_count(sum(counts.values()), "frame")
            failed = sum(n for (_, state), n in counts.items() if state == "failed")
            parts.append(f"{total}, {failed:,} failed" if failed else total)
        except RunFolderError:
            parts.append("no query")
        if self._catalogue is not None:
            parts.append(format_count(len(self._catalogue), "source"))
        record = load_aggregation(self.folder.state)
        if record is not None:
            parts.append(format_count(record.n_light_curves, "light curve"))
            parts.append(format_count(record.n_rows, "row"))
        elif self._find_curves() is None:
            parts.append("no light curves yet")
        else:
            parts.append("light curves not up to date")
        return ", ".join(parts)

    def _repr_html_(self) -> str:
        lines: list[tuple[str, str]] = []
        counts: dict[tuple[str, str], int] = {}
        try:
            lines.append(("field", self._describe_field()))
            counts = self._count_frames()
        except RunFolderError as error:
            lines.append(("frames", str(error)))
        lines.append(("results", self._describe()))
        versions = self.provenance
        lines.append(("releases", ", ".join(versions["releases"]) or "-"))
        products = ", ".join(f"{k}: {v}" for k, v in sorted(versions["calibration"].items()))
        lines.append(("calibration", products or "of the frames"))
        lines.append(("software", versions["software"]))
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in lines
        )
        title = f"<p><b>Run</b> {html.escape(self.path)}</p>"
        return f"<div>{title}<table>{rows}</table>{_make_frame_table(counts)}</div>"


def _make_frame_table(counts: dict[tuple[str, str], int]) -> str:
    """Return frames by band and state as HTML."""
    if not counts:
        return ""
    states = sorted({state for _, state in counts})
    head = "".join(f"<th>{html.escape(state)}</th>" for state in states)
    body = "".join(
        f"<tr><th>{html.escape(band)}</th>"
        + "".join(f"<td>{counts.get((band, state), 0):,}</td>" for state in states)
        + "</tr>"
        for band in sorted({band for band, _ in counts})
    )
    return f"<table><tr><th>frames</th>{head}</tr>{body}</table>"


def _as_id(target_id: object) -> str | None:
    """Return an id as text, None for what is none: a float has lost digits."""
    if isinstance(target_id, str):
        return str(target_id)
    if isinstance(target_id, int | np.integer) and not isinstance(target_id, bool):
        return str(int(target_id))
    return None


def _find(ids: pa.Array, target_id: str) -> int | None:
    place = int(pc.index(ids, pa.scalar(target_id, pa.large_string())).as_py())
    return place if place >= 0 else None


def _find_near(ids: pa.Array, target_id: str) -> str | None:
    """Return an id that is like another."""
    # Of many, those that begin alike, as far as that leaves any.
    for length in range(len(target_id), -1, -1):
        alike = ids.filter(pc.starts_with(ids, target_id[:length])) if length else ids
        if len(alike) and (length < len(target_id) - 2 or len(alike) > 1 or not length):
            near = alike.slice(0, MAX_IDS_COMPARED).to_pylist()
            found = difflib.get_close_matches(target_id, near, 1)
            if found or len(alike) > MAX_IDS_COMPARED:
                return found[0] if found else None
    return None


def _to_degrees(name: str, value: Any) -> float:
    try:
        number = float(value.to_value("deg")) if hasattr(value, "to_value") else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise ConfigError(option=name, value=value, rule="a number, in degrees")
    return number


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _name_flux(found: pa.Table) -> str:
    """Return which flux the means of a summary are of."""
    has_psf = pc.any(found.column("is_psf")).as_py()
    has_corrected = pc.any(found.column("is_corrected")).as_py()
    if has_psf:
        return "psf_flux, else flux x aperture_correction" if has_corrected else "psf_flux"
    return "flux x aperture_correction" if has_corrected else "flux in the aperture"
