"""The side of spxdask in a benchmark: it answers the same commands as the peer's side.

It reads commands as JSON from standard input, one on each line, and answers each with a line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from workloads import obtain_products

import spxdask
from spxdask import BatchConfig, BatchPipeline, PhotometryConfig
from spxdask.archive.calibration import CalibrationSet
from spxdask.cluster.embedded import embedded_client
from spxdask.science.level2.frame import open_frame
from spxdask.stages.extract import ExtractOptions, extract
from spxdask.tables.catalogue import read_catalogue

answers, sys.stdout = sys.stdout, sys.stderr
# The peer has neither PSF photometry nor calibration products; what is compared is the same work.
SAME_WORK = PhotometryConfig(psf="none")


class Ours:
    def __init__(self) -> None:
        self.cluster = ExitStack()
        self.client = None
        self.calibration = CalibrationSet()

    def about(self) -> dict:
        return {"version": spxdask.__version__, "python": sys.version.split()[0]}

    def load(self, catalogue: str) -> dict:
        """Read the catalogue and save its index, as a run does once."""
        started = time.perf_counter()
        read_catalogue(catalogue).save(f"{catalogue}.arrow")
        return {"seconds": time.perf_counter() - started}

    def floor(self, image: str) -> dict:
        """Read the four planes into arrays in native byte order."""
        started = time.perf_counter()
        frame = open_frame(image)
        planes = (frame.image, frame.variance, frame.zodi, frame.flags)
        arrays = [plane.astype(plane.dtype.newbyteorder("=")) for plane in planes]
        return {
            "seconds": time.perf_counter() - started,
            "bytes": sum(array.nbytes for array in arrays),
        }

    def calibrate(self, products: str, cache: str, band: str) -> dict:
        """Fetch the products of a tree into a cache, as a run does once."""
        self.calibration = obtain_products(Path(products), Path(cache), band)
        return {"families": sorted(product.family for product in self.calibration.products)}

    def extract(
        self, image: str, catalogue: str, folder: str, psf: str = "none", release: str = "qr2"
    ) -> dict:
        """Extract a frame: apertures alone, as the peer does, or with the PSF and products."""
        products = self.calibration.choose("D3", release == "qr2") if psf != "none" else {}
        options = ExtractOptions(
            catalogue=f"{catalogue}.arrow",
            photometry=PhotometryConfig(psf=psf),
            recipe="benchmark",
            catalogue_fingerprint="benchmark",
            serial=False,
            products=tuple(products.values()),
        )
        started = time.perf_counter()
        outcome = extract(image, folder, options)
        seconds = time.perf_counter() - started
        assert outcome.status == "done", outcome.reason
        table = Path(folder) / f"{Path(image).stem}_photometry.csv"
        return {"seconds": seconds, "table": str(table), "rows": outcome.rows}

    def start_cluster(self, processes: int) -> dict:
        """Start the embedded cluster of a run."""
        self.stop_cluster()
        config = BatchConfig(
            center_ra=0,
            center_dec=0,
            radius=1,
            catalog_path="none.csv",
            max_extract_workers=processes,
        )
        self.client = self.cluster.enter_context(
            embedded_client(
                max_processes=config.max_extract_workers, n_downloads=config.max_download_workers
            )
        )
        return {}

    def stop_cluster(self) -> dict:
        self.cluster.close()
        self.client = None
        return {}

    def aggregate(self, per_image: str, folder: str) -> dict:
        """Aggregate on the running cluster; a symbolic link leads to the tables."""
        out = Path(folder)
        out.mkdir(parents=True)
        (out / "per_image").symlink_to(per_image)
        config = BatchConfig(
            center_ra=0, center_dec=0, radius=1, catalog_path="none.csv", output_dir=out
        )
        started = time.perf_counter()
        report = BatchPipeline(config, client=self.client).run_aggregate()
        seconds = time.perf_counter() - started
        memory = self.client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return {
            "seconds": seconds,
            "rows": report.rows,
            "sources": report.total,
            "lightcurves": str(out / "lightcurves"),
            "worker_peak_mb": max(memory.values()),
        }

    def run_all(self, folder: str, **options) -> dict:
        """Run the four stages, on the running cluster if there is one."""
        started = time.perf_counter()
        config = BatchConfig(
            output_dir=folder, photometry=SAME_WORK, calibration="frame", **options
        )
        summary = BatchPipeline(config, client=self.client).run_all()
        return {
            "seconds": time.perf_counter() - started,
            "stages": {name: report.seconds for name, report in summary.stages.items()},
            "rows": summary.stages["aggregate"].rows,
            "lightcurves": str(Path(folder) / "lightcurves"),
        }

    def frames_per_second(self, images: list[str], catalogue: str, folder: str) -> dict:
        """Extract many frames on the running cluster, after a first pass to warm up."""
        options = ExtractOptions(
            catalogue=f"{catalogue}.arrow",
            photometry=PhotometryConfig(psf="none"),
            recipe="benchmark",
            catalogue_fingerprint="benchmark",
            serial=True,
        )

        def run() -> float:
            started = time.perf_counter()
            futures = self.client.map(
                extract, images, per_image=folder, options=options, pure=False
            )
            assert {o.status for o in self.client.gather(futures)} == {"done"}
            return time.perf_counter() - started

        run()
        seconds = [run() for _ in range(3)]
        return {"seconds": float(np.median(seconds))}


def main() -> None:
    ours = Ours()
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(ours, command["call"])(**command["arguments"])
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result), file=answers, flush=True)
    ours.stop_cluster()


if __name__ == "__main__":
    main()
