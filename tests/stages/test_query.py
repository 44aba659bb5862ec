"""The query stage against the simulated archive: what is asked for, and what is selected."""

from __future__ import annotations

import asyncio
import itertools
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from archived import (
    CONTAINS,
    CUTS,
    ELSEWHERE,
    HALF_EXPOSURE_DAYS,
    archived_frame,
    archived_uri,
)
from astropy.table import MaskedColumn, Table
from hypothesis import given
from hypothesis import strategies as st

from spxdask.archive.retry import RetryPolicy
from spxdask.archive.tap import TapOptions, run_adql
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, InputError, TruncatedAnswerError
from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import pack_footprint
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive
from spxdask.simulate.tap import QueryError
from spxdask.stages import query

TAP_OPTIONS = TapOptions(retry=RetryPolicy(max_retries=0))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "frame.fits"
    path.write_bytes(b"x" * 5000)
    return path


@pytest.fixture
def frames(path):
    return [archived_frame(path, slew, detector) for slew in (1, 2) for detector in (3, 4)]


def config(archive=None, **options):
    urls = {"tap_url": archive.tap_url, "archive_url": archive.url} if archive else {}
    field = {"center_ra": 10.0, "center_dec": 0.0, "radius": 0.5, "catalog_path": "x.csv"}
    return BatchConfig(**{"max_retries": 2} | field | urls | options)


def found(archive, **options):
    asked = config(archive, **options)
    observations = query.find_observations(asked)
    query.check_count(observations, asked)
    return observations


# What is asked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bands": ["D1", "D6"], "mjd_range": (61000, 61000.00065)},
        {"bands": ["D3"], "center_ra": 1e-5, "center_dec": -1.5e-7, "radius": 1e-9},
        {"center_ra": 360.0, "center_dec": -90.0, "radius": 90.0, "mjd_range": (1e-6, 1e6)},
        {"coverage_mode": "full", "center_ra": 270.123456789012, "center_dec": 66.56},
    ],
)
@pytest.mark.slow
def test_another_parser_takes_the_adql(options):
    queryparser = pytest.importorskip("queryparser.adql")
    text = query.build_adql(config(**options))
    assert "spherex.artifact" in queryparser.ADQLQueryTranslator(text).to_postgresql()
    assert ";" not in text


def test_the_other_parser_is_strict():
    queryparser = pytest.importorskip("queryparser.adql")
    errors = pytest.importorskip("queryparser.exceptions")
    text = query.build_adql(config(radius=0.25))
    for wrong in (text.replace("0.25", "25e-2"), text.replace(" = 1", "", 1) + " ="):
        with pytest.raises(errors.QuerySyntaxError):
            queryparser.ADQLQueryTranslator(wrong)


@given(st.floats(0, 360), st.floats(-90, 90), st.floats(0, 90, exclude_min=True))
def test_the_place_is_asked_for_exactly(ra, dec, radius):
    text = query.build_adql(config(center_ra=ra, center_dec=dec, radius=radius))
    numbers = re.search(r"CIRCLE\('ICRS', (.*?)\)", text)[1].split(", ")
    assert [float(n) for n in numbers] == [ra, dec, radius]
    assert all(re.fullmatch(r"-?\d+\.\d+", n) for n in numbers)


@pytest.mark.parametrize(("mode", "slews"), [("any", [1, 2]), ("full", [1])])
def test_coverage(path, mode, slews):
    sky = [
        archived_frame(path, n, polygon=p)
        for n, p in enumerate((CONTAINS, CUTS, ELSEWHERE), start=1)
    ]
    with SimulatedArchive(sky) as archive:
        assert [o.uri for o in found(archive, coverage_mode=mode)] == [
            archived_uri(n) for n in slews
        ]


@pytest.mark.parametrize(
    ("bands", "kept"), [(None, "123456"), (["D3"], "3"), (["D6", "D1"], "16"), (["D2"], "2")]
)
def test_bands_are_left_out_in_the_query(path, bands, kept):
    sky = [archived_frame(path, 1, detector) for detector in range(1, 7)]
    with SimulatedArchive(sky) as archive:
        observations = found(archive, bands=bands)
        asked = run_adql(archive.tap_url, query.build_adql(config(bands=bands)), TAP_OPTIONS)
    assert [o.band for o in observations] == [f"D{detector}" for detector in kept]
    assert len(asked) == len(kept)


