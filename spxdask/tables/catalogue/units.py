"""Units of columns, as tables state them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from spxdask.errors import CatalogueError

__all__ = ["AngleUnit", "find_factor", "is_angle_unit", "parse_angle_unit"]

# Degrees in the units of angles that tables use, without spaces and in lower case.
_DEGREES = {
    **dict.fromkeys(
        ("deg", "degs", "degree", "degrees", "d", "°", "d:m:s", "dms", "dd:mm:ss"), 1.0
    ),
    **dict.fromkeys(("sexagesimaldegrees", "deg:min:sec", "decimaldegrees", "degj2000"), 1.0),
    **dict.fromkeys(("hourangle", "h", "hr", "hrs", "hour", "hours", "h:m:s", "hms"), 15.0),
    **dict.fromkeys(("hh:mm:ss", "sexagesimalhours", "hour:min:sec", "decimalhours"), 15.0),
    **dict.fromkeys(("rad", "rads", "radian", "radians"), math.degrees(1.0)),
}
_NO_UNIT = {"", "-", "--", "---", "none", "null", "nan"}
# Units of motions that need no import of astropy.
_USUAL = {
    "mas/yr": {"mas/yr", "mas.yr**-1", "masyr-1", "mas.yr-1", "masyr^-1", "mas*yr**-1"},
    "mas": {"mas"},
    "yr": {"yr", "year", "years", "julianyears", "jyr", "a"},
}


@dataclass(frozen=True)
class AngleUnit:
    """The unit of a coordinate.

    Attributes
    ----------
    degrees : float
        Degrees in one of it.
    sexagesimal_degrees : float
        Degrees in the first part of a sexagesimal value that does not say whether it is hours.
    is_stated : bool
        Whether the table states the unit.
    """

    degrees: float = 1.0
    sexagesimal_degrees: float = 1.0
    is_stated: bool = False


def parse_angle_unit(text: str | None, column: str) -> AngleUnit:
    """Return the unit of a coordinate.

    Parameters
    ----------
    text : str or None
        As the table states it.
    column : str
        ``ra``, which is in hours where it is sexagesimal and no unit is stated, or ``dec``.

    Returns
    -------
    AngleUnit

    Raises
    ------
    CatalogueError
        If it is not the unit of an angle.
    """
    if text is None or _squeeze(text) in _NO_UNIT:
        return AngleUnit(1.0, 15.0 if column == "ra" else 1.0)
    degrees = _angle_in_degrees(text)
    if degrees is None:
        raise CatalogueError(
            f"the unit of {column} must be one of angles, such as deg, rad, or h:m:s, got {text!r}"
        )
    return AngleUnit(degrees, degrees, is_stated=True)


def is_angle_unit(text: str) -> bool:
    """Return whether a cell of a table is the unit of an angle, and no value.

    Parameters
    ----------
    text : str
        The cell.

    Returns
    -------
    bool
    """
    return not re.search(r"\d", text) and _angle_in_degrees(text) is not None


def find_factor(text: str | None, usual: str) -> float | None:
    """Return what values in a unit are to be multiplied by.

    Parameters
    ----------
    text : str or None
        The unit, as the table states it; None if it states none.
    usual : str
        The unit that they are wanted in, and are in if none is stated.

    Returns
    -------
    float or None
        None for a unit that cannot be converted.
    """
    if text is None or _squeeze(text) in _NO_UNIT | _USUAL[usual]:
        return 1.0
    return _convert(text, usual)


def _squeeze(text: str) -> str:
    return re.sub(r"[\s\"']", "", text).strip("[]()").lower()


@cache
def _angle_in_degrees(text: str) -> float | None:
    known = _DEGREES.get(_squeeze(text))
    return known if known is not None else _convert(text.strip().strip("[]()"), "deg")


@cache
def _convert(text: str, wanted: str) -> float | None:
    """Return the factor from one unit to another by astropy, None if there is none."""
    import warnings

    from astropy import units

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(units.Unit(text).to(units.Unit(wanted)))
        # astropy raises TypeError for a text that it cannot parse at all.
        except (ValueError, TypeError):
            return None
