"""One frame as the archive describes it: its names, its release and where it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spxdask.errors import ArchiveError
from spxdask.storage import local_path

# The start of every URI at IRSA's own file service.
SERVICE_PREFIX = "ibe/data/spherex/"
# Examples: level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits, and of an exposure that was
# processed again level2_2026W31_2A_0101_3D5_spx_l2b_retry-v27-2026-242.fits.
_FILENAME = re.compile(
    r"level2_(?P<obs_id>[0-9A-Za-z_]{1,60})D(?P<detector>[1-6])_spx_"
    r"l2b(?P<rerun>_retry(?P<rerun_number>\d{0,4}))?"
    r"-v(?P<version>\d{1,6})-(?P<year>\d{4})-(?P<day>\d{3})\.fits"
)
_URI_PART = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.+-]*")
# Examples: ivo://irsa.ipac/spherex_qr2_deep?2025W51_1A_0684_2/D3, with spherex_dr1 for DR1.
_PUBLISHER_DID = re.compile(r"ivo://[^?]*/spherex_(?P<release>[a-z][a-z0-9]*)(_deep)?\?")
# Releases whose fluxes are on the scale of before QR3; all others are on that of QR3.
EARLY_RELEASES = frozenset({"qr1", "qr2"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One detector of one exposure in one release.

    Attributes
    ----------
    obs_id : str
        Name of the exposure, such as ``2025W51_1A_0684_2``.
    band : str
        ``D1`` to ``D6``.
    mjd : float
        Middle of the exposure, in days; NaN where the archive does not state it.
    wavelength_um : float
        Centre of the detector's range, in micrometres.
    uri : str
        Path below the archive's URL; its last part is the file name.
    download_url : str
        Where the frame is.
    size_bytes : int or None
        Length of the file, None where the archive does not state it.
    footprint : bytes or None
        Corners of the frame on the sky, as `spxdask.science.footprint.pack_footprint` has them;
        None where the archive does not state them.
    """

    obs_id: str
    band: str
    mjd: float
    wavelength_um: float
    uri: str
    download_url: str
    size_bytes: int | None
    footprint: bytes | None = None

    @property
    def filename(self) -> str:
        """The archive's file name, unique to exposure, detector and version.

        Returns
        -------
        str
            The last part of the URI.
        """
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The file name without its suffix.

        Returns
        -------
        str
            The file name without ``.fits``.
        """
        return self.filename.removesuffix(".fits")

    @property
    def recency(self) -> tuple[int, int, int, int, str]:
        """What orders the versions of a frame: the larger, the newer.

        Returns
        -------
        tuple
            Pipeline version, year and day of the processing, number of the re-run (0 for a
            first run), and the URI, which decides between two copies of one file. Names of
            releases say nothing about age.
        """
        name = _match_filename(self.filename)
        rerun = int(name["rerun_number"] or 1) if name["rerun"] else 0
        return int(name["version"]), int(name["year"]), int(name["day"]), rerun, self.uri

    @property
    def release(self) -> str:
        """The release that the frame is of, such as ``qr2`` or ``dr1``.

        Returns
        -------
        str
            The first folder of the URI; empty for a URI without folders.
        """
        return self.uri.removeprefix(SERVICE_PREFIX).rpartition("/")[0].partition("/")[0]

    @property
    def is_early(self) -> bool:
        """Whether its release has the flux scale of before QR3.

        Returns
        -------
        bool
        """
        return self.release in EARLY_RELEASES

    def is_complete(self, sizes: Mapping[str, int]) -> bool:
        """Return whether the frame is among some files, with the length the archive states.

        Parameters
        ----------
        sizes : mapping of str to int
            Length of each file in bytes, by name.

        Returns
        -------
        bool
            True where the archive states no length and there is a file of that name.
        """
        size = sizes.get(self.filename)
        return size is not None and self.size_bytes in (None, size)


def frame_url(archive_url: str, uri: str) -> str:
    """Return where a file of the archive is.

    The bucket, and a copy of it on disk, lack ``ibe/data/spherex/`` in their paths.

    Parameters
    ----------
    archive_url : str
        Base URL of the archive (http, https), the bucket (s3) or a mirror (file).
    uri : str
        The file's path as the archive's tables give it.

    Returns
    -------
    str
        URL of the file.
    """
    mirror = local_path(archive_url)
    is_bucket_layout = archive_url.startswith("s3:") or (
        mirror is not None and not (mirror / "ibe").is_dir()
    )
    return f"{archive_url}/{uri.removeprefix(SERVICE_PREFIX) if is_bucket_layout else uri}"


def is_level2_name(uri: str) -> bool:
    """Return whether a URI names a Level 2 science file.

    Parameters
    ----------
    uri : str
        A path or a bare file name.

    Returns
    -------
    bool
        Only the last part of the path is examined.
    """
    return _FILENAME.fullmatch(uri.rpartition("/")[2]) is not None


def check_uri(uri: str) -> None:
    """Raise an error unless a URI is a plain relative path.

    File names on disk and requests to the archive are made from it, so it may contain
    no scheme, no empty or dotted part and no character with a meaning in a URL.

    Parameters
    ----------
    uri : str
        The file's path as the archive's tables give it.

    Raises
    ------
    ArchiveError
        If it is anything else.
    """
    if not all(_URI_PART.fullmatch(part) and ".." not in part for part in uri.split("/")):
        raise ArchiveError(f"the archive names a file by the unusable URI {uri[:200]!r}")


def parse_filename(filename: str) -> tuple[str, str]:
    """Return the exposure and the band that a Level 2 file name gives.

    Parameters
    ----------
    filename : str
        Name for which `is_level2_name` is true.

    Returns
    -------
    obs_id : str
        Name of the exposure.
    band : str
        ``D1`` to ``D6``.

    Raises
    ------
    ValueError
        If it is not the name of a Level 2 file.
    """
    name = _match_filename(filename)
    return name["obs_id"], f"D{name['detector']}"


def parse_release(publisher_did: str) -> str | None:
    """Return the release that the archive's identifier of a frame gives.

    Parameters
    ----------
    publisher_did : str
        The column ``obs_publisher_did``.

    Returns
    -------
    str or None
        Such as ``qr2`` or ``dr1``, also for a deep collection; None if the identifier is of
        a collection that is not understood.
    """
    match = _PUBLISHER_DID.match(publisher_did)
    return match["release"] if match else None


def _match_filename(filename: str) -> re.Match[str]:
    """Return the parts of a Level 2 file name."""
    match = _FILENAME.fullmatch(filename)
    if match is None:
        raise ValueError(f"{filename!r} is not the name of a Level 2 file")
    return match
