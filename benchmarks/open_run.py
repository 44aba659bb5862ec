"""What a user waits for who opens a large run: `python benchmarks/open_run.py` prints a table.

The folder is made without a pipeline: Parquet light curves as the aggregation writes them, so many
sources of 20 rows each, with a catalogue of them. `make_large_run` makes it for other programs.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from made_run import make_points, make_rows, make_run

import spxdask
from spxdask.run.aggregation import AggregationRecord, save_aggregation
from spxdask.run.folder import RunFolder
from spxdask.tables.parquet import encode_parquet

ROWS = 20
# Of a bucket, as the aggregation limits them: 32 MB as CSV.
SOURCES_PER_FILE = 3000
# About the north ecliptic pole, deg.
CENTER, RADIUS_DEG = (270.0, 66.56), 1.0
FIRST_ID = 39633458707826492


def make_large_run(folder: Path, n_sources: int) -> RunFolder:
    """Write the output folder of a run with `ROWS` rows a source."""
    rng = np.random.default_rng(1)
    ids = [str(FIRST_ID + i) for i in range(n_sources)]
    dec = CENTER[1] + rng.uniform(-RADIUS_DEG, RADIUS_DEG, n_sources)
    ra = CENTER[0] + rng.uniform(-RADIUS_DEG, RADIUS_DEG, n_sources) / np.cos(np.radians(dec))
    positions = dict(zip(ids, zip(ra.tolist(), dec.tolist(), strict=True), strict=True))
    run = make_run(folder, {}, positions=positions, format="parquet", n_frames=120)
    # Sources are spread over the files by a hash, here by chance.
    order = rng.permutation(n_sources)
    n_files = -(-n_sources // SOURCES_PER_FILE)
    for number in range(n_files):
        mine = sorted(ids[i] for i in order[number::n_files].tolist())
        n = len(mine) * ROWS
        points = make_points(rng, n, lambda wavelength: 500.0 * wavelength**-1.5, snr=20)
        rows = make_rows(points)
        # A source is seen now and then in the time of the whole run.
        by_source = np.argsort(np.tile(np.arange(len(mine)), ROWS), kind="stable")
        rows = rows.take(pa.array(by_source))
        table = rows.add_column(0, "target_id", pa.array(np.repeat(np.array(mine), ROWS).tolist()))
        table = table.replace_schema_metadata({"sources": str(len(mine))})
        run.lightcurves.put(f"bucket-{number:05d}.parquet", encode_parquet(table))
    record = AggregationRecord(
        tables="", files="", n_light_curves=n_sources, n_rows=n_sources * ROWS
    )
    save_aggregation(run.state, record)
    return run


def measure(what: str, act: Callable[[], Any]) -> Any:
    """Do something, and print how long it took and the most memory until then."""
    started, cpu_started = time.perf_counter(), time.process_time()
    found = act()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"| {what} | {seconds:.2f} s | {cpu:.2f} s | {peak:.2f} GB |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="is made, or used if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "run"
        if not (folder / "state").exists():
            started = time.perf_counter()
            make_large_run(folder, options.sources)
            print(f"made in {time.perf_counter() - started:.0f} s")
        print("| | time | CPU time | peak memory |\n|---|---:|---:|---:|")
        last = str(FIRST_ID + options.sources - 1)
        run = measure("import and open_run", lambda: spxdask.open_run(folder))
        measure("repr(run)", lambda: repr(run))
        measure("the first light curve by id", lambda: run[last].table)
        other = str(FIRST_ID + options.sources // 2)
        measure("another one", lambda: run[other].table)
        measure("one by position", lambda: run.light_curve(run[other].ra, run[other].dec))
        measure("its spectrum", run[other].spectrum)
        measure("missing_sources", lambda: run.missing_sources)
        sources = measure("sources", lambda: run.sources)
        reduced = np.nanmean(sources["chi2"] / sources["dof"])
        with tempfile.TemporaryDirectory(dir=folder.parent) as catalogue:
            measure("to_hats", lambda: run.to_hats(Path(catalogue) / "catalogue"))
        print(f"{len(sources):,} sources, mean reduced chi2 {reduced:.3f}")


if __name__ == "__main__":
    main()
