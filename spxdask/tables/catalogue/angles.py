"""Columns of coordinates and motions as numbers: decimal or sexagesimal, in any unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.units import AngleUnit

__all__ = ["MISSING", "Numbers", "as_text", "parse_numbers", "to_mask"]

# What stands for a missing number in a text, in lower case.
MISSING = (
    *(
        "",
        "nan",
        "null",
        "none",
        "na",
        "n/a",
        "#n/a",
        "#na",
        "<na>",
        "-",
        "--",
        "---",
        "...",
        "\\n",
    ),
    *("masked", "nil"),
)
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# The decimal comma of programs that separate columns by semicolons.
DECIMAL_COMMA = r"^[+-]?\d*,\d+([eE][+-]?\d+)?$"
# What marks the parts of a sexagesimal value, as typed and as typeset.
_HOURS, _DEGREES = "hH\u02b0", "dD\u00b0"
_MINUTES, _SECONDS = "mM'\u1d50\u2032", 'sS"\u02e2\u2033'
_DIGITS = r"\d{1,2}(?:\.\d*)?"
SEXAGESIMAL = (
    rf"^(?P<sign>[+-]?)\s*(?P<whole>\d{{1,3}})(?:\s*(?P<mark>[{_HOURS}{_DEGREES}:])\s*|\s+)"
    rf"(?P<minutes>{_DIGITS})"
    rf"(?:\s*[{_MINUTES}:]\s*(?:(?P<seconds>{_DIGITS})\s*(?:[{_SECONDS}]|'')?)?"
    rf"|\s+(?P<rest>{_DIGITS}))?$"
)
HOURS_DEG = 15.0


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of a column.

    Attributes
    ----------
    values : (n,) float array
        NaN where there is none.
    is_missing : (n,) bool array
        Where nothing stands.
    is_wrong : (n,) bool array
        Where something else than a number stands.
    is_mixed : (n,) bool array
        Where a decimal number stands in a column whose other rows are sexagesimal, so that it
        may be degrees or hours.
    """

    values: np.ndarray
    is_missing: np.ndarray
    is_wrong: np.ndarray
    is_mixed: np.ndarray


def parse_numbers(column: pa.Array, unit: AngleUnit | None = None) -> Numbers:
    """Return the numbers of a column.

    Parameters
    ----------
    column : (n,) pyarrow array
        Numbers or texts.
    unit : AngleUnit, optional
        Given for angles, which are converted to degrees and may be sexagesimal.

    Returns
    -------
    Numbers
        Numbers that are not converted have every bit of the column's.

    Raises
    ------
    CatalogueError
        If the column holds neither numbers nor texts.
    """
    factor = 1.0 if unit is None else unit.degrees
    none = np.zeros(len(column), bool)
    if _is_numeric(column.type):
        values = _scale(_to_floats(column), factor)
        return Numbers(values=values, is_missing=np.isnan(values), is_wrong=none, is_mixed=none)
    text = pc.utf8_trim_whitespace(as_text(column))
    is_missing = pc.or_kleene(
        pc.is_null(text), pc.is_in(pc.utf8_lower(text), pa.array(MISSING, text.type))
    )
    try:
        plain = pc.cast(pc.if_else(is_missing, pa.scalar(None, text.type), text), pa.float64())
    except pa.ArrowInvalid:
        return _parse_odd_texts(text, to_mask(is_missing), unit)
    values = _scale(_to_floats(plain), factor)
    return Numbers(values=values, is_missing=to_mask(is_missing), is_wrong=none, is_mixed=none)


