"""A frame read by rows: the same numbers as from the whole, of fewer bytes, with every fault."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simulated

from spxdask.archive.buffer_pool import BufferPool
from spxdask.archive.link import Link
from spxdask.archive.observation import Observation
from spxdask.archive.pieces import RangeRefusals
from spxdask.archive.retry import RetryPolicy
from spxdask.science.level2.partial import Layouts
from spxdask.science.options import PhotometryConfig
from spxdask.simulate.archive import Fault, SimulatedArchive, make_mirror
from spxdask.simulate.frames import SceneOptions, make_planes, write_frame
from spxdask.stages.download import FetchOptions
from spxdask.stages.extract import ExtractOptions
from spxdask.stages.partial import may_be_read_by_rows, stream_rows
from spxdask.stages.reading import RowRule
from spxdask.stages.stream import stream
from spxdask.tables.catalogue import read_catalogue

# High enough to be worth reading in parts.
WINDOW = (900, 500, 240, 1000)
RULE = RowRule(least_file_bytes=1_000_000)
# Of the columns, these alone may follow from more than the rows of the source.
FITTED = {"flux", "flux_error", "mag_ab", "mag_ab_error", "bg_level", "bg_error"}
FITTED |= {"psf_flux", "psf_flux_error", "psf_chi2", "neighbour_flux"}


class Setting:
    """Frames in an archive, with catalogues of some of their sources."""

    def __init__(self, folder, layout) -> None:
        self.folder = folder
        self.sky = simulated.field_sky()
        release = {"release": layout, "version": 30} if layout == "qr3" else {}
        self.exposures = [simulated.exposure(number, 3, **release) for number in range(2)]
        self.paths = []
        for one in self.exposures:
            planes = make_planes(one, self.sky, SceneOptions(crowding=0.3), window=WINDOW)
            self.paths.append(folder / one.filename)
            write_frame(self.paths[-1], one, planes, window=WINDOW)

    @property
    def archived(self):
        pairs = zip(self.exposures, self.paths, strict=True)
        return [simulated.ArchivedFrame.of(one, path, WINDOW) for one, path in pairs]

    def observe(self, url, number=0, **changes):
        frame = self.archived[number]
        values = {
            "obs_id": frame.obs_id,
            "band": f"D{frame.detector}",
            "mjd": (frame.mjd_begin + frame.mjd_end) / 2,
            "wavelength_um": 2.0,
            "uri": frame.uri,
            "download_url": f"{url}/{frame.uri}",
            "size_bytes": frame.path.stat().st_size,
        }
        return Observation(**values | changes)

    def options(self, sources, rule=RULE, **photometry):
        path = self.folder / f"sources-{len(sources)}-{sources[0] if len(sources) else ''}.csv"
        if len(sources):
            ra, dec = self.sky.ra[sources], self.sky.dec[sources]
        else:
            ra, dec = np.array([simulated.CENTER[0]]), np.array([simulated.CENTER[1] + 1.0])
        ids = [f"s{i}" for i in sources] or ["far"]
        catalogue = read_catalogue(simulated.write_catalogue(path, ids, ra, dec))
        catalogue.save(path.with_suffix(".arrow"))
        return ExtractOptions(
            catalogue=str(path.with_suffix(".arrow")),
            photometry=PhotometryConfig(**photometry),
            recipe="recipe",
            catalogue_fingerprint=catalogue.fingerprint,
            serial=False,
            row_rule=rule,
        )


@pytest.fixture(scope="module", params=["qr2", "qr3"])
def setting(request, tmp_path_factory):
    return Setting(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qr3(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("one"), "qr3")


@pytest.fixture
def archive(qr3):
    with SimulatedArchive(qr3.archived) as archive:
        yield archive


def fetch_options(read="rows", max_retries=3, **limits):
    retry = RetryPolicy(max_retries=max_retries, first_delay_s=0.001)
    return FetchOptions(**{"retry": retry, "stall_timeout_s": 20.0, "read": read} | limits)


class KnownLink(Link):
    """A link that is as it is, whatever is measured."""

    def note(self, **measured):
        pass


class Reader:
    """Reads frames into a folder of its own, and knows no archive but those of the test."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.refusals, self.layouts = RangeRefusals(), Layouts()

    def read(self, observation, extract, fetch=None, **known):
        outcomes = stream_rows(
            observation,
            str(self.folder),
            fetch or fetch_options(),
            extract,
            **{
                "buffers": BufferPool(),
                "layouts": self.layouts,
                "link": KnownLink(latency_s=1e-6),
                "refusals": self.refusals,
            }
            | known,
        )
        return outcomes, self.table

    def read_whole(self, observation, extract):
        outcomes = stream(observation, None, str(self.folder), fetch_options("whole"), extract)
        return outcomes, self.table

    @property
    def table(self):
        tables = list(self.folder.glob("*_photometry.csv"))
        return tables[0].read_bytes() if tables else None


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path)


