"""Which columns of a table are the id, the position and the motion of a source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spxdask.errors import CatalogueError

__all__ = ["MOTIONS", "CatalogueColumns"]

# What each column may be called, in any case. A name in an earlier group is preferred to those
# in later groups; two columns with names of one group are ambiguous.
SYNONYMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "target_id": (
        ("targetid",),
        ("target_id",),
        ("source_id", "id", "objid", "name", "designation"),
        (
            *("sourceid", "obj_id", "object_id", "objectid", "main_id", "source_name", "objname"),
            *("source", "object"),
        ),
    ),
    "ra": (
        ("ra",),
        (
            *("raj2000", "ra_j2000", "_ra", "_raj2000", "ra_icrs", "_ra_icrs", "radeg", "ra_deg"),
            *("right_ascension", "ra_epoch2000", "ramean", "alpha_j2000", "alphawin_j2000"),
        ),
    ),
    "dec": (
        ("dec",),
        (
            *("decj2000", "dec_j2000", "dej2000", "de_j2000", "_dec", "_de", "_decj2000"),
            *("_dej2000", "dec_icrs", "de_icrs", "_de_icrs", "_dec_icrs", "decdeg", "dedeg"),
            *("dec_deg", "de_deg", "de", "decl", "declination", "dec_epoch2000", "decmean"),
            *("delta_j2000", "deltawin_j2000"),
        ),
    ),
}
MOTIONS: dict[str, tuple[str, ...]] = {
    "pmra": ("pmra", "pm_ra", "pmra_cosdec", "pm_ra_cosdec"),
    "pmdec": ("pmdec", "pm_dec", "pmde", "pm_de"),
    "parallax": ("parallax", "plx"),
    "ref_epoch": ("ref_epoch", "refepoch"),
}
LABELS = {"target_id": "targetid", "ra": "ra", "dec": "dec"}
OPTIONS = {"target_id": "id_column", "ra": "ra_column", "dec": "dec_column"}
# Limit of the names that a message lists, characters.
MAX_NAMES_LENGTH = 300
# A unit in brackets behind a name, as in "ra [deg]".
BRACKETED_UNIT = re.compile(r"^(?P<name>.*\S)\s*[\[(](?P<unit>[^\[\]()]*)[\])]$")


@dataclass(frozen=True, kw_only=True)
class CatalogueColumns:
    """The names of the columns that the user has chosen.

    Attributes
    ----------
    target_id, ra, dec : str or None
        None finds the column by the names that are usual for it.
    """

    target_id: str | None = None
    ra: str | None = None
    dec: str | None = None

    def fit(self, names: Sequence[str]) -> bool:
        """Return whether a header has columns for id and position, be it too many of them.

        Parameters
        ----------
        names : sequence of str
            The header.

        Returns
        -------
        bool
        """
        return all(self._find_candidates(names, column) for column in SYNONYMS)

    def find(self, names: Sequence[str]) -> dict[str, int]:
        """Find the columns of id and position.

        Parameters
        ----------
        names : sequence of str
            The header.

        Returns
        -------
        dict of str to int
            Positions in the header by ``target_id``, ``ra`` and ``dec``.

        Raises
        ------
        CatalogueError
            If one is missing or ambiguous.
        """
        found = {column: self._find_one(names, column) for column in SYNONYMS}
        if len(set(found.values())) < len(found):
            used = ", ".join(f"{LABELS[c]} from {names[i]}" for c, i in found.items())
            raise CatalogueError(f"id, ra and dec must be different columns, got {used}")
        return found

    def _find_candidates(self, names: Sequence[str], column: str) -> list[int]:
        chosen = getattr(self, column)
        if chosen is not None:
            exact = [i for i, name in enumerate(names) if name == chosen]
            wanted = chosen.strip().lower()
            return exact or [i for i, name in enumerate(names) if name.strip().lower() == wanted]
        plain = [_plain(name) for name in names]
        groups = ([i for i, n in enumerate(plain) if n in group] for group in SYNONYMS[column])
        return next(filter(None, groups), [])

    def _find_one(self, names: Sequence[str], column: str) -> int:
        found = self._find_candidates(names, column)
        if len(found) == 1:
            return found[0]
        label, option, chosen = LABELS[column], OPTIONS[column], getattr(self, column)
        flag = f"{option} (--{option.replace('_', '-')})"
        if found and chosen is not None:
            raise CatalogueError(f"{len(found)} columns {chosen}: rename those not to be used")
        if found:
            listed = ", ".join(names[i] for i in found)
            raise CatalogueError(
                f"{len(found)} columns {label}; name the one to use with {flag}: {listed}"
            )
        have = ", ".join(names)[:MAX_NAMES_LENGTH] or "nothing"
        if chosen is not None:
            raise CatalogueError(f"no column {chosen}, which {option} names; the columns: {have}")
        usual = [name for group in SYNONYMS[column][1:3] for name in group][:5]
        raise CatalogueError(
            f"no column {label} or {', '.join(usual)}; the header must name it, or {flag}; "
            f"the columns: {have}"
        )


def find_motions(names: Sequence[str]) -> dict[str, int]:
    """Find the columns of proper motion, parallax and the epoch of the positions.

    Parameters
    ----------
    names : sequence of str
        The header.

    Returns
    -------
    dict of str to int
        Positions in the header by the names in `MOTIONS`, for those that are there once.
    """
    plain = [_plain(name) for name in names]
    found = {what: [i for i, n in enumerate(plain) if n in MOTIONS[what]] for what in MOTIONS}
    return {what: where[0] for what, where in found.items() if len(where) == 1}


def find_bracketed_unit(name: str) -> str | None:
    """Return the unit that stands in brackets behind the name of a column.

    Parameters
    ----------
    name : str
        Such as ``ra [deg]``.

    Returns
    -------
    str or None
    """
    match = BRACKETED_UNIT.match(name.strip())
    return match["unit"].strip() if match else None


def _plain(name: str) -> str:
    """Return the name of a column without case, spaces about it, and a unit in brackets."""
    match = BRACKETED_UNIT.match(name.strip())
    return (match["name"] if match else name).strip().lower()
