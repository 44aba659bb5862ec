"""One frame as the archive describes it, before any of it is fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spxdask.errors import ArchiveError
from spxdask.storage import local_path

# Of IRSA's own file service.
SERVICE = "ibe/data/spherex/"
# level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits
_FILE = re.compile(
    r"level2_(?P<obs_id>[0-9A-Za-z_]{1,60})D(?P<detector>[1-6])_spx_"
    r"l2b-v(?P<version>\d{1,6})-(?P<year>\d{4})-(?P<day>\d{3})\.fits"
)
_URI_PART = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.+-]*")
_RELEASE = re.compile(r"qr(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One detector of one exposure in one release.

    Attributes
    ----------
    obs_id, band : str
        Such as ``2025W51_1A_0684_2`` and ``D3``.
    mjd : float
        Middle of the exposure, days.
    wavelength_um : float
        Centre of the detector's range.
    uri : str
        Path below the archive's URL; its last part is the file name.
    download_url : str
        Where the frame is.
    size_bytes : int or None
        Length of the file as the archive says it.
    """

    obs_id: str
    band: str
    mjd: float
    wavelength_um: float
    uri: str
    download_url: str
    size_bytes: int | None

    @property
    def filename(self) -> str:
        """The archive's own file name, unique to exposure, detector and version."""
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The file name without its suffix."""
        return self.filename.removesuffix(".fits")

    @property
    def recency(self) -> tuple[int, ...]:
        """Release, pipeline version, year and day: the larger, the newer."""
        release = next((int(m[1]) for m in map(_RELEASE.fullmatch, self.uri.split("/")) if m), 0)
        file = _FILE.fullmatch(self.filename)
        return release, int(file["version"]), int(file["year"]), int(file["day"])


def frame_url(archive_url: str, uri: str) -> str:
    """Return where a file of the archive is.

    A bucket, and a copy of it on disk, have no ``ibe/data/spherex/`` in their paths.
    """
    mirror = local_path(archive_url)
    in_bucket = archive_url.startswith("s3:") or (
        mirror is not None and not (mirror / "ibe").is_dir()
    )
    return f"{archive_url}/{uri.removeprefix(SERVICE) if in_bucket else uri}"


def is_level2_name(uri: str) -> bool:
    """Tell whether a URI names a Level 2 science file."""
    return _FILE.fullmatch(uri.rpartition("/")[2]) is not None


def check_uri(uri: str) -> None:
    """Raise ArchiveError unless a URI is a plain relative path.

    File names on our disk and requests to the archive are made from it, so it may hold
    no scheme, no empty or dotted part and no character that means something in a URL.
    """
    if not all(_URI_PART.fullmatch(part) and ".." not in part for part in uri.split("/")):
        raise ArchiveError(f"the archive names a file by the unusable URI {uri[:200]!r}")


def filename_identity(filename: str) -> tuple[str, str]:
    """Return obs_id and band as a Level 2 file name gives them."""
    file = _FILE.fullmatch(filename)
    return file["obs_id"], f"D{file['detector']}"
