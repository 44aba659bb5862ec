"""Runs without a circle: scattered sources, poles, right ascension 0, and one target."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simulated
from outputs import output_of, read_files, read_per_image

from spxdask import BatchConfig, BatchPipeline, load_query_summary
from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.run.status import read_status
from spxdask.simulate.archive import Fault, SimulatedArchive

# Sources: two about right ascension 0, one at the antipode of their frame, one near each pole, two
# that share a circle, and one that no frame has.
RA = np.array([0.05, 359.95, 180.0, 77.0, 200.0, 100.0, 101.5, 250.0])
DEC = np.array([0.02, -0.03, 0.01, 89.97, -89.96, 30.0, 30.02, -60.0])
IDS = [f"s{i}" for i in range(len(RA))]
# Centres of the frames, which are 0.41 deg wide, and the sources that are on each.
FRAMES = {
    (0.0, 0.0): "s0 s1",
    (180.05, 0.0): "s2",
    (60.0, 90.0): "s3",
    (10.0, -90.0): "s4",
    (100.05, 30.0): "s5",
    (100.75, 30.0): "",
    (101.45, 30.0): "s6",
}
EMPTY = 5


@dataclass(frozen=True)
class AnySky:
    """Frames over the whole sky, and how runs over them are made."""

    frames: list[simulated.SimulatedFrame]
    archive: SimulatedArchive
    run: Callable[..., BatchPipeline]

    @property
    def empty(self) -> simulated.SimulatedFrame:
        """The frame on which there is no source."""
        return self.frames[EMPTY]

    def count_requests(self, what: str) -> int:
        return sum(what in request.path for request in self.archive.requests)


def make_sources(index=slice(None)) -> pd.DataFrame:
    return pd.DataFrame({"targetid": IDS, "ra": RA, "dec": DEC}).iloc[index]


@pytest.fixture(scope="module")
def sky(tmp_path_factory, client) -> Iterator[AnySky]:
    one = simulated.field_sky(1)
    values = {f.name: np.repeat(getattr(one, f.name), len(RA)) for f in dataclasses.fields(one)}
    sources = type(one)(**values | {"ra": RA, "dec": DEC})
    exposures = [
        simulated.exposure(n, 1 + n % 6, ra=ra, dec=dec) for n, (ra, dec) in enumerate(FRAMES)
    ]
    frames = simulated.simulate(tmp_path_factory.mktemp("sky"), exposures, sources)
    with SimulatedArchive([frame.archived for frame in frames]) as archive:

        def run(folder: Path, sources: pd.DataFrame | None, **options) -> BatchPipeline:
            if sources is not None:
                options["catalog_path"] = folder / "sources.csv"
                sources.to_csv(options["catalog_path"], index=False)
            defaults = simulated.run_options(folder, archive, folder / "out")
            for name in ("center_ra", "center_dec", "radius", "catalog_path"):
                del defaults[name]
            pipeline = BatchPipeline(BatchConfig(**(defaults | options)), client=client)
            pipeline.run_all()
            return pipeline

        yield AnySky(frames, archive, run)


@pytest.fixture(scope="module")
def finished(sky, tmp_path_factory) -> BatchPipeline:
    n_before = sky.count_requests(sky.empty.exposure.filename)
    pipeline = sky.run(tmp_path_factory.mktemp("finished"), make_sources())
    assert sky.count_requests(sky.empty.exposure.filename) == n_before
    return pipeline


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A folder with a copy of the finished run, in which runs may go on."""
    shutil.copytree(output_of(finished).path, tmp_path / "out")
    return tmp_path


def test_every_source_is_measured_wherever_it_is(sky, finished):
    rows = read_per_image(output_of(finished).per_image)
    found = rows.groupby("filename")["target_id"].agg(lambda ids: " ".join(sorted(ids))).to_dict()
    expected = {
        frame.exposure.filename: ids
        for frame, ids in zip(sky.frames, FRAMES.values(), strict=True)
        if ids
    }
    assert found == expected
    assert finished.summary.n_measured == 7


