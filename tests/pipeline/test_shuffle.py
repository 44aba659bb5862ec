"""A shuffle that does not survive the loss of a worker."""

from __future__ import annotations

import os

import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline


@pytest.mark.parametrize(
    ("error", "repeated"),
    [
        (RuntimeError("P2P 0a failed during barrier phase"), True),
        (RuntimeError("No active shuffle with id='0a' found"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_shuffle_that_was_lost_with_a_worker_is_repeated(
    finished, make_config, client, fail_in_workers, tmp_path, error, repeated
):
    failed = tmp_path / "failed"

    def is_first_call(*_) -> bool:
        """Return true once over all workers."""
        try:
            os.close(os.open(failed, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    fail_in_workers("spxdask.stages.light_curves", "_write_partition", is_first_call, error)
    pipeline = BatchPipeline(make_config(), client=client)
    if repeated:
        assert not pipeline.run_all().failed
        assert read_files(output_of(pipeline).lightcurves) == read_files(
            output_of(finished).lightcurves
        )
    else:
        with pytest.raises(RuntimeError, match="something else"):
            pipeline.run_all()
    assert failed.exists()
