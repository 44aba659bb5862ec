"""The shuffle and the light curves, against pandas."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outputs import read_files

from spxdask.errors import DiskFullError, FrameError
from spxdask.stages import light_curves
from spxdask.storage import LocalStore
from spxdask.tables.csv import render_header
from spxdask.tables.parquet import PARQUET_MARK, encode_parquet
from spxdask.tables.per_image import encode_rows
from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE, SCHEMA


def make_rows(rng, ids, number) -> pd.DataFrame:
    n = len(ids)
    rows = {"target_id": ids, "ra": rng.uniform(0, 360, n), "dec": rng.uniform(-90, 90, n)}
    rows |= {"obs_id": f"2025W51_1A_{number % 7:04d}_1", "band": f"D{1 + number % 6}"}
    rows |= {"mjd": 61000.0 + number // 3}
    for name in PER_IMAGE[6:]:
        rows[name] = rng.integers(0, 1 << 30, n) if name == "flag" else rng.standard_normal(n)
    rows["filename"] = f"level2_{number}.fits"
    frame = pd.DataFrame(rows)
    frame.loc[frame["flux"] < 0, ["mag_ab", "mag_ab_error"]] = np.nan
    frame.loc[frame["flux"] > 2.0, ["flux", "flux_error"]] = np.nan
    return frame[list(PER_IMAGE)]


def write(folder, rows: pd.DataFrame, number: int, how: str = "csv") -> light_curves.Table:
    path = folder / f"level2_{number}_photometry.{how}"
    columns = {name: rows[name].to_numpy() for name in rows}
    size = path.write_bytes(encode_rows(columns, how))
    release = f"qr{2 + number % 2}"
    return light_curves.Table(name=path.name, bytes=size, rows=len(rows), release=release)


def with_release(frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Add what light curves have of the frames that `write` wrote."""
    return [rows.assign(release=f"qr{2 + number % 2}") for number, rows in enumerate(frames)]


def make_options(per_image, folder, how="csv", buckets=None) -> light_curves.CurveOptions:
    return light_curves.CurveOptions(
        per_image=str(per_image),
        table_groups=str(per_image / "tables.parquet"),
        lightcurves=str(folder),
        format=how,
        buckets=buckets,
    )


def run(client, found, folder, num_buckets=7, how="csv", buckets=None, max_files=500):
    """Aggregate tables that lie beside the folder of the light curves."""
    folder.mkdir(exist_ok=True)
    options = make_options(folder.parent, folder, how, buckets)
    n_groups = light_curves.save_table_groups(found, options.table_groups, max_files=max_files)
    frame = light_curves.build_light_curves(n_groups, num_buckets, options)
    return client.compute(frame).result()


def read_groups(manifest) -> list[list[light_curves.Table]]:
    with pq.ParquetFile(manifest) as file:
        found = [file.read_row_group(n).to_pylist() for n in range(file.num_row_groups)]
    return [[light_curves.Table(**row) for row in group] for group in found]


def test_light_curves_equal_a_sort_in_pandas(client, tmp_path):
    rng = np.random.default_rng(1)
    ids = np.array([f"{39633458707826492 + i}" for i in range(200)])
    frames, found = [], []
    for number in range(25):
        chosen = rng.permutation(ids)[: rng.integers(0, 120)]
        frames.append(make_rows(rng, chosen, number))
        found.append(write(tmp_path, frames[-1], number))
    written = run(client, found, tmp_path / "lightcurves", max_files=4)
    everything = pd.concat(with_release(frames))
    everything = everything.sort_values(["target_id", "mjd", "obs_id", "band"])
    assert written["rows"].sum() == len(everything)
    assert sorted(written["target_id"]) == sorted(everything["target_id"].unique())
    for target, expected in everything.groupby("target_id"):
        curve = pd.read_csv(tmp_path / "lightcurves" / f"{target}.csv")
        expected = expected[list(LIGHT_CURVE)].reset_index(drop=True)
        pd.testing.assert_frame_equal(curve, expected, check_dtype=False, check_exact=True)