@pytest.mark.parametrize(
    ("first", "last", "slews"),
    [
        (61050, 61050, [2]),
        (61049.5, 61050, [1, 2]),
        (61050, 61050.5, [2, 3]),
        (61049.5 + 1e-6, 61050.5 - 1e-6, [2]),
        (61049.5 - 2 * HALF_EXPOSURE_DAYS, 61049.5 - 1e-6, []),
        (0, 1e6, [1, 2, 3]),
    ],
)
def test_times_are_of_mid_exposure_and_both_ends_count(path, first, last, slews):
    sky = []
    for slew, mjd in enumerate((61049.5, 61050.0, 61050.5), start=1):
        # Binary fractions, so that the middle is exact.
        times = {"mjd_begin": mjd - 2**-10, "mjd_end": mjd + 2**-10}
        sky.append(ArchivedFrame(**vars(archived_frame(path, slew)) | times))
    with SimulatedArchive(sky) as archive:
        observations = found(archive, mjd_range=(first, last))
    assert [o.uri for o in observations] == [archived_uri(n) for n in slews]


def test_what_an_observation_says(path):
    with SimulatedArchive([archived_frame(path, 7, 4, mjd=61050.25)]) as archive:
        [observation] = found(archive)
        assert observation.download_url == f"{archive.url}/{archived_uri(7, 4)}"
    assert (observation.obs_id, observation.band) == ("2025W51_1A_0007_2", "D4")
    assert observation.mjd == pytest.approx(61050.25, abs=1e-9)
    assert observation.wavelength_um == pytest.approx(2.02)
    assert observation.uri == archived_uri(7, 4)
    assert observation.size_bytes == 5000


def test_nothing_there_is_no_error(path):
    with SimulatedArchive([archived_frame(path, polygon=ELSEWHERE)]) as archive:
        assert found(archive) == []


# What is kept


OLD, NEW, QR3 = (
    archived_uri(),
    archived_uri(version="l2b-v22-2026-010"),
    archived_uri(release="qr3", version="l2b-v30-2026-100"),
)
RERUN = archived_uri(release="qr3", version="l2b_retry-v30-2026-100")
DR1 = archived_uri(release="dr1", version="l2b-v31-2026-310")


@pytest.mark.parametrize(
    ("release", "kept"),
    [
        ("latest", [DR1]),
        ("qr2", [NEW]),
        ("qr3", [RERUN]),
        ("qr2,qr3", [RERUN]),
        ("dr1", [DR1]),
        ("all", sorted([OLD, NEW, QR3, RERUN, DR1])),
    ],
)
@pytest.mark.parametrize("turn", range(6))
def test_releases_and_versions(path, release, kept, turn):
    sky = [
        archived_frame(path, version="l2b-v22-2026-010"),
        archived_frame(path),
        archived_frame(path, deep="_deep"),
        archived_frame(path, release="qr3", version="l2b-v30-2026-100"),
        archived_frame(path, release="qr3", version="l2b_retry-v30-2026-100"),
        archived_frame(path, release="dr1", version="l2b-v31-2026-310"),
    ]
    with SimulatedArchive(sky[turn:] + sky[:turn]) as archive:
        observations = found(archive, release=release)
    assert sorted(o.uri for o in observations) == kept


def test_detectors_of_an_exposure_are_not_versions_of_it(frames):
    with SimulatedArchive(frames) as archive:
        assert {(o.obs_id[-6:-2], o.band) for o in found(archive)} == {
            ("0001", "D3"), ("0001", "D4"), ("0002", "D3"), ("0002", "D4"),
        }  # fmt: skip


def test_a_release_that_is_absent_is_a_warning(path, caplog):
    with SimulatedArchive([archived_frame(path)]) as archive:
        assert found(archive, release="dr1") == []
        assert "no frame of release dr1 covers the field; there are frames of qr2" in caplog.text


def test_only_science_files_count(path, caplog):
    other = [
        archived_uri().replace("level2_", "cutout_"),
        archived_uri().replace(".fits", ".fits.gz"),
        "ibe/data/spherex/qr2/level2/notes.txt",
        "../../level2_passwd",
    ]
    science = archived_frame(path)
    with SimulatedArchive(
        [science, archived_frame(path, 2, deep="_cal")],
        extra_artifacts=[(science, u, path) for u in other],
    ) as archive:
        assert [o.uri for o in found(archive)] == [archived_uri()]
    [record] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "5 files of the archive ignored" in record.getMessage()
    assert "for example " in record.getMessage()


