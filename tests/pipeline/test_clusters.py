"""The clusters a run can work on: given, embedded, by address, of threads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings

import dask
import pytest
from distributed import Client
from outputs import output_of, read_files

from spxdask import BatchPipeline, run_batch
from spxdask.simulate.archive import SimulatedArchive


def test_client_that_is_not_the_default(make_config, client):
    with Client(client.scheduler.address, set_as_default=False) as own:
        assert BatchPipeline(make_config(bands=["D6"]), client=own).run_all().n_measured > 0


def process_state() -> tuple:
    """Return what belongs to the calling process and must survive a run."""
    return (
        multiprocessing.get_start_method(),
        logging.getLogger().handlers[:],
        logging.getLogger("spxdask").handlers[:],
        warnings.filters[:],
        dict(os.environ),
        dask.config.get("scheduler", None),
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_run_batch_on_an_embedded_cluster(make_config):
    config = make_config(bands=["D3"], max_extract_workers=1, max_download_workers=2)
    state = process_state()
    pipeline = run_batch(
        catalog=config.catalog_path,
        progress=False,
        **{k: v for k, v in config.to_dict().items() if k != "catalog_path"},
    )
    assert pipeline.config == config
    assert pipeline.summary.stages["extract"].done == 3
    assert pipeline.dashboard_link is None
    assert process_state() == state
    before = read_files(output_of(pipeline).lightcurves)

    # Inside a `with` block one cluster serves all stages.
    with BatchPipeline(config) as again:
        link = again.dashboard_link
        again.run_extract(skip_existing=False)
        again.run_all()
        assert again.dashboard_link == link is not None
        # What is computed beside the run does not move to its cluster.
        assert dask.config.get("scheduler", None) is None
    assert again.dashboard_link is None
    assert read_files(output_of(pipeline).lightcurves) == before


def test_scheduler_address(make_config, client):
    config = make_config(bands=["D6"])
    pipeline = BatchPipeline(config, scheduler=client.scheduler.address)
    assert pipeline.run_all().stages["extract"].done == 1
    # The run leaves the cluster running.
    assert client.submit(sum, [1, 2]).result() == 3


def test_cluster_of_threads(make_config, thread_client):
    summary = BatchPipeline(make_config(bands=["D6"]), client=thread_client).run_all()
    assert summary.stages["extract"].done == 1


def test_archive_never_sees_more_connections_than_allowed(make_config, client, survey):
    with SimulatedArchive(survey.archived, bandwidth=30_000_000) as archive:
        config = make_config(
            max_download_workers=2, tap_url=archive.tap_url, archive_url=archive.archive_url
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_query()
        assert pipeline.run_download().done == 6
        assert archive.peak_connections == 2
