"""Errors of bright sources: `python benchmarks/bright_sources.py` prints a table.

Bright constant sources are measured in frames of one detector, through the whole pipeline and
with the calibration products of a simulated archive, which a true PSF belongs to that is no
Gaussian. The scatter of each light curve is compared with the errors that it states. No true
value is used, except for the last column.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from spxdask import BatchConfig, BatchPipeline
from spxdask.simulate.archive import ArchivedFrame, SimulatedArchive
from spxdask.simulate.frames import CALIBRATED_SCENE, Exposure, make_planes, make_sky, write_frame
from spxdask.simulate.products import CATALOG, make_products

CENTER = (270.0, 66.56)
N_SOURCES = 60
RADIUS_DEG = 0.6
SCENE = replace(CALIBRATED_SCENE, crowding=0.2)
# How a flux and its error are had from the columns of a light curve.
MEASURES = {
    "`flux`": ("flux", "flux_error", None),
    "`flux` x `aperture_correction`": ("flux", "flux_error", "aperture_correction"),
    "`psf_flux`": ("psf_flux", "psf_flux_error", None),
}


def measure(folder: Path, detector: int, epochs: int, flux_ujy: float) -> pd.DataFrame:
    """Return the rows of all light curves of a run."""
    os.environ["SPXDASK_CACHE"] = str(folder / "cache")
    sky = make_sky(
        *CENTER,
        RADIUS_DEG,
        n_sources=N_SOURCES,
        min_separation_arcsec=120,
        seed=detector,
        amplitude_ujy=(flux_ujy, flux_ujy),
    )
    # Without a spectrum, a source is constant wherever it lies on the detector.
    sky = replace(sky, slope=0.0 * sky.slope, line_strength=0.0 * sky.line_strength)
    catalogue = folder / "sources.csv"
    ids = [f"s{number}" for number in range(N_SOURCES)]
    pd.DataFrame({"targetid": ids, "ra": sky.ra, "dec": sky.dec}).to_csv(catalogue, index=False)
    rng = np.random.default_rng(12)
    frames = []
    for epoch in range(epochs):
        shift = rng.uniform(-0.6, 0.6, 2)
        one = Exposure(
            obs_id=f"2025W51_1A_{epoch:04d}_1",
            detector=detector,
            ra=CENTER[0] + shift[0] / np.cos(np.radians(CENTER[1])),
            dec=CENTER[1] + shift[1],
            roll_deg=float(rng.uniform(0.0, 360.0)),
            mjd_begin=61027.0 + epoch,
            release="qr3",
            version=30,
        )
        path = folder / one.filename
        write_frame(path, one, make_planes(one, sky, SCENE))
        frames.append(ArchivedFrame.of(one, path))
    tokens = [token for release, _, token, _ in CATALOG if release == "qr3"]
    products = make_products(folder / "products", detectors=[detector], tokens=tokens)
    with SimulatedArchive(frames, products=products) as archive:
        config = BatchConfig(
            catalog_path=str(catalogue),
            center_ra=CENTER[0],
            center_dec=CENTER[1],
            radius=RADIUS_DEG,
            output_dir=folder / "run",
            tap_url=archive.tap_url,
            archive_url=archive.archive_url,
            max_extract_workers=1,
        )
        BatchPipeline(config).run_all()
    curves = (folder / "run" / "lightcurves").glob("*.csv")
    return pd.concat(pd.read_csv(path).assign(target_id=path.stem) for path in curves)


def summarise(rows: pd.DataFrame, flux_ujy: float) -> str:
    """Return the table in Markdown."""
    lines = [
        "| | rms | quoted error | chi^2 | mean / true |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (flux_name, error_name, factor_name) in MEASURES.items():
        factor = rows[factor_name] if factor_name else 1.0
        measured = rows.assign(flux=rows[flux_name] * factor, error=rows[error_name] * factor)
        measured = measured.dropna(subset=["flux", "error"])
        scatter, quoted, chi_squared, degrees = [], [], 0.0, 0
        for _, curve in measured.groupby("target_id"):
            flux, error = curve["flux"].to_numpy(), curve["error"].to_numpy()
            mean = np.average(flux, weights=error**-2)
            scatter.append(np.std(flux, ddof=1) / mean)
            quoted.append(np.median(error) / mean)
            chi_squared += float(np.sum(((flux - mean) / error) ** 2))
            degrees += len(flux) - 1
        lines.append(
            f"| {name} | {100 * np.median(scatter):.2f} % | {100 * np.median(quoted):.2f} % | "
            f"{chi_squared / degrees:.2f} | {measured['flux'].mean() / flux_ujy:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--detector", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--flux", type=float, default=20_000.0, help="of each source, uJy")
    parser.add_argument("--work", type=Path, help="where a folder for the data is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, ignore_cleanup_errors=True) as folder:
        rows = measure(Path(folder), options.detector, options.epochs, options.flux)
    print(
        f"{N_SOURCES} constant sources of {options.flux:,.0f} uJy in D{options.detector}, "
        f"{options.epochs} epochs, {len(rows):,} rows\n"
    )
    print(summarise(rows, options.flux))


if __name__ == "__main__":
    main()
