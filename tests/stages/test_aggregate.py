"""The shuffle and the light curves, against pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spxdask import tables
from spxdask.errors import FrameError
from spxdask.stages import aggregate


def make_rows(rng, ids, number) -> pd.DataFrame:
    n = len(ids)
    rows = {"target_id": ids, "ra": rng.uniform(0, 360, n), "dec": rng.uniform(-90, 90, n)}
    rows |= {"obs_id": f"2025W51_1A_{number % 7:04d}_1", "band": f"D{1 + number % 6}"}
    rows |= {"mjd": 61000.0 + number // 3}
    for name in tables.PER_IMAGE[6:-1]:
        rows[name] = rng.integers(0, 1 << 30, n) if name == "flag" else rng.standard_normal(n)
    rows["filename"] = f"level2_{number}.fits"
    frame = pd.DataFrame(rows)
    frame.loc[frame["flux"] < 0, ["mag_ab", "mag_ab_error"]] = np.nan
    frame.loc[frame["flux"] > 2.0, ["flux", "flux_error"]] = np.nan
    return frame[list(tables.PER_IMAGE)]


def write(folder, rows: pd.DataFrame, number: int) -> aggregate.Table:
    path = folder / f"level2_{number}_photometry.csv"
    columns = {name: rows[name].to_numpy() for name in rows}
    path.write_bytes(
        tables.csv_header(tables.PER_IMAGE)
        + bytes(tables.lines_to_bytes(tables.csv_lines(columns)))
    )
    return aggregate.Table(path=str(path), rows=len(rows))


def run(client, found, folder, num_buckets=7, buckets=None):
    folder.mkdir(exist_ok=True)
    groups = aggregate.group(found)
    frame = aggregate.light_curves(groups, str(folder), buckets, num_buckets)
    return client.compute(frame).result()


def test_light_curves_equal_a_sort_in_pandas(client, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate, "GROUP_FILES", 4)
    rng = np.random.default_rng(1)
    ids = np.array([f"{39633458707826492 + i}" for i in range(200)])
    frames, found = [], []
    for number in range(25):
        chosen = rng.permutation(ids)[: rng.integers(0, 120)]
        frames.append(make_rows(rng, chosen, number))
        found.append(write(tmp_path, frames[-1], number))
    written = run(client, found, tmp_path / "lightcurves")
    everything = pd.concat(frames).sort_values(["target_id", "mjd", "obs_id", "band"])
    assert written["rows"].sum() == len(everything)
    assert sorted(written["target_id"]) == sorted(everything["target_id"].unique())
    for target, expected in everything.groupby("target_id"):
        curve = pd.read_csv(tmp_path / "lightcurves" / f"{target}.csv")
        expected = expected[list(tables.LIGHT_CURVE)].reset_index(drop=True)
        pd.testing.assert_frame_equal(curve, expected, check_dtype=False, check_exact=True)


def test_result_does_not_depend_on_groups_or_buckets(client, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    found = [
        write(tmp_path, make_rows(rng, np.array([f"s{i}" for i in range(40)]), number), number)
        for number in range(9)
    ]
    contents = []
    for n, (files, buckets) in enumerate([(100, 1), (2, 16), (1, 3)]):
        monkeypatch.setattr(aggregate, "GROUP_FILES", files)
        assert len(aggregate.group(found)) == -(-9 // min(files, 9))
        run(client, found[::-1] if n else found, tmp_path / f"lc{n}", buckets)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / f"lc{n}").iterdir()})
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 40


@pytest.mark.parametrize("seed", range(4))
def test_frames_in_any_order(client, tmp_path, monkeypatch, seed):
    """Pieces of a light curve that begin before others end are taken apart."""
    monkeypatch.setattr(aggregate, "GROUP_FILES", 3)
    rng = np.random.default_rng(seed)
    ids = np.array(["a", "b,c", 'd"e', "f"])
    found, frames = [], []
    for number in range(12):
        rows = make_rows(rng, ids[rng.random(4) < 0.7], number)
        # Exposures of several detectors share their time.
        rows["mjd"] = 61000.0 + number // 3
        rows["obs_id"] = f"2025W51_1A_{number // 3:04d}_1"
        rows["band"] = f"D{1 + number % 3}"
        frames.append(rows)
        found.append(write(tmp_path, rows, number))
    run(client, [found[i] for i in rng.permutation(12)], tmp_path / "lc", num_buckets=2)
    for target, expected in pd.concat(frames).groupby("target_id"):
        curve = pd.read_csv(tmp_path / "lc" / aggregate.light_curve_name(target))
        expected = expected.sort_values(["mjd", "obs_id", "band"]).reset_index(drop=True)
        expected = expected[list(tables.LIGHT_CURVE)]
        pd.testing.assert_frame_equal(curve, expected, check_dtype=False, check_exact=True)


def test_groups_are_bounded_by_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    found = [write(tmp_path, make_rows(rng, np.array(["a", "b"]), n), n) for n in range(6)]
    size = (tmp_path / "level2_0_photometry.csv").stat().st_size
    monkeypatch.setattr(aggregate, "GROUP_BYTES", int(2.5 * size))
    groups = aggregate.group(found)
    assert [len(g) for g in groups] == [2, 2, 2]
    assert [t for g in groups for t in g] == found
    assert aggregate.group([]) == []


def test_a_table_that_lost_rows_is_refused(tmp_path):
    rng = np.random.default_rng(4)
    table = write(tmp_path, make_rows(rng, np.array(["a", "b"]), 0), 0)
    with pytest.raises(FrameError, match="has 2 rows, 3 were measured"):
        aggregate.read_tables([aggregate.Table(path=table.path, rows=3)])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
    partition = aggregate.read_tables([write(folder, rows, 0)])
    assert sorted(partition["target_id"]) == sorted(set(ids))
    assert partition["rows"].sum() == len(ids)
    (folder / "lc").mkdir()
    written = aggregate.write_lightcurves(partition, folder=str(folder / "lc"), buckets=None)
    assert sorted(written["target_id"]) == sorted(set(ids))
    files = list((folder / "lc").iterdir())
    assert len(files) == len(set(ids))
    assert sum(len(p.read_text().splitlines()) - 1 for p in files) == len(ids)


def test_empty_partition(tmp_path):
    partition = aggregate.META
    written = aggregate.write_lightcurves(partition, folder=str(tmp_path), buckets=None)
    assert len(written) == 0
    assert list(written.columns) == ["target_id", "rows"]
    assert list(tmp_path.iterdir()) == []


def test_keep_only_spares_what_is_not_ours(tmp_path):
    ours = tables.csv_header(tables.LIGHT_CURVE)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(ours + b"x\n")
    (tmp_path / "star.csv").write_text("ra,dec\n1,2\n")
    (tmp_path / "notes.txt").write_bytes(ours)
    (tmp_path / "folder").mkdir()
    missing = aggregate.keep_only(str(tmp_path), {"a.csv", "c.csv"}, aggregate.is_light_curve)
    assert missing == {"c.csv"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.csv", "star.csv", "notes.txt", "folder"}


def test_table_of_another_kind_is_named(tmp_path):
    (tmp_path / "x_photometry.csv").write_text("a,b\n1,2\n")
    table = aggregate.Table(path=str(tmp_path / "x_photometry.csv"), rows=None)
    with pytest.raises(FrameError, match=r"x_photometry.csv is not a per-image table"):
        aggregate.read_tables([table])
