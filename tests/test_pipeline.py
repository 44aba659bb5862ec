"""Whole runs on a Dask cluster, against the embedded archive."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import dask.bag
import dask.dataframe
import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated
import yaml
from astropy.io import fits
from distributed import Client, Future, KilledWorker

from spxdask import BatchConfig, BatchPipeline, PhotometryConfig, load_query_summary, run_batch
from spxdask.archive.observation import Observation
from spxdask.cli import main
from spxdask.cluster import shuffle
from spxdask.errors import (
    ClusterError,
    ConfigError,
    DiskFullError,
    FrameError,
    InputError,
    RunFolderError,
)
from spxdask.progress import Silent
from spxdask.run.folder import RunFolder
from spxdask.run.status import status
from spxdask.science.sphere import angular_distance
from spxdask.simulate.archive import Fault, SimulatedArchive
from spxdask.stages.aggregate import light_curve_name
from spxdask.stages.extract import table_name
from spxdask.storage import open_store
from spxdask.tables.csv import read_csv
from spxdask.tables.parquet import encode_parquet
from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE, SCHEMA, SORT_KEYS

IDS = [
    "39633458707826492",
    "39633458707826493",
    "a/b",
    "../../etc/passwd",
    ".hidden",
    'quo"te, comma',
    "line\nfeed",
    "100%",
    "=cmd()|' /C calc'!A0",
    "bell\a\x01\x7f\r",
    "é" * 150,
    "007",
    "7",
    "7.0",
    "NA",
]


PLACES = {
    *("images", "per_image", "lightcurves", "buckets", "state"),
    "query_summary.yaml",
}


def all_ids(sky) -> list[str]:
    return IDS + [f"s{i}" for i in range(len(sky) - len(IDS))]


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Six frames, one of them also in the older release, and a sky."""
    sky = simulated.field_sky()
    newer = {"release": "qr3", "version": 30, "year": 2026, "day": 90}
    exposures = [
        simulated.exposure(0, 3),
        simulated.exposure(0, 6),
        simulated.exposure(1, 3),
        simulated.exposure(2, 4, **newer),
        simulated.exposure(3, 1),
        simulated.exposure(4, 3, **newer),
        simulated.exposure(4, 3),
    ]
    return sky, simulated.simulate(tmp_path_factory.mktemp("archive"), exposures, sky)


@pytest.fixture(scope="module")
def archive(survey):
    with SimulatedArchive([frame.archived for frame in survey[1]]) as archive:
        yield archive


@pytest.fixture
def make_config(survey, archive, tmp_path):
    sky = survey[0]
    catalogue = simulated.write_catalogue(tmp_path / "sources.csv", all_ids(sky), sky.ra, sky.dec)

    def make(**options) -> BatchConfig:
        defaults = simulated.run_options(catalogue, archive, tmp_path / "out")
        return BatchConfig(**(defaults | options))

    return make


def contents(folder) -> dict[str, bytes]:
    store = open_store(folder)
    return {name: store.get(name) for name in store.list_names()}


