"""The queries of a simulated TAP service: ADQL for the three SPHEREx tables in memory.

sqlite runs the queries. Before, they are restricted to what the stricter TAP servers accept, so
that a query that works here works everywhere.
"""

from __future__ import annotations

import io
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from astropy.io.votable.tree import Field, Info, Resource, TableElement, VOTableFile

from spxdask.simulate import sphere

__all__ = [
    "QueryError",
    "QueryResult",
    "SpherexTables",
    "error_votable",
    "footprint_text",
    "result_votable",
]

TABLE_COLUMNS = {
    "observation": {"obsid": "long", "observationid": "char", "collection": "char"},
    "plane": {
        "planeid": "long",
        "obsid": "long",
        "obs_publisher_did": "char",
        "energy_bandpassname": "char",
        "energy_bounds_lower": "double",
        "energy_bounds_upper": "double",
        "time_bounds_lower": "double",
        "time_bounds_upper": "double",
        "poly": "char",
    },
    "artifact": {"planeid": "long", "uri": "char", "contentlength": "long"},
}
"""Columns of each table of the schema `spherex`, with their VOTable datatypes."""

_SQLITE_TYPES = {"long": "INTEGER", "double": "REAL", "char": "TEXT"}
_COLUMN_DATATYPES = {name: kind for cols in TABLE_COLUMNS.values() for name, kind in cols.items()}

_PREDICATES = {"CONTAINS", "INTERSECTS"}
_GEOMETRIES = {"CIRCLE", "POINT", "POLYGON"}
_PLAIN_FUNCTIONS = {
    "ABS", "AVG", "CEILING", "COUNT", "FLOOR", "LIKE", "LOWER", "MAX", "MIN", "POWER", "ROUND",
    "SQRT", "SUM", "UPPER",
}  # fmt: skip

_TOKEN = re.compile(
    r"""
    (?P<blank>\s+|--[^\n]*)
    | (?P<text>'(?:[^']|'')*')
    | (?P<delimited>"[^"\]]+")
    | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>[A-Za-z]\w*)
    | (?P<symbol><>|!=|<=|>=|==|\|\||[-+*/=<>(),.;])
    """,
    re.VERBOSE | re.ASCII,
)


class QueryError(ValueError):
    """A query that the service rejects; the message gives the reason in one sentence."""


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """The answer to one query.

    Attributes
    ----------
    names : tuple of str
        Column names, as selected.
    datatypes : tuple of str
        VOTable datatype of each column: "long", "double" or "char".
    rows : list of tuple
        Values in the order of `names`; None is null.
    overflow : bool
        Whether `maxrec` excluded rows.
    """

    names: tuple[str, ...]
    datatypes: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    overflow: bool