def test_result_does_not_depend_on_groups_or_buckets(client, tmp_path):
    rng = np.random.default_rng(2)
    found = [
        write(tmp_path, make_rows(rng, np.array([f"s{i}" for i in range(40)]), number), number)
        for number in range(9)
    ]
    curves = []
    for n, (files, buckets) in enumerate([(100, 1), (2, 16), (1, 3)]):
        tables_in_order = found[::-1] if n else found
        run(client, tables_in_order, tmp_path / f"lc{n}", buckets, max_files=files)
        assert len(read_groups(tmp_path / "tables.parquet")) == -(-9 // min(files, 9))
        curves.append(read_files(tmp_path / f"lc{n}"))
    assert curves[0] == curves[1] == curves[2]
    assert len(curves[0]) == 40


def test_parquet_light_curves_do_not_depend_on_groups_or_formats(client, tmp_path):
    rng = np.random.default_rng(2)
    frames = [make_rows(rng, np.array([f"s{i}" for i in range(40)]), n) for n in range(9)]
    curves = []
    for n, (files, how) in enumerate([(100, "csv"), (2, "csv"), (1, "parquet"), (4, "parquet")]):
        found = [write(tmp_path, rows, number, how) for number, rows in enumerate(frames)]
        tables_in_order = found[::-1] if n else found
        folder = tmp_path / f"lc{n}"
        written = run(client, tables_in_order, folder, 3, "parquet", max_files=files)
        assert written["rows"].sum() == 9 * 40
        curves.append(read_files(tmp_path / f"lc{n}"))
    assert curves[0] == curves[1] == curves[2] == curves[3]
    assert set(curves[0]) == {light_curves.bucket_name(n) for n in range(3)}


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_buckets_beside_the_light_curves(client, tmp_path, how):
    rng = np.random.default_rng(6)
    ids = np.array(["a", "b,c", 'd"e', "f\ng"])
    found = [write(tmp_path, make_rows(rng, ids, number), number) for number in range(5)]
    (tmp_path / "buckets").mkdir()
    run(client, found, tmp_path / "lc", 2, how, buckets=str(tmp_path / "buckets"))
    run(client, found, tmp_path / "alone", 2, "parquet")
    assert read_files(tmp_path / "buckets") == read_files(tmp_path / "alone")
    names = {light_curves.light_curve_name(i) for i in ids}
    if how == "parquet":
        names = {"bucket-00000.parquet", "bucket-00001.parquet"}
    assert set(read_files(tmp_path / "lc")) == names


@pytest.mark.parametrize("seed", range(4))
def test_frames_in_any_order(client, tmp_path, seed):
    """Pieces of a light curve that overlap in time are merged row by row."""
    rng = np.random.default_rng(seed)
    ids = np.array(["a", "b,c", 'd"e', "f"])
    found, frames = [], []
    for number in range(12):
        rows = make_rows(rng, ids[rng.random(4) < 0.7], number)
        # Three detectors of one exposure share its time.
        rows["mjd"] = 61000.0 + number // 3
        rows["obs_id"] = f"2025W51_1A_{number // 3:04d}_1"
        rows["band"] = f"D{1 + number % 3}"
        frames.append(rows)
        found.append(write(tmp_path, rows, number))
    shuffled = [found[i] for i in rng.permutation(12)]
    run(client, shuffled, tmp_path / "lc", num_buckets=2, max_files=3)
    for target, expected in pd.concat(with_release(frames)).groupby("target_id"):
        curve = pd.read_csv(tmp_path / "lc" / light_curves.light_curve_name(target))
        expected = expected.sort_values(["mjd", "obs_id", "band"]).reset_index(drop=True)
        expected = expected[list(LIGHT_CURVE)]
        pd.testing.assert_frame_equal(curve, expected, check_dtype=False, check_exact=True)


def test_groups_are_bounded_by_size(tmp_path):
    rng = np.random.default_rng(3)
    found = [write(tmp_path, make_rows(rng, np.array(["a", "b"]), n), n) for n in range(6)]
    assert found[0].bytes == (tmp_path / found[0].name).stat().st_size
    manifest = tmp_path / "tables.parquet"
    max_bytes = int(2.5 * found[0].bytes)
    assert light_curves.save_table_groups(iter(found), str(manifest), max_bytes=max_bytes) == 3
    assert [len(g) for g in read_groups(manifest)] == [2, 2, 2]
    assert [t for g in read_groups(manifest) for t in g] == found
    # A table that is larger than a group forms a group of its own.
    unknown = [replace(table, rows=None) for table in found]
    assert light_curves.save_table_groups(unknown, str(manifest), max_bytes=1) == 6
    assert read_groups(manifest) == [[table] for table in unknown]
    assert light_curves.save_table_groups([], str(manifest)) == 0


def test_partitions_are_as_many_as_requested_unless_too_large():
    found = [light_curves.Table(name=f"{n}", bytes=n, rows=None) for n in (120, 280)]
    counts = [light_curves.count_partitions(found, n, max_bytes=100) for n in (1, 3, 4, 5)]
    assert counts == [4, 4, 4, 5]
    assert light_curves.count_partitions([replace(found[0], bytes=1)], 1, max_bytes=100) == 1
    # Without tables there is nothing to shuffle.
    assert light_curves.count_partitions([], 5) == 0


def read(found, folder):
    options = make_options(folder, folder / "lc")
    assert light_curves.save_table_groups(found, options.table_groups) == 1
    return light_curves.read_tables(0, options)


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_table_that_lost_rows_is_refused(tmp_path, how):
    rng = np.random.default_rng(4)
    table = write(tmp_path, make_rows(rng, np.array(["a", "b"]), 0), 0, how)
    assert len(read([replace(table, rows=None)], tmp_path)) == 2
    with pytest.raises(FrameError, match=rf"{table.name} has 2 rows, 3 were measured"):
        read([replace(table, rows=3)], tmp_path)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ids=st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1
        ).filter(lambda s: s.strip()),
        min_size=1,
        max_size=30,
    )
)
def test_rows_of_any_ids_are_conserved(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("any")
    rows = make_rows(np.random.default_rng(5), np.array(ids, dtype=object), 0)
    one, other = (read([write(folder, rows, 0, how)], folder) for how in ("csv", "parquet"))
    pd.testing.assert_frame_equal(one, other)
    assert sorted(one["target_id"]) == sorted(set(ids))
    assert one["rows"].sum() == len(ids)
    (folder / "lc").mkdir()
    written = light_curves.write_lightcurves(one, options=make_options(folder, folder / "lc"))
    assert sorted(written["target_id"]) == sorted(set(ids))
    files = list((folder / "lc").iterdir())
    assert len(files) == len(set(ids))
    assert sum(len(p.read_text().splitlines()) - 1 for p in files) == len(ids)
    options = make_options(folder, folder / "lc", "parquet")
    again = light_curves.write_lightcurves(one, options=options, partition_info={"number": 3})
    pd.testing.assert_frame_equal(again, written)
    path = folder / "lc" / "bucket-00003.parquet"
    assert pq.read_table(path).column("target_id").to_pylist() == sorted(ids)
    assert pq.read_metadata(path).metadata[b"sources"] == str(len(set(ids))).encode()


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_empty_partition(tmp_path, how):
    options = make_options(tmp_path, tmp_path, how)
    for info in (None, {"number": 0}):
        written = light_curves.write_lightcurves(
            light_curves.SHUFFLE_META, options=options, partition_info=info
        )
        assert len(written) == 0
        assert list(written.columns) == ["target_id", "rows"]
    found = list(tmp_path.iterdir())
    if how == "csv":
        assert found == []
        return
    # The file has the columns of the others, so that all files are one dataset.
    assert [path.name for path in found] == ["bucket-00000.parquet"]
    one = read([write(tmp_path, make_rows(np.random.default_rng(7), ["a"], 0), 0)], tmp_path)
    light_curves.write_lightcurves(one, options=options, partition_info={"number": 1})
    empty, full = (pq.read_table(tmp_path / light_curves.bucket_name(n)) for n in range(2))
    assert (len(empty), len(full)) == (0, 1)
    assert empty.schema == full.schema


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_light_curve_that_cannot_be_written_returns_the_error(tmp_path, how, monkeypatch):
    one = read([write(tmp_path, make_rows(np.random.default_rng(7), ["a"], 0), 0)], tmp_path)
    options = make_options(tmp_path, tmp_path / "lc", how)
    (tmp_path / "lc").mkdir()

    def raise_disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", raise_disk_full)
    # The task returns the error, as Dask would log one that it raises in front of the user.
    result = light_curves.write_lightcurves(one, options=options, partition_info={"number": 0})
    assert isinstance(result, DiskFullError)
    assert str(tmp_path / "lc") in str(result)
    assert list((tmp_path / "lc").iterdir()) == []


def test_remove_others_leaves_files_of_the_user(tmp_path):
    header = render_header(LIGHT_CURVE)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(header + b"x\n")
    for name in ("bucket-00001.parquet", "bucket-00002.parquet", "stars.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    (tmp_path / "star.csv").write_text("ra,dec\n1,2\n")
    (tmp_path / "notes.txt").write_bytes(header)
    (tmp_path / "folder").mkdir()
    names = {"a.csv", "c.csv", "bucket-00001.parquet"}
    missing, removed = light_curves.remove_others(
        LocalStore(tmp_path), names, light_curves.find_light_curves
    )
    assert (missing, removed) == ({"c.csv"}, {"b.csv", "bucket-00002.parquet"})
    users = {"stars.parquet", "star.csv", "notes.txt", "folder"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.csv", "bucket-00001.parquet"} | users
    missing, removed = light_curves.remove_others(
        LocalStore(tmp_path), set(), light_curves.find_light_curves
    )
    assert (missing, removed) == (set(), {"a.csv", "bucket-00001.parquet"})
    assert {p.name for p in tmp_path.iterdir()} == users
    # No folder, nothing to remove.
    nothing = light_curves.remove_others(
        LocalStore(tmp_path / "absent"), set(), light_curves.find_buckets
    )
    assert nothing == (set(), set())


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,2\n",
        b"",
        encode_parquet(pa.table({"a": [1]})),
        encode_parquet(SCHEMA.empty_table())[:-9],
        PARQUET_MARK,
    ],
)
def test_table_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "x_photometry.csv").write_bytes(content)
    table = light_curves.Table(name="x_photometry.csv", bytes=len(content), rows=None)
    with pytest.raises(FrameError, match=r"x_photometry.csv is not a per-image table"):
        read([table], tmp_path)


