"""Pulls of PSF fluxes: `python benchmarks/pulls.py` prints a table.

A pull is (measured - true) / error. Full-size simulated frames are measured with the calibration
products that belong to them, in this process. Half of the sources have a neighbour 1 to 3 pixels
away. The same light without noise, fitted with the same model, shows which part of the pulls is due
to the model: the PSF that differs between the zones and, with --endless, the light beyond its
stamp.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from spxdask import PhotometryConfig
from spxdask.demo import robust_scatter
from spxdask.science.calibration import DetectorCalibration, open_products
from spxdask.science.families import EPSF, SOLID_ANGLE, SPECTRAL_WCS
from spxdask.science.level2.frame import open_frame
from spxdask.science.photometry import measure
from spxdask.simulate.frames import (
    CALIBRATED_SCENE,
    Exposure,
    Sky,
    make_planes,
    make_sky,
    write_frame,
)
from spxdask.simulate.products import CATALOG, make_products
from spxdask.simulate.psf import VaryingPsf

CENTER = (270.0, 66.56)
PIXEL_ARCSEC = 6.15
N_POSITIONS = 2_500
AMPLITUDE_UJY = (1_000.0, 50_000.0)
SCENE = replace(CALIBRATED_SCENE, crowding=0.2)
MODES = ("nearest", "bilinear")


def simulate_sky(seed: int) -> tuple[Sky, np.ndarray]:
    """Return sources far from one another, half of them with a neighbour, and which have one."""
    rng = np.random.default_rng(seed)
    sky = make_sky(
        *CENTER, 1.5, n_sources=N_POSITIONS, min_separation_arcsec=90,
        amplitude_ujy=AMPLITUDE_UJY, seed=seed,
    )  # fmt: skip
    pairs = np.arange(N_POSITIONS // 2)
    distance_deg = rng.uniform(1.0, 3.0, len(pairs)) * PIXEL_ARCSEC / 3600
    angle = rng.uniform(0, 2 * np.pi, len(pairs))
    parents = sky.take(pairs)
    others = replace(
        sky.take(rng.permutation(N_POSITIONS)[pairs]),
        ra=parents.ra + distance_deg * np.cos(angle) / np.cos(np.radians(parents.dec)),
        dec=parents.dec + distance_deg * np.sin(angle),
    )
    columns = {name: np.append(getattr(sky, name), getattr(others, name)) for name in vars(sky)}
    has_neighbour = np.ones(len(columns["ra"]), bool)
    has_neighbour[len(pairs) : N_POSITIONS] = False
    return Sky(**columns), has_neighbour


def calibrate(folder: Path, detector: int, psf: VaryingPsf) -> DetectorCalibration:
    """Return the products of a detector, without the flux correction, which QR3 does not need."""
    tokens = [token for release, _, token, _ in CATALOG if release == "qr3"]
    families = [EPSF, SOLID_ANGLE, SPECTRAL_WCS]
    made = make_products(folder, detectors=[detector], tokens=tokens, families=families, psf=psf)
    return open_products({product.family: product.path for product in made}, f"D{detector}")


def measure_frame(
    folder: Path, detector: int, number: int, calibration: DetectorCalibration, psf: VaryingPsf
) -> pd.DataFrame:
    """Simulate a frame, and return one row for each source and way of choosing the PSF."""
    sky, has_neighbour = simulate_sky(number)
    one = Exposure(
        obs_id=f"2025W51_1A_{number:04d}_1", detector=detector, ra=CENTER[0], dec=CENTER[1],
        roll_deg=0.0, mjd_begin=61027.0 + number, release="qr3", version=30,
    )  # fmt: skip
    planes = make_planes(one, sky, replace(SCENE, psf=psf))
    path = folder / one.filename
    write_frame(path, one, planes)
    frame = open_frame(path)
    tables = []
    for mode in MODES:
        config = PhotometryConfig(psf=mode)
        found = measure(frame, sky.ra[planes.source], sky.dec[planes.source], config, calibration)
        columns = found.columns | found.psf_columns
        model = calibration.psf.interpolated(mode == "bilinear")
        stamps, _, _ = model.render(columns["x"], columns["y"])
        light = psf.stamps(detector, columns["x"], columns["y"], model.size)
        tables.append(
            pd.DataFrame(
                {
                    "mode": mode,
                    "detector": detector,
                    "is_pair": has_neighbour[planes.source[found.index]],
                    "true": planes.flux_ujy[found.index],
                    "psf": columns["psf_flux"],
                    "psf_error": columns["psf_flux_error"],
                    "aperture": columns["flux"] * columns["aperture_correction"],
                    "aperture_error": columns["flux_error"] * columns["aperture_correction"],
                    "noise_free": (stamps * light).sum((1, 2)) / (stamps**2).sum((1, 2)),
                }
            )
        )
    path.unlink()
    return pd.concat(tables)


def summarise(rows: pd.DataFrame) -> str:
    """Return the table in Markdown."""
    rows = rows.dropna()
    lines = [
        "| band | psf | rows | pulls: median | scatter | less the model: median | scatter "
        "| model | its scatter | bright, psf / true | psf / aperture | pairs: median | scatter |",
        "|---|---|" + "---:|" * 11,
    ]
    for (detector, mode), some in rows.groupby(["detector", "mode"], sort=True):
        alone, pairs = some[~some.is_pair], some[some.is_pair]
        bright = alone[alone.true > alone.true.median()]
        pulls = (alone.psf - alone.true) / alone.psf_error
        less = (alone.psf - alone.true * alone.noise_free) / alone.psf_error
        of_pairs = (pairs.psf - pairs.true) / pairs.psf_error
        cells = [
            f"{len(some):,}",
            f"{pulls.median():+.3f}", f"{robust_scatter(pulls):.3f}",
            f"{less.median():+.3f}", f"{robust_scatter(less):.3f}",
            f"{100 * (alone.noise_free.mean() - 1):+.3f} %",
            f"{100 * alone.noise_free.std():.3f} %",
            f"{(bright.psf / bright.true).median():.4f}",
            f"{(bright.psf / bright.aperture).median():.4f}",
            f"{of_pairs.median():+.3f}", f"{robust_scatter(of_pairs):.3f}",
        ]  # fmt: skip
        lines.append(f"| D{detector} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--detectors", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--frames", type=int, default=4, help="of each detector")
    parser.add_argument(
        "--endless", action="store_true", help="simulate light beyond the support of an EPSF, too"
    )
    parser.add_argument("--work", type=Path, help="where a folder for the data is made")
    options = parser.parse_args()
    psf = VaryingPsf(reach=math.inf) if options.endless else VaryingPsf()
    with tempfile.TemporaryDirectory(dir=options.work, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        tables = []
        for detector in options.detectors:
            calibration = calibrate(folder / "products", detector, psf)
            for number in range(options.frames):
                tables.append(measure_frame(folder, detector, number, calibration, psf))
    print(summarise(pd.concat(tables)))


if __name__ == "__main__":
    main()
