"""One source from its position, or from a name that has the position, as text."""

from __future__ import annotations

import logging
import re
import warnings

import numpy as np
import pyarrow as pa

from spxdask.science.catalogue import Catalogue

__all__ = ["make_target_catalogue", "parse_target"]

logger = logging.getLogger(__name__)

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_DEGREES = re.compile(rf"({_NUMBER})(?: ?d(?:eg)?)?")
# Signs that people type, or paste from papers, for those that are understood.
_SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2013", "-")  # minus sign, en dash
    | dict.fromkeys("\u00b0\u00ba", "d")  # degree sign, masculine ordinal
    | dict.fromkeys("\u2032'\u2019", "m")  # prime, apostrophe, right quotation mark
    | dict.fromkeys('\u2033"\u201d', "s")  # double prime, quotation marks
)
# J004244.3+411609, 2MASS J00424433+4116074 (whose decimal points are left out).
_NAME = re.compile(
    r"(?:.*[^a-z])?[a-z]*J(\d\d)(\d\d)(\d\d)\.?(\d*)([+-])(\d\d)(\d\d)(\d\d)\.?(\d*)",
    re.IGNORECASE,
)


def parse_target(text: str) -> tuple[float, float]:
    """Read a position.

    Parameters
    ----------
    text : str
        Right ascension and declination, ICRS: as degrees; sexagesimal, where the right ascension
        is in hours unless it says ``d``; or as a part of a name such as ``J004244.3+411609``.

    Returns
    -------
    ra, dec : float
        ICRS, deg.

    Raises
    ------
    ValueError
        If it is none of these; the message is empty, or says in brackets why.

    Examples
    --------
    >>> parse_target("10.684 -41.269")
    (10.684, -41.269)
    >>> parse_target("J120000+301500")
    (180.0, 30.25)
    """
    plain = " ".join(text.translate(_SIGNS).split())
    if name := _NAME.fullmatch(plain):
        h, m, s, fraction, sign, d, arcmin, arcsec, rest = name.groups()
        plain = f"{h}:{m}:{s}.{fraction} {sign}{d}:{arcmin}:{arcsec}.{rest}"
    ra_text, dec_text = _split(plain)
    ra = _read_angle(ra_text, is_ra=True)
    dec = _read_angle(dec_text, is_ra=False)
    if not -180 <= ra <= 360:
        raise ValueError(f" (its right ascension is {ra:g} deg)")
    if not -90 <= dec <= 90:
        raise ValueError(f" (its declination is {dec:g} deg)")
    return ra % 360.0, dec


def _split(text: str) -> tuple[str, str]:
    """Divide a position into right ascension and declination."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1:
        # The sign of the declination divides, or else the space in the middle.
        signed = re.fullmatch(r"(.*\S) ?([+-][^+-]*)", text)
        words = text.split(" ")
        half, is_odd = divmod(len(words), 2)
        if signed:
            parts = list(signed.groups())
        elif not is_odd:
            parts = [" ".join(words[:half]), " ".join(words[half:])]
    if len(parts) != 2 or not all(parts):
        raise ValueError
    return parts[0], parts[1]


def _read_angle(text: str, *, is_ra: bool) -> float:
    """Return an angle in degrees."""
    if degrees := _DEGREES.fullmatch(text):
        return float(degrees[1])
    # Without a unit, three numbers or two are sexagesimal.
    if not re.fullmatch(rf"{_NUMBER}([hdms: ]+(\d+\.?\d*|\.\d+))*[hdms]?", text):
        raise ValueError
    from astropy.coordinates import Angle
    from astropy.units import UnitsError

    try:
        with warnings.catch_warnings():
            # Such as that of 24 hours.
            warnings.simplefilter("error")
            angle = Angle(text, "hourangle" if is_ra and "d" not in text else "deg")
        # Without the last digits, which differ between versions of astropy.
        return round(float(angle.deg), 11)
    except (UnitsError, ValueError, Warning) as error:
        raise ValueError from error


def make_target_catalogue(text: str) -> Catalogue:
    """Make a catalogue of one source, whose id is the text.

    Parameters
    ----------
    text : str
        As for `parse_target`.

    Returns
    -------
    Catalogue
        One source.
    """
    ra, dec = parse_target(text)
    name = _NAME.fullmatch(" ".join(text.translate(_SIGNS).split()))
    if name and not name[4]:
        logger.warning(
            "%s: the name has the position to a whole second of right ascension, which is up to "
            "15 arcsec, more than two pixels; a target such as '10.684 41.269' is exact",
            text,
        )
    target_id = pa.array([" ".join(text.split())], pa.large_string())
    return Catalogue.from_arrays(target_id, np.array([ra]), np.array([dec]))