@pytest.fixture
def other(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    return Reader(folder)


def find_on_frame(setting, number=0):
    """Return sources of the sky that get rows, in the order of y."""
    x, y = setting.exposures[number].wcs().all_world2pix(setting.sky.ra, setting.sky.dec, 0)
    x, y = x - WINDOW[0], y - WINDOW[1]
    inside = (x > 40) & (x < WINDOW[2] - 40) & (y > 40) & (y < WINDOW[3] - 40)
    found = np.flatnonzero(inside)
    return found[np.argsort(y[found])]


def assert_done(outcomes):
    assert [(o.stage, o.status, o.reason) for o in outcomes] == [
        ("download", "done", None),
        ("extract", "done", None),
    ]


@pytest.mark.slow
def test_the_same_table_from_fewer_bytes(setting, reader, other):
    sources = find_on_frame(setting)[:2]
    options = setting.options(sources)
    with SimulatedArchive(setting.archived) as archive:
        observation = setting.observe(archive.url)
        outcomes, table = reader.read(observation, options)
        sent = archive.traffic["range"]
        again, _ = reader.read(setting.observe(archive.url, 1), options)
        n_requests = archive.traffic["range"].answers - sent.answers
        whole, expected = other.read_whole(observation, options)
        assert_done(outcomes)
        assert_done(whole)
        assert table == expected
        fetched, measured = outcomes
        assert (fetched.read, measured.read, whole[0].read) == ("rows", "rows", "whole")
        assert fetched.bytes == sent.sent_bytes < 0.7 * fetched.frame_bytes
        assert fetched.requests == sent.answers
        assert fetched.frame_bytes == measured.frame_bytes == observation.size_bytes
        assert measured.rows == len(sources)
        assert measured.etag == fetched.etag == whole[0].etag
        assert measured.properties["fit_rows"] < 1000
        assert n_requests == again[0].requests


def test_all_rows_change_only_what_is_fitted(setting, reader, other):
    sources = find_on_frame(setting)[:3]
    with SimulatedArchive(setting.archived) as archive:
        observation = setting.observe(archive.url)
        reader.read(observation, setting.options(sources))
        outcomes, _ = other.read_whole(observation, setting.options(sources, rule=None))
        assert outcomes[1].properties["fit_rows"] is None
    few, all_ = (pd.read_csv(next(r.folder.glob("*.csv"))) for r in (reader, other))
    pd.testing.assert_frame_equal(
        few.drop(columns=[*FITTED]), all_.drop(columns=[*FITTED]), check_exact=True
    )
    assert (abs(few["flux"] - all_["flux"]) < 1e-3 * all_["flux_error"]).all()
    assert (abs(few["psf_flux"] - all_["psf_flux"]) < 1e-3 * all_["psf_flux_error"]).all()


def test_a_frame_without_sources_is_done_after_its_head(setting, reader, other):
    options = setting.options([])
    with SimulatedArchive(setting.archived) as archive:
        observation = setting.observe(archive.url)
        outcomes, table = reader.read(observation, options)
        whole, expected = other.read_whole(observation, options)
    assert_done(outcomes)
    assert table == expected
    assert table.count(b"\n") == 1
    assert outcomes[0].bytes < 300_000
    assert (outcomes[1].rows, outcomes[1].properties["n_sources"]) == (0, 0)
    assert outcomes[1].bounding_circle == whole[1].bounding_circle
    assert outcomes[1].sources_fingerprint == whole[1].sources_fingerprint


def test_a_mirror_is_read_by_rows(qr3, reader, other, tmp_path):
    options = qr3.options(find_on_frame(qr3)[:2])
    make_mirror(tmp_path / "mirror", qr3.archived)
    frame = qr3.archived[0]
    place = tmp_path / "mirror" / frame.uri.removeprefix("ibe/data/spherex/")
    observation = qr3.observe("", download_url=place.as_uri())
    outcomes, table = reader.read(observation, options)
    assert_done(outcomes)
    assert outcomes[0].bytes < 0.7 * outcomes[0].frame_bytes
    assert table == other.read_whole(observation, options)[1]


@pytest.mark.parametrize(
    ("latency_s", "bandwidth", "read"),
    [(1e-4, 1e6, "rows"), (1.0, 1e9, "whole")],
)
def test_auto_follows_the_link_and_the_table_does_not(
    qr3, archive, reader, other, latency_s, bandwidth, read
):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation = qr3.observe(archive.url)
    link = KnownLink(latency_s=latency_s, bandwidth=bandwidth)
    outcomes, table = reader.read(observation, options, fetch_options("auto"), link=link)
    assert_done(outcomes)
    assert (outcomes[0].read, outcomes[1].read) == (read, read)
    assert outcomes[0].bytes == archive.sent_bytes
    assert outcomes[0].requests == sum(t.answers for t in archive.traffic.values())
    assert table == other.read_whole(observation, options)[1]


def test_more_rows_than_the_rule_allows_are_read_whole(qr3, archive, reader, other):
    options = qr3.options(find_on_frame(qr3)[:2], rule=replace(RULE, largest_share=0.01))
    observation = qr3.observe(archive.url)
    outcomes, table = reader.read(observation, options, fetch_options("rows"))
    assert_done(outcomes)
    assert (outcomes[0].read, outcomes[1].properties["fit_rows"]) == ("whole", None)
    whole = other.read_whole(observation, replace(options, row_rule=None))
    assert table == whole[1]


def describe(fault):
    """Return what is wrong, as the name of a test."""
    return "-".join(f"{k}={v}" for k, v in vars(fault).items() if v not in (None, False))


NO_RANGES = [
    Fault(no_range=True),
    Fault(range_status=403),
    Fault(range_status=416),
    Fault(no_version=True),
]


@pytest.mark.parametrize("fault", NO_RANGES, ids=describe)
def test_an_archive_without_ranges_gives_whole_frames(qr3, archive, reader, other, fault):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation, next_one = (qr3.observe(archive.url, number) for number in range(2))
    for frame in qr3.archived:
        archive.add_faults(frame.uri, itertools.repeat(fault))
    outcomes, table = reader.read(observation, options)
    assert_done(outcomes)
    assert outcomes[0].read == outcomes[1].read == "whole"
    assert outcomes[0].refusal
    archive.requests.clear()
    later, _ = reader.read(next_one, options)
    # It is not asked again.
    assert_done(later)
    assert (len(archive.requests), later[0].requests) == (1, 1)
    assert later[0].refusal == outcomes[0].refusal
    (reader.folder / table_of(next_one)).unlink()
    assert reader.table == table == other.read_whole(observation, options)[1]


def test_another_run_asks_for_ranges_again(qr3, archive, reader):
    options, observation = qr3.options(find_on_frame(qr3)[:1]), qr3.observe(archive.url)
    reader.refusals.begin("one")
    reader.refusals.note(observation.download_url, "no ranges yesterday")
    for run, read in (("one", "whole"), ("two", "rows")):
        outcomes, _ = reader.read(observation, options, fetch_options(run=run))
        assert_done(outcomes)
        assert outcomes[0].read == read


def table_of(observation):
    return f"{observation.stem}_photometry.csv"


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(truncate=100),
        Fault(short_range=100),
        Fault(wrong_range=1000),
        Fault(multipart=True),
        Fault(changed=True),
        Fault(unconditional=True),
        Fault(html=True),
        Fault(stall=100),
    ],
    ids=describe,
)
@pytest.mark.slow
def test_faults_cost_time_alone(qr3, archive, reader, other, fault, at):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation = qr3.observe(archive.url)
    archive.add_faults(observation.uri, [*[Fault()] * at, fault])
    limits = {"stall_timeout_s": 0.2} if fault.stall else {}
    outcomes, table = reader.read(observation, options, fetch_options(**limits))
    assert_done(outcomes)
    assert outcomes[0].attempts > 1 or outcomes[0].refusal
    assert table == other.read_whole(observation, options)[1]


