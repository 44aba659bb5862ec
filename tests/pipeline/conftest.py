"""One survey for all whole runs, and two finished runs over it that tests only read."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import simulated
from distributed import Client
from outputs import output_of, read_per_image

from spxdask import BatchConfig, BatchPipeline
from spxdask.simulate.archive import SimulatedArchive
from spxdask.stages.light_curves import light_curve_name
from spxdask.tables.csv import read_csv
from spxdask.tables.schema import LIGHT_CURVE


@pytest.fixture(scope="session")
def survey(tmp_path_factory) -> simulated.Survey:
    """Six frames, the last also in an older release, which a query leaves out."""
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
    return simulated.make_survey(
        tmp_path_factory.mktemp("archive"), exposures, ids=simulated.AWKWARD_IDS
    )


@pytest.fixture(scope="session")
def archive(survey) -> Iterator[SimulatedArchive]:
    with SimulatedArchive(survey.archived) as archive:
        yield archive


@pytest.fixture(scope="session")
def run_in(survey, archive, client) -> Callable[..., BatchPipeline]:
    """Return a function that makes a full run over the survey in a folder."""

    def run(folder: Path, **options) -> BatchPipeline:
        catalogue = survey.write_catalogue(folder / "sources.csv")
        defaults = simulated.run_options(catalogue, archive, folder / "out")
        pipeline = BatchPipeline(BatchConfig(**(defaults | options)), client=client)
        pipeline.run_all()
        return pipeline

    return run


@pytest.fixture(scope="session")
def finished(run_in, tmp_path_factory) -> BatchPipeline:
    """A full run in CSV with a report, its partitions kept as Parquet."""
    return run_in(tmp_path_factory.mktemp("finished"), keep_bucket_files=True, report=True)


@pytest.fixture(scope="session")
def finished_parquet(run_in, tmp_path_factory) -> BatchPipeline:
    """The same run with tables and light curves in Parquet."""
    folder = tmp_path_factory.mktemp("parquet")
    return run_in(folder, per_image_format="parquet", lightcurve_format="parquet")


@pytest.fixture(scope="session")
def all_curves(finished) -> pa.Table:
    """The rows of all CSV light curves of `finished` with their ids, in order of the id."""
    files = {path.name: path for path in output_of(finished).lightcurves.iterdir()}
    ids = sorted(set(read_per_image(output_of(finished).per_image)["target_id"]))
    assert len(ids) == len(files)
    assert set(simulated.AWKWARD_IDS) < set(ids)
    curves = []
    for target in ids:
        curve = read_csv(files[light_curve_name(target)], LIGHT_CURVE)
        curves.append(curve.add_column(0, "target_id", pa.repeat(target, len(curve))))
    return pa.concat_tables(curves)


class WorkerFaults:
    """Functions that fail in the workers of a cluster until `stop` is called."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._replaced: list[tuple[str, str]] = []

    def __call__(
        self, module: str, name: str, fails: Callable[..., bool], error: Exception
    ) -> None:
        """Let a function raise an error when `fails` is true.

        Its arguments are the number of the call in the worker process, and those of the call.
        """

        def install() -> None:
            home, numbers = importlib.import_module(module), itertools.count(1)
            function = getattr(home, name)

            def failing(*arguments, **options):
                if fails(next(numbers), *arguments):
                    raise error
                return function(*arguments, **options)

            failing.function = function
            setattr(home, name, failing)

        self._client.run(install)
        self._replaced.append((module, name))

    def stop(self) -> None:
        for module, name in self._replaced:

            def restore(module=module, name=name) -> None:
                home = importlib.import_module(module)
                setattr(home, name, getattr(home, name).function)

            self._client.run(restore)
        self._replaced.clear()


@pytest.fixture
def fail_in_workers(client) -> Iterator[WorkerFaults]:
    faults = WorkerFaults(client)
    yield faults
    faults.stop()
