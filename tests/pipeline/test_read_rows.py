"""Whole runs that read frames by rows: the rows of whole frames, of a part of their bytes."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import simulated
from killing import Command
from outputs import output_of, read_files

from spxdask import BatchConfig, BatchPipeline
from spxdask.errors import RunFolderError
from spxdask.run.frame_table import FRAMES_NAME
from spxdask.run.status import read_status
from spxdask.simulate.archive import ArchivedFrame, Fault, SimulatedArchive
from spxdask.simulate.frames import SceneOptions, make_planes, make_sky, write_frame

N_FRAMES = 6
# What follows from the zodiacal light of the frame.
FITTED = ["flux", "flux_error", "mag_ab", "mag_ab_error", "bg_level", "bg_error"]
FITTED += ["psf_flux", "psf_flux_error", "psf_chi2", "neighbour_flux"]


@dataclasses.dataclass(frozen=True)
class Field:
    """Full-size frames of one place, one file under many names, and one beside the sources.

    In the last of the place, light is not in ZODI, so that a few of its rows do not tell enough.
    """

    catalogue: Path
    frames: list[ArchivedFrame]

    @property
    def total_bytes(self) -> int:
        return sum(frame.path.stat().st_size for frame in self.frames)


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    folder = tmp_path_factory.mktemp("field")
    sky = make_sky(*simulated.CENTER, 0.3, n_sources=60, min_separation_arcsec=90, seed=2)
    one = simulated.exposure(0, 3)
    path = folder / one.filename
    planes = make_planes(one, sky, SceneOptions(crowding=0.45))
    write_frame(path, one, planes)
    base, frames = ArchivedFrame.of(one, path), []
    for number in range(N_FRAMES):
        obs_id = f"2025W51_1A_{number:04d}_1"
        changes = {"obs_id": obs_id, "uri": base.uri.replace(base.obs_id, obs_id)}
        times = {"mjd_begin": base.mjd_begin + number, "mjd_end": base.mjd_end + number}
        frames.append(dataclasses.replace(base, **changes, **times))
    planes.image[...] += np.linspace(-0.02, 0.02, len(planes.image))[:, np.newaxis]
    write_frame(folder / "slope.fits", one, planes)
    frames[-1] = dataclasses.replace(frames[-1], path=folder / "slope.fits")
    # Its polygon has the field, and the frame itself is elsewhere.
    aside = simulated.exposure(50, 3, dec=simulated.CENTER[1] + 10)
    path = folder / aside.filename
    write_frame(path, aside, make_planes(aside, sky, SceneOptions(crowding=0.45)))
    beside = ArchivedFrame.of(aside, path)
    frames.append(dataclasses.replace(beside, polygon=base.polygon))
    chosen = np.arange(3)
    catalogue = simulated.write_catalogue(
        folder / "sources.csv", [f"s{i}" for i in chosen], sky.ra[chosen], sky.dec[chosen]
    )
    return Field(catalogue, frames)


@pytest.fixture(scope="module")
def archive(field):
    with SimulatedArchive(field.frames) as archive:
        yield archive


def make_run(field, archive, output, client, **options) -> BatchPipeline:
    defaults = simulated.run_options(field.catalogue, archive, output)
    defaults |= {"keep_images": False, "max_retries": 3}
    return BatchPipeline(BatchConfig(**(defaults | options)), client=client)


@pytest.fixture(scope="module")
def by_rows(field, archive, client, tmp_path_factory) -> BatchPipeline:
    output = tmp_path_factory.mktemp("rows") / "out"
    pipeline = make_run(field, archive, output, client, read="rows")
    pipeline.run_all()
    return pipeline


def read_results(output: Path) -> dict:
    return {name: read_files(output / name) for name in ("per_image", "lightcurves")}


def test_a_part_of_the_bytes_gives_the_rows_of_whole_frames(
    field, archive, client, by_rows, tmp_path
):
    download = by_rows.reports["download"]
    assert (download.done, download.by_rows, download.failed) == (N_FRAMES + 1, N_FRAMES + 1, {})
    assert download.file_bytes == field.total_bytes
    # The link is fast enough to read many a gap along.
    assert download.bytes < 0.5 * field.total_bytes
    text = f"fetched {download.bytes / 1e9:.3g} GB of {field.total_bytes / 1e9:.3g} GB, by rows"
    assert text in str(by_rows.summary)
    output = Path(output_of(by_rows).path)
    assert text in str(read_status(output))
    frames = pq.read_table(output / "state" / FRAMES_NAME).to_pandas()
    assert set(frames["read"]) == {"rows"}
    assert frames["bytes"].sum() == download.bytes
    assert frames["file_bytes"].sum() == field.total_bytes
    assert (frames["requests"] > 0).all()
    assert sorted(frames["fit_rows"]) == [0, *[24] * (N_FRAMES - 1), 200]
    # No more than the head of the frame without sources.
    [aside] = frames[frames["rows"] == 0].to_dict("records")
    assert (aside["bytes"] < 300_000, aside["requests"], aside["fit_rows"]) == (True, 1, 0)

    whole = make_run(field, archive, tmp_path / "whole", client, read="whole")
    whole.run_all()
    assert whole.reports["download"].bytes == field.total_bytes
    assert "by rows" not in str(whole.summary)
    names = sorted(path.name for path in (output / "lightcurves").iterdir())
    assert len(names) == 3
    for name in names:
        few, all_ = (
            pd.read_csv(folder / "lightcurves" / name) for folder in (output, tmp_path / "whole")
        )
        assert len(few) == N_FRAMES
        pd.testing.assert_frame_equal(
            few.drop(columns=FITTED), all_.drop(columns=FITTED), check_exact=True
        )
        for flux in ("flux", "psf_flux"):
            assert (abs(few[flux] - all_[flux]) < 1e-3 * all_[f"{flux}_error"]).all()
        assert (abs(few["bg_level"] - all_["bg_level"]) < all_["bg_error"]).all()


def test_an_archive_without_ranges_gives_the_same_tables_and_is_named_once(
    field, client, by_rows, tmp_path, caplog
):
    faults = {frame.uri: itertools.repeat(Fault(no_range=True)) for frame in field.frames}
    with SimulatedArchive(field.frames, faults=faults) as archive:
        pipeline = make_run(field, archive, tmp_path / "out", client, read="auto")
        pipeline.run_all()
        # One for a frame, those that found out included.
        assert archive.traffic["range"].answers == 0
    download = pipeline.reports["download"]
    assert (download.done, download.by_rows) == (N_FRAMES + 1, 0)
    assert str(pipeline.summary).count("sends no parts of files") == 1
    assert sum("fetched whole" in record.message for record in caplog.records) == 1
    assert read_results(tmp_path / "out") == read_results(Path(output_of(by_rows).path))


def test_that_frames_which_are_kept_come_whole_is_said(field, archive, client, tmp_path, caplog):
    pipeline = make_run(field, archive, tmp_path, client, read="rows", keep_images=True)
    with pytest.raises(RunFolderError):
        # There was no query.
        pipeline.run_download()
    assert sum("must be false for read: rows" in record.message for record in caplog.records) == 1


@pytest.mark.kill
def test_killed_by_rows_and_resumed_in_auto_it_ends_with_the_same_bytes(
    field, client, by_rows, tmp_path
):
    output = tmp_path / "out"
    ledger = output / "state/ledger.jsonl"
    ra, dec = map(str, simulated.CENTER)
    with SimulatedArchive(field.frames, bandwidth=15e6) as archive:
        command = [
            *("spxdask", "run", "--ra", ra, "--dec", dec, "--radius", "0.05", "--read", "rows"),
            *("--catalog", str(field.catalogue), "--output", str(output), "--no-keep-images"),
            *("--num-buckets", "5", "--max-extract-workers", "1", "--calibration", "frame"),
            *("--tap-url", archive.tap_url, "--archive-url", archive.archive_url),
        ]
        with Command(*command, log=tmp_path / "run.log") as running:
            deadline = time.monotonic() + 100
            while '"extract"' not in (ledger.read_text() if ledger.exists() else ""):
                assert running.wait(0.01) is None, running.stderr
                assert time.monotonic() < deadline
            running.kill()
    assert not (output / "lightcurves").exists() or not any((output / "lightcurves").iterdir())
    with SimulatedArchive(field.frames) as archive:
        resumed = make_run(field, archive, output, client, read="auto")
        summary = resumed.run_all()
    assert summary.failed == {}
    assert resumed.reports["extract"].reused > 0
    assert read_results(output) == read_results(Path(output_of(by_rows).path))
    # Nothing is left to do in any way of reading.
    again = make_run(field, archive, output, client, read="whole")
    assert again.folder.saved_config().read == "auto"
