"""The plan: what is left to do for a frame, from plain data alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from spxdask import PhotometryConfig
from spxdask.archive.calibration import CalibrationSet, Product
from spxdask.archive.observation import Observation
from spxdask.run.ledger import Outcome
from spxdask.run.plan import (
    FrameState,
    MeasurementInputs,
    choose_tables,
    has_failed,
    plan_frames,
    table_name,
)
from spxdask.run.recipe import FEW_ROWS_VERSION, RecipeInputs, make_recipe
from spxdask.science.catalogue import Catalogue
from spxdask.science.footprint import pack_footprint

SIZE = 1000


def make_catalogue(ids, ra, dec) -> Catalogue:
    return Catalogue.from_arrays(pa.array(ids, pa.large_string()), np.array(ra), np.array(dec))


CIRCLE = (270.0, 66.0, 2.0)


def make_observation(number: int = 1) -> Observation:
    name = f"level2_2025W51_1A_{number:04d}_2D3_spx_l2b-v21-2025-354.fits"
    uri = f"ibe/data/spherex/qr2/level2/2025W51_1A/l2b-v21-2025-354/3/{name}"
    return Observation(
        obs_id=f"2025W51_1A_{number:04d}_2",
        band="D3",
        mjd=61027.0,
        wavelength_um=2.0,
        uri=uri,
        download_url=f"https://archive/{uri}",
        size_bytes=SIZE,
    )


FRAME = make_observation()
TABLE = table_name(FRAME.filename, "csv")


class Ledger(dict):
    """Outcomes by stage and file name."""

    def get(self, stage, filename):
        return super().get((stage, filename))

    def get_done(self, stage, filename):
        earlier = super().get((stage, filename, "done"))
        last = self.get(stage, filename)
        return last if last is not None and last.status == "done" else earlier


@pytest.fixture
def catalogue():
    return make_catalogue(["a", "b"], [270.0, 10.0], [66.0, -30.0])


@pytest.fixture
def inputs(catalogue):
    return MeasurementInputs(photometry=PhotometryConfig(), catalogue=catalogue)


@pytest.fixture
def measured(inputs, catalogue):
    """The outcome of a frame that was measured with the present inputs."""
    near = catalogue.digest(catalogue.within(*CIRCLE))
    return Outcome(
        stage="extract",
        filename=FRAME.filename,
        status="done",
        bytes=77,
        rows=3,
        recipe=inputs.find_recipe(FRAME).digest,
        catalogue=catalogue.fingerprint,
        sources_fingerprint=near.hex(),
        bounding_circle=CIRCLE,
    )


def outcome(stage: str, status: str, **values) -> Outcome:
    return Outcome(stage=stage, filename=FRAME.filename, status=status, **values)


def ledger_of(*outcomes: Outcome) -> Ledger:
    return Ledger({(one.stage, one.filename): one for one in outcomes})


def decide(inputs, *outcomes: Outcome, on_disk=False, table=None, **options) -> FrameState:
    [planned] = plan_frames(
        [FRAME],
        ledger_of(*outcomes),
        inputs,
        image_sizes={FRAME.filename: SIZE} if on_disk else {},
        table_sizes={} if table is None else {TABLE: table},
        **options,
    )
    assert planned.observation is FRAME
    assert (planned.measured is not None) == (planned.state in (FrameState.DONE, FrameState.FETCH))
    return planned.state


@pytest.mark.parametrize(
    ("on_disk", "keep_images", "expected"),
    [
        (False, True, FrameState.FETCH_AND_MEASURE),
        (False, False, FrameState.FETCH_AND_MEASURE),
        (True, True, FrameState.MEASURE),
        (True, False, FrameState.MEASURE),
    ],
)
def test_a_new_frame(inputs, on_disk, keep_images, expected):
    assert decide(inputs, on_disk=on_disk, keep_images=keep_images) == expected


@pytest.mark.parametrize(
    ("on_disk", "keep_images", "expected"),
    [
        (False, True, FrameState.FETCH),
        (False, False, FrameState.DONE),
        (True, True, FrameState.DONE),
        (True, False, FrameState.DONE),
    ],
)
def test_a_measured_frame(inputs, measured, on_disk, keep_images, expected):
    assert decide(inputs, measured, on_disk=on_disk, table=77, keep_images=keep_images) == expected


def test_one_stage_alone(inputs, measured):
    [fetch] = plan_frames(
        [FRAME], Ledger(), inputs, image_sizes={}, table_sizes={}, stages=["download"]
    )
    assert fetch.state == FrameState.FETCH
    assert decide(inputs, stages=["extract"]) == FrameState.MISSING
    assert decide(inputs, stages=["extract"], on_disk=True) == FrameState.MEASURE
    assert decide(inputs, measured, stages=["extract"], table=77) == FrameState.DONE


def test_a_file_of_another_length_is_no_frame(inputs):
    [planned] = plan_frames(
        [FRAME],
        Ledger(),
        inputs,
        image_sizes={FRAME.filename: SIZE - 1},
        table_sizes={},
        stages=["extract"],
    )
    assert planned.state == FrameState.MISSING


def test_all_can_be_measured_again(inputs, measured):
    state = decide(inputs, measured, on_disk=True, table=77, skip_existing=False)
    assert state == FrameState.MEASURE


@pytest.mark.parametrize("table", [None, 78], ids=["removed", "changed"])
def test_a_table_that_is_not_as_it_was_written(inputs, measured, table):
    assert decide(inputs, measured, on_disk=True, table=table) == FrameState.MEASURE


@pytest.mark.parametrize(
    ("properties", "state"),
    [
        ({"fit_rows": 92}, FrameState.MEASURE),
        ({"fit_rows": 92, "fit_version": FEW_ROWS_VERSION - 1}, FrameState.MEASURE),
        ({"fit_rows": 24, "fit_version": FEW_ROWS_VERSION}, FrameState.DONE),
        # All rows, or no source.
        ({"fit_rows": None}, FrameState.DONE),
        ({"fit_rows": 0}, FrameState.DONE),
    ],
)
def test_frames_of_few_rows_are_measured_again_when_their_fit_is_another(
    inputs, measured, properties, state
):
    one = replace(measured, properties=properties)
    assert decide(inputs, one, on_disk=True, table=77) == state


def test_a_frame_that_the_archive_has_replaced(inputs, measured):
    fetched = outcome("download", "done", bytes=SIZE - 1)
    assert decide(inputs, measured, fetched, table=77, keep_images=False) == (
        FrameState.FETCH_AND_MEASURE
    )
    same = outcome("download", "done", bytes=SIZE)
    assert decide(inputs, measured, same, table=77, keep_images=False) == FrameState.DONE


def test_a_frame_that_was_replaced_and_fetched_is_measured_again(inputs, measured):
    old = replace(measured, frame_bytes=SIZE - 1)
    fetched = outcome("download", "done", bytes=SIZE)
    assert decide(inputs, old, fetched, on_disk=True, table=77) == FrameState.MEASURE
    # The new file could not be fetched yet.
    failed = outcome("download", "failed", reason="HTTP 503")
    assert decide(inputs, old, failed, table=77) == FrameState.FETCH_AND_MEASURE
    new = replace(measured, frame_bytes=SIZE)
    assert decide(inputs, new, fetched, on_disk=True, table=77) == FrameState.DONE


def test_the_content_of_a_frame_decides_whether_it_was_replaced(inputs, measured):
    old = replace(measured, frame_bytes=SIZE, frame_checksum="xxh64:a")
    same = outcome("download", "done", bytes=SIZE, checksum="xxh64:a")
    other = outcome("download", "done", bytes=SIZE, checksum="xxh64:b")
    assert decide(inputs, old, same, on_disk=True, table=77) == FrameState.DONE
    assert decide(inputs, old, other, on_disk=True, table=77) == FrameState.MEASURE
    assert decide(inputs, old, other, table=77, keep_images=False) == FrameState.FETCH_AND_MEASURE
    # Sums of eight digits, which ledgers had before, identify nothing.
    for sum_ in (None, "ffffffff", "0123abcd"):
        unknown = replace(same, checksum=sum_)
        assert decide(inputs, old, unknown, on_disk=True, table=77) == FrameState.DONE
        legacy = replace(old, frame_checksum=None)
        assert decide(inputs, legacy, unknown, on_disk=True, table=77) == FrameState.DONE
    # What was measured without a hash may be another file than that which was fetched since.
    legacy = replace(old, frame_checksum=None)
    assert decide(inputs, legacy, same, on_disk=True, table=77) == FrameState.MEASURE


@pytest.mark.parametrize(
    ("keep_images", "expected"), [(True, FrameState.FETCH), (False, FrameState.FETCH_AND_MEASURE)]
)
def test_a_frame_that_the_archive_is_known_to_have_replaced(
    inputs, measured, keep_images, expected
):
    how = {"on_disk": True, "table": 77, "keep_images": keep_images}
    assert decide(inputs, measured, replaced={FRAME.filename}, **how) == expected
    assert decide(inputs, measured, replaced={"another"}, **how) == FrameState.DONE


def test_a_failure_with_other_inputs_does_not_outdate_a_table(inputs, measured):
    failed = outcome("extract", "failed", reason="not downloaded", recipe="other", catalogue="x")
    ledger = ledger_of(failed)
    ledger[("extract", FRAME.filename, "done")] = measured
    for retry_failed in (True, False):
        [planned] = plan_frames(
            [FRAME],
            ledger,
            inputs,
            image_sizes={},
            table_sizes={TABLE: 77},
            keep_images=False,
            retry_failed=retry_failed,
        )
        assert planned.state == FrameState.DONE
        assert planned.measured is measured


def test_other_options_make_a_table_stale(inputs, measured):
    other = replace(inputs, photometry=PhotometryConfig(fwhm_multiplier=3.0))
    assert decide(other, measured, on_disk=True, table=77) == FrameState.MEASURE


def test_only_sources_near_the_frame_count(inputs, measured):
    def with_sources(ids, ra, dec):
        catalogue = make_catalogue(ids, ra, dec)
        return decide(replace(inputs, catalogue=catalogue), measured, on_disk=True, table=77)

    assert with_sources(["a", "c"], [270.0, 40.0], [66.0, 0.0]) == FrameState.DONE
    assert with_sources(["A", "b"], [270.0, 10.0], [66.0, -30.0]) == FrameState.MEASURE
    assert with_sources(["a", "b"], [270.1, 10.0], [66.0, -30.0]) == FrameState.MEASURE
    assert with_sources(["a", "b", "c"], [270.0, 10.0, 271.0], [66.0, -30.0, 66.5]) == (
        FrameState.MEASURE
    )
    assert decide(replace(inputs, catalogue=None), measured, on_disk=True, table=77) == (
        FrameState.DONE
    )


def test_tables_of_versions_without_recipes_are_measured_again(inputs, measured):
    """Their numbers are others by now."""
    old = replace(measured, recipe=None, catalogue=None)
    assert decide(inputs, old, on_disk=True, table=77) == FrameState.MEASURE
    # An image that is there is not fetched again.
    fetched = outcome("download", "done", bytes=SIZE)
    assert decide(inputs, old, fetched, on_disk=True, table=77) == FrameState.MEASURE
    assert decide(inputs, old, fetched, table=77) == FrameState.FETCH_AND_MEASURE


def make_product(family="epsf", band="D3", token="cal-epsf-v1-2026-001", checksum="0") -> Product:
    url = f"https://archive/{token}.fits"
    return Product(
        family=family,
        band=band,
        release="qr3",
        token=token,
        url=url,
        size=1,
        checksum=checksum * 32,
    )


def test_another_product_of_its_detector_makes_a_table_stale(inputs, measured):
    def with_products(*products):
        return replace(inputs, calibration=CalibrationSet(products=products))

    made_with = with_products(make_product(), make_product(band="D4"))
    table = replace(measured, recipe=made_with.find_recipe(FRAME).digest)
    assert decide(made_with, table, on_disk=True, table=77) == FrameState.DONE
    elsewhere = with_products(make_product(), make_product(band="D4", checksum="1"))
    assert decide(elsewhere, table, on_disk=True, table=77) == FrameState.DONE
    for products in (
        [make_product(checksum="1")],
        [make_product(token="cal-epsf-v1-2026-002")],
        [make_product(), make_product("spectral_wcs")],
        [],
    ):
        assert decide(with_products(*products), table, on_disk=True, table=77) == (
            FrameState.MEASURE
        )


def test_a_flux_correction_counts_for_early_frames_alone(inputs):
    late = replace(FRAME, uri=FRAME.uri.replace("/qr2/", "/qr3/"))
    assert (FRAME.is_early, late.is_early) == (True, False)
    calibration = CalibrationSet(products=(make_product("l3_flux_corrections"),))
    corrected = replace(inputs, calibration=calibration)
    assert corrected.find_recipe(late) == inputs.find_recipe(late) == inputs.find_recipe(FRAME)
    assert corrected.find_recipe(FRAME).steps["flux_scale"]["product"][1] == "0" * 32


def test_contaminants_make_a_table_stale(inputs, measured):
    others = replace(inputs, contaminants=make_catalogue(["c"], [270.0], [66.0]))
    assert decide(others, measured, on_disk=True, table=77) == FrameState.MEASURE
    without_psf = replace(inputs, photometry=PhotometryConfig(psf="none"))
    same = replace(without_psf, contaminants=others.contaminants)
    assert without_psf.find_recipe(FRAME) == same.find_recipe(FRAME)


def test_sources_that_move_are_compared_as_a_whole(inputs, measured):
    """Whether one comes near the frame depends on the time."""
    ids, places = pa.array(["a", "b"], pa.large_string()), np.array([[270.0, 10.0], [66.0, -30.0]])
    motions = {"pmra": np.array([1000.0, 0.0])}
    moving = Catalogue.from_arrays(ids, *places, motions)
    now = replace(inputs, catalogue=moving)
    assert decide(now, measured, on_disk=True, table=77) == FrameState.MEASURE
    same = replace(measured, catalogue=moving.identity)
    assert decide(now, same, on_disk=True, table=77) == FrameState.DONE
    # One without motions has the same positions, and other rows.
    moved = replace(same, sources_fingerprint=moving.digest(moving.within(*CIRCLE)).hex())
    assert decide(inputs, moved, on_disk=True, table=77) == FrameState.MEASURE
    grown = Catalogue.from_arrays(ids, places[0] + [0, 40], places[1], motions)
    assert decide(replace(inputs, catalogue=grown), same, on_disk=True, table=77) == (
        FrameState.MEASURE
    )


def test_failures_are_tried_again_unless_told_otherwise(inputs, catalogue):
    present = {"recipe": inputs.find_recipe(FRAME).digest, "catalogue": catalogue.fingerprint}
    unmeasurable = outcome("extract", "failed", reason="no WCS", **present)
    assert decide(inputs, unmeasurable, on_disk=True) == FrameState.MEASURE
    assert decide(inputs, unmeasurable, on_disk=True, retry_failed=False) == FrameState.FAILED
    other = replace(inputs, photometry=PhotometryConfig(fwhm_multiplier=3.0))
    assert decide(other, unmeasurable, on_disk=True, retry_failed=False) == FrameState.MEASURE
    unreachable = outcome("download", "failed", reason="HTTP 404")
    assert decide(inputs, unreachable, retry_failed=False) == FrameState.FAILED
    # It came in another way.
    assert decide(inputs, unreachable, on_disk=True, retry_failed=False) == FrameState.MEASURE


def test_only_failed_frames(inputs, measured):
    failed = outcome("download", "failed", reason="HTTP 503")
    assert decide(inputs, only_failed=True) == FrameState.EXCLUDED
    assert decide(inputs, failed, only_failed=True) == FrameState.FETCH_AND_MEASURE
    [planned] = plan_frames(
        [FRAME],
        ledger_of(measured),
        inputs,
        image_sizes={},
        table_sizes={TABLE: 77},
        only_failed=True,
    )
    assert planned.state == FrameState.EXCLUDED


def test_has_failed():
    assert not has_failed(Ledger(), FRAME.filename)
    assert not has_failed(ledger_of(outcome("download", "done")), FRAME.filename)
    both = ledger_of(outcome("download", "done"), outcome("extract", "failed", reason="x"))
    assert has_failed(both, FRAME.filename)


def footprint(ra, dec):
    corners = [ra - 1, dec - 1, ra + 1, dec - 1, ra + 1, dec + 1, ra - 1, dec + 1]
    return pack_footprint(corners)


class TestFramesWithoutASource:
    """The catalogue has sources at (270, 66) and (10, -30)."""

    EMPTY = replace(FRAME, footprint=footprint(100.0, 0.0))
    HELD = replace(FRAME, footprint=footprint(10.5, -30.5))

    def decide(self, frame, inputs, *outcomes, **options):
        known = {"image_sizes": {}, "table_sizes": {}, "fetch_empty": False}
        [planned] = plan_frames([frame], ledger_of(*outcomes), inputs, **known | options)
        return planned.state

    def test_they_are_neither_fetched_nor_measured(self, inputs):
        assert self.decide(self.EMPTY, inputs) == FrameState.EMPTY
        assert self.decide(self.EMPTY, inputs, stages=["download"]) == FrameState.EMPTY
        assert self.decide(self.EMPTY, inputs, stages=["extract"]) == FrameState.EMPTY
        on_disk = {"image_sizes": {FRAME.filename: SIZE}}
        assert self.decide(self.EMPTY, inputs, **on_disk) == FrameState.EMPTY

    def test_others_are(self, inputs):
        for frame in (self.HELD, FRAME):
            assert self.decide(frame, inputs) == FrameState.FETCH_AND_MEASURE
        unknown = replace(inputs, catalogue=None)
        assert self.decide(self.EMPTY, unknown) == FrameState.FETCH_AND_MEASURE
        fetched = self.decide(self.EMPTY, inputs, fetch_empty=True)
        assert fetched == FrameState.FETCH_AND_MEASURE

    def test_a_failure_is_not_tried_again(self, inputs):
        failed = outcome("download", "failed", reason="HTTP 404")
        for options in ({}, {"only_failed": True}, {"retry_failed": False}):
            assert self.decide(self.EMPTY, inputs, failed, **options) == FrameState.EMPTY
        assert self.decide(self.EMPTY, inputs, only_failed=True) == FrameState.EXCLUDED

    def test_a_table_that_is_there_counts(self, inputs, measured):
        state = self.decide(
            self.EMPTY, inputs, measured, table_sizes={TABLE: 77}, stages=["extract"]
        )
        assert state == FrameState.DONE

    def test_they_make_nothing_stale_or_incomplete(self, inputs, measured):
        other = ledger_of(replace(measured, catalogue="0", sources_fingerprint="0"))
        known = {"image_sizes": {}, "table_sizes": {TABLE: 77}, "stages": ["extract"]}
        planned = plan_frames([self.EMPTY], other, inputs, **known, fetch_empty=False)
        choice = choose_tables(
            planned, other, inputs, recipes={}, table_sizes={TABLE: 77}, table_format="csv"
        )
        assert (choice.tables, choice.stale, choice.left_out) == ([], [], 0)

    def test_they_are_found_in_batches(self, inputs):
        frames = [self.HELD, self.EMPTY] * 1100
        known = {"image_sizes": {}, "table_sizes": {}, "fetch_empty": False}
        states = [p.state for p in plan_frames(iter(frames), Ledger(), inputs, **known)]
        assert states == [FrameState.FETCH_AND_MEASURE, FrameState.EMPTY] * 1100


def test_the_plan_streams(inputs):
    seen = []

    def frames():
        for number in range(3):
            seen.append(number)
            yield make_observation(number)

    planned = plan_frames(frames(), Ledger(), inputs, image_sizes={}, table_sizes={})
    next(planned)
    assert seen == [0]
    assert bytes(bytearray(frame.state for frame in planned)) == b"\x04\x04"


class TestChoiceOfTables:
    def choose(self, inputs, *outcomes, table_sizes, recipes=None):
        ledger = ledger_of(*outcomes)
        planned = plan_frames(
            [FRAME],
            ledger,
            inputs,
            image_sizes={},
            table_sizes=table_sizes,
            stages=["extract"],
            retry_failed=False,
        )
        return choose_tables(
            planned,
            ledger,
            inputs,
            recipes=recipes or {},
            table_sizes=table_sizes,
            table_format="csv",
        )

    def test_a_table_that_is_up_to_date(self, inputs, measured):
        choice = self.choose(inputs, measured, table_sizes={TABLE: 77})
        assert choice.tables == [(TABLE, 77, 3, None, "qr2")]
        assert not choice.stale
        assert choice.left_out == 0

    def test_a_frame_without_a_table_is_left_out(self, inputs):
        choice = self.choose(inputs, table_sizes={})
        assert (choice.tables, choice.stale, choice.left_out) == ([], [], 1)

    def test_a_failed_frame_makes_nothing_stale(self, inputs, catalogue):
        present = {"recipe": inputs.find_recipe(FRAME).digest, "catalogue": catalogue.fingerprint}
        failed = outcome("extract", "failed", reason="no WCS", **present)
        choice = self.choose(inputs, failed, table_sizes={TABLE: 77})
        assert (choice.tables, choice.stale, choice.left_out) == ([], [], 1)

    @pytest.mark.parametrize(
        ("changes", "table_sizes", "reason"),
        [
            ({}, {TABLE: 78}, "it has 78 bytes, 77 were written"),
            ({}, {}, "it was removed"),
            ({"catalogue": "0", "sources_fingerprint": "0"}, {TABLE: 77}, "other sources"),
            ({"recipe": "unknown"}, {TABLE: 77}, "other options"),
            ({"recipe": None}, {TABLE: 77}, "it was made by an earlier version"),
            ({"properties": {"fit_rows": 92}}, {TABLE: 77}, "zodi: fitted to other rows"),
        ],
    )
    def test_a_stale_table_is_explained(self, inputs, measured, changes, table_sizes, reason):
        choice = self.choose(inputs, replace(measured, **changes), table_sizes=table_sizes)
        assert choice.stale == [TABLE]
        assert reason in choice.stale_reason

    def test_the_option_that_differs_is_named(self, inputs, measured):
        earlier = make_recipe(RecipeInputs(photometry=PhotometryConfig(fwhm_multiplier=3.0)))
        choice = self.choose(
            inputs,
            replace(measured, recipe=earlier.digest),
            table_sizes={TABLE: 77},
            recipes={earlier.digest: earlier.steps},
        )
        assert choice.stale_reason == "aperture: fwhm_multiplier was 3.0, is 2.5"

    def test_a_table_without_a_record(self, inputs):
        choice = self.choose(inputs, table_sizes={TABLE: 77})
        assert choice.stale_reason == "no record says how it was made"


DONE, AGAIN = FrameState.DONE, FrameState.FETCH_AND_MEASURE


@pytest.mark.parametrize(
    ("fetched", "versions", "expected"),
    [
        # Only some rows came both times: the archive's version decides.
        ({"read": "rows", "etag": "a"}, {"read": "rows", "etag": "a"}, DONE),
        (
            {"read": "rows", "etag": "b"},
            {"read": "rows", "etag": "a"},
            AGAIN,
        ),
        ({"read": "rows"}, {"read": "rows"}, DONE),
        # The whole came later, to be kept, or earlier.
        ({"checksum": "x:1", "etag": "a"}, {"read": "rows", "etag": "a"}, DONE),
        (
            {"checksum": "x:1", "etag": "b"},
            {"read": "rows", "etag": "a"},
            AGAIN,
        ),
        ({"checksum": "x:1"}, {"read": "rows", "etag": "a"}, AGAIN),
        ({"read": "rows", "etag": "b"}, {"frame_checksum": "x:1"}, AGAIN),
    ],
)
def test_a_frame_of_which_rows_came_is_told_from_its_replacement(
    inputs, measured, fetched, versions, expected
):
    download = outcome("download", "done", bytes=10, frame_bytes=SIZE, **fetched)
    table = replace(measured, frame_bytes=SIZE, **versions)
    assert decide(inputs, download, table, table=77, keep_images=False) == expected