ROW = (
    "ivo://irsa.ipac/spherex_qr2?2025W51_1A_0001_2/D3",
    1e-6,
    2e-6,
    1.0,
    2.0,
    archived_uri(),
    5000,
)


def table(*rows, names="abcdefg"):
    return Table(rows=list(rows), names=list(names))


def changed(**values):
    row = dict(zip(("did", "lower", "upper", "begin", "end", "uri", "size"), ROW, strict=True))
    return tuple((row | values).values())


def test_columns_may_be_called_anything():
    names = [f"col_{n}" for n in range(48, 55)]
    [observation] = query.select_observations(table(ROW, names=names), config())
    assert (observation.uri, observation.mjd) == (archived_uri(), 1.5)


@pytest.mark.parametrize(
    ("archive_url", "below"),
    [
        ("https://example.org/a", archived_uri()),
        ("s3://nasa-irsa-spherex", archived_uri().removeprefix("ibe/data/spherex/")),
        ("file:///nowhere/mirror", archived_uri().removeprefix("ibe/data/spherex/")),
    ],
)
def test_frames_are_where_the_archive_is(archive_url, below):
    [observation] = query.select_observations(table(ROW), config(archive_url=archive_url))
    assert observation.uri == archived_uri()
    assert observation.download_url == f"{archive_url}/{below}"


@pytest.mark.parametrize(
    "hostile",
    [
        f"../../{archived_uri()}",
        f"//evil.example/{archived_uri()}",
        f"/{archived_uri()}",
        f"https://evil.example/{archived_uri()}",
        f"@evil.example/{archived_uri()}",
        archived_uri().replace("qr2", "qr2\0"),
        archived_uri().replace("qr2", ".."),
        archived_uri().replace("level2/", "level2/%2e%2e/"),
        archived_uri().replace("qr2/", "qr2//"),
        archived_uri().replace("qr2/", "qr2\\"),
    ],
)
@pytest.mark.parametrize("release", ["latest", "all"])
def test_a_hostile_uri_is_an_error(hostile, release):
    with pytest.raises(ArchiveError, match="unusable URI"):
        query.select_observations(table(ROW, changed(uri=hostile)), config(release=release))


@pytest.mark.parametrize("size", [0, -1, np.ma.masked])
def test_an_unknown_length_is_none(size):
    answer = table(ROW)
    answer["g"] = MaskedColumn([0 if size is np.ma.masked else size], mask=[size is np.ma.masked])
    [observation] = query.select_observations(answer, config())
    assert observation.size_bytes is None
    assert query.sum_gigabytes([observation]) == pytest.approx(0.0716)


def test_a_frame_without_times_is_kept_and_comes_last():
    answer = table(ROW, *(changed(uri=archived_uri(n), begin=n + 1.0) for n in range(2, 5)))
    answer["d"] = MaskedColumn(answer["d"], mask=[True, False, True, False])
    observations = query.select_observations(answer, config())
    assert [o.uri for o in observations] == [
        archived_uri(2),
        archived_uri(4),
        archived_uri(1),
        archived_uri(3),
    ]
    assert np.isnan(observations[2].mjd)


