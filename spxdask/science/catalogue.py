"""The catalogue: read and checked once, sorted so that a frame touches only its own sky."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from spxdask.errors import CatalogueError, StoreError
from spxdask.science.level2.frame import angular_distance
from spxdask.storage import local_path, read_file

COLUMNS = ("targetid", "ra", "dec")
# What the tables we write call a column.
SYNONYMS = {"targetid": "target_id"}
# Declination zones of one degree, each sorted in right ascension: a frame of 3.5 deg
# looks into seven of them with two binary searches each.
ZONES = 180
# Zones are laid one after the other on a line, with room between them.
ZONE_STEP = 400.0
SHOWN = 5


@dataclass(frozen=True, eq=False, kw_only=True)
class Catalogue:
    """Sources in the order of the sky.

    Attributes
    ----------
    target_id : (n,) pyarrow large_string array
        Ids as in the file, to the last character.
    ra, dec : (n,) float array
        ICRS, deg, as in the file.
    row : (n,) int array
        Place of each source in the file, 0 for the first.
    sky_key : (n,) float array
        Increasing: zone of declination, then right ascension.
    fingerprint : str
        Hash of all of it; the same for the same rows in the same order.
    """

    target_id: pa.Array
    ra: np.ndarray
    dec: np.ndarray
    row: np.ndarray
    sky_key: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ra)

    @classmethod
    def from_csv(cls, path: str | os.PathLike) -> Catalogue:
        """Read a catalogue with the columns targetid (or target_id), ra and dec.

        Names may be in any case, other columns are ignored, a byte-order mark and
        quoting are understood. Ids are text.

        Raises
        ------
        CatalogueError
            If the file cannot be read, a column is missing, there are no rows, an id is
            empty or occurs twice, or a coordinate is not a number on the sky. The
            message names the file and the column or the first bad rows.
        """
        try:
            table = _read_text_columns(path)
        except (pa.ArrowInvalid, pa.ArrowKeyError, csv.Error, UnicodeDecodeError) as error:
            raise CatalogueError(f"{path}: not readable as CSV: {error}") from error
        except OSError as error:
            raise CatalogueError(f"{path}: {error.strerror or error}") from error
        except StoreError as error:
            raise CatalogueError(str(error)) from error
        if not len(table):
            raise CatalogueError(f"{path}: no rows below the header")
        ids = table.column(0)
        _refuse(path, pc.equal(pc.utf8_trim_whitespace(ids), ""), "targetid is empty", ids)
        ra = _coordinate(path, "ra", table.column(1), 0.0, 360.0)
        dec = _coordinate(path, "dec", table.column(2), -90.0, 90.0)
        if pc.count_distinct(ids).as_py() < len(ids):
            first = ids.dictionary_encode().indices.to_numpy()
            seen = np.zeros(len(ids), bool)
            seen[np.unique(first, return_index=True)[1]] = True
            _refuse(path, pa.array(~seen), "targetid occurs more than once", ids)
        return cls._sorted(ids, ra, dec)

    @classmethod
    def _sorted(cls, ids: pa.Array, ra: np.ndarray, dec: np.ndarray) -> Catalogue:
        digest = hashlib.blake2b(digest_size=16)
        for part in (ids.buffers()[1], ids.buffers()[2], ra, dec):
            digest.update(part)
        key = _sky_key(ra, dec)
        row = np.argsort(key, kind="stable")
        return cls(
            target_id=ids.take(pa.array(row)),
            ra=ra[row],
            dec=dec[row],
            row=row,
            sky_key=key[row],
            fingerprint=digest.hexdigest(),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the sorted catalogue to an Arrow file that `open` maps."""
        table = pa.table(
            {
                "target_id": self.target_id,
                "ra": self.ra,
                "dec": self.dec,
                "row": self.row,
                "sky_key": self.sky_key,
            },
            metadata={"fingerprint": self.fingerprint},
        )
        with pa.OSFile(os.fspath(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table, max_chunksize=len(table))

    @classmethod
    def open(cls, path: str | os.PathLike) -> Catalogue:
        """Map a saved catalogue: its memory is shared by all processes of the machine."""
        table = pa.ipc.open_file(pa.memory_map(os.fspath(path))).read_all()
        numbers = {
            name: table.column(name).chunk(0).to_numpy() for name in ("ra", "dec", "row", "sky_key")
        }
        return cls(
            target_id=table.column("target_id").chunk(0),
            fingerprint=table.schema.metadata[b"fingerprint"].decode(),
            **numbers,
        )

    def digest(self, index: np.ndarray) -> bytes:
        """Return a hash of some sources: their ids and positions, in the order given."""
        ids = self.target_id.take(pa.array(index))
        size = 8 * (len(ids) + 1)
        offsets = np.frombuffer(ids.buffers()[1], np.int64, len(ids) + 1) if len(ids) else [0]
        digest = hashlib.blake2b(np.asarray(offsets).tobytes()[:size], digest_size=16)
        for part in ((ids.buffers()[2] or b"")[: offsets[-1]], self.ra[index], self.dec[index]):
            digest.update(part)
        return digest.digest()

    def within(self, ra: float, dec: float, radius: float) -> np.ndarray:
        """Find the sources in a circle on the sphere.

        Parameters
        ----------
        ra, dec, radius : float
            ICRS, deg.

        Returns
        -------
        (m,) int array
            Indices into this catalogue, in the order of the file.
        """
        if abs(dec) + radius >= 90.0:
            half_width = 180.0
        else:
            sine = np.sin(np.deg2rad(radius)) / np.cos(np.deg2rad(dec))
            half_width = np.rad2deg(np.arcsin(min(sine, 1.0))) + 1e-6
        if half_width >= 180.0:
            spans = [(0.0, 360.0)]
        else:
            low, high = (ra - half_width) % 360.0, (ra + half_width) % 360.0
            spans = [(low, high)] if low <= high else [(0.0, high), (low, 360.0)]
        first, last = _zone(np.array([dec - radius, dec + radius]))
        pieces = []
        for zone in range(first, last + 1):
            for low, high in spans:
                start, stop = np.searchsorted(
                    self.sky_key, [zone * ZONE_STEP + low, zone * ZONE_STEP + high + 1e-9]
                )
                pieces.append(np.arange(start, stop))
        index = np.concatenate(pieces)
        near = angular_distance(ra, dec, self.ra[index], self.dec[index]) <= radius
        index = index[near]
        return index[np.argsort(self.row[index], kind="stable")]


def _zone(dec: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(dec + 90.0), 0, ZONES - 1).astype(np.int64)


def _sky_key(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    return _zone(dec) * ZONE_STEP + ra % 360.0


def _read_text_columns(path: str | os.PathLike) -> pa.Table:
    """Read the three columns as text, each in one piece."""
    on_disk = local_path(path)
    far = b"" if on_disk is not None else read_file(path)
    source = open(on_disk, "rb") if on_disk is not None else io.BytesIO(far)  # noqa: SIM115
    with source, io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    content = os.fspath(on_disk) if on_disk is not None else pa.BufferReader(far)
    wanted = []
    for column in COLUMNS:
        called = (column, SYNONYMS.get(column, column))
        found = next(filter(None, (_named(names, name) for name in called)), [])
        if len(found) != 1:
            for separator, what in ((";", "';'"), ("\t", "a tab")):
                if not found and any(separator in name for name in names):
                    raise CatalogueError(
                        f"{path}: the file has to be comma-separated, and its header has {what}"
                    )
            what = "no column" if not found else f"{len(found)} columns"
            what += f" {' or '.join(dict.fromkeys(called))}"
            raise CatalogueError(
                f"{path}: {what}; the header has to name each of "
                f"{', '.join(COLUMNS)} once, and says: {', '.join(names)[:200] or 'nothing'}"
            )
        wanted.append(found[0])
    table = pa_csv.read_csv(
        content,
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.large_string()),
            strings_can_be_null=False,
        ),
    )
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(COLUMNS))


def _named(names: list[str], wanted: str) -> list[str]:
    return [name for name in names if name.strip().lower() == wanted]


def _coordinate(path, name: str, text: pa.Array, low: float, high: float) -> np.ndarray:
    trimmed = pc.utf8_trim_whitespace(text)
    try:
        values = pc.cast(trimmed, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        number = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
        bad = pc.invert(pc.match_substring_regex(trimmed, number))
        _refuse(path, bad, f"{name} is not a number", text)
        raise
    off = ~((values >= low) & (values <= high))
    _refuse(path, pa.array(off), f"{name} is not within {low:g} to {high:g} deg", text)
    return values


def _refuse(path, bad: pa.Array, problem: str, column: pa.Array) -> None:
    """Raise CatalogueError for the rows where `bad` holds, showing the first few."""
    where = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
    if not len(where):
        return
    shown = ", ".join(f"{i + 1} ({column[i].as_py()[:60]!r})" for i in where[:SHOWN].tolist())
    more = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
    raise CatalogueError(f"{path}: {problem} in data row {shown}{more}")