def test_a_frame_without_a_source_is_not_fetched_and_counted(sky, finished):
    reason = {"no source on the frame": 1}
    reports = finished.summary.stages
    assert reports["query"].total == 7
    assert reports["query"].excluded == reason
    for stage in ("download", "extract"):
        assert (reports[stage].total, reports[stage].excluded) == (6, reason)
    assert reports["aggregate"].left_out == 0
    assert not finished.summary.failed
    text = str(finished.summary)
    assert "7 frames found, 6 with a source, " in text
    assert "1 frame not fetched: no source on the frame" in text
    assert "1 frame not measured: no source on the frame" in text
    assert not (output_of(finished).images / sky.empty.exposure.filename).exists()
    assert len(list(output_of(finished).per_image.iterdir())) == 6


def test_status_agrees(sky, finished):
    status = read_status(output_of(finished).path)
    assert (status.n_frames, status.measured, status.pending) == (7, 6, 0)
    assert status.excluded == {"no source on the frame": 1}
    assert status.ended == 7
    assert status.frame_bytes == sum(
        frame.path.stat().st_size for frame in sky.frames if frame is not sky.empty
    )
    assert "1 frame not fetched: no source on the frame" in str(status)


def test_the_query_summary_says_what_the_field_was(sky, finished):
    summary = load_query_summary(output_of(finished).path)
    region = summary["region"]
    assert (region["mode"], region["n_sources"]) == ("catalogue", 8)
    # Two about right ascension 0, and the pair, share one each.
    assert region["n_queries"] == 6
    assert summary["n_observations"] == 7
    assert summary["not_fetched"] == {"no source on the frame": 1}
    marked = [o["obs_id"] for o in summary["observations"] if "not_fetched" in o]
    assert marked == [sky.empty.exposure.obs_id]


def test_the_same_rows_as_one_run_for_each_source(sky, finished, tmp_path):
    everything = read_files(output_of(finished).lightcurves)
    for i in (0, 3, 6):
        (tmp_path / IDS[i]).mkdir()
        circle = {"center_ra": RA[i], "center_dec": DEC[i], "radius": 0.1}
        alone = sky.run(tmp_path / IDS[i], make_sources(slice(i, i + 1)), **circle)
        [(name, content)] = read_files(output_of(alone).lightcurves).items()
        assert everything[name] == content


def test_again_there_is_nothing_to_do(sky, copied):
    before = read_files(copied / "out" / "lightcurves")
    n_files = sky.count_requests(".fits")
    again = sky.run(copied, make_sources()).summary.stages
    assert sky.count_requests(".fits") == n_files
    assert (again["download"].reused, again["extract"].reused) == (6, 6)
    assert again["extract"].excluded == {"no source on the frame": 1}
    assert read_files(copied / "out" / "lightcurves") == before


def test_a_run_that_is_resumed_ends_with_the_same_bytes(sky, finished, tmp_path):
    sky.archive.add_faults(sky.frames[0].exposure.uri, [Fault(status=404)])
    first = sky.run(tmp_path, make_sources())
    assert len(first.summary.failed) == 1
    first.run_all(retry_failed=True)
    assert not first.summary.failed
    for folder in ("per_image", "lightcurves"):
        now, then = tmp_path / "out" / folder, output_of(finished).path / folder
        assert read_files(now) == read_files(then)


def test_a_catalogue_that_grows_finds_its_frames(sky, tmp_path):
    few = sky.run(tmp_path, make_sources(slice(0, 3)))
    assert few.summary.stages["query"].total == 2
    grown = sky.run(tmp_path, make_sources()).summary.stages
    assert grown["query"].total == 7
    assert (grown["extract"].reused, grown["extract"].done) == (2, 4)


def test_a_catalogue_that_shrinks_leaves_its_frames_out(sky, copied):
    shrunk = sky.run(copied, make_sources([0, 5]))
    reports = shrunk.summary.stages
    assert reports["query"].total == 2
    assert shrunk.summary.n_measured == 2
    assert reports["aggregate"].removed == 5


def test_a_later_stage_does_not_take_the_frames_of_other_sources(sky, finished, copied):
    config = dataclasses.replace(finished.config, output_dir=copied / "out")
    make_sources([0, 1, 2]).to_csv(copied / "fewer.csv", index=False)
    other = dataclasses.replace(config, catalog_path=copied / "fewer.csv")
    for stage in ("extract", "aggregate"):
        with pytest.raises(RunFolderError, match=r"found for other sources .* run query first"):
            getattr(BatchPipeline(other), f"run_{stage}")()