class SpherexTables:
    """The tables spherex.observation, spherex.plane and spherex.artifact, queried in ADQL.

    Several threads may use it; queries run one after the other.

    Parameters
    ----------
    observations, planes, artifacts : iterable of sequence
        Rows, with the columns in the order of `TABLE_COLUMNS`; `poly` in the form of
        `footprint_text`.

    Raises
    ------
    ValueError
        If a footprint is not a convex polygon.
    """

    def __init__(
        self,
        *,
        observations: Iterable[Sequence[Any]],
        planes: Iterable[Sequence[Any]],
        artifacts: Iterable[Sequence[Any]],
    ) -> None:
        rows = {"observation": observations, "plane": list(planes), "artifact": artifacts}
        # Cached, so that each footprint, and each constant of a query, is parsed only once.
        self._shape = lru_cache(maxsize=None)(_parse_region)
        for plane in rows["plane"]:
            self._shape(plane[-1])
        self._lock = threading.Lock()
        self._function_error: Exception | None = None
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._db.execute("ATTACH ':memory:' AS spherex")
        for table, columns in TABLE_COLUMNS.items():
            declared = ", ".join(f"{name} {_SQLITE_TYPES[kind]}" for name, kind in columns.items())
            self._db.execute(f"CREATE TABLE spherex.{table} ({declared})")
            self._db.execute("BEGIN")
            marks = ", ".join("?" * len(columns))
            self._db.executemany(f"INSERT INTO spherex.{table} VALUES ({marks})", rows[table])
            self._db.execute("COMMIT")
        for table, key in (("plane", "planeid"), ("artifact", "planeid"), ("observation", "obsid")):
            self._db.execute(f"CREATE INDEX spherex.{table}_{key} ON {table} ({key})")
        self._add_functions()
        self._db.set_authorizer(_authorize)
        self._closing = False
        # sqlite calls this every 10,000 of its instructions, and interrupts the query if true.
        self._db.set_progress_handler(lambda: self._closing, 10_000)

    def query(self, adql: str, *, maxrec: int) -> QueryResult:
        """Answer one query.

        Parameters
        ----------
        adql : str
            One SELECT statement in ADQL.
        maxrec : int
            Largest number of rows to return. A longer answer is truncated and marked as an
            overflow.

        Returns
        -------
        QueryResult
            The answer.

        Raises
        ------
        QueryError
            If the query is malformed, names something that does not exist, or does more than
            read the tables.
        """
        statement = _to_sqlite(adql)
        with self._lock:
            self._function_error = None
            try:
                cursor = self._db.execute(statement)
                rows = cursor.fetchmany(maxrec + 1)
                names = tuple(column[0] for column in cursor.description)
                cursor.close()
            except sqlite3.Error as error:
                # sqlite does not report the error of a user-defined function.
                reason = self._function_error or error
                raise QueryError(f"The query failed: {reason}.") from error
        return QueryResult(
            names=names,
            datatypes=tuple(
                _datatype(name, [row[i] for row in rows]) for i, name in enumerate(names)
            ),
            rows=rows[:maxrec],
            overflow=len(rows) > maxrec,
        )

    def close(self) -> None:
        """Interrupt a running query and free the tables."""
        self._closing = True
        with self._lock:
            self._db.close()

    def _add_functions(self) -> None:
        shape = self._shape

        def distance(first: str, second: str) -> float:
            if not (first.startswith("POINT") and second.startswith("POINT")):
                raise ValueError("DISTANCE is measured between two POINTs")
            a, b = shape(first), shape(second)
            assert isinstance(a, sphere.Circle)
            assert isinstance(b, sphere.Circle)
            return sphere.separation_deg(a.ra_deg, a.dec_deg, b.ra_deg, b.dec_deg)

        functions: list[tuple[str, int, Callable[..., Any]]] = [
            ("POINT", 3, _point),
            ("CIRCLE", 4, _circle),
            ("POLYGON", -1, _polygon),
            ("CONTAINS", 2, lambda inner, outer: sphere.contains(shape(outer), shape(inner))),
            ("INTERSECTS", 2, lambda a, b: sphere.intersects(shape(a), shape(b))),
            ("DISTANCE", 2, distance),
        ]
        for name, n_arguments, function in functions:
            self._db.create_function(
                name, n_arguments, self._record_error(function), deterministic=True
            )

    def _record_error(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that also records its error, and is null if an argument is."""

        def call(*arguments: Any) -> Any:
            if None in arguments:
                return None
            try:
                return function(*arguments)
            except Exception as error:
                self._function_error = error
                raise

        return call


def footprint_text(polygon_deg: Iterable[tuple[float, float]]) -> str:
    """Write a footprint in the form of the archive's `poly` column.

    Parameters
    ----------
    polygon_deg : iterable of (float, float)
        ICRS right ascension and declination of the corners, degrees.

    Returns
    -------
    str
        Like ``POLYGON ICRS 10.0 20.0 11.0 20.0 11.0 21.0``.
    """
    return _region("POLYGON", *(value for corner in polygon_deg for value in corner))


def result_votable(result: QueryResult) -> bytes:
    """Write an answer as a VOTable 1.4, with DALI's trailing OVERFLOW mark if it is truncated.

    Parameters
    ----------
    result : QueryResult
        The answer.

    Returns
    -------
    bytes
        XML. As at IRSA, the ID of a column is "col_0", "col_1", ...; its name is in `name`.
    """
    votable, resource = _results_document("OK")
    table = TableElement(votable)
    resource.tables.append(table)
    for i, (name, datatype) in enumerate(zip(result.names, result.datatypes, strict=True)):
        size = {"arraysize": "*"} if datatype == "char" else {}
        table.fields.append(Field(votable, ID=f"col_{i}", name=name, datatype=datatype, **size))
    table.create_arrays(len(result.rows))
    for i, datatype in enumerate(result.datatypes):
        values = [row[i] for row in result.rows]
        fill: Any = "" if datatype == "char" else 0
        table.array[f"col_{i}"] = np.ma.array(
            [fill if value is None else value for value in values],
            mask=[value is None for value in values],
            dtype=table.array.dtype[i],
        )
    content = _to_bytes(votable)
    if result.overflow:
        # astropy writes a resource's INFO before its table, but the mark must follow the rows.
        head, end_tag, tail = content.rpartition(b"</RESOURCE>")
        content = head + b'<INFO name="QUERY_STATUS" value="OVERFLOW"/>\n' + end_tag + tail
    return content


def error_votable(message: str) -> bytes:
    """Write a VOTable that reports a failed query.

    Parameters
    ----------
    message : str
        Why the query failed.

    Returns
    -------
    bytes
        XML.
    """
    votable, resource = _results_document("ERROR")
    resource.infos[0].content = message
    return _to_bytes(votable)


def _results_document(status: str) -> tuple[VOTableFile, Resource]:
    votable = VOTableFile(version="1.4")
    resource = Resource(type="results")
    resource.infos.append(Info(name="QUERY_STATUS", value=status))
    votable.resources.append(resource)
    return votable, resource


def _to_bytes(votable: VOTableFile) -> bytes:
    buffer = io.BytesIO()
    # astropy's writer in C writes a byte beyond its buffer where a row fills that exactly, which
    # brings down the process.
    votable.to_xml(buffer, _debug_python_based_parser=True)
    return buffer.getvalue()


def _datatype(name: str, values: list[Any]) -> str:
    """Return the VOTable datatype of a column by its values, or by its name if all are null."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return _COLUMN_DATATYPES.get(name.lower(), "char")
    if str in kinds:
        return "char"
    return "double" if float in kinds else "long"


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    allowed = {
        sqlite3.SQLITE_SELECT: True,
        sqlite3.SQLITE_READ: first in TABLE_COLUMNS,
        sqlite3.SQLITE_FUNCTION: str(second).upper()
        in _PREDICATES | _GEOMETRIES | _PLAIN_FUNCTIONS | {"DISTANCE"},
    }
    return sqlite3.SQLITE_OK if allowed.get(action, False) else sqlite3.SQLITE_DENY


def _to_sqlite(adql: str) -> str:
    """Reject what a strict ADQL parser rejects, and return the query in sqlite's dialect."""
    tokens = _tokens(adql)
    words = [token.upper() for token in tokens] + ["", ""]
    if words[0] != "SELECT":
        raise QueryError("A query must be one SELECT statement.")
    for i, word in enumerate(words[:-2]):
        before, after = words[i - 1] if i else "", words[i + 1]
        if word == ";":
            raise QueryError("A query must not contain a semicolon, not even at its end.")
        if word == "==":
            raise QueryError("Equality is written with one '=', not '=='.")
        if word == "LIMIT":
            raise QueryError("LIMIT is not ADQL: use SELECT TOP n.")
        if word in {"UNION", "EXCEPT", "INTERSECT"}:
            raise QueryError(f"A query must be one SELECT statement, without {word}.")
        if word in {"LEFT", "RIGHT", "FULL"} and after != "OUTER":
            raise QueryError(f"Write {word} OUTER JOIN in full.")
        if before in {"FROM", "JOIN"} and word != "(" and (word, after) != ("SPHEREX", "."):
            raise QueryError(f"Table names need their schema: spherex.{tokens[i].lower()}.")
        if word in _PREDICATES:
            end = _closing_parenthesis(words, i + 1)
            compared_after = words[end + 1] == "=" and words[end + 2] in {"0", "1"}
            compared_before = before == "=" and words[i - 2] in {"0", "1"}
            if not (compared_after or compared_before):
                raise QueryError(f"{word}(...) must be compared with 1 or 0, like {word}(...) = 1.")
    top_at = 2 if words[1] in {"DISTINCT", "ALL"} else 1
    if words[top_at] == "TOP":
        count = words[top_at + 1]
        if not count.isdecimal():
            raise QueryError("TOP must be followed by a whole number of rows.")
        tokens = [*tokens[:top_at], *tokens[top_at + 2 :], "LIMIT", count]
    return " ".join(tokens)


def _tokens(adql: str) -> list[str]:
    tokens = []
    position = 0
    while position < len(adql):
        match = _TOKEN.match(adql, position)
        if match is None:
            raise QueryError(f"Unexpected character {adql[position]!r} at {position} in the query.")
        position = match.end()
        if match.lastgroup == "delimited":
            # sqlite treats an unknown name in double quotes as a string, but not one in brackets.
            tokens.append(f"[{match[0][1:-1]}]")
        elif match.lastgroup != "blank":
            tokens.append(match[0])
    return tokens


def _closing_parenthesis(words: list[str], start: int) -> int:
    depth = 0
    for i in range(start, len(words)):
        depth += (words[i] == "(") - (words[i] == ")")
        if depth == 0:
            return i
    raise QueryError("A parenthesis is not closed.")


def _region(kind: str, *numbers: float) -> str:
    return " ".join([kind, "ICRS", *(repr(float(number)) for number in numbers)])


def _check_system(system: Any) -> None:
    if str(system).upper() != "ICRS":
        raise ValueError(f"the coordinate system must be 'ICRS', got {system!r}")


def _point(system: str, ra_deg: float, dec_deg: float) -> str:
    _check_system(system)
    return _region("POINT", ra_deg, dec_deg)


def _circle(system: str, ra_deg: float, dec_deg: float, radius_deg: float) -> str:
    _check_system(system)
    return _region("CIRCLE", ra_deg, dec_deg, radius_deg)


def _polygon(system: str, *coordinates_deg: float) -> str:
    _check_system(system)
    if len(coordinates_deg) % 2:
        raise ValueError("POLYGON needs a right ascension and a declination for each corner")
    return _region("POLYGON", *coordinates_deg)


def _parse_region(region: str) -> sphere.Circle | sphere.ConvexPolygon:
    kind, _, coordinates = str(region).partition(" ICRS ")
    if kind not in _GEOMETRIES:
        raise ValueError(f"{region!r} is not a region")
    values = [float(value) for value in coordinates.split()]
    if kind == "POLYGON":
        return sphere.ConvexPolygon(list(zip(values[::2], values[1::2], strict=True)))
    return sphere.Circle(*values)
