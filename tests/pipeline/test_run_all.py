"""A whole run over the simulated archive: what is found, measured and reported."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated
from outputs import output_of, read_files, read_per_image
from ruamel.yaml import YAML

from spxdask import BatchPipeline, __version__, load_query_summary
from spxdask.run.frame_table import FRAMES_NAME
from spxdask.run.status import read_status
from spxdask.science.level2.frame import angular_distance
from spxdask.stages.light_curves import light_curve_name
from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE, SCHEMA


def test_every_frame_is_found_once_and_measured(finished, survey):
    newest = survey.frames[:6]
    images = {path.name for path in output_of(finished).images.iterdir()}
    assert images == {frame.exposure.filename for frame in newest}
    summary = finished.summary
    assert summary.stages["query"].total == 6
    assert summary.stages["download"].done == 6
    assert summary.stages["extract"].done == 6
    assert summary.failed == {}
    rows = read_per_image(output_of(finished).per_image)
    assert summary.stages["extract"].rows == len(rows) > 40
    assert tuple(rows.columns) == PER_IMAGE
    assert summary.n_measured == rows["target_id"].nunique()
    assert summary.n_measured < summary.n_sources == len(survey.sky)
    # Every id is written as it was read, and none leads to a file outside the output folder.
    assert set(simulated.AWKWARD_IDS) < set(rows["target_id"]) <= set(survey.ids)
    assert {path.name for path in output_of(finished).path.iterdir()} == {
        *("images", "per_image", "lightcurves", "buckets", "state"),
        *("query_summary.yaml", "README.txt", "columns.yaml"),
        *("report.html", "report.json", "progress.html"),
    }
    assert {path.name for path in output_of(finished).path.parent.iterdir()} == {
        "out",
        "sources.csv",
    }
    frames = pd.read_parquet(output_of(finished).state / FRAMES_NAME)
    assert (frames["status"] == "measured").all()
    assert dict(zip(frames["filename"], frames["rows"], strict=True)) == dict(
        rows["filename"].value_counts()
    )
    for frame in newest:
        one = rows[rows["filename"] == frame.exposure.filename]
        assert set(one["band"]) == {frame.exposure.band}
        assert set(one["obs_id"]) == {frame.exposure.obs_id}
        np.testing.assert_array_equal(
            one["mjd"].unique(), [(frame.exposure.mjd_begin + frame.exposure.mjd_end) / 2]
        )


def test_recovered_flux_is_the_injected_flux(finished, survey):
    rows = read_per_image(output_of(finished).per_image)
    ratios = []
    for frame in survey.frames[:6]:
        truth = pd.DataFrame(
            {
                "target_id": [survey.ids[i] for i in frame.planes.source],
                "true_x": frame.planes.x,
                "true_wavelength": frame.planes.wavelength_um,
                "injected": frame.planes.flux_ujy,
            }
        )
        both = rows[rows["filename"] == frame.exposure.filename].merge(truth, on="target_id")
        np.testing.assert_allclose(both["x"], both["true_x"], atol=1e-6)
        np.testing.assert_allclose(both["wavelength"], both["true_wavelength"], atol=1e-4)
        # An aperture with a diameter of 2.1 pixels holds 85 % of the light.
        ratio = both["flux"] / both["injected"]
        assert 0.8 < ratio.median() < 0.9
        ratios.append(ratio)
    assert np.concatenate(ratios).std() < 0.1


def test_what_the_light_curves_are_stands_beside_them(finished, finished_parquet):
    output = output_of(finished)
    about = YAML(typ="safe").load((output.path / "columns.yaml").read_text())
    assert [c["name"] for c in about["columns"] if c["lightcurves"]] == list(LIGHT_CURVE)
    assert {c["name"] for c in about["columns"] if c["per_image"]} == set(PER_IMAGE)
    assert all(c["ucd"] and c["description"] for c in about["columns"])
    assert (about["software"], about["releases"]) == (
        f"spxdask {__version__}",
        ["qr2", "qr3"],
    )
    options = YAML(typ="safe").load(about["configuration"])
    assert options["photometry"] == finished.config.photometry.to_dict()
    text = (output.path / "README.txt").read_text()
    assert str(output.path) not in text
    for word in ("psf_flux ", "[uJy]", about["configuration_digest"], *about["citation"]):
        assert word in text
    # Parquet files have the same in themselves, whatever the formats are.
    [first, *_] = sorted(output_of(finished_parquet).lightcurves.iterdir())
    found = json.loads(pq.read_metadata(first).metadata[b"spxdask"])
    assert found == {name: value for name, value in about.items() if name != "columns"}


def test_light_curves_are_the_per_image_rows_by_source(finished):
    rows = read_per_image(output_of(finished).per_image)
    names = set()
    for target, expected in rows.groupby("target_id"):
        expected = expected.sort_values(["mjd", "obs_id", "band"])
        name = light_curve_name(target)
        names.add(name)
        curve = pd.read_csv(output_of(finished).lightcurves / name)
        assert tuple(curve.columns) == LIGHT_CURVE
        assert curve["obs_id"].tolist() == expected["obs_id"].tolist()
        for column in ("mjd", "x", "flux", "bg_level", "flag", "wavelength"):
            np.testing.assert_array_equal(
                curve[column].to_numpy(float), expected[column].to_numpy(float)
            )
    assert {p.name for p in output_of(finished).lightcurves.iterdir()} == names
    assert len(names) == rows["target_id"].nunique()
    assert "39633458707826492.csv" in names


def test_bucket_files_hold_the_sorted_partitions(finished):
    rows = read_per_image(output_of(finished).per_image)
    buckets = [pd.read_parquet(p) for p in sorted(output_of(finished).buckets.glob("*.parquet"))]
    assert len(buckets) == 5
    assert sum(map(len, buckets)) == len(rows)
    seen = [set(b["target_id"]) for b in buckets]
    assert sum(map(len, seen)) == len(set.union(*seen))
    for bucket in buckets:
        keys = bucket[["target_id", "mjd", "obs_id", "band"]].apply(tuple, axis=1).tolist()
        assert keys == sorted(keys)


def test_running_stage_by_stage_gives_the_same_files(finished, make_config, client):
    pipeline = BatchPipeline(make_config(keep_bucket_files=True), client=client)
    pipeline.run_query()
    assert (pipeline.run_download().done, pipeline.run_extract().done) == (6, 6)
    pipeline.run_aggregate()
    prefixes = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert {"download", "extract"} <= prefixes
    for folder in ("images", "per_image", "lightcurves", "buckets"):
        made, expected = (read_files(output_of(p).path / folder) for p in (pipeline, finished))
        assert made == expected, folder


def test_summary_counts_the_frames_of_each_release(finished, make_config, client):
    assert finished.summary.stages["query"].releases == {"qr2": 4, "qr3": 2}
    assert "4 of qr2, 2 of qr3: qr2 has another flux scale" in str(finished.summary)
    one = BatchPipeline(make_config(bands=["D1"]), client=client)
    assert repr(one) == f"BatchPipeline in {output_of(one).path}"
    assert "flux scale" not in str(one.run_all())
    assert repr(one) == repr(one.summary) == str(one.summary)
    assert repr(one.reports["aggregate"]).startswith("aggregate   ")


def test_summary_counts_the_sources_outside_the_field(finished, survey):
    ra, dec = survey.sky.ra, survey.sky.dec
    outside = int((angular_distance(*simulated.CENTER, ra, dec) > 0.05).sum())
    assert finished.summary.stages["query"].outside == outside > 0
    assert f"{outside} sources outside the circle" in str(finished.summary)


def test_query_that_finds_no_frame_ends_the_run(make_config, client):
    pipeline = BatchPipeline(make_config(center_dec=-60.0), client=client)
    summary = pipeline.run_all()
    assert summary.stages["query"].total == 0
    assert "no frame covers the field" in str(summary)
    assert list(summary.stages) == ["query"]
    assert load_query_summary(pipeline.config.output_dir)["n_observations"] == 0
    assert pipeline.observations.count().compute(scheduler="sync") == 0


def test_catalogue_far_from_the_field_logs_a_warning(make_config, client, tmp_path, caplog):
    far = simulated.write_catalogue(tmp_path / "far.csv", ["a", "b"], [10.0, 11.0], [10.0, 10.0])
    pipeline = BatchPipeline(make_config(catalog_path=far, bands=["D1"]), client=client)
    assert pipeline.run_all().n_measured == 0
    assert "none of the 2 sources lies within 6.05 deg of the field's centre" in caplog.text


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_frame_without_sources_gives_a_table_without_rows(make_config, client, tmp_path, how):
    catalogue = simulated.write_catalogue(tmp_path / "off.csv", ["off"], [270.0], [70.5])
    formats = {"per_image_format": how, "lightcurve_format": how}
    config = make_config(catalog_path=catalogue, bands=["D1"], **formats)
    pipeline = BatchPipeline(config, client=client)
    # A whole run ends with the query, as no source lies on any frame.
    summary = pipeline.run_all()
    assert list(summary.stages) == ["query"]
    pipeline.run_download()
    pipeline.run_extract()
    pipeline.run_aggregate()
    (table,) = output_of(pipeline).per_image.iterdir()
    if how == "csv":
        assert table.read_text() == ",".join(PER_IMAGE) + "\n"
        assert list(output_of(pipeline).lightcurves.iterdir()) == []
    else:
        assert pq.read_schema(table).equals(pa.schema([SCHEMA.field(n) for n in PER_IMAGE]))
        assert len(pq.read_table(table)) == 0
        assert len(pd.read_parquet(output_of(pipeline).lightcurves)) == 0
    assert pipeline.reports["extract"].done == 1
    assert (summary.n_sources, summary.n_measured) == (1, 0)
    assert read_status(output_of(pipeline).path).lightcurves == 0
    assert BatchPipeline(pipeline.config, client=client).run_extract().reused == 1
