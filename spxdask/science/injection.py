"""Artificial sources of known flux in a frame, to find out how well sources are measured on it.

The planes of the file do not change: what is returned is another frame. Its light is the flux
times the share of the PSF that falls on a pixel, divided by the solid angle of a pixel at the
source. Its noise is what such light has on this frame: by how much VARIANCE is higher on bright
pixels than around them, as a multiple of by how much IMAGE is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from spxdask.science.flags import FLAGS
from spxdask.science.level2.frame import Frame
from spxdask.science.photometry import UJY_PER_ARCSEC2
from spxdask.science.psf.model import PsfModel

__all__ = ["draw_positions", "estimate_photon_variance", "inject_sources"]

# Two sources that are closer cannot be told apart, pixels.
LEAST_SEPARATION = 0.5
# Artificial sources keep this distance from one another, pixels, so that their number does not
# make a frame more crowded: their stamps do not overlap.
DISTANCE_OF_INJECTED = 10.0
# They are this far from the source of the catalogue whose surroundings they share, pixels: some
# widths of the PSF. The outer limit doubles until there is room for all.
LEAST_SHIFT, FIRST_LARGEST_SHIFT = 4.0, 20.0
N_ROUNDS = 9
# Blocks of so many pixels have a common background.
BLOCK_PIXELS = 60
# Pixels that are brighter than their block by so many times their noise tell of the variance of
# light, if there are at least so many of them.
BRIGHT_SIGMA = 10.0
LEAST_BRIGHT_PIXELS = 20


def draw_positions(
    x: np.ndarray,
    y: np.ndarray,
    n: int,
    *,
    shape: tuple[int, int],
    margin: float,
    rng: np.random.Generator,
    others: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw positions that are as crowded as those of a catalogue: next to its sources.

    Parameters
    ----------
    x, y : (m,) float array
        0-based pixel positions of the sources of the catalogue, also of those at the edges.
    n : int
        How many positions.
    shape : (int, int)
        Rows and columns of the frame.
    margin : float
        Distance to keep from every edge, pixels.
    rng : Generator
        Decides.
    others : ((k,) float array, (k,) float array), optional
        Pixel positions x and y of further sources, to be kept clear of.

    Returns
    -------
    x, y : (k,) float array
        As many as there is room for, at most `n`, not closer to any source than half a pixel.
        None without a source of the catalogue within the margins.
    """
    ny, nx = shape
    catalogue = np.column_stack([x, y])

    def is_within(points: np.ndarray) -> np.ndarray:
        px, py = points.T
        return (px >= margin) & (px < nx - margin) & (py >= margin) & (py < ny - margin)

    parents = catalogue[is_within(catalogue)]
    found = np.empty((0, 2))
    if not len(parents):
        return found[:, 0], found[:, 1]
    # Imported here, as what loads this module need not place sources.
    from scipy.spatial import KDTree

    tree = KDTree(catalogue if others is None else np.vstack([catalogue, np.column_stack(others)]))
    for number in range(N_ROUNDS):
        largest = FIRST_LARGEST_SHIFT * 2**number
        shift = np.sqrt(rng.uniform(LEAST_SHIFT**2, largest**2, 2 * n))
        angle = rng.uniform(0.0, 2 * math.pi, 2 * n)
        points = parents[rng.integers(0, len(parents), 2 * n)]
        points = points + np.column_stack([shift * np.cos(angle), shift * np.sin(angle)])
        points = points[is_within(points)]
        points = points[tree.query(points)[0] >= LEAST_SEPARATION]
        for point in points:
            if len(found) == n:
                break
            if not (np.hypot(*(found - point).T) < DISTANCE_OF_INJECTED).any():
                found = np.vstack([found, point])
    return found[:, 0], found[:, 1]


