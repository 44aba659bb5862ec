"""Scattered sources in one run, and the same with one run for each: the rows have to be the same.

``python benchmarks/any_sky.py [SOURCES]`` simulates one to three cut-outs of frames about each
source, frames beside the sources, and frames anywhere, and serves them from a simulated archive.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster

from spxdask import BatchConfig, BatchPipeline
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import (
    Exposure,
    SceneOptions,
    Sky,
    make_planes,
    make_sky,
    write_frame,
)

WINDOW = (900, 900, 240, 240)
# The width of the window is 0.41 deg.
NEAR_DEG, BESIDE_DEG = 0.05, 0.7


def main(n_sources: int) -> None:
    """Print queries, frames and rows of both ways."""
    logging.getLogger("distributed.shuffle").setLevel(logging.ERROR)
    rng = np.random.default_rng(11)
    one = make_sky(10, 0, 0.1, n_sources=1, min_separation_arcsec=1, seed=1)
    ra, dec = _scatter(rng, n_sources)
    repeated = {f.name: np.repeat(getattr(one, f.name), n_sources) for f in fields(one)}
    sky = Sky(**repeated | {"ra": ra, "dec": dec})
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=2, threads_per_worker=3, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        frames = [
            _simulate(Path(folder), number, *centre, sky)
            for number, centre in enumerate(_choose_centres(rng, ra, dec))
        ]
        with SimulatedArchive(frames) as archive:

            def run(name: str, index: np.ndarray, **options: float) -> BatchPipeline:
                catalogue = Path(folder) / f"{name}.csv"
                rows = [f"s{i},{float(ra[i])},{float(dec[i])}\n" for i in index]
                catalogue.write_text("".join(["targetid,ra,dec\n", *rows]))
                config = BatchConfig(
                    catalog_path=catalogue,
                    output_dir=Path(folder) / name,
                    max_images=10 * len(frames),
                    num_buckets=4,
                    tap_url=archive.tap_url,
                    archive_url=archive.archive_url,
                    calibration="frame",
                    **options,
                )
                pipeline = BatchPipeline(config, client=client)
                pipeline.run_all()
                return pipeline

            print(f"{n_sources} sources, {len(frames)} frames in the archive")
            started = time.monotonic()
            print(run("all", np.arange(n_sources)).summary)
            _report("one run", archive, started)
            archive.requests.clear()
            started = time.monotonic()
            for i in range(n_sources):
                run(f"s{i}", np.array([i]), center_ra=ra[i], center_dec=dec[i], radius=0.01)
            _report("a run for each", archive, started)
        together = _read_curves(Path(folder) / "all")
        alone = {}
        for i in range(n_sources):
            alone |= _read_curves(Path(folder) / f"s{i}")
        assert together == alone, "the light curves differ"
        print(f"{len(alone)} light curves are the same, byte for byte")


def _scatter(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))


def _choose_centres(
    rng: np.random.Generator, ra: np.ndarray, dec: np.ndarray
) -> list[tuple[float, float]]:
    """Return centres of frames about the sources, beside every other one, and anywhere."""
    centres = []
    for i in range(len(ra)):
        offsets = rng.uniform(-NEAR_DEG, NEAR_DEG, (1 + i % 3, 2)).tolist()
        centres += [(ra[i] + x / np.cos(np.deg2rad(dec[i])), dec[i] + y) for x, y in offsets]
        if i % 2:
            centres.append((ra[i] + BESIDE_DEG / np.cos(np.deg2rad(dec[i])), dec[i]))
    centres += zip(*_scatter(rng, len(ra) // 2), strict=True)
    return [(float(x % 360), float(np.clip(y, -90, 90))) for x, y in centres]


def _simulate(folder: Path, number: int, ra: float, dec: float, sky: Sky) -> ArchivedFrame:
    exposure = Exposure(
        obs_id=f"2025W51_1A_{number:04d}_1",
        detector=1 + number % 6,
        ra=ra,
        dec=dec,
        roll_deg=15.0 * number,
        mjd_begin=61027.0 + number,
    )
    path = folder / exposure.filename
    planes = make_planes(exposure, sky, SceneOptions(crowding=0.3), window=WINDOW)
    write_frame(path, exposure, planes, window=WINDOW)
    return ArchivedFrame.of(exposure, path, WINDOW)


def _report(what: str, archive: SimulatedArchive, started: float) -> None:
    seconds = time.monotonic() - started
    queries = sum(request.path.startswith("/TAP") for request in archive.requests)
    fetched = sum(request.path.endswith(".fits") for request in archive.requests)
    print(f"{what}: {queries} queries, {fetched} frames fetched, {seconds:.0f} s", flush=True)


def _read_curves(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "lightcurves").iterdir()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
