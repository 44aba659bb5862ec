"""The columns of the tables that a run writes: names, types, units, meanings.

This is the only place where columns are listed; the tables, their readers and their
documentation are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

__all__ = [
    "APERTURE_ONLY",
    "COLUMNS",
    "LAYOUTS",
    "LIGHT_CURVE",
    "LIGHT_CURVE_START",
    "PER_IMAGE",
    "SCHEMA",
    "SORT_KEYS",
    "TEXT",
    "WITH_PSF",
    "Column",
    "Layout",
    "column_rows",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the per-image tables, of the light curves, or of both.

    Attributes
    ----------
    name : str
        As in the header of a table.
    type : pyarrow.DataType
        Text, integer or double.
    unit : str
        As `astropy.units` reads it; empty for text and numbers without a unit.
    ucd : str
        What kind of quantity it is, in the words of the IVOA: a UCD1+.
    description : str
        What it is, for people.
    is_measured : bool
        Whether photometry measures it; otherwise it comes from catalogue or file.
    in_per_image, in_light_curve : bool
        Which tables have it.
    needs_psf : bool
        Whether tables without PSF photometry lack it.
    is_origin : bool
        Whether it says which frame a row is from. Light curves have it behind all others.
    """

    name: str
    type: pa.DataType
    unit: str
    ucd: str
    description: str
    is_measured: bool = True
    in_per_image: bool = True
    in_light_curve: bool = True
    needs_psf: bool = False
    is_origin: bool = False


