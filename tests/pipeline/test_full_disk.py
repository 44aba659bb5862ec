"""A disk without room stops a run with advice, and the next run continues."""

from __future__ import annotations

import errno
import shutil

import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.cli import main
from spxdask.errors import DiskFullError
from spxdask.run.folder import RunFolder
from spxdask.run.plan import table_name


@pytest.mark.parametrize(
    ("module", "name", "folder"),
    [
        ("spxdask.storage.local", "_write_direct", "images"),
        ("spxdask.storage.local", "_write_durable", "per_image"),
        ("spxdask.storage.local", "_write_small", "lightcurves"),
    ],
)
def test_full_disk_stops_the_run(
    finished, make_config, client, archive, fail_in_workers, capsys, module, name, folder
):
    pipeline = BatchPipeline(make_config(max_download_workers=1), client=client)
    n_requests = len(archive.requests)
    fail_in_workers(
        module, name, lambda call, *_: call > 1, OSError(errno.ENOSPC, "No space left on device")
    )
    with pytest.raises(DiskFullError) as error:
        pipeline.run_all()
    full = (output_of(pipeline).path / folder).resolve()
    message = f"No space left on device in {full}: make room, then the same command resumes the run"
    assert str(error.value) == message
    begun = len(archive.requests) - n_requests - 1

    def count_recorded() -> int:
        ledger = RunFolder(output_of(pipeline).path).ledger
        names = {o.filename for o in pipeline.observations.compute(scheduler="sync")}
        done = {table_name(n, "csv") for n in names if ledger.get("extract", n)}
        # A table may lie there without an outcome in the ledger, never an outcome without a table.
        assert done <= {p.name for p in output_of(pipeline).per_image.iterdir()}
        return len(done)

    if name == "_write_small":
        assert (begun, count_recorded()) == (6, 6)
    else:
        # One frame succeeds in each worker; a failed one and the one fetched next add to them.
        assert 0 < count_recorded() < begun <= 4

    run = ["run", "--config", str(output_of(pipeline).state / "config.yaml")]
    assert main([*run, "--scheduler", client.scheduler.address]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    # The addresses of the dashboard and of the page of frames come before.
    assert [line for line in err.splitlines() if "http://" not in line] == [f"spxdask: {message}"]

    reused = count_recorded()
    fail_in_workers.stop()
    summary = BatchPipeline(make_config(), client=client).run_all()
    assert summary.stages["extract"].reused == reused
    assert not summary.failed
    assert read_files(output_of(pipeline).per_image) == read_files(output_of(finished).per_image)
    assert read_files(output_of(pipeline).lightcurves) == read_files(
        output_of(finished).lightcurves
    )
    assert not list(output_of(pipeline).path.rglob(".*.part"))


def test_free_space_is_checked_before_the_first_request(
    make_config, client, archive, monkeypatch, finished
):
    needed = sum(p.stat().st_size for p in output_of(finished).images.iterdir())
    usage = shutil.disk_usage("/")
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    pipeline = BatchPipeline(make_config(), client=client)
    n_requests = len(archive.requests)
    message = (
        f"have {needed / 1e9:.3g} GB, and .* are free in {output_of(pipeline).images}: make room"
    )
    for stage in (pipeline.run_all, pipeline.run_download):
        with pytest.raises(DiskFullError, match=message):
            stage()
    assert [r.path for r in archive.requests[n_requests:]] == ["/TAP/sync"]
    # Images that are there need no more room, and images that are not kept need none.
    free = needed
    pipeline.run_download()
    free = 0
    assert pipeline.run_download().reused == 6
    elsewhere = make_config(keep_images=False, output_dir=output_of(pipeline).path / "other")
    assert BatchPipeline(elsewhere, client=client).run_all().stages["extract"].done == 6
