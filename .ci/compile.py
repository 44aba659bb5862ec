#!/usr/bin/env python3
"""Compile the loops in the environment that runs this: ``python .ci/compile.py``.

A frame is simulated and measured with the PSF, with and without flux factors as calibration
products have them. Otherwise the first processes of pytest would wait for one of them to compile.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np

from spxdask.science.calibration import NO_CALIBRATION, DetectorCalibration
from spxdask.science.level2.frame import open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure
from spxdask.simulate.frames import Exposure, SceneOptions, make_planes, make_sky, write_frame

# Compilers make many objects that stay.
gc.disable()
ra, dec, window = 270.0, 66.56, (960, 960, 120, 120)
exposure = Exposure(
    obs_id="2025W51_1A_0001_1",
    detector=3,
    ra=ra,
    dec=dec,
    roll_deg=0.0,
    mjd_begin=61027.0,
    release="qr3",
)
sky = make_sky(ra, dec, 0.05, n_sources=10, min_separation_arcsec=30, seed=1)
planes = make_planes(exposure, sky, SceneOptions(crowding=0.3), window=window)
corrected = DetectorCalibration(flux_correction=np.ones((2040, 2040), np.float32))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, exposure.filename)
    write_frame(path, exposure, planes, window=window)
    for calibration in (NO_CALIBRATION, corrected):
        measured = measure(open_frame(path), sky.ra, sky.dec, PhotometryConfig(), calibration)
        assert len(measured.columns["flux"]) > 0