def test_a_file_that_is_replaced_on_the_way_is_read_anew(qr3, archive, reader, other, tmp_path):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation = qr3.observe(archive.url)
    replaced = tmp_path / "replaced.fits"
    content = bytearray(qr3.paths[0].read_bytes())
    replaced.write_bytes(content)
    before = other.read_whole(observation, options)

    class Replacing(Layouts):
        """Replaces the file when its head is there."""

        def find(self, key):
            archive.replace_file(observation.uri, replaced)
            return super().find(key)

    outcomes, table = reader.read(observation, options, layouts=Replacing())
    assert_done(outcomes)
    assert outcomes[0].attempts == 2
    assert outcomes[0].etag == outcomes[1].etag != before[0][0].etag
    assert table == before[1]


@pytest.mark.parametrize(
    ("fault", "blame"),
    [(Fault(status=404), None), (Fault(status=503), "archive"), (Fault(changed=False), None)],
    ids=["gone", "down", "another detector"],
)
def test_what_cannot_be_had_is_a_failed_download(qr3, archive, reader, fault, blame):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation = qr3.observe(archive.url)
    if fault.status is None:
        observation = replace(observation, band="D2")
    archive.add_faults(observation.uri, itertools.repeat(fault))
    [outcome], table = reader.read(observation, options)
    assert (outcome.stage, outcome.status, outcome.blame) == ("download", "failed", blame)
    assert (outcome.bytes, outcome.frame_bytes, table) == (0, 0, None)
    assert outcome.reason


