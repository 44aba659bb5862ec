"""What a notebook shows of the objects of a run, and what it completes."""

from __future__ import annotations

import inspect
import typing

import pytest
import simulated

from spxdask import BatchConfig, BatchPipeline, run_batch
from spxdask.run.summary import RunSummary, StageReport
from spxdask.science.options import list_options
from spxdask.tables.catalogue import CatalogueReader


@pytest.fixture
def config(tmp_path):
    simulated.write_catalogue(tmp_path / "s.csv", ["<b>", "2"], [270.0, 270.1], [66.0, 66.1])
    return BatchConfig(
        catalog_path=str(tmp_path / "s.csv"), output_dir=str(tmp_path / "o"), bands=["D3"]
    )


def test_reprs_are_short_and_html_is_escaped(config):
    report = StageReport(stage="extract", total=2, failed={"x.fits": "<i>"})
    summary = RunSummary(stages={"extract": report}, n_sources=2, output="<o>")
    catalogue = CatalogueReader(config.catalog_path).read()
    assert repr(catalogue) == "<Catalogue: 2 sources>"
    pipeline = BatchPipeline(config)
    assert repr(pipeline) == f"BatchPipeline in {pipeline.folder.path}"
    for thing in (report, summary, catalogue, pipeline, config):
        html = thing._repr_html_()
        assert "<table>" in html
        assert "<i>" not in html
        assert "<o>" not in html
    assert "&lt;b&gt;" in catalogue._repr_html_()
    shown = config._repr_html_()
    assert "bands" in shown
    assert "num_buckets" not in shown


def test_run_batch_names_every_option_and_its_choices():
    parameters = inspect.signature(run_batch).parameters
    names = {info.name for info in list_options(BatchConfig)}
    assert names <= set(parameters)
    assert set(parameters) - names == {
        *("config", "catalog", "client", "scheduler", "jobqueue", "progress"),
    }
    assert typing.get_args(parameters["coverage_mode"].annotation) == ("any", "full")
    assert parameters["num_buckets"].kind is inspect.Parameter.KEYWORD_ONLY