def estimate_photon_variance(frame: Frame) -> float:
    """Estimate how much variance light has on a frame, from its bright pixels.

    Parameters
    ----------
    frame : Frame
        The frame.

    Returns
    -------
    float
        (MJy/sr)^2 of variance for 1 MJy/sr of light: the median over pixels that are bright
        against the block of pixels around them, which takes out what changes over the detector.
        Never negative; 0 if there are too few such pixels.
    """
    image, variance = (np.asarray(plane, np.float64) for plane in (frame.image, frame.variance))
    bad = sum(1 << frame.flag_bits[f.name] for f in FLAGS if f.bad and f.name in frame.flag_bits)
    usable = np.isfinite(image) & np.isfinite(variance) & (variance > 0)
    usable &= (np.asarray(frame.flags, np.int64) & bad) == 0
    light, excess = [], []
    ny, nx = frame.shape
    for top in range(0, ny, BLOCK_PIXELS):
        for left in range(0, nx, BLOCK_PIXELS):
            block = np.s_[top : top + BLOCK_PIXELS, left : left + BLOCK_PIXELS]
            good = usable[block]
            if not good.any():
                continue
            i, v = image[block][good], variance[block][good]
            above, more = i - np.median(i), v - np.median(v)
            bright = above > BRIGHT_SIGMA * math.sqrt(np.median(v))
            light.append(above[bright])
            excess.append(more[bright])
    if sum(map(len, light)) < LEAST_BRIGHT_PIXELS:
        return 0.0
    return max(float(np.median(np.concatenate(excess) / np.concatenate(light))), 0.0)


def inject_sources(
    frame: Frame,
    model: PsfModel,
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    solid_angle: np.ndarray,
    rng: np.random.Generator,
    *,
    photon_variance: float,
    factors: np.ndarray | None = None,
) -> Frame:
    """Add sources to a frame.

    Parameters
    ----------
    frame : Frame
        It stays as it is.
    model : PsfModel
        The PSF.
    x, y : (n,) float array
        0-based pixel positions.
    flux : (n,) float array
        Total flux of each, uJy.
    solid_angle : (n,) float array
        Of the pixel at each source, arcsec^2.
    rng : Generator
        For the noise.
    photon_variance : float
        Variance of light; see `estimate_photon_variance`.
    factors : (2040, 2040) float array, optional
        Factors with which IMAGE will be multiplied before it is measured, by which the light is
        divided.

    Returns
    -------
    Frame
        With other planes of image, variance and flags, in the form of those of a file. Pixels
        that no light falls on are the same to the bit, and so is VARIANCE where it is invalid.
        Where the light is above the noise of a pixel, the pixel is flagged SOURCE, as the archive
        flags those of the sources that it knows.
    """
    light = np.zeros(frame.shape)
    if len(x):
        stamps, corners, _ = model.render(x, y, origin=frame.origin)
        stamps = stamps * (flux / solid_angle / UJY_PER_ARCSEC2)[:, np.newaxis, np.newaxis]
        steps = np.arange(model.size)
        rows = (corners[:, 0, np.newaxis] + steps)[:, :, np.newaxis]
        columns = (corners[:, 1, np.newaxis] + steps)[:, np.newaxis, :]
        rows, columns, _ = np.broadcast_arrays(rows, columns, stamps)
        ny, nx = frame.shape
        on = (rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx)
        np.add.at(light, (rows[on], columns[on]), stamps[on])
    lit = np.nonzero(light)
    added = light[lit]
    if factors is not None:
        x0, y0 = (round(corner) for corner in frame.origin)
        added = added / factors[lit[0] + y0, lit[1] + x0]
    image, variance, flags = frame.image.copy(), frame.variance.copy(), frame.flags.copy()
    before = variance[lit].astype(np.float64)
    is_valid = np.isfinite(before) & (before > 0)
    more = photon_variance * added.clip(min=0.0)
    noise = rng.standard_normal(len(added)) * np.sqrt(more)
    image[lit] = image[lit] + added + noise
    variance[lit] = np.where(is_valid, before + more, before)
    is_source = is_valid & (added > np.sqrt(np.where(is_valid, before, 0.0)))
    flags[lit] |= np.where(is_source, 1 << frame.flag_bits["SOURCE"], 0).astype(flags.dtype)
    return replace(frame, image=image, variance=variance, flags=flags)
