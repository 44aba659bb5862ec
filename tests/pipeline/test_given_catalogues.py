"""Runs over catalogues that are no plain CSV file: objects, pipes, folders; and their rows."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from astropy.coordinates import SkyCoord
from astropy.table import Table
from outputs import output_of, read_files

from spxdask import BatchConfig, BatchPipeline, run_batch
from spxdask.cli import main
from spxdask.errors import CatalogueError, ConfigError
from spxdask.run.folder import RunFolder
from spxdask.run.status import read_status


@pytest.fixture
def no_cluster(monkeypatch):
    """Fail a test that starts a cluster."""

    def fail(*_, **__):
        pytest.fail("a cluster was started")

    monkeypatch.setattr("spxdask.cluster.session.embedded_client", fail)


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return shutil.copytree(output_of(finished).path, tmp_path / "out")


@pytest.fixture
def table(survey) -> pd.DataFrame:
    return pd.DataFrame({"name": survey.ids, "RAJ2000": survey.sky.ra, "DEJ2000": survey.sky.dec})


def assert_nothing_was_done(summary) -> None:
    assert (summary.stages["extract"].done, summary.stages["extract"].reused) == (0, 6)
    assert summary.stages["aggregate"].done == 0


OBJECTS = {
    "DataFrame": lambda table: table,
    "Table": Table.from_pandas,
    "index": lambda table: table.set_index("name"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_are_kept_and_resumed(finished, table, output, no_cluster, kind, tmp_path):
    before = read_files(output / "lightcurves")
    config = replace(finished.config, output_dir=output, catalog_path=OBJECTS[kind](table))
    pipeline = BatchPipeline(config)
    # The same sources as in the CSV file, so that all of it is up to date.
    assert_nothing_was_done(pipeline.run_all())
    kept = output / "state" / "given_catalogue.parquet"
    assert pipeline.config.catalog_path == str(kept)
    assert pipeline.catalogue.fingerprint == finished.catalogue.fingerprint
    assert_nothing_was_done(BatchPipeline(config).run_all())
    # Another process, and a folder that was moved.
    moved = shutil.move(output, tmp_path / "moved")
    saved = RunFolder(moved).saved_config()
    assert saved.catalog_path == str(moved / "state" / "given_catalogue.parquet")
    resumed = BatchPipeline(saved)
    assert resumed.catalogue.fingerprint == finished.catalogue.fingerprint
    assert_nothing_was_done(resumed.run_all())
    assert read_files(moved / "lightcurves") == before


def test_stages_by_themselves_keep_an_object(finished, table, output, no_cluster):
    config = replace(finished.config, output_dir=output, catalog_path=table)
    for stage in ("run_download", "run_extract", "run_aggregate"):
        shutil.rmtree(output / "state" / "given_catalogue.parquet", ignore_errors=True)
        getattr(BatchPipeline(config), stage)()
        saved = RunFolder(output).saved_config()
        assert BatchPipeline(saved).catalogue.fingerprint == finished.catalogue.fingerprint


def test_coordinates_have_their_place_as_id(finished, survey, output, client):
    coordinates = SkyCoord(survey.sky.ra, survey.sky.dec, unit="deg").galactic
    config = replace(finished.config, output_dir=output, catalog_path=coordinates)
    summary = BatchPipeline(config, client=client).run_all()
    assert summary.n_measured == finished.summary.n_measured
    ids = {path.stem for path in (output / "lightcurves").iterdir()}
    assert ids <= {str(i) for i in range(len(coordinates))}


def test_the_first_argument_may_be_a_file_or_a_table(finished, table, output, no_cluster, tmp_path):
    options = {
        name: value
        for name, value in finished.config.to_dict().items()
        if name not in ("catalog_path", "output_dir")
    } | {"output_dir": output, "progress": False}
    csv = finished.config.catalog_path
    assert_nothing_was_done(run_batch(csv, **options).summary)
    assert_nothing_was_done(run_batch(Path(csv), **options).summary)
    assert_nothing_was_done(run_batch(table, **options).summary)
    assert_nothing_was_done(run_batch(catalog=table, **options).summary)
    path = tmp_path / "run.yaml"
    finished.config.to_yaml(path)
    assert_nothing_was_done(run_batch(path, output_dir=output, progress=False).summary)
    replace(finished.config, output_dir=output).to_yaml(path)
    assert_nothing_was_done(run_batch(str(path), progress=False).summary)
    with pytest.raises(ConfigError, match="given twice"):
        run_batch(csv, catalog=table, **options)
    with pytest.raises(ConfigError, match="same option"):
        run_batch(catalog_path=csv, catalog=table, **options)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        run_batch(tmp_path / "none.yaml")
    path.write_text("radius: -1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: radius must be"):
        run_batch(path)


def test_a_folder_of_a_version_without_these_options_resumes(finished, output, no_cluster):
    path = output / "state" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for name in ("id_column", "ra_column", "dec_column", "on_bad_row"):
        del values[name]
    path.write_text(yaml.safe_dump(values))
    config = replace(RunFolder(output).saved_config(), output_dir=output)
    assert config == replace(finished.config, output_dir=str(output))
    assert_nothing_was_done(BatchPipeline(config).run_all())


def test_skipped_rows_are_counted_and_listed(finished, table, output, no_cluster, tmp_path):
    table.loc[len(table)] = ['lost, "one"', float("nan"), 1.0]
    table.loc[len(table)] = [None, 1.0, 1.0]
    table.to_csv(tmp_path / "x.csv", index=False, quoting=csv.QUOTE_ALL)
    for catalogue in (table, tmp_path / "x.csv"):
        config = replace(finished.config, output_dir=output, catalog_path=catalogue)
        with pytest.raises(CatalogueError, match="targetid is empty"):
            BatchPipeline(config).run_all()
        config = replace(config, on_bad_row="skip")
        summary = BatchPipeline(config).run_all()
        assert_nothing_was_done(summary)
        assert summary.stages["query"].skipped_sources == 2
        assert "2 rows of the catalogue skipped, see skipped_rows.csv" in str(summary)
        listed = pd.read_csv(output / "skipped_rows.csv")
        assert listed["target_id"].tolist()[:1] == ['lost, "one"']
        assert listed["reason"].tolist() == ["ra is missing", "targetid is empty"]
        assert read_status(output).skipped_sources == 2
        # A later stage that reads what was kept of an object does not forget them.
        BatchPipeline(RunFolder(output).saved_config()).run_extract()
        assert read_status(output).skipped_sources == 2
    assert_nothing_was_done(BatchPipeline(replace(finished.config, output_dir=output)).run_all())
    assert not (output / "skipped_rows.csv").exists()
    assert read_status(output).skipped_sources == 0


def test_columns_that_are_named_on_the_command_line(finished, table, output, tmp_path, capfd):
    table.rename(columns={"name": "n", "RAJ2000": "x", "DEJ2000": "y"}).to_csv(
        tmp_path / "x.csv", index=False, quoting=csv.QUOTE_ALL
    )
    config = tmp_path / "run.yaml"
    replace(finished.config, output_dir=output).to_yaml(config)
    command = ["run", "--config", str(config), "--catalog", "PATH"]
    command += ["--id-column", "n", "--ra-column", "x", "--dec-column", "y"]
    # As a file, as a pipe of the shell, and as the standard input.
    ways = [tmp_path / "x.csv", tmp_path / "pipe", "-"]
    os.mkfifo(ways[1])
    content = (tmp_path / "x.csv").read_bytes()
    for path in ways:
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        if path == ways[1]:
            writer.start()
        arguments = [str(path) if part == "PATH" else part for part in command]
        if path == ways[2]:
            # Only a process of its own has a standard input of its own.
            ended = subprocess.run(
                [sys.executable, "-m", "spxdask", *arguments],
                input=content,
                capture_output=True,
                check=False,
            )
            status, out = ended.returncode, ended.stdout.decode()
        else:
            status, out = main(arguments), capfd.readouterr().out
        if path == ways[1]:
            writer.join()
        assert status == 0
        assert "(already there)" in out
        saved = RunFolder(output).saved_config()
        is_kept = path != ways[0]
        assert (Path(saved.catalog_path).name == "given_catalogue.parquet") == is_kept
        assert saved.id_column == (None if is_kept else "n")
        assert BatchPipeline(saved).catalogue.fingerprint == finished.catalogue.fingerprint
        other = BatchConfig.from_yaml(output / "state" / "config.yaml")
        assert other.catalog_path == saved.catalog_path
