"""Per-image tables and light curves in CSV and Parquet hold the same."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import dask.bag
import dask.dataframe
import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.cli import main
from spxdask.errors import ConfigError, MissingExtraError, RunFolderError
from spxdask.run.status import read_status
from spxdask.tables.csv import read_csv
from spxdask.tables.parquet import encode_parquet
from spxdask.tables.schema import LIGHT_CURVE, SCHEMA, SORT_KEYS


def test_parquet_tables_hold_the_same_as_csv_tables(finished, finished_parquet):
    texts = sorted(output_of(finished).per_image.iterdir())
    tables = sorted(output_of(finished_parquet).per_image.iterdir())
    assert len(texts) == len(tables) == 6
    releases = {}
    for text, table in zip(texts, tables, strict=True):
        assert table.name == f"{text.stem}.parquet"
        assert pq.read_table(table).equals(read_csv(text))
        about = json.loads(pq.read_metadata(table).metadata[b"spxdask"])
        releases[table.name] = about["releases"]
    assert sorted(releases.values()) == [["qr2"]] * 4 + [["qr3"]] * 2
    report, other = finished_parquet.summary.stages["extract"], finished.summary.stages["extract"]
    assert (report.done, report.rows, report.skipped) == (other.done, other.rows, other.skipped)
    assert report.bytes == sum(path.stat().st_size for path in tables)


def test_light_curves_do_not_depend_on_the_format_of_the_tables(finished, make_config, client):
    pipeline = BatchPipeline(make_config(per_image_format="parquet"), client=client)
    assert pipeline.run_all().stages["extract"].done == 6
    assert {path.suffix for path in output_of(pipeline).per_image.iterdir()} == {".parquet"}
    curves = read_files(output_of(finished).lightcurves)
    assert read_files(output_of(pipeline).lightcurves) == curves
    # The tables alone are enough.
    for name in ("state", "lightcurves"):
        shutil.rmtree(output_of(pipeline).path / name)
    BatchPipeline(pipeline.config, client=client).run_aggregate()
    # But for the releases, which only the query knows.
    unknown = {name: re.sub(rb",qr[23]\n", b",\n", text) for name, text in curves.items()}
    assert read_files(output_of(pipeline).lightcurves) == unknown != curves


def test_parquet_light_curves_hold_the_same_as_csv_light_curves(
    finished, finished_parquet, all_curves
):
    files = sorted(output_of(finished_parquet).lightcurves.iterdir())
    assert [path.name for path in files] == [f"bucket-{n:05d}.parquet" for n in range(5)]
    found = [pq.read_table(path) for path in files]
    schema = pa.schema([SCHEMA.field(name) for name in ("target_id", *LIGHT_CURVE)])
    assert [table.schema for table in found] == [schema] * 5
    for table in found:
        keys = [tuple(row.values()) for row in table.select(SORT_KEYS).to_pylist()]
        assert keys == sorted(keys)
    ids = [set(table.column("target_id").to_pylist()) for table in found]
    assert sum(map(len, ids)) == len(set.union(*ids))
    together = pa.concat_tables(found).sort_by([(name, "ascending") for name in SORT_KEYS])
    assert together.equals(all_curves)
    assert finished_parquet.summary.n_measured == finished.summary.n_measured
    assert finished_parquet.summary.stages["aggregate"].rows == len(all_curves)
    # They are the partitions that a run with CSV light curves can keep.
    assert read_files(output_of(finished_parquet).lightcurves) == read_files(
        output_of(finished).buckets
    )


def with_pandas(folder: Path) -> pa.Table:
    return pa.Table.from_pandas(pd.read_parquet(folder), preserve_index=False)


def with_dask(folder: Path) -> pa.Table:
    frame = dask.dataframe.read_parquet(folder).compute(scheduler="sync")
    return pa.Table.from_pandas(frame, preserve_index=False)


def with_polars(folder: Path) -> pa.Table:
    return polars.read_parquet(folder).to_arrow()


def with_duckdb(folder: Path) -> pa.Table:
    with duckdb.connect() as database:
        return database.read_parquet(f"{folder}/*.parquet").to_arrow_table()


# Dask calls pandas with an argument that the newest pandas deprecates.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")
@pytest.mark.parametrize("read", [with_pandas, with_dask, with_polars, with_duckdb])
def test_parquet_light_curves_are_one_dataset(finished_parquet, all_curves, read):
    found = read(output_of(finished_parquet).lightcurves)
    assert found.column_names == all_curves.column_names
    for name in found.column_names:
        kind, expected = found.schema.field(name).type, all_curves.schema.field(name).type
        # Libraries differ in the type of text.
        text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        assert kind == expected or (text and pa.types.is_string(expected)), name
    found = found.cast(all_curves.schema)
    assert found.sort_by([(name, "ascending") for name in SORT_KEYS]).equals(all_curves)


def test_status_counts_the_sources_of_parquet_light_curves(finished, finished_parquet, capsys):
    found, other = (
        read_status(output_of(finished_parquet).path),
        read_status(output_of(finished).path),
    )
    assert found.lightcurves == other.lightcurves == finished_parquet.summary.n_measured > 5
    assert (found.measured, found.pending, found.rows) == (6, 0, other.rows)
    assert main(["status", str(output_of(finished_parquet).path)]) == 0
    assert f"aggregate   {found.lightcurves} light curves\n" in capsys.readouterr().out


def test_parquet_light_curves_are_the_same_bytes_in_each_run(
    finished_parquet, make_config, client, tmp_path
):
    expected = read_files(output_of(finished_parquet).lightcurves)
    copy = shutil.copytree(output_of(finished_parquet).path, tmp_path / "copy")
    for path in (copy / "lightcurves").iterdir():
        path.unlink()
    pipeline = BatchPipeline(replace(finished_parquet.config, output_dir=copy), client=client)
    assert pipeline.run_all().stages["extract"].reused == 6
    assert read_files(copy / "lightcurves") == expected
    # Light curves in other partitions replace all files of the earlier ones.
    config = make_config(lightcurve_format="parquet", num_buckets=2)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    first = read_files(output_of(pipeline).lightcurves)
    assert len(first) == 2
    pipeline = BatchPipeline(replace(config, num_buckets=5), client=client)
    pipeline.run_aggregate()
    assert read_files(output_of(pipeline).lightcurves) == expected
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_aggregate()
    assert read_files(output_of(pipeline).lightcurves) == first


@pytest.mark.parametrize("keep", [False, True])
def test_light_curves_in_another_format_replace_the_old(
    finished, finished_parquet, make_config, client, archive, keep
):
    config = make_config(keep_bucket_files=keep)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    folder = output_of(pipeline).lightcurves
    users = {
        "notes.txt": b"mine",
        "star.csv": b"a,b\n1,2\n",
        "stars.parquet": encode_parquet(pa.table({"a": [1]})),
    }
    for name, content in users.items():
        (folder / name).write_bytes(content)
    n_requests = len(archive.requests)
    kept = read_files(output_of(finished).buckets) if keep else None
    runs = {"csv": finished, "parquet": finished_parquet}
    for how in ("parquet", "csv", "parquet"):
        expected = runs[how]
        pipeline = BatchPipeline(replace(config, lightcurve_format=how), client=client)
        summary = pipeline.run_all()
        assert summary.stages["extract"].reused == 6
        assert summary.n_measured == expected.summary.n_measured
        assert read_files(folder) == read_files(output_of(expected).lightcurves) | users
        if keep:
            assert read_files(output_of(pipeline).buckets) == kept
    assert {r.path for r in archive.requests[n_requests:]} == {"/TAP/sync"}


def test_tables_in_another_format_are_measured_again(
    finished, finished_parquet, make_config, client, archive
):
    config = make_config()
    BatchPipeline(config, client=client).run_all()
    n_requests = len(archive.requests)
    for how, expected in (("parquet", finished_parquet), ("csv", finished)):
        pipeline = BatchPipeline(replace(config, per_image_format=how), client=client)
        summary = pipeline.run_all()
        assert (summary.stages["extract"].done, summary.stages["extract"].reused) == (6, 0)
        assert read_files(output_of(pipeline).lightcurves) == read_files(
            output_of(finished).lightcurves
        )
        tables = read_files(output_of(pipeline).per_image)
        assert read_files(output_of(expected).per_image).items() <= tables.items()
        assert read_status(output_of(pipeline).path).measured == 6
        # Now they are current.
        assert BatchPipeline(pipeline.config, client=client).run_extract().reused == 6
    # The images that were kept are measured, and not fetched again.
    assert {r.path for r in archive.requests[n_requests:]} == {"/TAP/sync"}


def test_light_curves_stay_without_tables_in_the_new_format(finished, make_config, client):
    config = make_config()
    BatchPipeline(config, client=client).run_all()
    other = BatchPipeline(replace(config, per_image_format="parquet"), client=client)
    with pytest.raises(RunFolderError, match="run extract first"):
        other.run_aggregate()
    assert read_files(output_of(other).lightcurves) == read_files(output_of(finished).lightcurves)


@pytest.mark.filterwarnings("ignore")
def test_a_catalogue_for_lsdb_beside_the_light_curves(
    finished, finished_parquet, make_config, client, tmp_path
):
    lsdb = pytest.importorskip("lsdb", exc_type=ImportError)
    copy = shutil.copytree(output_of(finished).path, tmp_path / "copy")
    config = replace(finished.config, output_dir=copy, lightcurve_format="hats")
    # What a run left behind that was killed while it wrote.
    (copy / ".hats.x.part" / "catalogue").mkdir(parents=True)
    report = BatchPipeline(config, client=client).run_aggregate()
    assert report.total == finished.summary.n_measured
    assert read_files(copy / "lightcurves") == read_files(output_of(finished_parquet).lightcurves)
    catalog = lsdb.open_catalog(copy / "hats").compute(progress_bar=False)
    assert len(catalog) == report.total
    assert catalog["points"].sum() == report.rows
    assert not list(copy.glob(".hats*"))
    files = {path: path.read_bytes() for path in (copy / "hats").rglob("*") if path.is_file()}
    # Nothing is left to do, until it is gone; then it is the same bytes.
    assert BatchPipeline(config, client=client).run_aggregate().reused == report.total
    shutil.rmtree(copy / "hats")
    assert BatchPipeline(config, client=client).run_aggregate().done == report.total
    assert {path: path.read_bytes() for path in files} == files
    # Light curves in another format are not those of the catalogue.
    BatchPipeline(replace(config, lightcurve_format="csv"), client=client).run_aggregate()
    assert not (copy / "hats").exists()
    assert read_files(copy / "lightcurves") == read_files(output_of(finished).lightcurves)
    # What is not ours stays.
    (copy / "hats").mkdir()
    (copy / "hats" / "mine").write_bytes(b"")
    with pytest.raises(RunFolderError, match="is in the way of the HATS catalogue: move it"):
        BatchPipeline(config, client=client).run_aggregate()
    assert (copy / "hats" / "mine").exists()


def test_a_missing_library_is_said_before_the_run(make_config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hats.io", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spxdask\[hats\]'"):
        BatchPipeline(make_config(lightcurve_format="hats")).run_query()
    with pytest.raises(ConfigError, match="needs an output_dir on disk"):
        make_config(lightcurve_format="hats", output_dir="s3://bucket/run")
