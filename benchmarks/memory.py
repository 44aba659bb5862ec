"""Memory of workers with a limit of 2 GB: `python benchmarks/memory.py` prints the peaks.

All four stages process full-size frames with 10,000 sources on each. Workers that Dask had to
restart are counted by their process ids, which differ after the run.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
from pathlib import Path

import workloads
from distributed import Client, LocalCluster

from spxdask import BatchConfig, BatchPipeline
from spxdask.simulate.archive import SimulatedArchive


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--sources", type=int, default=10_000)
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    # The archive serves one file under many names.
    image = workloads.frame(work, workloads.exposure())
    frames = [workloads.archived(number, image) for number in range(options.frames)]
    output = work / "out-memory"
    with (
        SimulatedArchive(frames) as archive,
        LocalCluster(
            n_workers=2,
            threads_per_worker=3,
            memory_limit="2GB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        config = BatchConfig(
            catalog_path=workloads.catalogue(work, options.sources),
            center_ra=workloads.CENTER[0],
            center_dec=workloads.CENTER[1],
            radius=0.5,
            output_dir=output,
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
            calibration="frame",
        )
        before = client.run(os.getpid)
        summary = BatchPipeline(config, client=client).run_all()
        print(summary)
        print("peak MB a worker:", *client.run(peak_mb).values())
        print("workers restarted:", len(set(client.run(os.getpid).values()) - {*before.values()}))
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