def test_damaged_table_with_a_sound_end_is_named(tmp_path):
    rows = make_rows(np.random.default_rng(8), np.array([f"s{i}" for i in range(100)]), 0)
    table = write(tmp_path, rows, 0, "parquet")
    data = bytearray((tmp_path / table.name).read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / table.name).write_bytes(data)
    with pytest.raises(FrameError, match=rf"{table.name} is not a per-image table"):
        read([table], tmp_path)


def test_the_order_of_arrival_does_not_matter_for_two_releases(tmp_path):
    rng = np.random.default_rng(2)
    one = make_rows(rng, ["a", "b"], 0)
    other = make_rows(rng, ["a", "b"], 0).assign(filename="level2_1.fits")
    options = make_options(tmp_path, tmp_path / "lc")
    found = [write(tmp_path, one, 0), write(tmp_path, other, 1)]
    groups = []
    for table in found:
        light_curves.save_table_groups([table], options.table_groups)
        groups.append(light_curves.read_tables(0, options))
    curves = []
    for parts in (groups, groups[::-1]):
        (tmp_path / "lc").mkdir(exist_ok=True)
        written = light_curves.write_lightcurves(
            pd.concat(parts, ignore_index=True), options=options
        )
        assert written["rows"].tolist() == [2, 2]
        curves.append([path.read_bytes() for path in sorted((tmp_path / "lc").iterdir())])
    assert curves[0] == curves[1]