def test_stages_one_by_one(sky, finished, tmp_path, client):
    config = dataclasses.replace(finished.config, output_dir=tmp_path / "out")
    pipeline = BatchPipeline(config, client=client)
    assert len(pipeline.run_query()) == 7
    status = read_status(tmp_path / "out")
    assert (status.pending, status.excluded.total()) == (6, 1)
    downloaded = pipeline.run_download()
    assert (downloaded.total, downloaded.excluded.total()) == (6, 1)
    extracted = pipeline.run_extract()
    assert (extracted.total, extracted.excluded.total()) == (6, 1)
    assert pipeline.run_aggregate().left_out == 0
    for folder in ("per_image", "lightcurves"):
        now, then = tmp_path / "out" / folder, output_of(finished).path / folder
        assert read_files(now) == read_files(then)


@pytest.mark.parametrize(("keep", "n_fetched"), [(True, 3), (False, 2)])
def test_a_circle_fetches_frames_without_a_source_only_to_keep_them(sky, tmp_path, keep, n_fetched):
    circle = {"center_ra": 100.75, "center_dec": 30.0, "radius": 1.0}
    n_before = sky.count_requests(sky.empty.exposure.filename)
    pipeline = sky.run(tmp_path, make_sources(), **circle, keep_images=keep)
    reports = pipeline.summary.stages
    assert reports["query"].total == 3
    assert (reports["download"].total, reports["extract"].total) == (n_fetched, n_fetched)
    assert reports["query"].excluded.total() == 3 - n_fetched
    assert reports["query"].outside == 6
    assert sky.count_requests(sky.empty.exposure.filename) - n_before == n_fetched - 2
    assert load_query_summary(tmp_path / "out")["region"]["mode"] == "circle"
    status = read_status(tmp_path / "out")
    assert (status.pending, status.excluded.total()) == (0, 3 - n_fetched)


def test_only_frames_to_be_fetched_count_for_the_limit(sky, tmp_path):
    assert sky.run(tmp_path, make_sources(), max_images=6).summary.stages["extract"].total == 6


def test_one_target(sky, tmp_path):
    target = "06h40m00s +30d00m00s"
    pipeline = sky.run(tmp_path, None, target=target)
    rows = read_per_image(output_of(pipeline).per_image)
    assert rows["target_id"].tolist() == [target]
    assert (rows["ra"][0], rows["dec"][0]) == pytest.approx((100.0, 30.0))
    region = load_query_summary(tmp_path / "out")["region"]
    assert (region["mode"], region["target"]) == ("target", target)
    assert (region["center_ra"], region["center_dec"]) == pytest.approx((100.0, 30.0))
    assert len(list(output_of(pipeline).lightcurves.iterdir())) == 1
    again = BatchPipeline(pipeline.folder.saved_config()).run_all()
    assert again.stages["extract"].reused == 1


def test_a_target_on_the_command_line(sky, tmp_path, client, capfd, monkeypatch):
    monkeypatch.setenv("SPXDASK_TAP_URL", sky.archive.tap_url)
    monkeypatch.setenv("SPXDASK_ARCHIVE_URL", sky.archive.archive_url)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("catalog_path: absent.csv\nbands: [D5]\n")
    scheduler = ["--scheduler", client.scheduler.address]
    assert main(["run", "--target", "J064000.0+300000", "--config", "run.yaml", *scheduler]) == 0
    assert "1 frame found" in capfd.readouterr().out
    [curve] = Path("batch_output/lightcurves").iterdir()
    assert curve.name == "J064000.0+300000.csv"
    for stage in ("download", "extract", "aggregate"):
        assert main([stage, *scheduler]) == 0
    assert main(["run", "--target", "M31"]) == 2
    [line] = capfd.readouterr().err.splitlines()[-1:]
    assert line.startswith("spxdask: target must be a position such as '10.684 41.269' (degrees)")
    assert line.endswith("got 'M31'")