def test_order_of_the_rows_does_not_matter():
    rows = [
        changed(
            uri=archived_uri(slew, detector, version=f"l2b-v{version}-2025-354"),
            begin=float(slew // 2),
        )
        for slew, detector, version in itertools.product(range(4), (1, 6), (9, 10))
    ]
    expected = query.select_observations(table(*rows), config())
    assert len(expected) == 8
    assert all("-v10-" in o.uri for o in expected)
    assert [o.mjd for o in expected] == sorted(o.mjd for o in expected)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert query.select_observations(table(*rows), config()) == expected


def test_too_many_frames(frames):
    with SimulatedArchive(frames) as archive:
        assert len(found(archive, max_images=4)) == 4
        with pytest.raises(InputError) as caught:
            found(archive, max_images=3)
    said = str(caught.value)
    assert said.startswith("4 frames (0.0 GB) cover the field, max_images allows 3")
    assert all(option in said for option in ("raise max_images", "radius", "bands", "mjd_range"))


def test_gigabytes_are_counted():
    observations = query.select_observations(
        table(*(changed(uri=archived_uri(n), size=2_000_000_000) for n in range(3))), config()
    )
    with pytest.raises(InputError, match=re.escape("3 frames (6.0 GB)")):
        query.check_count(observations, config(max_images=2))


# Where no circle is given


def catalogue(ra, dec) -> Catalogue:
    ids = pa.array([f"s{i}" for i in range(len(ra))], pa.large_string())
    return Catalogue.from_arrays(ids, np.array(ra, float), np.array(dec, float))


def anywhere(archive, sources, **options):
    """Return what is found for sources, and the number of queries for it."""
    asked = config(archive, **NO_CIRCLE | options)
    asked_before = len(archive.requests)
    field = query.make_field(asked, sources)
    observations = query.find_observations(asked, field.circles)
    n_queries = len(archive.requests) - asked_before
    assert n_queries == len(field.circles)
    return observations, n_queries


NO_CIRCLE = {"center_ra": None, "center_dec": None, "radius": None}


def square(ra, dec, half=1.75):
    return ((ra - half, dec - half), (ra + half, dec - half), (ra + half, dec + half),
            (ra - half, dec + half))  # fmt: skip


def test_scattered_sources_have_a_query_each(path):
    centres = [(10.0, 0.0), (100.0, 30.0), (200.0, -45.0), (300.0, 60.0)]
    sky = [archived_frame(path, n, polygon=square(*c)) for n, c in enumerate(centres, start=1)]
    with SimulatedArchive(sky) as archive:
        observations, n_queries = anywhere(archive, catalogue(*zip(*centres[:3], strict=True)))
    assert [o.uri for o in observations] == [archived_uri(n) for n in (1, 2, 3)]
    assert n_queries == 3


def test_a_frame_of_several_queries_is_there_once(path):
    """The sources are too far apart for one query, and on a frame that both have."""
    sky = [
        archived_frame(path, 1, polygon=square(10.0, 0.0)),
        archived_frame(path, 2, polygon=square(25.0, 0.0, 16.0)),
        archived_frame(path, 3, polygon=square(40.0, 0.0)),
    ]
    with SimulatedArchive(sky) as archive:
        found_at_once, n_queries = anywhere(archive, catalogue([10.0, 40.0], [0.0, 0.0]))
        every_version, _ = anywhere(archive, catalogue([10.0, 40.0], [0.0, 0.0]), release="all")
    assert n_queries == 2
    assert [o.uri for o in found_at_once] == [archived_uri(n) for n in (1, 2, 3)]
    assert every_version == found_at_once


@pytest.mark.parametrize(
    ("ra", "dec", "polygon"),
    [
        (0.0, 0.0, ((359.0, -1.0), (1.0, -1.0), (1.0, 1.0), (359.0, 1.0))),
        (359.99, 0.0, ((359.0, -1.0), (1.0, -1.0), (1.0, 1.0), (359.0, 1.0))),
        (77.0, 90.0, ((0.0, 88.0), (90.0, 88.0), (180.0, 88.0), (270.0, 88.0))),
        (200.0, -89.5, ((0.0, -88.0), (90.0, -88.0), (180.0, -88.0), (270.0, -88.0))),
    ],
)
def test_a_source_alone(path, ra, dec, polygon):
    with SimulatedArchive(
        [archived_frame(path, 1, polygon=polygon), archived_frame(path, 2, polygon=square(120, 0))]
    ) as archive:
        observations, n_queries = anywhere(archive, catalogue([ra], [dec]))
    assert [o.uri for o in observations] == [archived_uri()]
    assert n_queries == 1


@pytest.mark.slow
def test_many_sources_are_few_queries(path):
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 100_000), np.rad2deg(np.arcsin(rng.uniform(-1, 1, 100_000)))
    sky = [
        archived_frame(path, n, polygon=square(20.0 * n, 40.0 if n % 2 else -40.0))
        for n in range(1, 18)
    ]
    with SimulatedArchive(sky) as archive:
        observations, n_queries = anywhere(archive, catalogue(ra, dec))
    assert len(observations) == 17
    assert n_queries <= 91


