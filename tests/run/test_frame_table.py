"""The table of frames: a row a frame, of what the query and the ledger say of it."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from spxdask.archive.observation import Observation
from spxdask.run.frame_table import FRAME_COLUMNS, FRAMES_NAME, save_frame_table
from spxdask.run.ledger import LocalLedger, Outcome
from spxdask.run.observations import Observations, save_observations
from spxdask.run.plan import BATCH_SIZE
from spxdask.storage import LocalStore

STEPS = {
    "frame": {"version": 1},
    "psf": {"version": 1, "psf": "auto", "product": ["cal-epsf-v2-2026-191", "aa"]},
    "wavelength": {"version": 1, "product": ["cal-swcs-v5-2026-191", "bb"]},
}
PROPERTIES = {
    "mjd": 61000.25,
    "zodi_scale": 1.01,
    "is_zodi_fitted": True,
    "aperture_radius": 1.5,
    "psf": "epsf",
    "n_sources": 12,
    "background": 0.25,
    "background_scatter": None,
    "of a later version": 1,
}


def observation(number: int) -> Observation:
    name = f"level2_2025W51_1A_{number:04d}_2D3_spx_l2b_retry-v27-2026-242.fits"
    return Observation(
        obs_id=f"2025W51_1A_{number:04d}_2",
        band="D3",
        mjd=61000.0 + number,
        wavelength_um=2.0,
        uri=f"ibe/data/spherex/qr3/level2/{name}",
        download_url="",
        size_bytes=100,
    )


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


@pytest.fixture
def ledger(tmp_path):
    return LocalLedger(tmp_path / "ledger.jsonl")


def query(store, number: int) -> Observations:
    save_observations(store, "observations", [observation(i) for i in range(number)], {})
    return Observations(store, "observations", "https://127.0.0.1")


def outcome(number: int, stage: str = "extract", **what) -> Outcome:
    defaults = {"stage": stage, "filename": observation(number).filename, "status": "done"}
    return Outcome(**(defaults | what))


def read(store) -> list[dict]:
    return pq.read_table(store.local_path / FRAMES_NAME).to_pylist()


def test_each_frame_has_what_became_of_it(store, ledger):
    frames = query(store, 6)
    ledger.add_recipe("r", STEPS)
    ledger.add(outcome(0, "download", bytes=101, seconds=9.0))
    ledger.add(
        outcome(
            0,
            recipe="r",
            rows=10,
            skipped={"margin": 2},
            psf_empty={"no PSF": 1},
            seconds=0.5,
            bytes=7,
            frame_bytes=101,
            properties=PROPERTIES,
        )
    )
    ledger.add(outcome(1, "download", status="failed", reason="HTTP 404"))
    ledger.add(outcome(2, "download", bytes=102))
    ledger.add(outcome(3, status="done"))
    ledger.add(outcome(3, status="failed", reason="no WCS", seconds=1.0))
    ledger.add(outcome(4))
    assert save_frame_table(store, frames, ledger, None)
    rows = read(store)
    assert [row["status"] for row in rows] == [
        *("measured", "failed", "fetched", "failed", "measured", "pending")
    ]
    assert [row["reason"] for row in rows] == [None, "HTTP 404", None, "no WCS", None, None]
    assert [row["file_bytes"] for row in rows] == [101, 100, 102, 100, 100, 100]
    assert [row["bytes"] for row in rows] == [101, None, 102, None, None, None]
    assert [row["read"] for row in rows] == ["whole", None, "whole", None, None, None]
    first = rows[0]
    assert [*first] == [name for name, _, _, _ in FRAME_COLUMNS]
    assert first["calibration"] == "cal-epsf-v2-2026-191, cal-swcs-v5-2026-191"
    assert (first["release"], first["version"]) == ("qr3", "l2b_retry-v27-2026-242")
    assert (first["rows"], first["n_sources"], first["seconds"]) == (10, 12, 0.5)
    assert (first["mjd"], rows[1]["mjd"]) == (61000.25, 61001.0)
    assert json.loads(first["skipped"]) == {"margin": 2}
    assert json.loads(first["psf_empty"]) == {"no PSF": 1}
    assert first["is_zodi_fitted"] is True
    assert first["background_scatter"] is None
    # Of an earlier version, which recorded less.
    assert (rows[4]["calibration"], rows[4]["zodi_scale"]) == ("", None)


def test_it_is_written_only_when_something_changed(store, ledger):
    frames = query(store, 2)
    assert save_frame_table(store, frames, ledger, None)
    assert not save_frame_table(store, frames, ledger, None)
    ledger.add(outcome(1))
    assert save_frame_table(store, frames, ledger, None)
    content = read(store)
    # What a resumed run reads again is the same.
    again = LocalLedger(store.local_path / "ledger.jsonl")
    again.refresh()
    assert not save_frame_table(store, frames, again, None)
    (store.local_path / FRAMES_NAME).write_bytes(b"damaged")
    assert save_frame_table(store, frames, again, None)
    assert read(store) == content


def test_it_streams(store, ledger):
    assert save_frame_table(store, query(store, BATCH_SIZE + 1), ledger, None)
    file = pq.ParquetFile(store.local_path / FRAMES_NAME)
    assert file.metadata.num_row_groups == 2
    assert file.metadata.num_rows == BATCH_SIZE + 1


def test_a_query_without_frames(store, ledger):
    assert save_frame_table(store, query(store, 0), ledger, None)
    assert read(store) == []


def test_a_frame_read_by_rows_says_how_much_of_it_came(store, ledger):
    frames = query(store, 2)
    came = {"bytes": 30, "frame_bytes": 101, "read": "rows", "requests": 4}
    ledger.add(outcome(0, "download", **came))
    ledger.add(outcome(0, frame_bytes=101, read="rows", properties={"fit_rows": 55}))
    ledger.add(outcome(1, "download", **came))
    ledger.add(outcome(1, "download", bytes=101, frame_bytes=101, read="whole", requests=1))
    ledger.add(outcome(1, frame_bytes=101, read="rows", properties={"fit_rows": 55}))
    save_frame_table(store, frames, ledger, None)
    names = ("bytes", "file_bytes", "read", "requests", "fit_rows")
    assert [[row[name] for name in names] for row in read(store)] == [
        [30, 101, "rows", 4, 55],
        # What was measured counts.
        [101, 101, "rows", 1, 55],
    ]