def test_a_damaged_head_is_read_anew_and_a_second_time_settles_it(qr3, archive, reader):
    options = qr3.options(find_on_frame(qr3)[:2])
    observation = qr3.observe(archive.url)
    archive.add_faults(observation.uri, [Fault(garbage=True)])
    outcomes, _ = reader.read(observation, options)
    assert_done(outcomes)
    wrong = replace(observation, band="D2")
    [outcome], _ = reader.read(wrong, options)
    assert "second transfer brought the same bytes" in outcome.reason
    assert outcome.attempts == 2


def test_what_is_held_counts_for_the_limit_of_memory(qr3, archive, reader):
    counts = []

    class Counting(BufferPool):
        def _wait_for_room(self, size, limit):
            counts.append((size, limit))
            super()._wait_for_room(size, limit)

    options = qr3.options(find_on_frame(qr3)[:2], psf="none")
    observation = qr3.observe(archive.url)
    pool = Counting()
    fetch = fetch_options(scratch_bytes=12_345.0)
    outcomes, _ = reader.read(observation, options, fetch, buffers=pool)
    [(size, limit)] = counts
    assert limit == 12_345.0
    # More bands follow, as the frame is small.
    assert 0.3 * outcomes[0].bytes < size <= outcomes[0].bytes
    assert pool._leased_bytes == 0


def test_which_frames_are_looked_at_first(qr3, archive):
    options, fetch = qr3.options(find_on_frame(qr3)[:2]), fetch_options("auto")
    observation = qr3.observe(archive.url)
    assert may_be_read_by_rows(observation, None, fetch, options)
    assert not may_be_read_by_rows(observation, "images", fetch, options)
    assert not may_be_read_by_rows(observation, None, fetch_options("whole"), options)
    assert not may_be_read_by_rows(observation, None, fetch, replace(options, row_rule=None))
    # Cut-outs are short, and a length that nobody knows may be any.
    assert not may_be_read_by_rows(replace(observation, size_bytes=900_000), None, fetch, options)
    assert not may_be_read_by_rows(replace(observation, size_bytes=None), None, fetch, options)


def test_sources_that_cannot_be_read_fail_the_measurement_and_not_the_download(
    qr3, archive, reader
):
    options = replace(qr3.options(find_on_frame(qr3)[:2]), catalogue="/nowhere/at/all")
    downloaded, extracted = reader.read(qr3.observe(archive.url), options)[0]
    assert downloaded.status == "done"
    assert (extracted.stage, extracted.status) == ("extract", "failed")
    assert "nowhere" in extracted.reason