def per_image(pipeline) -> pd.DataFrame:
    tables = [
        pd.read_csv(path, dtype={"target_id": str}, keep_default_na=False, na_values={"flux": [""]})
        for path in sorted(pipeline.folder.per_image.local_path.glob("*.csv"))
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def run_in(survey, archive, client):
    """Make one full run in a folder."""

    def run(folder: Path, **options) -> BatchPipeline:
        sky = survey[0]
        catalogue = simulated.write_catalogue(folder / "sources.csv", all_ids(sky), sky.ra, sky.dec)
        config = BatchConfig(
            catalog_path=catalogue,
            center_ra=simulated.CENTER[0],
            center_dec=simulated.CENTER[1],
            radius=0.05,
            output_dir=folder / "out",
            num_buckets=5,
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
            **options,
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
        return pipeline

    return run


@pytest.fixture(scope="module")
def finished(run_in, tmp_path_factory):
    """One full run, to look at from all sides."""
    return run_in(tmp_path_factory.mktemp("finished"), keep_bucket_files=True)


def test_all_frames_are_found_once_and_measured(finished, survey):
    _, frames = survey
    newest = {f.exposure.filename for f in frames[:6]}
    assert {p.name for p in finished.folder.images.local_path.iterdir()} == newest
    summary = finished.summary
    assert summary.stages["query"].total == 6
    assert summary.stages["download"].done == 6
    assert summary.stages["extract"].done == 6
    assert summary.failed == {}
    rows = per_image(finished)
    assert summary.stages["extract"].rows == len(rows) > 40
    assert tuple(rows.columns) == PER_IMAGE
    assert summary.n_measured == rows["target_id"].nunique()
    assert summary.n_measured < summary.n_sources == len(survey[0])
    # Ids are what they were, and none leads out of the folder.
    ids = all_ids(survey[0])
    assert {ids.index(target) for target in rows["target_id"]} > set(range(len(IDS)))
    assert {p.name for p in finished.folder.root.local_path.iterdir()} == PLACES
    assert {p.name for p in finished.folder.root.local_path.parent.iterdir()} == {
        "out",
        "sources.csv",
    }
    for frame in frames[:6]:
        one = rows[rows["filename"] == frame.exposure.filename]
        assert set(one["band"]) == {frame.exposure.band}
        assert set(one["obs_id"]) == {frame.exposure.obs_id}
        np.testing.assert_array_equal(
            one["mjd"].unique(), [(frame.exposure.mjd_begin + frame.exposure.mjd_end) / 2]
        )


def test_recovered_flux_is_the_injected_one(finished, survey):
    sky, frames = survey
    rows = per_image(finished)
    ids = all_ids(sky)
    pulls = []
    for frame in frames[:6]:
        truth = pd.DataFrame(
            {
                "target_id": [ids[i] for i in frame.planes.source],
                "true_x": frame.planes.x,
                "true_wavelength": frame.planes.wavelength_um,
                "injected": frame.planes.flux_ujy,
            }
        )
        both = rows[rows["filename"] == frame.exposure.filename].merge(truth, on="target_id")
        np.testing.assert_allclose(both["x"], both["true_x"], atol=1e-6)
        np.testing.assert_allclose(both["wavelength"], both["true_wavelength"], atol=1e-4)
        # Nearly all of the light is in the aperture of 2.1 pixels' diameter, 85 % of it.
        ratio = both["flux"] / both["injected"]
        assert 0.8 < ratio.median() < 0.9
        pulls.append(ratio)
    assert np.concatenate(pulls).std() < 0.1


def test_light_curves_are_the_tables_regrouped(finished):
    rows = per_image(finished)
    names = set()
    for target, expected in rows.groupby("target_id"):
        expected = expected.sort_values(["mjd", "obs_id", "band"])
        name = light_curve_name(target)
        names.add(name)
        curve = pd.read_csv(finished.folder.lightcurves.local_path / name)
        assert tuple(curve.columns) == LIGHT_CURVE
        assert curve["obs_id"].tolist() == expected["obs_id"].tolist()
        for column in ("mjd", "x", "flux", "bg_level", "flag", "wavelength"):
            np.testing.assert_array_equal(
                curve[column].to_numpy(float), expected[column].to_numpy(float)
            )
    assert {p.name for p in finished.folder.lightcurves.local_path.iterdir()} == names
    assert len(names) == rows["target_id"].nunique()
    assert "39633458707826492.csv" in names


def test_bucket_files_hold_the_sorted_partitions(finished):
    rows = per_image(finished)
    buckets = [
        pd.read_parquet(p) for p in sorted(finished.folder.buckets.local_path.glob("*.parquet"))
    ]
    assert len(buckets) == 5
    assert sum(map(len, buckets)) == len(rows)
    seen = [set(b["target_id"]) for b in buckets]
    assert sum(map(len, seen)) == len(set.union(*seen))
    for bucket in buckets:
        keys = bucket[["target_id", "mjd", "obs_id", "band"]].apply(tuple, axis=1).tolist()
        assert keys == sorted(keys)


def test_query_summary(finished):
    summary = load_query_summary(finished.config.output_dir)
    assert summary == load_query_summary(finished.folder.root.path_to("query_summary.yaml"))
    assert summary["region"] == {
        "center_ra": 270.0,
        "center_dec": 66.56,
        "radius_deg": 0.05,
        "coverage_mode": "any",
    }
    assert summary["filters"]["bands"] is None
    assert summary["n_observations"] == 6
    assert summary["band_counts"] == {"D1": 1, "D3": 3, "D4": 1, "D6": 1}
    assert summary["time_span_days"] == pytest.approx(4.0)
    one = summary["observations"][0]
    assert list(one) == ["obs_id", "band", "mjd", "wavelength_um", "download_url"]
    assert one["mjd"] == round(one["mjd"], 6)
    assert {o["wavelength_um"] for o in summary["observations"] if o["band"] == "D3"} == {2.02}
    assert one["download_url"].startswith(finished.config.archive_url + "/ibe/data/spherex/")
    with pytest.raises(RunFolderError, match="no readable query summary"):
        load_query_summary("/nowhere/at/all")


def test_observations_are_a_bag(finished):
    assert isinstance(finished.observations, dask.bag.Bag)
    found = finished.observations.compute(scheduler="sync")
    assert all(isinstance(o, Observation) for o in found)
    assert len(found) == 6
    assert finished.images.count().compute(scheduler="sync") == 6


def test_dashboard_names_read_as_the_pipeline_does(finished, client):
    prefixes = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert {"query", "download-extract", "write-lightcurves"} <= prefixes
    assert any(prefix.startswith("shuffle") for prefix in prefixes)
    tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    assert tasks == 0


def test_running_again_does_nothing_twice(finished, client, archive):
    before = contents(finished.folder.lightcurves)
    tables = {p: p.stat().st_mtime_ns for p in finished.folder.per_image.local_path.iterdir()}
    asked = len(archive.requests)
    again = BatchPipeline(finished.config, client=client)
    summary = again.run_all()
    assert summary.stages["download"].reused == 6
    assert summary.stages["extract"].reused == 6
    assert summary.stages["extract"].done == 0
    assert summary.stages["extract"].rows == finished.summary.stages["extract"].rows
    assert {
        p: p.stat().st_mtime_ns for p in finished.folder.per_image.local_path.iterdir()
    } == tables
    assert contents(finished.folder.lightcurves) == before
    assert [r.path for r in archive.requests[asked:]] == ["/TAP/sync"]


def test_stage_by_stage_is_the_same_run(finished, make_config, client):
    pipeline = BatchPipeline(make_config(keep_bucket_files=True), client=client)
    pipeline.run_query()
    assert (pipeline.run_download().done, pipeline.run_extract().done) == (6, 6)
    pipeline.run_aggregate()
    prefixes = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert {"download", "extract"} <= prefixes
    for folder in ("images", "per_image", "lightcurves", "buckets"):
        ours, theirs = (contents(getattr(p.folder, folder)) for p in (pipeline, finished))
        assert ours == theirs, folder


def test_images_that_are_not_kept(finished, make_config, client, archive):
    pipeline = BatchPipeline(make_config(keep_images=False), client=client)
    with pytest.raises(ConfigError, match="keep_images is false"):
        pipeline.run_download()
    asked = len(archive.requests)
    summary = pipeline.run_all()
    assert not summary.failed
    assert len(archive.requests) - asked == 1 + 6
    assert summary.stages["download"].bytes == finished.summary.stages["download"].bytes
    assert contents(pipeline.folder.lightcurves) == contents(finished.folder.lightcurves)
    assert list(pipeline.folder.images.local_path.iterdir()) == []
    # What is measured is not fetched again, unless it is to be kept.
    summary = pipeline.run_all()
    assert (summary.stages["download"].done, summary.stages["extract"].reused) == (0, 6)
    kept = BatchPipeline(make_config(), client=client).run_all()
    assert (kept.stages["download"].done, kept.stages["extract"].reused) == (6, 6)
    assert contents(pipeline.folder.images) == contents(finished.folder.images)
    # Frames that are there are used, and left there.
    tables = sorted(pipeline.folder.per_image.local_path.iterdir())
    tables[0].unlink()
    asked = len(archive.requests)
    summary = BatchPipeline(make_config(keep_images=False), client=client).run_all()
    assert (summary.stages["download"].reused, summary.stages["extract"].done) == (6, 1)
    assert len(archive.requests) - asked == 1
    assert len(list(pipeline.folder.images.local_path.iterdir())) == 6


def test_other_options_and_catalogues_never_mix(make_config, client):
    first = BatchPipeline(make_config(), client=client)
    first.run_all()
    old = contents(first.folder.lightcurves)

    fixed = make_config(photometry=PhotometryConfig(aperture_method="fixed"))
    second = BatchPipeline(fixed, client=client)
    with pytest.raises(RunFolderError, match="6 per-image tables are not those of this catalogue"):
        second.run_aggregate()
    assert contents(first.folder.lightcurves) == old
    assert second.run_extract().done == 6
    second.run_aggregate()
    assert set(per_image(second)["aperture_radius"]) == {1.5}

    rows = per_image(second)
    few = rows["target_id"].unique()[:3]
    places = rows.drop_duplicates("target_id").set_index("target_id").loc[few]
    simulated.write_catalogue(fixed.catalog_path, few, places["ra"], places["dec"])
    third = BatchPipeline(fixed, client=client)
    summary = third.run_all()
    assert summary.stages["extract"].done == 6
    assert summary.n_sources == summary.n_measured == 3
    # Nothing is left of the sources that are gone.
    assert len(list(third.folder.lightcurves.local_path.iterdir())) == 3


def test_a_frame_that_fails_does_not_hold_up_new_options(make_config, client):
    first = BatchPipeline(make_config(), client=client)
    rows = first.run_all().stages["extract"].rows
    broken = next(first.folder.images.local_path.iterdir())
    data = bytearray(broken.read_bytes())
    data[:2880] = bytes(2880)
    broken.write_bytes(data)
    fixed = make_config(photometry=PhotometryConfig(aperture_method="fixed"))
    second = BatchPipeline(fixed, client=client)
    summary = second.run_all()
    assert list(summary.failed) == [broken.name]
    assert 0 < summary.stages["aggregate"].rows < rows
    # The next run fetches it again.
    assert BatchPipeline(fixed, client=client).run_all().stages["aggregate"].rows == rows


def test_a_table_that_was_changed_is_made_again(make_config, client):
    pipeline = BatchPipeline(make_config(), client=client)
    pipeline.run_all()
    before = contents(pipeline.folder.lightcurves)
    table = max(
        pipeline.folder.per_image.local_path.iterdir(), key=lambda path: path.stat().st_size
    )
    table.write_bytes(table.read_bytes()[:1000])
    with pytest.raises(RunFolderError, match=f"{table.name} for one: run extract first"):
        pipeline.run_aggregate()
    assert pipeline.run_all().stages["extract"].done == 1
    assert contents(pipeline.folder.lightcurves) == before


def test_files_of_the_user_stay(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    (pipeline.folder.lightcurves.local_path / "notes.txt").write_text("mine")
    (pipeline.folder.lightcurves.local_path / "star.csv").write_text("a,b\n1,2\n")
    curves = contents(pipeline.folder.lightcurves)
    pipeline.run_aggregate()
    assert contents(pipeline.folder.lightcurves) == curves
    # Finding nothing is a mistake more often than not.
    BatchPipeline(make_config(center_dec=-60.0), client=client).run_all()
    assert contents(pipeline.folder.lightcurves) == curves


def test_two_runs_in_one_folder(make_config, client):
    pipeline = BatchPipeline(make_config(), client=client)
    said = f"another run is at work .*process {os.getpid()}"
    with pipeline.folder.locked(), pytest.raises(RunFolderError, match=said):
        BatchPipeline(make_config(), client=client).run_query()
    assert BatchPipeline(make_config(), client=client).run_query()


@pytest.mark.parametrize("unit", ["frames", "buckets"])
def test_a_run_that_another_took_over_from_stops(make_config, client, unit):
    class Takes(Silent):
        def start(self, stage, total, unit_):
            if unit_ == unit:
                pipeline.folder.lock._lost.set()

    pipeline = BatchPipeline(make_config(), client=client, progress=Takes())
    with pytest.raises(RunFolderError, match="another run has taken over"):
        pipeline.run_all()
    assert BatchPipeline(make_config(), client=client).run_all().failed == {}


def test_stages_of_another_query_are_refused(make_config, client):
    BatchPipeline(make_config(bands=["D3"]), client=client).run_query()
    other = BatchPipeline(make_config(bands=["D4"]), client=client)
    with pytest.raises(RunFolderError, match=r"found with bands \['D3'\], the configuration says"):
        other.run_download()


def test_client_that_is_not_the_default(make_config, client):
    with Client(client.scheduler.address, set_as_default=False) as own:
        assert BatchPipeline(make_config(bands=["D6"]), client=own).run_all().n_measured > 0


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_frame_without_sources_leaves_a_table_without_rows(make_config, client, tmp_path, how):
    catalogue = simulated.write_catalogue(tmp_path / "off.csv", ["off"], [270.0], [70.5])
    formats = {"per_image_format": how, "lightcurve_format": how}
    config = make_config(catalog_path=catalogue, bands=["D1"], **formats)
    pipeline = BatchPipeline(config, client=client)
    summary = pipeline.run_all()
    (table,) = pipeline.folder.per_image.local_path.iterdir()
    if how == "csv":
        assert table.read_text() == ",".join(PER_IMAGE) + "\n"
        assert list(pipeline.folder.lightcurves.local_path.iterdir()) == []
    else:
        assert (pq.read_schema(table), len(pq.read_table(table))) == (SCHEMA, 0)
        assert len(pd.read_parquet(pipeline.folder.lightcurves.local_path)) == 0
    assert summary.stages["extract"].done == 1
    assert (summary.n_sources, summary.n_measured) == (1, 0)
    assert status(pipeline.folder.path).lightcurves == 0
    assert BatchPipeline(pipeline.config, client=client).run_extract().reused == 1


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_without_a_table_light_curves_stay(make_config, client, how):
    pipeline = BatchPipeline(make_config(bands=["D1"], lightcurve_format=how), client=client)
    assert pipeline.run_all().n_measured > 0
    curves = contents(pipeline.folder.lightcurves)
    # Another query, of which nothing is measured yet.
    other = BatchPipeline(make_config(bands=["D6"], lightcurve_format=how), client=client)
    other.run_query()
    with pytest.raises(RunFolderError, match="none of the 1 frames of the query is measured"):
        other.run_aggregate()
    assert contents(other.folder.lightcurves) == curves


def test_skip_existing_can_be_turned_off(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    before = contents(pipeline.folder.per_image)
    assert pipeline.run_extract(skip_existing=False).done == 1
    assert contents(pipeline.folder.per_image) == before


def test_one_bad_frame_does_not_cost_the_run(make_config, client, survey):
    lost, broken = survey[1][0].exposure, survey[1][2].exposure
    with SimulatedArchive(
        [f.archived for f in survey[1]], faults={lost.uri: [Fault(status=404)]}
    ) as archive:
        config = make_config(tap_url=archive.tap_url, archive_url=archive.archive_url)
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_query()
        pipeline.run_download()
        path = pipeline.folder.images.local_path / broken.filename
        data = bytearray(path.read_bytes())
        start = data.index(b"CTYPE1  = 'RA---TAN")
        data[start : start + 25] = b"CTYPE1  = 'GLON-TAN-SIP' "
        path.write_bytes(data)
        with pipeline:
            extracted = pipeline.run_extract()
        assert extracted.done == 4
        assert set(extracted.failed) == {lost.filename, broken.filename}
        assert "404" in extracted.failed[lost.filename]
        assert "celestial WCS" in extracted.failed[broken.filename]
        aggregated = pipeline.run_aggregate()
        assert aggregated.rows == extracted.rows > 0

        # The next run has what the archive did not give, and what broke here.
        assert not path.exists()
        assert path.with_name(f"{path.name}.unreadable").exists()
        summary = BatchPipeline(config, client=client).run_all()
    assert summary.failed == {}
    assert summary.stages["download"].done == 2
    assert summary.stages["extract"].done == 2


def test_archive_never_sees_more_connections_than_allowed(make_config, client, survey):
    with SimulatedArchive([f.archived for f in survey[1]], bandwidth=30_000_000) as archive:
        config = make_config(
            max_download_workers=2, tap_url=archive.tap_url, archive_url=archive.archive_url
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_query()
        assert pipeline.run_download().done == 6
        assert archive.peak_connections == 2


def test_embedded_cluster_and_plain_call(make_config):
    config = make_config(bands=["D3"], max_extract_workers=1, max_download_workers=2)
    state = (
        multiprocessing.get_start_method(),
        logging.getLogger().handlers[:],
        logging.getLogger("spxdask").handlers[:],
        warnings.filters[:],
        dict(os.environ),
    )
    pipeline = run_batch(
        catalog=config.catalog_path,
        progress=False,
        **{k: v for k, v in config.to_dict().items() if k != "catalog_path"},
    )
    assert pipeline.config == config
    assert pipeline.summary.stages["extract"].done == 3
    assert pipeline.dashboard_link is None
    assert state == (
        multiprocessing.get_start_method(),
        logging.getLogger().handlers[:],
        logging.getLogger("spxdask").handlers[:],
        warnings.filters[:],
        dict(os.environ),
    )
    before = contents(pipeline.folder.lightcurves)

    # Stage by stage in one `with`, one cluster serves all.
    with BatchPipeline(config) as again:
        link = again.dashboard_link
        again.run_extract(skip_existing=False)
        again.run_all()
        assert again.dashboard_link == link is not None
    assert again.dashboard_link is None
    assert contents(pipeline.folder.lightcurves) == before


def test_scheduler_address(make_config, client):
    config = make_config(bands=["D6"])
    pipeline = BatchPipeline(config, scheduler=client.scheduler.address)
    assert pipeline.run_all().stages["extract"].done == 1
    # The given cluster is still there.
    assert client.submit(sum, [1, 2]).result() == 3


def test_threads_only_client(make_config):
    with Client(processes=False, dashboard_address=":0", n_workers=1, threads_per_worker=2) as own:
        summary = BatchPipeline(make_config(bands=["D6"]), client=own).run_all()
    assert summary.stages["extract"].done == 1


def test_a_stage_sees_what_another_process_did(make_config, client, survey, archive):
    lost = survey[1][0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    one = BatchPipeline(make_config(), client=client)
    assert set(one.run_all().failed) == {lost.filename}
    other = BatchPipeline(make_config(), client=client)
    assert other.run_all(retry_failed=True).failed == {}
    rows = other.reports["aggregate"].rows
    curves = contents(one.folder.lightcurves)
    # It knew the frame as one that failed.
    assert one.run_aggregate().rows == rows
    assert contents(one.folder.lightcurves) == curves


def test_frames_without_a_table_are_told_by_aggregate(make_config, client, survey, archive):
    lost = survey[1][0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    pipeline = BatchPipeline(make_config(), client=client)
    summary = pipeline.run_all()
    assert summary.stages["aggregate"].left_out == 1
    assert "1 frames are not in them: not measured" in str(summary)


def test_a_folder_that_was_removed_is_begun_anew(make_config, client, survey, archive):
    lost = survey[1][0].exposure
    archive.add_faults(lost.uri, [Fault(status=404)])
    pipeline = BatchPipeline(make_config(), client=client)
    assert len(pipeline.run_all().failed) == 1
    shutil.rmtree(pipeline.folder.path)
    summary = pipeline.run_all()
    assert summary.failed == {}
    assert summary.stages["aggregate"].rows == summary.stages["extract"].rows
    assert summary.stages["extract"].done == 6


def test_when_all_frames_fail_light_curves_stay(make_config, client, archive, survey):
    pipeline = BatchPipeline(make_config(keep_images=False), client=client)
    pipeline.run_all()
    curves = contents(pipeline.folder.lightcurves)
    for frame in survey[1][:6]:
        archive.add_faults(frame.exposure.uri, [Fault(status=404)])
    photometry = PhotometryConfig(fwhm_multiplier=3.0)
    config = make_config(keep_images=False, photometry=photometry)
    summary = BatchPipeline(config, client=client).run_all()
    assert len(summary.failed) == 6
    assert "aggregate" not in summary.stages
    assert contents(pipeline.folder.lightcurves) == curves


@pytest.mark.parametrize("keep", [True, False])
def test_a_frame_that_the_archive_replaced_is_measured_again(
    make_config, client, survey, tmp_path, keep
):
    frames = [frame.archived for frame in survey[1][:2]]
    with SimulatedArchive(frames) as archive:
        config = make_config(
            keep_images=keep, tap_url=archive.tap_url, archive_url=archive.archive_url
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
    tables = contents(pipeline.folder.per_image)
    first = survey[1][0]
    content = first.path.read_bytes()
    # The same and an extension more under the name.
    more = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.zeros((4, 4)), name="MORE")]).writeto(more)
    replaced = tmp_path / first.path.name
    replaced.write_bytes(content + more.getvalue()[2880:])
    frames = [replace(frames[0], path=replaced), frames[1]]
    with SimulatedArchive(frames) as archive:
        config = replace(config, tap_url=archive.tap_url, archive_url=archive.archive_url)
        again = BatchPipeline(config, client=client)
        summary = again.run_all()
    assert (summary.stages["extract"].done, summary.stages["extract"].reused) == (1, 1)
    assert contents(pipeline.folder.per_image) == tables


def test_an_edited_catalogue_is_read_again(make_config, client, survey):
    config = make_config(bands=["D1"])
    pipeline = BatchPipeline(config, client=client)
    before = pipeline.run_all()
    sky, ids = survey[0], all_ids(survey[0])
    table = pd.read_csv(
        next(pipeline.folder.per_image.local_path.iterdir()),
        dtype={"target_id": str},
        keep_default_na=False,
    )
    keep = [ids.index(target) for target in table["target_id"][:2]]
    kept = [ids[k] for k in keep]
    simulated.write_catalogue(Path(config.catalog_path), kept, sky.ra[keep], sky.dec[keep])
    after = pipeline.run_all()
    assert (after.n_sources, after.n_measured) == (2, 2)
    assert after.stages["aggregate"].removed == before.n_measured - 2
    assert "of sources without a row now were removed" in str(after)


def test_a_catalogue_that_is_elsewhere_is_told(make_config, client, tmp_path, caplog):
    far = simulated.write_catalogue(tmp_path / "far.csv", ["a", "b"], [10.0, 11.0], [10.0, 10.0])
    pipeline = BatchPipeline(make_config(catalog_path=far, bands=["D1"]), client=client)
    assert pipeline.run_all().n_measured == 0
    assert "none of the 2 sources lies within 6.05 deg of the field's centre" in caplog.text


def test_frames_are_fetched_without_a_catalogue(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_query()
    Path(pipeline.config.catalog_path).unlink()
    assert BatchPipeline(pipeline.config, client=client).run_download().done == 1


def test_passwords_stay_in_the_configuration(make_config, client, archive):
    url = archive.archive_url.replace("//", "//me:secret@")
    pipeline = BatchPipeline(make_config(bands=["D1"], archive_url=url), client=client)
    assert pipeline.run_all().failed == {}
    files = [p for p in pipeline.folder.root.local_path.rglob("*") if p.is_file()]
    assert [p for p in files if b"secret" in p.read_bytes()] == [
        pipeline.folder.state.local_path / "config.yaml"
    ]


def test_releases_are_told_apart(finished, make_config, client):
    assert finished.summary.stages["query"].releases == {"qr2": 4, "qr3": 2}
    assert "4 of qr2, 2 of qr3: their flux scales differ" in str(finished.summary)
    one = BatchPipeline(make_config(bands=["D1"]), client=client)
    assert repr(one) == f"BatchPipeline in {one.folder.path}"
    assert "flux scales" not in str(one.run_all())
    assert repr(one) == repr(one.summary) == str(one.summary)
    assert repr(one.reports["aggregate"]).startswith("aggregate   ")


def test_sources_outside_the_circle_are_counted(finished, survey):
    ra, dec = survey[0].ra, survey[0].dec
    outside = int((angular_distance(*simulated.CENTER, ra, dec) > 0.05).sum())
    assert finished.summary.stages["query"].outside == outside > 0
    assert f"{outside} sources lie outside" in str(finished.summary)


def test_a_query_whose_workers_die_is_told(make_config, client, monkeypatch):
    def killed(*_, **__):
        raise KilledWorker("query", None, 3)

    monkeypatch.setattr(Future, "result", killed)
    with pytest.raises(ClusterError, match="every worker that began the task query died"):
        BatchPipeline(make_config(), client=client).run_query()


def test_nothing_found_is_said(make_config, client):
    pipeline = BatchPipeline(make_config(center_dec=-60.0), client=client)
    summary = pipeline.run_all()
    assert summary.stages["query"].total == 0
    assert "no frame covers the field" in str(summary)
    assert list(summary.stages) == ["query"]
    assert load_query_summary(pipeline.config.output_dir)["n_observations"] == 0
    assert pipeline.observations.count().compute(scheduler="sync") == 0


@pytest.mark.parametrize(
    "place", ["lightcurves/s1.csv", "query_summary.yaml", "state/x/../a.csv", "images/link.csv"]
)
def test_a_catalogue_that_the_run_could_write_over(make_config, client, place, archive):
    config = make_config()
    path = Path(config.output_dir) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "x").mkdir(exist_ok=True)
    text = Path(config.catalog_path).read_bytes()
    path.write_bytes(text)
    asked = len(archive.requests)
    with pytest.raises(RunFolderError, match="lies where the run writes"):
        BatchPipeline(make_config(catalog_path=path), client=client).run_all()
    assert path.read_bytes() == text
    assert len(archive.requests) == asked


def test_too_many_frames_stop_before_any_download(make_config, client, archive):
    pipeline = BatchPipeline(make_config(max_images=5), client=client)
    asked = len(archive.requests)
    with pytest.raises(
        InputError, match=r"6 frames \(0\.\d GB\) .* max_images allows 5; raise max"
    ):
        pipeline.run_all()
    assert {r.path for r in archive.requests[asked:]} == {"/TAP/sync"}


def test_stages_say_what_they_lack(make_config, client, tmp_path):
    pipeline = BatchPipeline(make_config(), client=client)
    for stage in (pipeline.run_download, pipeline.run_extract):
        with pytest.raises(RunFolderError, match="run query first"):
            stage()
    with pytest.raises(RunFolderError, match="run query first"):
        _ = pipeline.observations
    with pytest.raises(RunFolderError, match="no per-image tables"):
        pipeline.run_aggregate()
    pipeline.run_query()
    report = pipeline.run_extract()
    assert len(report.failed) == 6
    assert "run download first" in next(iter(report.failed.values()))


def test_per_image_tables_alone_can_be_aggregated(finished, make_config, client, tmp_path):
    config = make_config(output_dir=tmp_path / "tables")
    folder = tmp_path / "tables" / "per_image"
    folder.mkdir(parents=True)
    for path in finished.folder.per_image.local_path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    BatchPipeline(config, client=client).run_aggregate()
    assert contents(tmp_path / "tables" / "lightcurves") == contents(finished.folder.lightcurves)


def test_saved_configuration_is_the_run(finished):
    assert finished.folder.saved_config() == finished.config
    assert yaml.safe_load(finished.folder.state.get("config.yaml"))["radius"] == 0.05


# Parquet


@pytest.fixture(scope="module")
def as_parquet(run_in, tmp_path_factory):
    """The same run, its tables and its light curves as Parquet."""
    folder = tmp_path_factory.mktemp("parquet")
    return run_in(folder, per_image_format="parquet", lightcurve_format="parquet")


@pytest.fixture(scope="module")
def all_curves(finished) -> pa.Table:
    """The rows of all light curves as their CSV files have them, with the ids, in order."""
    files = {path.name: path for path in finished.folder.lightcurves.local_path.iterdir()}
    ids = sorted(set(per_image(finished)["target_id"]))
    assert len(ids) == len(files)
    assert set(IDS) < set(ids)
    curves = []
    for target in ids:
        curve = read_csv(files[light_curve_name(target)], LIGHT_CURVE)
        curves.append(curve.add_column(0, "target_id", pa.repeat(target, len(curve))))
    return pa.concat_tables(curves)


def test_parquet_tables_hold_what_those_of_csv_do(finished, as_parquet):
    texts = sorted(finished.folder.per_image.local_path.iterdir())
    tables = sorted(as_parquet.folder.per_image.local_path.iterdir())
    assert len(texts) == len(tables) == 6
    for text, table in zip(texts, tables, strict=True):
        assert table.name == f"{text.stem}.parquet"
        assert pq.read_table(table).equals(read_csv(text), check_metadata=True)
    report, other = as_parquet.summary.stages["extract"], finished.summary.stages["extract"]
    assert (report.done, report.rows, report.skipped) == (other.done, other.rows, other.skipped)
    assert report.bytes == sum(path.stat().st_size for path in tables)


def test_light_curves_do_not_tell_what_tables_they_come_from(finished, make_config, client):
    pipeline = BatchPipeline(make_config(per_image_format="parquet"), client=client)
    assert pipeline.run_all().stages["extract"].done == 6
    assert {path.suffix for path in pipeline.folder.per_image.local_path.iterdir()} == {".parquet"}
    curves = contents(finished.folder.lightcurves)
    assert contents(pipeline.folder.lightcurves) == curves
    # Also where there are the tables and nothing else.
    for name in ("state", "lightcurves"):
        shutil.rmtree(pipeline.folder.root.local_path / name)
    BatchPipeline(pipeline.config, client=client).run_aggregate()
    assert contents(pipeline.folder.lightcurves) == curves


def test_parquet_light_curves_hold_the_rows_of_those_in_csv(finished, as_parquet, all_curves):
    files = sorted(as_parquet.folder.lightcurves.local_path.iterdir())
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
    assert as_parquet.summary.n_measured == finished.summary.n_measured
    assert as_parquet.summary.stages["aggregate"].rows == len(all_curves)
    # The same as what is kept beside light curves in CSV.
    assert contents(as_parquet.folder.lightcurves) == contents(finished.folder.buckets)


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


# Dask's own, with the newest pandas.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")
@pytest.mark.parametrize("read", [with_pandas, with_dask, with_polars, with_duckdb])
def test_parquet_light_curves_are_one_dataset(as_parquet, all_curves, read):
    found = read(as_parquet.folder.lightcurves.local_path)
    assert found.column_names == all_curves.column_names
    for name in found.column_names:
        kind, expected = found.schema.field(name).type, all_curves.schema.field(name).type
        # Some have text of their own kind.
        text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        assert kind == expected or (text and pa.types.is_string(expected)), name
    found = found.cast(all_curves.schema)
    assert found.sort_by([(name, "ascending") for name in SORT_KEYS]).equals(all_curves)


def test_status_counts_the_sources_in_parquet(finished, as_parquet, capsys):
    found, other = status(as_parquet.folder.path), status(finished.folder.path)
    assert found.lightcurves == other.lightcurves == as_parquet.summary.n_measured > 5
    assert (found.measured, found.pending, found.rows) == (6, 0, other.rows)
    assert main(["status", str(as_parquet.folder.path)]) == 0
    assert f"aggregate   {found.lightcurves} light curves\n" in capsys.readouterr().out


def test_parquet_light_curves_are_the_same_bytes_each_time(as_parquet, make_config, client):
    before = contents(as_parquet.folder.lightcurves)
    times = {p: p.stat().st_mtime_ns for p in as_parquet.folder.lightcurves.local_path.iterdir()}
    again = BatchPipeline(as_parquet.config, client=client)
    assert again.run_all().stages["extract"].reused == 6
    assert contents(as_parquet.folder.lightcurves) == before
    written = {p: p.stat().st_mtime_ns for p in as_parquet.folder.lightcurves.local_path.iterdir()}
    assert all(written[path] > times[path] for path in times)
    # Other partitions, and none is left of those before.
    config = make_config(lightcurve_format="parquet", num_buckets=2)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    first = contents(pipeline.folder.lightcurves)
    assert len(first) == 2
    pipeline = BatchPipeline(replace(config, num_buckets=5), client=client)
    pipeline.run_aggregate()
    assert contents(pipeline.folder.lightcurves) == before
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_aggregate()
    assert contents(pipeline.folder.lightcurves) == first


@pytest.mark.parametrize("keep", [False, True])
def test_light_curves_in_another_format_replace_the_old(
    finished, as_parquet, make_config, client, archive, keep
):
    config = make_config(keep_bucket_files=keep)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    folder = pipeline.folder.lightcurves.local_path
    users = {
        "notes.txt": b"mine",
        "star.csv": b"a,b\n1,2\n",
        "stars.parquet": encode_parquet(pa.table({"a": [1]})),
    }
    for name, content in users.items():
        (folder / name).write_bytes(content)
    asked = len(archive.requests)
    kept = contents(finished.folder.buckets) if keep else None
    for how, theirs in (("parquet", as_parquet), ("csv", finished), ("parquet", as_parquet)):
        pipeline = BatchPipeline(replace(config, lightcurve_format=how), client=client)
        summary = pipeline.run_all()
        assert summary.stages["extract"].reused == 6
        assert summary.n_measured == theirs.summary.n_measured
        assert contents(folder) == contents(theirs.folder.lightcurves) | users
        if keep:
            assert contents(pipeline.folder.buckets) == kept
    assert {r.path for r in archive.requests[asked:]} == {"/TAP/sync"}


def test_tables_in_another_format_are_measured_anew(
    finished, as_parquet, make_config, client, archive
):
    config = make_config()
    BatchPipeline(config, client=client).run_all()
    asked = len(archive.requests)
    for how, theirs in (("parquet", as_parquet), ("csv", finished)):
        pipeline = BatchPipeline(replace(config, per_image_format=how), client=client)
        summary = pipeline.run_all()
        assert (summary.stages["extract"].done, summary.stages["extract"].reused) == (6, 0)
        assert contents(pipeline.folder.lightcurves) == contents(finished.folder.lightcurves)
        tables = contents(pipeline.folder.per_image)
        assert contents(theirs.folder.per_image).items() <= tables.items()
        assert status(pipeline.folder.path).measured == 6
        # Once.
        assert BatchPipeline(pipeline.config, client=client).run_extract().reused == 6
    # What is in images/ is not fetched for it.
    assert {r.path for r in archive.requests[asked:]} == {"/TAP/sync"}


def test_without_tables_in_the_new_format_light_curves_stay(finished, make_config, client):
    config = make_config()
    BatchPipeline(config, client=client).run_all()
    other = BatchPipeline(replace(config, per_image_format="parquet"), client=client)
    with pytest.raises(RunFolderError, match="run extract first"):
        other.run_aggregate()
    assert contents(other.folder.lightcurves) == contents(finished.folder.lightcurves)


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (RuntimeError("P2P 0a failed during barrier phase"), True),
        (RuntimeError("No active shuffle with id='0a' found"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_a_shuffle_that_did_not_survive_a_worker_is_done_again(
    finished, make_config, client, monkeypatch, error, ends
):
    config = make_config()
    compute, raised = shuffle._compute_partitions, []

    def once(*arguments):
        if not raised:
            raised.append(error)
            raise error
        return compute(*arguments)

    monkeypatch.setattr(shuffle, "_compute_partitions", once)
    pipeline = BatchPipeline(config, client=client)
    if ends:
        assert not pipeline.run_all().failed
        assert contents(pipeline.folder.lightcurves) == contents(finished.folder.lightcurves)
    else:
        with pytest.raises(RuntimeError, match="something else"):
            pipeline.run_all()
    assert raised == [error]


# Full disks


FAULTS = [
    *(Fault(status=status) for status in (408, 429, 500, 502, 503, 504)),
    Fault(status=503, retry_after_s=0),
    *(Fault(truncate=n) for n in (0, 1, 100_000, 2_000_000)),
    *(Fault(short=n) for n in (0, 2880, 1_000_000)),
    *(Fault(stall=n) for n in (0, 500_000)),
    Fault(html=True),
    Fault(garbage=True),
]


class ImpatientPipeline(BatchPipeline):
    """A pipeline that waits hardly at all between attempts."""

    def _fetch_options(self):
        options = super()._fetch_options()
        return replace(options, retry=replace(options.retry, first_delay_s=0.001))


@pytest.mark.parametrize("keep_images", [True, False])
def test_a_storm_of_faults(finished, make_config, client, survey, keep_images):
    """Every frame meets several faults; none is lost, and none is the worse for it."""

    rng = random.Random(20261122)
    frames = [frame.archived for frame in survey[1]]
    faults = {frame.uri: rng.choices(FAULTS, k=5) for frame in frames}
    with SimulatedArchive(frames, faults=faults) as archive:
        config = make_config(
            max_retries=5,
            stall_timeout=0.3,
            keep_images=keep_images,
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
        )
        summary = ImpatientPipeline(config, client=client).run_all()
        assert len(archive.requests) == 1 + 6 * (5 + 1)
    assert not summary.failed
    for folder in ("per_image", "lightcurves"):
        ours, theirs = (Path(c.output_dir) / folder for c in (config, finished.config))
        assert contents(ours) == contents(theirs), folder


@pytest.fixture
def spoil(client):
    """Let a function of a module fail in the workers, when a condition on its calls holds."""
    spoilt = []

    def spoil(module: str, name: str, fails, error: Exception) -> None:
        def install() -> None:
            place, calls = importlib.import_module(module), itertools.count(1)
            whole = getattr(place, name)

            def spoilt(*arguments, **options):
                if fails(next(calls), *arguments):
                    raise error
                return whole(*arguments, **options)

            spoilt.whole = whole
            setattr(place, name, spoilt)

        client.run(install)
        spoilt.append((module, name))

    def mend() -> None:
        for module, name in spoilt:

            def restore(module=module, name=name) -> None:
                place = importlib.import_module(module)
                setattr(place, name, getattr(place, name).whole)

            client.run(restore)
        spoilt.clear()

    spoil.mend = mend
    yield spoil
    mend()


@pytest.mark.parametrize(
    ("module", "name", "folder"),
    [
        ("spxdask.storage.local", "_write_direct", "images"),
        ("spxdask.storage.local", "_write_durable", "per_image"),
        ("spxdask.storage.local", "_write_small", "lightcurves"),
    ],
)
def test_a_disk_that_fills_stops_the_run(
    finished, make_config, client, archive, spoil, capsys, module, name, folder
):
    pipeline = BatchPipeline(make_config(max_download_workers=1), client=client)
    asked = len(archive.requests)
    spoil(module, name, lambda call, *_: call > 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskFullError) as error:
        pipeline.run_all()
    place = (pipeline.folder.root.local_path / folder).resolve()
    said = f"No space left on device in {place}: make room, then the same command goes on"
    assert str(error.value) == said
    begun = len(archive.requests) - asked - 1

    def ended() -> int:
        ledger = RunFolder(pipeline.folder.path).ledger
        names = {o.filename for o in pipeline.observations.compute(scheduler="sync")}
        done = {table_name(n) for n in names if ledger.get("extract", n)}
        # A table whose frame found no room is not counted, and made again.
        assert done <= {p.name for p in pipeline.folder.per_image.local_path.iterdir()}
        return len(done)

    if name == "_write_small":
        assert (begun, ended()) == (6, 6)
    else:
        # One in each worker, the one that failed, and the one that was then at hand.
        assert 0 < ended() < begun <= 4

    run = ["run", "--config", pipeline.folder.state.path_to("config.yaml")]
    assert main([*run, "--scheduler", client.scheduler.address]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    # After the addresses of its pages.
    assert [line for line in err.splitlines() if "http://" not in line] == [f"spxdask: {said}"]

    reused = ended()
    spoil.mend()
    summary = BatchPipeline(make_config(), client=client).run_all()
    assert summary.stages["extract"].reused == reused
    assert not summary.failed
    assert contents(pipeline.folder.per_image) == contents(finished.folder.per_image)
    assert contents(pipeline.folder.lightcurves) == contents(finished.folder.lightcurves)
    assert not list(pipeline.folder.root.local_path.rglob(".*.part"))


def test_room_is_looked_for_before_the_first_request(
    make_config, client, archive, monkeypatch, finished
):
    needed = sum(p.stat().st_size for p in finished.folder.images.local_path.iterdir())
    usage = shutil.disk_usage("/")
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    pipeline = BatchPipeline(make_config(), client=client)
    asked = len(archive.requests)
    said = f"have {needed / 1e9:.3g} GB, and .* are free in {pipeline.folder.images}: make room"
    for stage in (pipeline.run_all, pipeline.run_download):
        with pytest.raises(DiskFullError, match=said):
            stage()
    assert [r.path for r in archive.requests[asked:]] == ["/TAP/sync"]
    # What is there needs no more room, and what is not kept needs none.
    free = needed
    pipeline.run_download()
    free = 0
    assert pipeline.run_download().reused == 6
    elsewhere = make_config(keep_images=False, output_dir=pipeline.folder.root.local_path / "other")
    assert BatchPipeline(elsewhere, client=client).run_all().stages["extract"].done == 6


# What failed


@pytest.mark.parametrize("keep", [True, False])
def test_only_what_failed_is_tried_again(
    finished, make_config, client, survey, spoil, tmp_path, keep
):
    lost, unlucky = survey[1][0].exposure, survey[1][2].exposure
    with SimulatedArchive(
        [f.archived for f in survey[1]], faults={lost.uri: [Fault(status=404)]}
    ) as archive:
        config = make_config(
            tap_url=archive.tap_url, archive_url=archive.archive_url, keep_images=keep
        )
        spoil(
            "spxdask.stages.extract",
            "measure_catalogue",
            lambda call, frame, *_: frame.filename == unlucky.filename,
            FrameError("bad luck"),
        )
        summary = BatchPipeline(config, client=client).run_all()
        assert summary.failed.keys() == {lost.filename, unlucky.filename}
        spoil.mend()
        lacking = contents(RunFolder(config.output_dir).lightcurves)
        asked = len(archive.requests)
        config = RunFolder(config.output_dir).saved_config()
        for wanted in ([lost.uri] if keep else [lost.uri, unlucky.uri]), []:
            summary = BatchPipeline(config, client=client).run_all(retry_failed=True)
            assert sorted(r.path for r in archive.requests[asked:]) == [f"/{u}" for u in wanted]
            asked = len(archive.requests)
            assert list(summary.stages) == ["download", "extract", "aggregate"]
            for stage in ("download", "extract"):
                assert summary.stages[stage].total == (2 if wanted else 0)
            assert summary.stages["download"].done == len(wanted)
            assert summary.stages["extract"].done == (2 if wanted else 0)
            assert summary.failed == {}
            curves = contents(RunFolder(config.output_dir).lightcurves)
            assert curves == contents(finished.folder.lightcurves) != lacking


def test_without_an_earlier_run_nothing_can_have_failed(make_config, client):
    with pytest.raises(RunFolderError, match="no query was made in"):
        BatchPipeline(make_config(), client=client).run_all(retry_failed=True)


def test_nothing_found_leaves_nothing_to_try_again(make_config, client):
    pipeline = BatchPipeline(make_config(bands=["D1"]), client=client)
    pipeline.run_all()
    curves = contents(pipeline.folder.lightcurves)
    nowhere = BatchPipeline(make_config(center_dec=-60.0), client=client)
    nowhere.run_all()
    nowhere.run_all(retry_failed=True)
    assert contents(pipeline.folder.lightcurves) == curves


# Catalogues that change

APART = 1.0


@pytest.fixture(scope="module")
def apart(tmp_path_factory, client):
    """A run of two frames that nearly coincide, and one a degree north of them."""
    folder = tmp_path_factory.mktemp("apart")
    ra, dec = simulated.CENTER
    sky = simulated.make_sky(
        ra, dec + APART / 2, 0.75, n_sources=250, min_separation_arcsec=70, seed=3
    )
    exposures = [simulated.exposure(number) for number in range(2)]
    exposures.append(simulated.exposure(2, dec=dec + APART))
    frames = simulated.simulate(folder, exposures, sky)
    rng = np.random.default_rng(4)
    # At the antipode, too, and where the frames' own zones are.
    far_ra = np.concatenate([rng.uniform(80, 100, 20), rng.uniform(300, 320, 20)])
    far_dec = np.concatenate([rng.uniform(-70, -60, 20), rng.uniform(66, 68, 20)])
    far = pd.DataFrame({"targetid": [f"far{i}" for i in range(40)], "ra": far_ra, "dec": far_dec})
    near = pd.DataFrame(
        {"targetid": [f"s{i}" for i in range(len(sky))], "ra": sky.ra, "dec": sky.dec}
    )
    catalogue = pd.concat([far[:10], near, far[10:30]], ignore_index=True)
    with SimulatedArchive([f.archived for f in frames]) as archive:

        def run(table, output, **options):
            path = output.parent / f"{output.name}.csv"
            table.to_csv(path, index=False)
            config = BatchConfig(
                catalog_path=path,
                center_ra=ra,
                center_dec=dec + APART / 2,
                radius=APART / 2 + 0.1,
                output_dir=output,
                num_buckets=2,
                tap_url=archive.tap_url,
                archive_url=archive.archive_url,
                **options,
            )
            return BatchPipeline(config, client=client).run_all()

        assert run(catalogue, folder / "base").stages["extract"].done == 3
        tables = pd.concat(pd.read_csv(p) for p in (folder / "base" / "per_image").iterdir())
        names = [e.filename for e in exposures]
        on = {i: set(tables.loc[tables["filename"] == names[i], "target_id"]) for i in range(3)}
        assert not on[2] & (on[0] | on[1])
        yield folder / "base", run, catalogue, far[30:], [table_name(n) for n in names], on


def _nudged(table, ids):
    table.loc[table["targetid"] == min(ids), "ra"] += 1e-9
    return table


def _swapped(table, ids):
    places = table.index[table["targetid"].isin(ids)][:2]
    table.loc[places] = table.loc[places[::-1]].to_numpy()
    return table


def _without(table, ids):
    return table[~table["targetid"].isin(ids)]


def _north_first(table):
    north = table["dec"] > simulated.CENTER[1] + APART / 2
    return pd.concat([table[north], table[~north]])


FAR_IDS = {f"far{i}" for i in range(40)}
CHANGES = {
    "nothing": (lambda table, far, on: table, []),
    "far added": (lambda table, far, on: pd.concat([far, table, far.assign(targetid=far.ra)]), []),
    "far removed": (lambda table, far, on: _without(table, FAR_IDS), []),
    "far moved": (lambda table, far, on: _nudged(table, FAR_IDS), []),
    "far swapped": (lambda table, far, on: _swapped(table, FAR_IDS), []),
    "fields swapped": (lambda table, far, on: table.sort_values("dec", kind="stable"), None),
    "one field first": (lambda table, far, on: _north_first(table), []),
    "near removed": (lambda table, far, on: _without(table, {min(on[2])}), [2]),
    "near renamed": (lambda table, far, on: table.replace({"targetid": {min(on[2]): "new"}}), [2]),
    "near moved": (lambda table, far, on: _nudged(table, on[2]), [2]),
    "near swapped": (lambda table, far, on: _swapped(table, on[2]), [2]),
    "near both": (lambda table, far, on: _nudged(table, on[0] & on[1]), [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "near added", "options"])
def test_only_what_changed_is_measured_again(apart, tmp_path, change):
    base, run, catalogue, far, names, on = apart
    shutil.copytree(base, tmp_path / "grown")
    options, again = {}, [2]
    table = catalogue.copy()
    if change == "options":
        options["photometry"], again = PhotometryConfig(fwhm_multiplier=2.4), [0, 1, 2]
    elif change == "near added":
        run(_without(catalogue, {min(on[2])}), tmp_path / "grown")
    else:
        make, again = CHANGES[change]
        table = make(table, far, on)
    again = [0, 1, 2] if again is None else again
    per_image = tmp_path / "grown" / "per_image"
    before = {name: (per_image / name).stat().st_mtime_ns for name in names}
    extracted = run(table, tmp_path / "grown", **options).stages["extract"]
    assert (extracted.done, extracted.reused) == (len(again), 3 - len(again))
    for i, name in enumerate(names):
        assert ((per_image / name).stat().st_mtime_ns == before[name]) == (i not in again), i
    fresh = run(table, tmp_path / "fresh", **options).stages["extract"]
    assert (fresh.done, fresh.rows) == (3, extracted.rows)
    for folder in ("per_image", "lightcurves"):
        grown, made = (contents(tmp_path / which / folder) for which in ("grown", "fresh"))
        assert grown == made


def test_usage_errors(make_config, client):
    config = make_config()
    with pytest.raises(ConfigError, match="not two of them"):
        BatchPipeline(config, client=client, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="allowed is a synchronous"):
        BatchPipeline(config, client="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="allowed is a BatchConfig"):
        BatchPipeline({"radius": 1})
    with pytest.raises(ConfigError, match="not both: radius"):
        run_batch(config, radius=1.0)
    with pytest.raises(ConfigError, match="did you mean radius"):
        run_batch(catalog="x.csv", center_ra=1, center_dec=1, radios=1)
    with pytest.raises(InputError, match="no Dask scheduler at"):
        BatchPipeline(config, scheduler="not-an-address://x").run_query()


def test_script_without_main_guard_is_told(tmp_path):
    script = tmp_path / "script.py"
    simulated.write_catalogue(tmp_path / "sources.csv", ["one"], [1.0], [1.0])
    script.write_text(
        "from spxdask import run_batch\n"
        "run_batch(catalog='sources.csv', center_ra=1.0, center_dec=1.0, radius=1.0)\n"
    )
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "if __name__ == '__main__':" in ended.stderr.splitlines()[-1]
