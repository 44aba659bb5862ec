"""Time and memory of the report of a large run: `python benchmarks/report.py`.

The tables are made up, a million sources of twenty rows each by default, and read by the threads of
one process, as `spxdask report` reads them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from generated import make_run

from spxdask.report.make import make_report


def measure(path: str) -> None:
    """Make the report in this process, and print what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started = time.monotonic()
    numbers = make_report(path)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = sum(Path(path, name).stat().st_size for name in ("report.html", "report.json")) / 1e6
    print(
        f"{numbers['run']['n_sources']:,} sources, {numbers['rows']['total']:,} rows in "
        f"{numbers['rows']['tables']:,} tables: {seconds:.1f} s, {peak:.2f} GB at the peak "
        f"({before:.2f} GB before), files of {size:.2f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sources", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=20, help="of each source")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--format", default="parquet", choices=["csv", "parquet"])
    parser.add_argument("--work", type=Path, help="where a folder for the data is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        make_run(
            Path(folder),
            n_frames=options.frames,
            n_sources=options.sources + 1,
            rows_per_frame=options.sources * options.rows // options.frames,
            table_format=options.format,
        )
        # A process of its own, whose memory is that of the report alone.
        process = multiprocessing.get_context("spawn").Process(target=measure, args=[folder])
        process.start()
        process.join()


if __name__ == "__main__":
    main()