def test_an_error_of_one_query_is_that_of_all(path):
    sky = [archived_frame(path, 1, polygon=square(10.0, 0.0))]
    sources = catalogue([10.0, 100.0, 200.0], [0.0, 0.0, 0.0])
    with SimulatedArchive(sky, faults={"TAP/sync": [Fault(), Fault(status=403)]}) as archive:
        asked = config(archive, **NO_CIRCLE, max_retries=0)
        with pytest.raises(ArchiveError, match="403"):
            query.find_observations(asked, query.make_field(asked, sources).circles)


def test_footprints_come_with_the_frames(path):
    with SimulatedArchive([archived_frame(path)]) as archive:
        [observation] = found(archive)
    assert observation.footprint == pack_footprint(np.ravel(CONTAINS))


class Counting(SimulatedArchive):
    """An archive whose answers wait until so many queries are there at once."""

    n_expected = active = peak = 0

    async def _answer(self, parameters, limit):
        self.active += 1
        self.peak = max(self.peak, self.active)
        if self.active == self.n_expected:
            self._all_there.set()
        await asyncio.wait_for(self._all_there.wait(), 10)
        self.active -= 1
        return await super()._answer(parameters, limit)

    async def _serve(self, started):
        self._all_there = asyncio.Event()
        await super()._serve(started)


@pytest.mark.parametrize(("limit", "n_at_once"), [(2, 2), (100, 4)])
def test_few_queries_at_once(path, limit, n_at_once):
    ra = np.arange(0.0, 360.0, 40.0)
    archive = Counting([archived_frame(path)])
    archive.n_expected = n_at_once
    with archive:
        anywhere(archive, catalogue(ra, np.zeros(len(ra))), max_download_workers=limit)
    assert archive.peak == n_at_once


class WithoutFootprints(SimulatedArchive):
    """A service that has no column of footprints to show, or shows none."""

    async def _answer(self, parameters, limit):
        if "p.poly FROM" in parameters["QUERY"]:
            raise QueryError("The column poly cannot be selected.")
        return await super()._answer(parameters, limit)


def test_an_archive_without_footprints_is_of_use(path, caplog):
    sources = catalogue([10.0, 100.0], [0.0, 0.0])
    with WithoutFootprints([archived_frame(path), archived_frame(path, 2)]) as archive:
        asked = config(archive, **NO_CIRCLE)
        field = query.make_field(asked, sources)
        observations = query.find_observations(asked, field.circles)
    assert [o.uri for o in observations] == [archived_uri(), archived_uri(2)]
    assert {o.footprint for o in observations} == {None}
    assert "does not give footprints" in caplog.text
    assert query.find_empty(asked, sources, observations) == [False, False]


def test_frames_without_a_source(path):
    sky = [
        archived_frame(path, 1, polygon=square(10.0, 0.0)),
        archived_frame(path, 2, polygon=square(13.6, 0.0)),
    ]
    sources = catalogue([11.0, 200.0], [1.0, 0.0])
    with SimulatedArchive(sky) as archive:
        observations = found(archive, radius=5.0)
    assert len(observations) == 2
    for options, empty in [
        ({}, [False, False]),
        ({"keep_images": False}, [False, True]),
        (NO_CIRCLE, [False, True]),
    ]:
        assert query.find_empty(config(**options), sources, observations) == empty


# What fails


def test_a_truncated_answer_says_what_to_do(frames):
    with SimulatedArchive(frames, maxrec=3) as archive:
        with pytest.raises(TruncatedAnswerError) as caught:
            found(archive)
        assert caught.value.path == archive.tap_url
    said = caught.value.reason
    assert said.startswith("the answer was truncated at 3 rows; choose a smaller radius")
    assert all(option in said for option in ("radius", "bands", "mjd_range"))


def test_retries_are_those_of_the_run(frames):
    impatient = TapOptions(retry=RetryPolicy(max_retries=1, first_delay_s=0.001))
    lasting = {f"TAP/{where}": itertools.repeat(Fault(status=502)) for where in ("sync", "async")}
    with SimulatedArchive(frames, faults=lasting) as archive:
        with pytest.raises(ArchiveError) as caught:
            found(archive, max_retries=0)
        assert caught.value.attempts == 1
        with pytest.raises(ArchiveError) as caught:
            query.find_observations(config(archive, max_retries=0), tap_options=impatient)
        assert caught.value.attempts == 2