COLUMNS = (
    Column(
        name="target_id",
        type=pa.string(),
        unit="",
        ucd="meta.id;meta.main",
        description="id of the source as in the catalogue (per image only)",
        is_measured=False,
        in_light_curve=False,
    ),
    Column(
        name="ra",
        type=pa.float64(),
        unit="deg",
        ucd="pos.eq.ra",
        description="right ascension at the time of the frame, ICRS (per image only)",
        is_measured=False,
        in_light_curve=False,
    ),
    Column(
        name="dec",
        type=pa.float64(),
        unit="deg",
        ucd="pos.eq.dec",
        description="declination at the time of the frame, ICRS (per image only)",
        is_measured=False,
        in_light_curve=False,
    ),
    Column(
        name="obs_id",
        type=pa.string(),
        unit="",
        ucd="meta.id;obs",
        description="exposure, such as 2025W51_1A_0684_2",
        is_measured=False,
    ),
    Column(
        name="band",
        type=pa.string(),
        unit="",
        ucd="instr.bandpass",
        description="detector, such as D3",
        is_measured=False,
    ),
    Column(
        name="mjd",
        type=pa.float64(),
        unit="d",
        ucd="time.epoch;obs.exposure",
        description="middle of the exposure, modified Julian date, UTC",
        is_measured=False,
    ),
    Column(
        name="x",
        type=pa.float64(),
        unit="pix",
        ucd="pos.cartesian.x;instr.det",
        description="column on the frame; the centre of the first pixel is 0",
    ),
    Column(
        name="y",
        type=pa.float64(),
        unit="pix",
        ucd="pos.cartesian.y;instr.det",
        description="row on the frame; the centre of the first pixel is 0",
    ),
    Column(
        name="flux",
        type=pa.float64(),
        unit="uJy",
        ucd="phot.flux.density;em.IR",
        description="flux in the aperture, background and zodiacal light subtracted",
    ),
    Column(
        name="flux_error",
        type=pa.float64(),
        unit="uJy",
        ucd="stat.error;phot.flux.density;em.IR",
        description="error of flux, from the variances of the pixels and of the background",
    ),
    Column(
        name="mag_ab",
        type=pa.float64(),
        unit="mag(AB)",
        ucd="phot.mag;em.IR",
        description="AB magnitude of flux; empty where that is not positive",
    ),
    Column(
        name="mag_ab_error",
        type=pa.float64(),
        unit="mag",
        ucd="stat.error;phot.mag;em.IR",
        description="error of mag_ab",
    ),
    Column(
        name="wavelength",
        type=pa.float64(),
        unit="um",
        ucd="em.wl.central",
        description="wavelength of the filter at the position",
    ),
    Column(
        name="bandwidth",
        type=pa.float64(),
        unit="um",
        ucd="instr.bandwidth",
        description="bandwidth of the filter at the position",
    ),
    Column(
        name="flag",
        type=pa.int64(),
        unit="",
        ucd="meta.code.qual",
        description="bitwise OR of the flags of pixels whose centres are in the aperture",
    ),
    Column(
        name="bg_level",
        type=pa.float64(),
        unit="uJy / arcsec2",
        ucd="phot.flux.density.sb;instr.background",
        description="local background",
    ),
    Column(
        name="bg_error",
        type=pa.float64(),
        unit="uJy / arcsec2",
        ucd="stat.error;phot.flux.density.sb;instr.background",
        description="error of bg_level",
    ),
    Column(
        name="aperture_radius",
        type=pa.float64(),
        unit="pix",
        ucd="phys.size.radius;instr.pixel",
        description="radius of the aperture",
    ),
    Column(
        name="filename",
        type=pa.string(),
        unit="",
        ucd="meta.id;meta.file",
        description="name of the frame's file",
        is_measured=False,
        is_origin=True,
    ),
    Column(
        name="aperture_correction",
        type=pa.float64(),
        unit="",
        ucd="arith.factor;phot.flux.density",
        description="flux times this is the total flux of an isolated point source",
        needs_psf=True,
    ),
    Column(
        name="psf_flux",
        type=pa.float64(),
        unit="uJy",
        ucd="phot.flux.density;em.IR;instr.det.psf",
        description="total flux by the PSF, from one solution for all sources on the frame",
        needs_psf=True,
    ),
    Column(
        name="psf_flux_error",
        type=pa.float64(),
        unit="uJy",
        ucd="stat.error;phot.flux.density;em.IR;instr.det.psf",
        description="error of psf_flux, that of overlapping sources included",
        needs_psf=True,
    ),
    Column(
        name="psf_chi2",
        type=pa.float64(),
        unit="",
        ucd="stat.fit.chi2;instr.det.psf",
        description="reduced chi-squared of the solution on the pixels around the source",
        needs_psf=True,
    ),
    Column(
        name="psf_fraction",
        type=pa.float64(),
        unit="",
        ucd="instr.det.psf;arith.squared;arith.ratio",
        description="share of the PSF, squared, on usable pixels; below 0.3 psf_flux is empty",
        needs_psf=True,
    ),
    Column(
        name="neighbour_flux",
        type=pa.float64(),
        unit="uJy",
        ucd="phot.flux.density;em.IR;meta.modelled",
        description="light of other catalogue sources in the aperture, which flux has too much",
        needs_psf=True,
    ),
    Column(
        name="bad_fraction",
        type=pa.float64(),
        unit="",
        ucd="phot.flux.density;arith.ratio",
        description="share of the source's light in the aperture on pixels with a bad flag",
        needs_psf=True,
    ),
    Column(
        name="bjd_tdb",
        type=pa.float64(),
        unit="d",
        ucd="time.epoch;pos.barycenter",
        description="middle of the exposure, barycentric Julian date at the source, TDB",
        needs_psf=True,
    ),
    Column(
        name="release",
        type=pa.string(),
        unit="",
        ucd="meta.version;meta.dataset",
        description="release of the archive, such as qr2 (light curves only)",
        is_measured=False,
        in_per_image=False,
        is_origin=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the tables of a run, in their order.

    Attributes
    ----------
    per_image : tuple of str
        Columns of the per-image tables.
    light_curve : tuple of str
        Columns of the light curves.
    """

    per_image: tuple[str, ...]
    light_curve: tuple[str, ...]


def _make_layout(with_psf: bool) -> Layout:
    columns = [column for column in COLUMNS if with_psf or not column.needs_psf]
    in_order = sorted(columns, key=lambda column: column.is_origin)
    return Layout(
        tuple(column.name for column in columns if column.in_per_image),
        tuple(column.name for column in in_order if column.in_light_curve),
    )


APERTURE_ONLY, WITH_PSF = _make_layout(False), _make_layout(True)
LAYOUTS = (WITH_PSF, APERTURE_ONLY)
# All columns of each kind of table.
PER_IMAGE, LIGHT_CURVE = WITH_PSF.per_image, WITH_PSF.light_curve
TEXT = tuple(column.name for column in COLUMNS if column.type == pa.string())
# What light curves of every version and layout begin with.
LIGHT_CURVE_START = tuple(
    column.name
    for column in COLUMNS
    if column.in_light_curve and not column.needs_psf and not column.is_origin
)
# Total order of the rows of a light curve.
SORT_KEYS = ("target_id", "mjd", "obs_id", "band")

SCHEMA = pa.schema([(column.name, column.type) for column in COLUMNS])


def column_rows() -> list[tuple[str, str, str, str]]:
    """List the columns for the documentation.

    Returns
    -------
    list of (str, str, str, str)
        Name, unit, UCD and description of each column, in their order.
    """
    return [(column.name, column.unit, column.ucd, column.description) for column in COLUMNS]
