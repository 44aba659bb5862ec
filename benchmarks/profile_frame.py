"""Time of each step of an extraction: `python benchmarks/profile_frame.py` prints a table.

The steps are timed while frames are extracted one after the other, in one process and one
thread, from files in the page cache; "the rest" is the time outside of all steps.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import workloads

from spxdask import PhotometryConfig
from spxdask.science import photometry
from spxdask.science.catalogue import Catalogue
from spxdask.science.level2 import frame
from spxdask.stages import extract
from spxdask.tables import per_image
from spxdask.tables.catalogue import read_catalogue

REPEATS = 25
WARM_UP = 3
# The steps, and for each its function and the module or class through which it is called.
STEPS = {
    "headers read, planes mapped": (extract, "open_frame"),
    "candidates from the catalogue": (Catalogue, "within"),
    "zodiacal fit, one pass of four planes": (photometry, "sum_zodi"),
    "median variance, one pass of one": (photometry, "find_positive_median"),
    "positions on the detector": (photometry, "on_frame"),
    "background and aperture of each source": (photometry, "measure_sources"),
    "PSF fluxes": (photometry, "measure_psf_fluxes"),
    "wavelengths": (frame.Frame, "wavelength_at"),
    "rows as CSV": (per_image, "render_lines"),
    "table on disk (fsync)": (os, "fsync"),
}


def profile(image: Path, catalogue: Path, folder: Path) -> dict[str, float]:
    """Return the median time per frame, ms, of each step, of the rest and in total."""
    read_catalogue(catalogue).save(f"{catalogue}.arrow")
    options = extract.ExtractOptions(
        catalogue=f"{catalogue}.arrow",
        photometry=PhotometryConfig(),
        recipe="benchmark",
        catalogue_fingerprint="benchmark",
        serial=False,
    )
    spent: dict[str, float] = defaultdict(float)
    frames: list[dict[str, float]] = []

    def timed(name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    originals = {name: getattr(*owner) for name, owner in STEPS.items()}
    for name, (owner, attribute) in STEPS.items():
        setattr(owner, attribute, timed(name, originals[name]))
    try:
        for _ in range(WARM_UP + REPEATS):
            spent.clear()
            started = time.perf_counter()
            outcome = extract.extract(str(image), str(folder), options)
            total = time.perf_counter() - started
            assert outcome.status == "done", outcome.reason
            rest = total - sum(spent.values())
            frames.append({**spent, "the rest": rest, "in all": total})
    finally:
        for name, (owner, attribute) in STEPS.items():
            setattr(owner, attribute, originals[name])
    names = [*STEPS, "the rest", "in all"]
    return {n: 1e3 * float(np.median([f.get(n, 0.0) for f in frames[WARM_UP:]])) for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--sources", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    options = parser.parse_args()
    work = options.work.absolute()
    folder = work / "extract-ours"
    folder.mkdir(parents=True, exist_ok=True)
    image = workloads.frame(work, workloads.exposure())
    columns = {n: profile(image, workloads.catalogue(work, n), folder) for n in options.sources}
    print("| ms a frame | " + " | ".join(f"{n:,} sources" for n in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{c[name]:.2f}" for c in columns.values()) + " |")


if __name__ == "__main__":
    main()
