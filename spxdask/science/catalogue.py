"""The catalogue, sorted so that a frame only touches the sources near it."""

from __future__ import annotations

import hashlib
import html
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from spxdask.science.footprint import SourceSky
from spxdask.science.sphere import angular_distance

__all__ = ["Catalogue"]

# Declination zones of one degree, each sorted in right ascension: a frame of 3.5 deg
# touches seven of them, with two binary searches each.
ZONES = 180
# Zones are laid one after the other on a line, so many degrees apart, without an overlap.
ZONE_STEP_DEG = 400.0
# Catalogues and frames are at most so many years apart.
MOST_YEARS = 50.0
# Seven times what the fastest star moves in them. A motion that is none of a star is not to extend
# the search for frames to the whole sky.
MOST_SHIFT_DEG = 1.0
# A notebook shows so many sources.
ROWS_SHOWN = 10
# What a source may have besides a position.
MOTION_COLUMNS = ("pmra", "pmdec", "parallax", "ref_epoch")


@dataclass(frozen=True, eq=False, kw_only=True)
class Catalogue:
    """Sources in the order of the sky.

    Attributes
    ----------
    target_id : (n,) pyarrow large_string array
        Ids as in the user's catalogue, to the last character.
    ra, dec : (n,) float array
        ICRS, deg, as in the user's catalogue.
    row : (n,) int array
        Position of each source in the user's catalogue, 0 for the first.
    sky_key : (n,) float array
        Increasing: zone of declination, then right ascension.
    fingerprint : str
        Hash of ids and positions; the same for the same rows in the same order.
    pmra, pmdec : (n,) float array or None
        Proper motion, mas/yr, that in right ascension times cos(dec). NaN where unknown.
    parallax : (n,) float array or None
        In mas; NaN where unknown.
    ref_epoch : (n,) float array or None
        Julian year of the positions; NaN where unknown.
    motion_fingerprint : str
        Hash of the motions, empty without any.
    """

    target_id: pa.Array
    ra: np.ndarray
    dec: np.ndarray
    row: np.ndarray
    sky_key: np.ndarray
    fingerprint: str
    pmra: np.ndarray | None = None
    pmdec: np.ndarray | None = None
    parallax: np.ndarray | None = None
    ref_epoch: np.ndarray | None = None
    motion_fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.ra)

    def __repr__(self) -> str:
        motions = f" with {', '.join(self.motions)}" if self.motions else ""
        return f"<Catalogue: {len(self):,} source{'' if len(self) == 1 else 's'}{motions}>"

    def _repr_html_(self) -> str:
        # In the order of the user's catalogue.
        first = np.argsort(self.row, kind="stable")[:ROWS_SHOWN]
        columns = {"target_id": self.target_id.take(pa.array(first)).to_pylist()}
        names = ("ra", "dec", *self.motions)
        columns |= {name: getattr(self, name)[first].tolist() for name in names}
        head = "".join(f"<th>{name}</th>" for name in columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>"
            for row in zip(*columns.values(), strict=True)
        )
        return f"{html.escape(repr(self))}<table><tr>{head}</tr>{rows}</table>"

    @cached_property
    def id_characters(self) -> set[str]:
        """The characters other than ASCII letters and digits that the ids are made of."""
        data = self.target_id.buffers()[2]
        plain = (string.ascii_letters + string.digits).encode()
        # Without the many plain ones, which is quick for a million ids.
        return set(bytes(data or b"").translate(None, plain).decode("utf-8", "surrogatepass"))

    @cached_property
    def sky(self) -> SourceSky:
        """Where its sources are, to compare with footprints of frames."""
        return SourceSky(self.ra, self.dec, min(self.largest_shift_deg, MOST_SHIFT_DEG))

    @property
    def motions(self) -> dict[str, np.ndarray]:
        """The arrays of `MOTION_COLUMNS` that are not None, by name."""
        found = {name: getattr(self, name) for name in MOTION_COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    @cached_property
    def has_motions(self) -> bool:
        """Whether any source has a proper motion or a parallax other than zero."""
        moving = (self.pmra, self.pmdec, self.parallax)
        return any(bool(np.nan_to_num(v).any()) for v in moving if v is not None)

    @property
    def identity(self) -> str:
        """Hash of ids, positions and motions."""
        prints = (self.fingerprint, self.motion_fingerprint if self.has_motions else "")
        return "-".join(filter(None, prints))

    @cached_property
    def largest_shift_deg(self) -> float:
        """How far a source may be from its position, deg; of motions, over half a century."""
        if not self.has_motions:
            return 0.0
        none = np.zeros(1)
        pmra, pmdec, parallax = (
            np.nan_to_num(none if v is None else v) for v in (self.pmra, self.pmdec, self.parallax)
        )
        per_year = float(np.hypot(np.abs(pmra).max(), np.abs(pmdec).max()))
        return (per_year * MOST_YEARS + float(parallax.max())) / 3.6e6

    @classmethod
    def from_arrays(
        cls,
        target_id: pa.Array,
        ra: np.ndarray,
        dec: np.ndarray,
        motions: Mapping[str, np.ndarray] | None = None,
    ) -> Catalogue:
        """Sort sources; nothing about them is checked here.

        Parameters
        ----------
        target_id : (n,) pyarrow large_string array
            Ids, without nulls, each once, in one piece that begins with its buffers.
        ra, dec : (n,) float array
            ICRS, deg, within 0 to 360 and -90 to 90.
        motions : mapping of str to (n,) float array, optional
            Some of ``pmra``, ``pmdec``, ``parallax`` and ``ref_epoch``.

        Returns
        -------
        Catalogue
            The same sources, sorted.
        """
        ra, dec = np.ascontiguousarray(ra, float), np.ascontiguousarray(dec, float)
        offsets, text = target_id.buffers()[1:]
        # A buffer may be longer than what it holds.
        offsets = offsets[: 8 * (len(target_id) + 1)] if len(target_id) else b""
        end = int(np.frombuffer(offsets[-8:], np.int64)[0]) if len(target_id) else 0
        digest = hashlib.blake2b(digest_size=16)
        for part in (offsets, text[:end] if end else b"", ra.data, dec.data):
            digest.update(part)
        motion_digest = hashlib.blake2b(digest_size=8)
        arrays = {n: np.ascontiguousarray(v, float) for n, v in sorted((motions or {}).items())}
        for name, values in arrays.items():
            motion_digest.update(name.encode())
            motion_digest.update(values.data)
        key = _sky_key(ra, dec)
        row = np.argsort(key, kind="stable")
        return cls(
            target_id=target_id.take(pa.array(row)),
            ra=ra[row],
            dec=dec[row],
            row=row,
            sky_key=key[row],
            fingerprint=digest.hexdigest(),
            motion_fingerprint=motion_digest.hexdigest() if arrays else "",
            **{name: values[row] for name, values in arrays.items()},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the sorted catalogue to an Arrow file, for `open`.

        Parameters
        ----------
        path : path
            A local file, replaced if it exists.
        """
        table = pa.table(
            {
                "target_id": self.target_id,
                "ra": self.ra,
                "dec": self.dec,
                "row": self.row,
                "sky_key": self.sky_key,
                **self.motions,
            },
            metadata={
                "fingerprint": self.fingerprint,
                "motion_fingerprint": self.motion_fingerprint,
            },
        )
        with open(path, "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table, max_chunksize=len(table))

    @classmethod
    def open(cls, path: str | os.PathLike) -> Catalogue:
        """Map a saved catalogue, so that all processes of the machine share its memory.

        Parameters
        ----------
        path : path
            A local file that `save` wrote.

        Returns
        -------
        Catalogue
            The catalogue that was saved.
        """
        # As bytes, since pyarrow takes text for UTF-8, whatever the locale.
        table = pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()
        names = [name for name in table.column_names if name != "target_id"]
        numbers = {name: table.column(name).chunk(0).to_numpy() for name in names}
        metadata = table.schema.metadata
        return cls(
            target_id=table.column("target_id").chunk(0),
            fingerprint=metadata[b"fingerprint"].decode(),
            motion_fingerprint=metadata.get(b"motion_fingerprint", b"").decode(),
            **numbers,
        )

    def digest(self, index: np.ndarray) -> bytes:
        """Hash the ids, positions and motions of some sources.

        Parameters
        ----------
        index : (m,) int array
            Indices into this catalogue; their order matters.

        Returns
        -------
        bytes
            Does not depend on the other sources of the catalogue.
        """
        ids = self.target_id.take(pa.array(index))
        size = 8 * (len(ids) + 1)
        offsets = np.frombuffer(ids.buffers()[1], np.int64, len(ids) + 1) if len(ids) else [0]
        digest = hashlib.blake2b(np.asarray(offsets).tobytes()[:size], digest_size=16)
        for part in ((ids.buffers()[2] or b"")[: offsets[-1]], self.ra[index], self.dec[index]):
            digest.update(part)
        for name, values in self.motions.items() if self.has_motions else ():
            digest.update(name.encode() + values[index].tobytes())
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
            Indices into this catalogue, in the order of the user's catalogue.
        """
        spans = _ra_spans(ra, dec, radius)
        first, last = _zone(np.array([dec - radius, dec + radius]))
        pieces = []
        for zone in range(first, last + 1):
            for low, high in spans:
                # Wider by 1e-9 deg, so that rounding of the key loses no source.
                start, stop = np.searchsorted(
                    self.sky_key, [zone * ZONE_STEP_DEG + low, zone * ZONE_STEP_DEG + high + 1e-9]
                )
                pieces.append(np.arange(start, stop))
        index = np.concatenate(pieces)
        near = angular_distance(ra, dec, self.ra[index], self.dec[index]) <= radius
        index = index[near]
        return index[np.argsort(self.row[index], kind="stable")]


def _ra_spans(ra: float, dec: float, radius: float) -> list[tuple[float, float]]:
    """Return the ranges of right ascension, within 0 to 360 deg, that a circle reaches into."""
    if abs(dec) + radius >= 90.0:
        return [(0.0, 360.0)]
    sine = np.sin(np.deg2rad(radius)) / np.cos(np.deg2rad(dec))
    half_width = np.rad2deg(np.arcsin(min(sine, 1.0))) + 1e-6
    if half_width >= 180.0:
        return [(0.0, 360.0)]
    low, high = (ra - half_width) % 360.0, (ra + half_width) % 360.0
    return [(low, high)] if low <= high else [(0.0, high), (low, 360.0)]


def _zone(dec: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(dec + 90.0), 0, ZONES - 1).astype(np.int64)


def _sky_key(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    return _zone(dec) * ZONE_STEP_DEG + ra % 360.0
