"""The flags of a pixel: one registry of names, bits and meanings.

The decoder, the option `bad_flags`, the selection of rows and the tables in the documentation
are made from it. Bits and meanings are those of the SPHEREx Explanatory Supplement (pipelines 6
and 7); a file's own header has precedence.

There are two sets. A *bad* pixel is of no use for background and zodiacal fit. A flag *rejects*
a row when a flux should not have it in its aperture; these are the flags that IRSA's Mosaic Tool
masks (Supplement v2.0, table 16). The sets differ: a ghost or the bloom of a saturated star spoils
the flux of what it lies on, and a bright star is an OUTLIER among its neighbours by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "FLAGS",
    "FLAG_BITS",
    "PSF_BAD_FLAGS",
    "REJECTING_FLAGS",
    "REJECTING_MASK",
    "Flag",
    "decode_flags",
    "find_bit",
]


@dataclass(frozen=True, slots=True)
class Flag:
    """One bit of the FLAGS plane.

    Attributes
    ----------
    name : str
        As file headers have it.
    bit : int
        0 is the lowest.
    meaning : str
        For people.
    bad : bool
        Whether such a pixel is, by default, unusable for background and zodiacal fit.
    rejects : bool
        Whether a row whose aperture holds such a pixel is not good; see `select_good_rows`.
    """

    name: str
    bit: int
    meaning: str
    bad: bool = False
    rejects: bool = False


FLAGS = (
    Flag(
        "TRANSIENT",
        0,
        "transient detected during ramp fitting, such as a cosmic ray",
        bad=True,
        rejects=True,
    ),
    Flag("OVERFLOW", 1, "overflow in the onboard processing", bad=True),
    Flag(
        "SUR_ERROR", 2, "error in the onboard sample-up-the-ramp processing", bad=True, rejects=True
    ),
    Flag("PHANTOM", 4, "phantom pixel"),
    Flag("REFERENCE", 5, "reference pixel, not sensitive to light"),
    Flag("NONFUNC", 6, "permanently unusable pixel", bad=True, rejects=True),
    Flag("DICHROIC", 7, "low efficiency near the edge of the dichroic", bad=True, rejects=True),
    Flag("MISSING_DATA", 9, "onboard data lost", bad=True, rejects=True),
    Flag("HOT", 10, "hot pixel", bad=True, rejects=True),
    Flag("COLD", 11, "anomalously low signal", bad=True, rejects=True),
    Flag("FULLSAMPLE", 12, "full sample history is available; informational"),
    Flag("PHANMISS", 14, "phantom correction was not performed", bad=True, rejects=True),
    Flag("NONLINEAR", 15, "non-linearity could not be corrected reliably", bad=True, rejects=True),
    Flag("PERSIST", 17, "persistent charge above threshold", bad=True, rejects=True),
    Flag("OUTLIER", 19, "outlier among neighbouring pixels", bad=True),
    Flag("CROSSTALK", 20, "electronic crosstalk of a bright source", rejects=True),
    Flag("SOURCE", 21, "a source the archive knows of lies on the pixel"),
    Flag("GHOST", 22, "optical ghost", rejects=True),
    Flag("GHOST_FPA", 23, "ghost of the focal plane assembly", rejects=True),
    Flag("GHOST_EXT", 24, "extended ghost", rejects=True),
    Flag("STREAK", 25, "streak", rejects=True),
    Flag("BLOOM", 26, "bloom of a bright source, saturated cores included", rejects=True),
    Flag("SNOWBALL", 27, "snowball: a large charge deposit", rejects=True),
    Flag("HALO", 28, "halo of a bright source", rejects=True),
    Flag("SATELLITE_HALO", 29, "halo of a satellite trail", rejects=True),
)

FLAG_BITS = {flag.name: flag.bit for flag in FLAGS}
REJECTING_FLAGS = tuple(flag.name for flag in FLAGS if flag.rejects)
REJECTING_MASK = sum(1 << flag.bit for flag in FLAGS if flag.rejects)

# Pixels that the PSF fit leaves out. TRANSIENT and OUTLIER are not among them, because they are
# set on the cores of bright sources, too.
PSF_BAD_FLAGS = (
    "SUR_ERROR", "NONFUNC", "MISSING_DATA", "HOT", "COLD", "PHANMISS", "NONLINEAR", "PERSIST",
)  # fmt: skip


def find_bit(flag: int | str) -> int:
    """Return the bit of a flag given by its name, in any case, or by its bit.

    Parameters
    ----------
    flag : int or str
        Such as ``21`` or ``"SOURCE"``.

    Returns
    -------
    int
        0 to 31.

    Raises
    ------
    ValueError
        If there is no such flag.

    Examples
    --------
    >>> find_bit("source")
    21
    """
    if isinstance(flag, str):
        if flag.strip().upper() not in FLAG_BITS:
            raise ValueError(f"{flag!r} is no flag")
        return FLAG_BITS[flag.strip().upper()]
    if isinstance(flag, bool) or not 0 <= flag <= 31:
        raise ValueError(f"{flag!r} is no flag bit, 0 to 31")
    return flag


def decode_flags(value: int) -> tuple[str, ...]:
    """Return the names of the flags that are set, the lowest bit first.

    Parameters
    ----------
    value : int
        As in the column ``flag``.

    Returns
    -------
    tuple of str
        A bit without a name is ``BIT<n>``.

    Examples
    --------
    >>> decode_flags(1 << 21 | 1 << 0)
    ('TRANSIENT', 'SOURCE')
    """
    names = {flag.bit: flag.name for flag in FLAGS}
    bits = (bit for bit in range(int(value).bit_length()) if int(value) >> bit & 1)
    return tuple(names.get(bit, f"BIT{bit}") for bit in bits)
