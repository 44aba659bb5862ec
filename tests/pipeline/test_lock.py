"""One run at a time works in an output folder."""

from __future__ import annotations

import os

import pytest

from spxdask import BatchPipeline
from spxdask.errors import RunFolderError
from spxdask.progress import Silent
from spxdask.run.folder import RunFolder


def test_second_run_in_a_locked_folder_is_refused(make_config, client):
    pipeline = BatchPipeline(make_config(), client=client)
    holder = f"another run is at work .*process {os.getpid()}"
    with pipeline.folder.locked(), pytest.raises(RunFolderError, match=holder):
        BatchPipeline(make_config(), client=client).run_query()
    assert BatchPipeline(make_config(), client=client).run_query()


@pytest.mark.parametrize("unit", ["frames", "partitions"])
def test_run_that_lost_its_lock_stops(make_config, client, monkeypatch, unit):
    class LoseLock(Silent):
        def start(self, stage, total, unit_):
            if unit_ == unit:
                monkeypatch.setattr(RunFolder, "is_lock_lost", True)

    pipeline = BatchPipeline(make_config(), client=client, progress=LoseLock())
    with pytest.raises(RunFolderError, match="another run has taken over"):
        pipeline.run_all()
    monkeypatch.undo()
    assert BatchPipeline(make_config(), client=client).run_all().failed == {}