def _parse_odd_texts(text: pa.Array, is_missing: np.ndarray, unit: AngleUnit | None) -> Numbers:
    """Return the numbers of texts that are not all decimal."""
    # The minus sign of typesetters.
    text = pc.replace_substring(text, "\u2212", "-")
    has_comma = pc.match_substring_regex(text, DECIMAL_COMMA)
    text = pc.if_else(has_comma, pc.replace_substring(text, ",", "."), text)
    is_decimal = to_mask(pc.match_substring_regex(text, NUMBER)) & ~is_missing
    decimal = pc.if_else(pa.array(is_decimal), text, pa.scalar(None, text.type))
    values = _to_floats(pc.cast(decimal, pa.float64()))
    is_mixed = np.zeros(len(text), bool)
    if unit is None:
        return Numbers(
            values=values,
            is_missing=is_missing,
            is_wrong=~is_decimal & ~is_missing,
            is_mixed=is_mixed,
        )
    values = _scale(values, unit.degrees)
    odd = np.flatnonzero(~is_decimal & ~is_missing)
    angles, is_default = _parse_sexagesimal(text.take(pa.array(odd)), unit)
    values = values.copy()
    values[odd] = angles
    if is_default.any() and not unit.is_stated and unit.sexagesimal_degrees != unit.degrees:
        is_mixed = is_decimal
    is_wrong = np.zeros(len(text), bool)
    is_wrong[odd] = np.isnan(angles)
    return Numbers(values=values, is_missing=is_missing, is_wrong=is_wrong, is_mixed=is_mixed)


def _parse_sexagesimal(text: pa.Array, unit: AngleUnit) -> tuple[np.ndarray, np.ndarray]:
    """Return sexagesimal values in degrees, NaN for other texts, and which have no mark of unit."""
    parts = pc.extract_regex(text, SEXAGESIMAL)
    is_found = to_mask(pc.is_valid(parts))

    def number(name: str) -> np.ndarray:
        digits = pc.struct_field(parts, name)
        return _to_floats(pc.cast(pc.if_else(pc.equal(digits, ""), "0", digits), pa.float64()))

    mark = pc.struct_field(parts, "mark")
    hours = to_mask(pc.is_in(mark, pa.array(list(_HOURS), mark.type)))
    degrees = to_mask(pc.is_in(mark, pa.array(list(_DEGREES), mark.type)))
    by_unit = unit.sexagesimal_degrees
    default = by_unit if by_unit in (1.0, HOURS_DEG) else np.nan
    factor = np.where(hours, HOURS_DEG, np.where(degrees, 1.0, default))
    minutes, seconds = number("minutes"), np.fmax(number("seconds"), number("rest"))
    sign = np.where(to_mask(pc.equal(pc.struct_field(parts, "sign"), "-")), -1.0, 1.0)
    # Fractions of minutes before seconds are no number. 60.0 s is one that was rounded.
    is_right = (minutes < 60) & (seconds <= 60) & ((minutes % 1 == 0) | (seconds == 0))
    value = sign * (number("whole") + minutes / 60 + seconds / 3600) * factor
    return np.where(is_found & is_right, value, np.nan), is_found & ~hours & ~degrees


def as_text(column: pa.Array) -> pa.Array:
    """Return a column of texts or bytes as texts.

    Parameters
    ----------
    column : (n,) pyarrow array
        Texts or bytes in UTF-8.

    Returns
    -------
    (n,) pyarrow large_string array

    Raises
    ------
    CatalogueError
        If it holds something else.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.large_string())
    if pa.types.is_fixed_size_binary(kind):
        column = pc.cast(column, pa.binary())
    is_text = any(
        test(column.type)
        for test in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        )
    )
    if not is_text:
        raise CatalogueError(f"numbers or texts are needed, got {kind}")
    try:
        return pc.cast(column, pa.large_string())
    except pa.ArrowInvalid as error:
        raise CatalogueError("some of its bytes are not UTF-8") from error


def to_mask(condition: pa.Array) -> np.ndarray:
    """Return a condition as an array of numpy's, false where it is null.

    Parameters
    ----------
    condition : (n,) pyarrow array of bool
        With or without nulls.

    Returns
    -------
    (n,) bool array
    """
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _is_numeric(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _to_floats(column: pa.Array) -> np.ndarray:
    """Return numbers as floats, NaN for null."""
    return pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _scale(values: np.ndarray, factor: float) -> np.ndarray:
    # A multiplication would make a copy.
    return values if factor == 1.0 else values * factor
