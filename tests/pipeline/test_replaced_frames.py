"""Frames whose content the archive replaces under the same name and length."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import simulated
from astropy.io import fits
from outputs import OutputFolder, output_of, read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.run.status import read_status
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive


class Holdings:
    """Two frames on disk, which tests replace, behind an archive or as a mirror."""

    def __init__(self, survey: simulated.Survey, folder: Path) -> None:
        self.paths: list[Path] = []
        self.frames: list[ArchivedFrame] = []
        for archived in survey.archived[:2]:
            path = folder / archived.uri
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archived.path.read_bytes())
            self.paths.append(path)
            self.frames.append(replace(archived, path=path))
        self.server = SimulatedArchive(self.frames)
        self.mirror_url = folder.as_uri()

    def replace(self, number: int = 0, factor: float = 2.0) -> bytes:
        """Multiply the image of a frame by a factor; name and length of the file stay."""
        path = self.paths[number]
        size = path.stat().st_size
        with fits.open(path, disable_image_compression=True) as hdus:
            hdus["IMAGE"].data = (hdus["IMAGE"].data * np.float32(factor)).astype(">f4")
            hdus.writeto(path.with_suffix(".new"), output_verify="ignore")
        path.with_suffix(".new").replace(path)
        assert path.stat().st_size == size
        return path.read_bytes()

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.server.requests)


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> simulated.Survey:
    exposures = [simulated.exposure(number, 3) for number in range(2)]
    return simulated.make_survey(tmp_path_factory.mktemp("survey"), exposures, n_sources=20)


@pytest.fixture
def holdings(survey, tmp_path) -> Iterator[Holdings]:
    holdings = Holdings(survey, tmp_path / "archive")
    with holdings.server:
        yield holdings


@pytest.fixture
def archive(holdings) -> SimulatedArchive:
    return holdings.server


@pytest.fixture
def config(make_config) -> BatchConfig:
    return make_config()


def outcomes(output: OutputFolder, stage: str) -> list[dict]:
    lines = (output.state / "ledger.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line)).get("stage") == stage]


def run_fresh(config, client, folder):
    """Return the files of a new run, to compare with."""
    pipeline = BatchPipeline(replace(config, output_dir=folder), client=client)
    pipeline.run_all()
    return read_files(output_of(pipeline).per_image), read_files(output_of(pipeline).lightcurves)


def test_a_frame_fetched_again_with_other_content_is_measured_again(
    config, client, holdings, tmp_path
):
    pipeline = BatchPipeline(config, client=client)
    first = pipeline.run_all()
    output = output_of(pipeline)
    content = holdings.replace()
    for image in output.images.iterdir():
        image.unlink()
    summary = BatchPipeline(config, client=client).run_all()
    assert summary.stages["download"].done == 2
    # Of the two that were fetched for their image, one is as it was measured.
    extracted = summary.stages["extract"]
    assert (extracted.done, extracted.reused, extracted.rows) == (
        1,
        1,
        first.stages["extract"].rows,
    )
    assert (output.images / holdings.paths[0].name).read_bytes() == content
    expected = run_fresh(config, client, tmp_path / "fresh")
    assert (read_files(output.per_image), read_files(output.lightcurves)) == expected
    again = BatchPipeline(config, client=client).run_all()
    assert (again.stages["extract"].done, again.stages["aggregate"].done) == (0, 0)


def test_download_alone_makes_the_table_stale(config, client, holdings):
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    holdings.replace()
    (output_of(pipeline).images / holdings.paths[0].name).unlink()
    assert pipeline.run_download().done == 1
    status = read_status(config.output_dir)
    assert (status.measured, status.pending) == (1, 1)
    assert pipeline.run_extract().done == 1


@pytest.mark.parametrize("keep", [True, False])
def test_recheck_finds_what_was_replaced(config, client, holdings, tmp_path, keep):
    config = replace(config, keep_images=keep)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    holdings.replace()
    # Without it, nobody asks.
    assert BatchPipeline(config, client=client).run_all().stages["extract"].reused == 2
    assert holdings.count("HEAD") == 0
    n_fetched = holdings.count("GET")
    summary = BatchPipeline(config, client=client).run_all(recheck=True)
    assert holdings.count("HEAD") == 2
    assert summary.stages["download"].done == summary.stages["extract"].done == 1
    assert holdings.count("GET") - n_fetched <= 2
    assert "2 frames rechecked: 1 replaced in the archive" in str(summary)
    expected = run_fresh(config, client, tmp_path / "fresh")
    output = output_of(pipeline)
    assert (read_files(output.per_image), read_files(output.lightcurves)) == expected
    summary = BatchPipeline(config, client=client).run_all(recheck=True)
    assert summary.stages["download"].done == summary.stages["extract"].done == 0
    assert "2 frames rechecked: 0 replaced" in str(summary)


def test_recheck_of_a_touched_file_fetches_but_does_not_measure(config, client, holdings):
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    for path in holdings.paths:
        path.touch()
    summary = BatchPipeline(config, client=client).run_all(recheck=True)
    assert (summary.stages["download"].done, summary.stages["extract"].done) == (2, 0)
    assert summary.stages["aggregate"].done == 0


def test_recheck_of_a_mirror(config, client, holdings):
    config = replace(config, archive_url=holdings.mirror_url)
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    holdings.replace()
    summary = BatchPipeline(config, client=client).run_all(recheck=True)
    assert summary.stages["download"].done == summary.stages["extract"].done == 1


def test_recheck_of_what_cannot_be_asked_for_changes_nothing(config, client, holdings):
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    holdings.server.add_faults(holdings.frames[0].uri, [Fault(status=404)])
    report = pipeline.run_download(recheck=True)
    assert (report.done, report.reused, report.rechecked) == (0, 2, 2)
    assert dict(report.not_rechecked) == {"HTTP 404 Not Found": 1}
    assert "1 frame not rechecked: HTTP 404 Not Found" in repr(report)


def test_a_folder_of_an_earlier_version_is_resumed_and_rechecked(config, client, holdings):
    pipeline = BatchPipeline(config, client=client)
    pipeline.run_all()
    ledger = output_of(pipeline).state / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    now = time.time()
    for path in holdings.paths:
        os.utime(path, (now - 7200, now - 7200))
    for record in lines:
        if "time" in record:
            record["time"] = datetime.fromtimestamp(now - 3600, UTC).isoformat()
        for name in ("etag", "modified", "frame_checksum"):
            record.pop(name, None)
        if record.get("stage") == "download":
            record["checksum"] = "ffffffff"
    ledger.write_text("".join(json.dumps(record) + "\n" for record in lines))
    again = BatchPipeline(config, client=client)
    assert again.run_all().stages["extract"].reused == 2
    # Files that are older than the run were not replaced since.
    assert again.run_all(recheck=True).stages["download"].done == 0
    holdings.replace()
    summary = again.run_all(recheck=True)
    assert summary.stages["download"].done == summary.stages["extract"].done == 1


def test_stale_sums_are_counted_in_summary_and_status(config, client, holdings):
    path = holdings.paths[0]
    with fits.open(path, disable_image_compression=True) as hdus:
        hdus.writeto(path.with_suffix(".new"), checksum=True)
    content = bytearray(path.with_suffix(".new").read_bytes())
    content[content.index(b"CHECKSUM") + 75] ^= 1
    path.write_bytes(content)
    # The lengths that the archive lists are those of when it was made.
    with SimulatedArchive(holdings.frames) as server:
        config = replace(config, tap_url=server.tap_url, archive_url=server.archive_url)
        summary = BatchPipeline(config, client=client).run_all()
    assert not summary.failed
    assert str(summary).count("1 frame: CHECKSUM of PRIMARY disagrees with the header") == 1
    warning = "1 frame: CHECKSUM of PRIMARY disagrees"
    assert warning in str(read_status(config.output_dir))
    assert outcomes(output_of(BatchPipeline(config)), "download")[0]["attempts"] in (1, 2)
