"""What a frame is called, where it is, which version is the newer, and what is no path."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from itertools import chain

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spxdask.archive.observation import (
    Observation,
    check_uri,
    frame_url,
    is_level2_name,
    parse_filename,
    parse_release,
)
from spxdask.config import BatchConfig
from spxdask.errors import ArchiveError, RunFolderError
from spxdask.pipeline import BatchPipeline
from spxdask.run.folder import OBSERVATIONS_NAME, RunFolder
from spxdask.run.observations import save_observations
from spxdask.run.query_summary import Field, load_query_summary
from spxdask.science.footprint import Circle

URI = (
    "ibe/data/spherex/qr2/level2/2025W51_1A/l2b-v21-2025-354/3/"
    "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
)
OBSERVATION = Observation(
    obs_id="2025W51_1A_0684_2",
    band="D3",
    mjd=61027.5,
    wavelength_um=2.02,
    uri=URI,
    download_url=f"http://127.0.0.1/{URI}",
    size_bytes=71_600_000,
)


def test_names():
    assert OBSERVATION.filename == "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
    assert OBSERVATION.stem == "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354"
    assert parse_filename(OBSERVATION.filename) == (OBSERVATION.obs_id, OBSERVATION.band)
    assert pickle.loads(pickle.dumps(OBSERVATION)) == OBSERVATION


@pytest.mark.parametrize("name", ["", "a.fits", f"{OBSERVATION.filename}.gz"])
def test_another_name_has_no_identity(name):
    with pytest.raises(ValueError, match="not the name of a Level 2 file"):
        parse_filename(name)


@pytest.mark.parametrize(
    ("publisher_did", "release"),
    [
        ("ivo://irsa.ipac/spherex_qr2?2025W51_1A_0684_2/D3", "qr2"),
        ("ivo://irsa.ipac/spherex_qr10_deep?2025W51_1A_0684_2/D3", "qr10"),
        ("ivo://irsa.ipac/spherex_dr1?2025W51_1A_0684_2/D3", "dr1"),
        ("ivo://irsa.ipac/spherex_dr1_deep?2025W51_1A_0684_2/D3", "dr1"),
        ("ivo://irsa.ipac/spherex_qr2_cal?2025W51_1A_0684_2/D3", None),
        ("ivo://irsa.ipac/spherex_?2025W51_1A_0684_2/D3", None),
        ("ivo://irsa.ipac/wise?2025W51_1A_0684_2/D3", None),
        ("", None),
    ],
)
def test_the_release_of_a_collection(publisher_did, release):
    assert parse_release(publisher_did) == release


def test_a_d_in_the_obs_id_is_not_the_detector():
    name = "level2_2025W51_1D_0684_2D6_spx_l2b-v1-2025-001.fits"
    assert parse_filename(name) == ("2025W51_1D_0684_2", "D6")


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("qr9/{}l2b-v9-2030-354", "qr2/{}l2b-v10-2026-001"),
        ("qr3/{}l2b-v30-2026-100", "dr1/{}l2b-v31-2026-310"),
        ("dr1/{}l2b-v30-2026-100", "qr3/{}l2b-v30-2026-101"),
        ("qr3/{}l2b-v27-2026-242", "qr3/{}l2b_retry-v27-2026-242"),
        ("qr3/{}l2b_retry-v27-2026-242", "qr3/{}l2b_retry2-v27-2026-242"),
        ("qr3/{}l2b_retry-v27-2026-242", "qr3/{}l2b-v27-2026-243"),
        # Two copies of one file: any order will do, as long as it is always the same.
        ("qr2/{}l2b-v21-2025-354", "qr3/{}l2b-v21-2025-354"),
        ("qr2/{}l2b-v9-2025-354", "qr2/{}l2b-v10-2025-354"),
        ("qr2/{}l2b-v21-2025-354", "qr2/{}l2b-v21-2026-001"),
        ("qr2/{}l2b-v21-2025-099", "qr2/{}l2b-v21-2025-100"),
    ],
)
def test_the_newer_version(older, newer):
    name = "level2/level2_2025W51_1A_0684_2D3_spx_"
    older, newer = (replace(OBSERVATION, uri=f"{o.format(name)}.fits") for o in (older, newer))
    assert older.recency < newer.recency


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        (URI, True),
        (OBSERVATION.filename, True),
        (URI.replace("l2b-", "l2b_retry-"), True),
        (URI.replace("l2b-", "l2b_other-"), False),
        (f"{URI}\n", False),
        (f"{URI}.gz", False),
        (URI.replace("D3_", "D7_"), False),
        (URI.replace("level2_", "level3_"), False),
        (URI.replace("0684", "06.84"), False),
        (URI.replace("0684", "0" * 60), False),
        (f"{URI}/", False),
        ("", False),
        ("ibe/data/spherex/qr2/epsf/cal-epsf-v3-2026-191/3/epsf_D3_spx_cal.fits", False),
    ],
)
def test_names_of_level2_files(uri, is_one):
    assert is_level2_name(uri) is is_one


NAME = OBSERVATION.filename
HOSTILE = [
    f"../../{NAME}",
    f"ibe/../../etc/{NAME}",
    f"ibe/./{NAME}",
    f"ibe/a..b/{NAME}",
    f"/etc/{NAME}",
    f"//evil.example/{NAME}",
    f"ibe//{NAME}",
    f"http://evil.example/{NAME}",
    f"file:///etc/{NAME}",
    f"user@evil.example/{NAME}",
    f"ibe/a\0b/{NAME}",
    f"ibe/a\nb/{NAME}",
    f"ibe\\..\\{NAME}",
    f"ibe/%2e%2e/{NAME}",
    f"ibe/a?b/{NAME}",
    f"ibe/a#b/{NAME}",
    f"ibe/a b/{NAME}",
    f"ibe/~root/{NAME}",
    f"ibe/\u2024\u2024/{NAME}",
    f"ibe/-rf/{NAME}",
    NAME.replace("v21", "v\u0662\u0661"),
    "",
]


@pytest.mark.parametrize("uri", HOSTILE)
def test_a_hostile_uri_is_refused(uri):
    with pytest.raises(ArchiveError, match="unusable URI") as caught:
        check_uri(uri)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_long_uri_does_not_fill_the_message():
    with pytest.raises(ArchiveError) as caught:
        check_uri("//" + "x" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("uri", [URI, NAME, "a/b.c+d-e_f/9"])
def test_a_plain_uri_passes(uri):
    check_uri(uri)


@given(
    st.lists(st.text("ab.%/\\:?#@~ \0\n\u00e9-", min_size=0, max_size=6), min_size=1, max_size=5)
)
def test_what_passes_stays_below_its_folder(parts):
    uri = "/".join(parts)
    try:
        check_uri(uri)
    except ArchiveError:
        return
    assert all(part and part[0] not in ".-" and ".." not in part for part in uri.split("/"))
    assert not set(uri) & set("%\\:?#@~ \0\n")


# Where frames are


@pytest.mark.parametrize(
    ("archive", "below"),
    [
        ("https://irsa.ipac.caltech.edu", f"/{URI}"),
        ("http://127.0.0.1:80/a", f"/{URI}"),
        ("s3://nasa-irsa-spherex", f"/{URI.removeprefix('ibe/data/spherex/')}"),
        ("s3://bucket/copy", f"/{URI.removeprefix('ibe/data/spherex/')}"),
    ],
)
def test_a_bucket_lacks_the_path_of_the_service(archive, below):
    assert frame_url(archive, URI) == archive + below
    assert frame_url(archive, "elsewhere/a.fits") == f"{archive}/elsewhere/a.fits"


def test_a_mirror_may_be_of_the_service_or_of_the_bucket(tmp_path):
    url = tmp_path.as_uri()
    assert frame_url(url, URI) == f"{url}/{URI.removeprefix('ibe/data/spherex/')}"
    (tmp_path / "ibe").mkdir()
    assert frame_url(url, URI) == f"{url}/{URI}"


# The frames of a query, from its file


def config(tmp_path, **options) -> BatchConfig:
    defaults = {"center_ra": 1.0, "center_dec": 2.0, "radius": 3.0, "catalog_path": "x.csv"}
    return BatchConfig(**defaults | {"output_dir": tmp_path} | options)


def found(count: int) -> list[Observation]:
    return [
        replace(
            OBSERVATION,
            mjd=61000.0 + number / 3,
            uri=URI.replace("0684", f"{number:04d}"),
            download_url=f"https://irsa.ipac.caltech.edu/{URI.replace('0684', f'{number:04d}')}",
            size_bytes=None if number % 4 == 3 else number,
        )
        for number in range(count)
    ]


def saved(tmp_path, observations, **part_sizes):
    folder = RunFolder(tmp_path)
    folder.state.make()
    field = Field(mode="circle", circles=[Circle(1.0, 2.0, 3.0)], n_sources=1)
    folder.save_query(observations, config(tmp_path), field, "0", [False] * len(observations))
    found = folder.load_observations(config(tmp_path))
    if part_sizes:
        options = found.query_options
        save_observations(folder.state, OBSERVATIONS_NAME, observations, options, **part_sizes)
        found = folder.load_observations(config(tmp_path))
    return found


def test_observations_of_earlier_versions(tmp_path):
    """Without footprints, and without the catalogue that they were found for."""
    observations = [replace(one, footprint=b"x" * 64) for one in found(3)]
    back = saved(tmp_path, observations)
    assert list(back) == observations
    path = tmp_path / "state" / OBSERVATIONS_NAME
    table = pq.read_table(path)
    options = {k: v for k, v in back.query_options.items() if k != "catalogue"}
    metadata = table.schema.metadata | {b"query": json.dumps(options).encode()}
    pq.write_table(table.drop_columns("footprint").replace_schema_metadata(metadata), path)
    assert list(RunFolder(tmp_path).load_observations(config(tmp_path))) == found(3)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20, 23, 24, 25, 100])
def test_observations_come_back_in_parts(tmp_path, count):
    """In parts of eight, and in three if these are larger."""
    observations = found(count)
    back = saved(tmp_path, observations, part_size=8, max_parts=3)
    assert len(back) == count
    assert list(back) == observations
    # Once more, as it is read twice in a run.
    assert list(back) == observations
    parts = [back.part(number) for number in range(back.n_parts)]
    assert list(chain.from_iterable(parts)) == observations
    size = max(8, math.ceil(count / 3))
    assert [len(part) for part in parts[:-1]] == [size] * (back.n_parts - 1)
    assert 1 <= len(parts[-1]) <= size
    assert back.n_parts <= 3


def test_observations_go_between_processes(tmp_path):
    observations = found(250)
    back = saved(tmp_path, observations)
    for one in (back, pickle.loads(pickle.dumps(back))):
        assert (len(one), one.n_parts) == (250, 3)
        assert one.part(2) == observations[200:]
        assert (one.query_options, one.query_time) == (back.query_options, back.query_time)
    # Not with what they say.
    assert len(pickle.dumps(back)) < 2000


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_observations_are_read_by_many_at_once(tmp_path, scheduler):
    observations = found(300)
    assert saved(tmp_path, observations, part_size=2).n_parts == 150
    pipeline = BatchPipeline(config(tmp_path))
    assert pipeline.observations.compute(scheduler=scheduler, num_workers=8) == observations


def test_a_query_that_found_nothing(tmp_path):
    back = saved(tmp_path, [])
    assert (len(back), list(back)) == (0, [])
    assert not back
    assert BatchPipeline(config(tmp_path)).observations.compute(scheduler="sync") == []
    assert list(pickle.loads(pickle.dumps(back))) == []
    summary = load_query_summary(tmp_path)
    assert (summary["n_observations"], summary["observations"]) == (0, [])


def test_the_summary_lists_all_of_many_frames(tmp_path):
    observations = found(2500)
    saved(tmp_path, observations)
    summary = load_query_summary(tmp_path)
    assert summary["n_observations"] == 2500
    assert [o["download_url"] for o in summary["observations"]] == [
        o.download_url for o in observations
    ]


def test_frames_are_where_the_archive_is_now(tmp_path):
    saved(tmp_path, found(3))
    elsewhere = config(tmp_path, archive_url="s3://bucket")
    for one, there in zip(found(3), RunFolder(tmp_path).load_observations(elsewhere), strict=True):
        assert there == replace(one, download_url=frame_url("s3://bucket", one.uri))


def test_another_query_is_refused(tmp_path):
    saved(tmp_path, found(3))
    with pytest.raises(RunFolderError, match=r"with radius 3.0, the configuration has 4.0"):
        RunFolder(tmp_path).load_observations(config(tmp_path, radius=4.0))
    assert RunFolder(tmp_path / "new").load_observations(config(tmp_path)) is None
