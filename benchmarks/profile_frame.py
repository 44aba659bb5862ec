"""Time of each step of an extraction: `python benchmarks/profile_frame.py` prints a table.

The steps are timed while frames are extracted one after the other, in one process and one
thread, from files in the page cache; "the rest" is the time outside of all steps. With
`--products`, calibration products are used. With `--cpu`, waiting does not count, and the least of
all times is shown, which other programs on the machine disturb least.
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
from spxdask.archive.calibration import Product
from spxdask.science import photometry, zodi
from spxdask.science.catalogue import Catalogue
from spxdask.stages import extract
from spxdask.tables import per_image
from spxdask.tables.catalogue import read_catalogue

REPEATS = 25
WARM_UP = 3
# The steps, and for each its function and the module or class through which it is called.
STEPS = {
    "headers read, planes mapped": (extract, "open_frame"),
    "candidates from the catalogue": (Catalogue, "within"),
    "zodiacal fit, one pass of four planes": (zodi, "sum_zodi"),
    "median variance, from a few values": (zodi, "find_positive_median"),
    "positions on the detector": (photometry, "on_frame"),
    "background and aperture of each source": (photometry, "measure_sources"),
    "PSF read from the frame": (photometry, "read_frame_psf"),
    "solution for the PSF fluxes": (photometry, "measure_psf_fluxes"),
    "wavelengths": (photometry, "_find_wavelengths"),
    "rows as CSV": (per_image, "render_lines"),
    "table on disk (fsync)": (os, "fsync"),
}


def profile(
    image: Path, catalogue: Path, folder: Path, products: tuple[Product, ...], is_cpu: bool
) -> dict[str, float]:
    """Return the time per frame, ms, of each step, of the rest and in total."""
    now, choose = (time.thread_time, np.min) if is_cpu else (time.perf_counter, np.median)
    read_catalogue(catalogue).save(f"{catalogue}.arrow")
    options = extract.ExtractOptions(
        catalogue=f"{catalogue}.arrow",
        photometry=PhotometryConfig(),
        recipe="benchmark",
        catalogue_fingerprint="benchmark",
        serial=False,
        products=products,
    )
    spent: dict[str, float] = defaultdict(float)
    frames: list[dict[str, float]] = []

    def timed(name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            started = now()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += now() - started

        return call

    originals = {name: getattr(*owner) for name, owner in STEPS.items()}
    for name, (owner, attribute) in STEPS.items():
        setattr(owner, attribute, timed(name, originals[name]))
    try:
        for _ in range(WARM_UP + REPEATS):
            spent.clear()
            started = now()
            outcome = extract.extract(str(image), str(folder), options)
            total = now() - started
            assert outcome.status == "done", outcome.reason
            rest = total - sum(spent.values())
            frames.append({**spent, "the rest": rest, "in all": total})
    finally:
        for name, (owner, attribute) in STEPS.items():
            setattr(owner, attribute, originals[name])
    names = [*STEPS, "the rest", "in all"]
    return {n: 1e3 * float(choose([f.get(n, 0.0) for f in frames[WARM_UP:]])) for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("benchmark_data"), help="for the data")
    parser.add_argument("--sources", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--products", action="store_true", help="use calibration products")
    parser.add_argument("--cpu", action="store_true", help="the least CPU time of each step")
    options = parser.parse_args()
    work = options.work.absolute()
    folder = work / "extract-ours"
    folder.mkdir(parents=True, exist_ok=True)
    image = workloads.frame(work, workloads.exposure())
    products: tuple[Product, ...] = ()
    if options.products:
        band = workloads.exposure().band
        found = workloads.obtain_products(workloads.products(work), work / "cache", band)
        products = tuple(found.choose(band, is_early=True).values())
    columns = {
        n: profile(image, workloads.catalogue(work, n), folder, products, options.cpu)
        for n in options.sources
    }
    print("| ms a frame | " + " | ".join(f"{n:,} sources" for n in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{c[name]:.2f}" for c in columns.values()) + " |")


if __name__ == "__main__":
    main()
