"""The peer's side of a benchmark: spxquery, in a separate environment.

It reads commands as JSON from standard input, one on each line, and answers each with a line.
It runs under the peer's interpreter and imports nothing of spxdask.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
answers, sys.stdout = sys.stdout, sys.stderr

import spxquery  # noqa: E402
import spxquery.core.query  # noqa: E402
from spxquery.batch import BatchConfig, BatchPipeline  # noqa: E402
from spxquery.batch.aggregate import aggregate_lightcurves  # noqa: E402
from spxquery.batch.config import load_catalog  # noqa: E402
from spxquery.batch.extract import process_single_image  # noqa: E402
from spxquery.core.config import PhotometryConfig  # noqa: E402

# Otherwise the time would include that of logging a message for each source.
logging.disable(logging.CRITICAL)


class Peer:
    def __init__(self) -> None:
        self.sources = {}

    def about(self) -> dict:
        return {"version": spxquery.__version__, "python": sys.version.split()[0]}

    def load(self, catalogue: str) -> dict:
        started = time.perf_counter()
        self.sources = {catalogue: load_catalog(Path(catalogue))}
        return {"seconds": time.perf_counter() - started}

    def extract(self, image: str, catalogue: str, folder: str) -> dict:
        sources = self.sources[catalogue]
        started = time.perf_counter()
        table = process_single_image(
            Path(image), sources, PhotometryConfig(), Path(folder), skip_existing=False
        )
        return {"seconds": time.perf_counter() - started, "table": str(table)}

    def aggregate(self, per_image: str, folder: str) -> dict:
        lightcurves, buckets = Path(folder) / "lightcurves", Path(folder) / "buckets"
        started = time.perf_counter()
        aggregate_lightcurves(Path(per_image), lightcurves, buckets)
        return {"seconds": time.perf_counter() - started, "lightcurves": str(lightcurves)}

    def run_all(self, tap_url: str, archive_url: str, folder: str, **options) -> dict:
        spxquery.core.query.TAP_URL = tap_url
        options["catalog_path"] = Path(options["catalog_path"])
        started = time.perf_counter()
        pipeline = BatchPipeline(BatchConfig(output_dir=Path(folder), **options))
        found = pipeline.run_query()
        for observation in found.observations:
            uri = observation.download_url.split("://", 1)[1].split("/", 1)[1]
            observation.download_url = f"{archive_url}/{uri}"
        pipeline.run_download()
        pipeline.run_extract()
        pipeline.run_aggregate()
        return {
            "seconds": time.perf_counter() - started,
            "lightcurves": str(Path(folder) / "lightcurves"),
        }


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(peer, command["call"])(**command["arguments"])
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
