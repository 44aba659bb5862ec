"""Queries of the simulated TAP service: what is answered, and what is refused as others do."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from astropy.io.votable import parse

from spxdask.simulate.tap import (
    QueryError,
    QueryResult,
    SpherexTables,
    error_votable,
    footprint_text,
    result_votable,
)

NEAR = footprint_text([(9, -1), (11, -1), (11, 1), (9, 1)])
ACROSS_ZERO = footprint_text([(359, -1), (1, -1), (1, 1), (359, 1)])
POLE = footprint_text([(0, 88), (90, 88), (180, 88), (270, 88)])


def plane(planeid, poly, detector=1):
    did = f"ivo://irsa.ipac/spherex_qr2?2025W51_1A_{planeid:04d}_2/D{detector}"
    band = f"SPHEREx-D{detector}"
    return (planeid, planeid, did, band, 1e-6, 2e-6, 61000.0 + planeid, 61000.5 + planeid, poly)


@pytest.fixture
def tables():
    tables = SpherexTables(
        observations=[(i, f"2025W51_1A_{i:04d}_2", "spherex_qr2") for i in (1, 2, 3)],
        planes=[plane(1, NEAR), plane(2, ACROSS_ZERO, 2), plane(3, POLE, 3)],
        artifacts=[(1, "a.fits", 10), (2, "b.fits", 20), (2, "c.fits", None)],
    )
    yield tables
    tables.close()


def rows(tables, query, maxrec=1000):
    return tables.query(query, maxrec=maxrec).rows


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("INTERSECTS(poly, CIRCLE('ICRS', 12.0, 0.0, 0.9)) = 1", []),
        ("INTERSECTS(poly, CIRCLE('ICRS', 12.0, 0.0, 1.1)) = 1", [1]),
        ("INTERSECTS(CIRCLE('ICRS', 12.0, 0.0, 1.1), poly) = 0", [2, 3]),
        ("1 = INTERSECTS(poly, CIRCLE('ICRS', 360.5, 0.0, 0.1))", [2]),
        ("INTERSECTS(poly, CIRCLE('ICRS', -0.5, 0.0, 0.1)) = 1", [2]),
        ("INTERSECTS(poly, CIRCLE('ICRS', 123.0, 90.0, 0.1)) = 1", [3]),
        ("CONTAINS(CIRCLE('ICRS', 10.0, 0.0, 0.9), poly) = 1", [1]),
        ("CONTAINS(CIRCLE('ICRS', 10.0, 0.0, 1.1), poly) = 1", []),
        ("CONTAINS(poly, CIRCLE('ICRS', 10.0, 0.0, 1.5)) = 1", [1]),
        ("CONTAINS(POINT('ICRS', 9.5, 0.5), poly) = 1", [1]),
        ("contains(point('icrs', 9.5, -1.5), poly) = 1", []),
        ("CONTAINS(poly, POLYGON('ICRS', 8, -2, 8, 2, 12, 2, 12, -2)) = 1", [1]),
        ("INTERSECTS(poly, POLYGON('ICRS', -9, 0, 9.5, 0.5, 9.5, -0.5)) = 1", [1, 2]),
    ],
)
def test_footprints(tables, condition, expected):
    found = rows(tables, f"SELECT planeid FROM spherex.plane WHERE {condition} ORDER BY planeid")
    assert [planeid for (planeid,) in found] == expected


def test_distance(tables):
    select = "SELECT DISTANCE(POINT('ICRS', 350.0, 0.0), POINT('ICRS', 10.0, 0.0)) AS d"
    result = tables.query(f"{select} FROM spherex.plane", maxrec=1)
    assert result.names == ("d",)
    assert result.rows[0][0] == pytest.approx(20.0, abs=1e-12)


def test_names_and_datatypes(tables):
    result = tables.query(
        "SELECT p.planeid, p.time_bounds_lower AS mjd, a.uri, a.contentlength, COUNT(*) AS n "
        "FROM spherex.plane AS p LEFT OUTER JOIN spherex.artifact AS a ON a.planeid = p.planeid "
        "WHERE p.planeid = 3 GROUP BY p.planeid",
        maxrec=10,
    )
    assert result.names == ("planeid", "mjd", "uri", "contentlength", "n")
    assert result.datatypes == ("long", "double", "char", "long", "long")
    assert result.rows == [(3, 61003.0, None, None, 1)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT TOP 2 planeid FROM spherex.plane ORDER BY planeid DESC", [(3,), (2,)]),
        ("select distinct top 1 detector.planeid from spherex.plane as detector", [(1,)]),
        ("SELECT planeid -- a comment; LIMIT\nFROM spherex.plane WHERE planeid < 2", [(1,)]),
        ("SELECT uri FROM spherex.artifact WHERE uri IN ('it''s; LIMIT', 'a.fits')", [("a.fits",)]),
        ('SELECT uri AS "LIMIT" FROM spherex.artifact WHERE "uri" = \'a.fits\'', [("a.fits",)]),
        ("SELECT obsid FROM spherex.observation WHERE observationid LIKE '%1A_0002%'", [(2,)]),
        ("SELECT planeid FROM spherex.plane WHERE time_bounds_lower > 6.10025e4", [(3,)]),
        (
            "SELECT uri FROM spherex.artifact WHERE planeid IN "
            "(SELECT planeid FROM spherex.plane WHERE energy_bandpassname = 'SPHEREx-D1')",
            [("a.fits",)],
        ),
    ],
)
def test_accepted(tables, query, expected):
    assert rows(tables, query) == expected


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT planeid FROM spherex.plane;", "semicolon"),
        ("SELECT planeid FROM spherex.plane; DROP TABLE spherex.plane", "semicolon"),
        ("", "one SELECT"),
        ("DELETE FROM spherex.plane", "one SELECT"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", "one SELECT"),
        ("SELECT 1 FROM spherex.plane UNION SELECT 2 FROM spherex.plane", "one SELECT"),
        ("SELECT planeid FROM spherex.plane LIMIT 5", "TOP"),
        ("SELECT TOP planeid FROM spherex.plane", "whole number"),
        ("SELECT planeid FROM spherex.plane WHERE planeid == 1", "=="),
        ("SELECT planeid FROM spherex.plane WHERE planeid = ?", "Unexpected character"),
        ("SELECT planeid FROM spherex.plane WHERE uri = 'open", "Unexpected character"),
        ("SELECT planeid FROM plane", r"spherex\.plane"),
        ("SELECT name FROM spherex.sqlite_master", "prohibited"),
        ("SELECT x FROM spherex.missing", "no such table"),
        ("SELECT missing FROM spherex.plane", "no such column"),
        ('SELECT planeid FROM spherex.plane WHERE uri = "missing"', "no such column"),
        ("SELECT load_extension('x') FROM spherex.plane", "not authorized"),
        ("SELECT 1 FROM spherex.plane AS p LEFT JOIN spherex.artifact AS a ON 1 = 1", "LEFT OUTER"),
        ("SELECT 1 FROM spherex.plane WHERE INTERSECTS(poly, poly)", "compared with 1 or 0"),
        ("SELECT 1 FROM spherex.plane WHERE CONTAINS(poly, poly) = 2", "compared with 1 or 0"),
        ("SELECT 1 FROM spherex.plane WHERE CONTAINS(poly, poly) > 0", "compared with 1 or 0"),
        ("SELECT 1 FROM spherex.plane WHERE CONTAINS(poly, poly", "not closed"),
        ("SELECT 1 FROM spherex.plane WHERE CONTAINS(poly) = 1", "number of arguments"),
        ("SELECT 1 FROM spherex.plane WHERE CONTAINS(poly, 'x') = 1", "not a region"),
        (
            "SELECT 1 FROM spherex.plane WHERE INTERSECTS(poly, CIRCLE('FK5', 1, 1, 1)) = 1",
            "'ICRS'",
        ),
        (
            "SELECT 1 FROM spherex.plane WHERE INTERSECTS(poly, CIRCLE('ICRS', 1, 91, 1)) = 1",
            "declination",
        ),
        (
            "SELECT 1 FROM spherex.plane WHERE CONTAINS(poly, POLYGON('ICRS', 1, 1, 2)) = 1",
            "each corner",
        ),
        ("SELECT DISTANCE(poly, poly) FROM spherex.plane", "two POINTs"),
    ],
)
def test_refused(tables, query, reason):
    with pytest.raises(QueryError, match=reason):
        tables.query(query, maxrec=10)
    assert rows(tables, "SELECT COUNT(*) FROM spherex.plane") == [(3,)]


@pytest.mark.parametrize(
    ("maxrec", "n_rows", "overflow"), [(0, 0, True), (2, 2, True), (3, 3, False), (4, 3, False)]
)
def test_maxrec(tables, maxrec, n_rows, overflow):
    result = tables.query("SELECT planeid FROM spherex.plane", maxrec=maxrec)
    assert (len(result.rows), result.overflow) == (n_rows, overflow)


def test_top_is_no_overflow(tables):
    assert not tables.query("SELECT TOP 2 planeid FROM spherex.plane", maxrec=2).overflow


def test_a_footprint_that_is_no_polygon_is_refused():
    bow_tie = footprint_text([(0, 0), (1, 1), (1, 0), (0, 1)])
    with pytest.raises(ValueError, match="convex"):
        SpherexTables(observations=[], planes=[plane(1, bow_tie)], artifacts=[])


def test_queries_from_several_threads(tables):
    query = "SELECT planeid FROM spherex.plane WHERE INTERSECTS(poly, {}) = 1"
    circles = ["CIRCLE('ICRS', 10, 0, 0.5)", "CIRCLE('ICRS', 0, 0, 0.5)"] * 20
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda circle: rows(tables, query.format(circle)), circles))
    assert found == [[(1,)], [(2,)]] * 20


def test_closing_interrupts_a_query(tables):
    # 3^24 rows to count.
    joins = ", ".join(f"spherex.plane AS p{i}" for i in range(24))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tables.query, f"SELECT COUNT(*) FROM {joins}", maxrec=1)
        while not tables._lock.locked():
            assert not running.done()
        tables.close()
        with pytest.raises(QueryError, match=r"interrupted"):
            running.result(timeout=10)


def test_votable_keeps_every_value():
    result = QueryResult(
        names=("obsid", "mjd", "uri"),
        datatypes=("long", "double", "char"),
        rows=[(2**53 + 1, 61000.1 + 1e-10, "a<&>'\".fits"), (None, None, None)],
        overflow=True,
    )
    resource = parse(io.BytesIO(result_votable(result))).resources[0]
    table = resource.tables[0].to_table(use_names_over_ids=True)
    assert table.colnames == ["obsid", "mjd", "uri"]
    assert tuple(table[0]) == result.rows[0]
    assert table["obsid"].mask.tolist() == [False, True]
    assert np.isnan(np.ma.filled(table["mjd"][1], np.nan))
    assert table["uri"][1] == ""
    assert [(info.name, info.value) for info in resource.infos] == [
        ("QUERY_STATUS", "OK"),
        ("QUERY_STATUS", "OVERFLOW"),
    ]


def test_error_votable_tells_the_reason():
    (info,) = parse(io.BytesIO(error_votable("LIMIT is < 5."))).resources[0].infos
    assert (info.name, info.value, info.content) == ("QUERY_STATUS", "ERROR", "LIMIT is < 5.")


@pytest.mark.slow
def test_many_planes_are_searched_quickly():
    n_planes = 20_000
    random = np.random.default_rng(3)
    ra = random.uniform(0, 360, n_planes)
    dec = np.degrees(np.arcsin(random.uniform(-0.9, 0.9, n_planes)))
    width = 1.75 / np.cos(np.radians(dec))
    planes = [
        plane(i, footprint_text([(r - w, d - 1.75), (r + w, d - 1.75), (r, d + 1.75)]))
        for i, (r, d, w) in enumerate(zip(ra, dec, width, strict=True))
    ]
    tables = SpherexTables(observations=[], planes=planes, artifacts=[])
    begun = time.process_time()
    n_found = len(
        rows(
            tables,
            "SELECT planeid FROM spherex.plane "
            "WHERE INTERSECTS(poly, CIRCLE('ICRS', 30.0, 20.0, 1.0)) = 1",
        )
    )
    assert time.process_time() - begun < 1
    assert 1 < n_found < 100
    tables.close()
