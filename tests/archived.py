"""Entries of the archive's tables for frames whose content does not matter."""

from __future__ import annotations

from pathlib import Path

from spxdask.simulate.archive import ArchivedFrame

HALF_EXPOSURE_DAYS = 113.58 / 86400 / 2
# Around (10, 0): the first polygon contains a field of radius 0.5, the second cuts it, the
# third is elsewhere. Corners in degrees.
CONTAINS = ((8.0, -2.0), (12.0, -2.0), (12.0, 2.0), (8.0, 2.0))
CUTS = ((10.2, -2.0), (14.0, -2.0), (14.0, 2.0), (10.2, 2.0))
ELSEWHERE = ((20.0, -2.0), (24.0, -2.0), (24.0, 2.0), (20.0, 2.0))


def archived_uri(
    slew: int = 1, detector: int = 3, release: str = "qr2", version: str = "l2b-v21-2025-354"
) -> str:
    name = f"level2_2025W51_1A_{slew:04d}_2D{detector}_spx_{version}.fits"
    return f"ibe/data/spherex/{release}/level2/2025W51_1A/{version}/{detector}/{name}"


def archived_frame(
    path: Path,
    slew: int = 1,
    detector: int = 3,
    *,
    polygon: tuple[tuple[float, float], ...] = CONTAINS,
    mjd: float = 61050.0,
    release: str = "qr2",
    deep: str = "",
    version: str | None = None,
) -> ArchivedFrame:
    return ArchivedFrame(
        obs_id=f"2025W51_1A_{slew:04d}_2",
        detector=detector,
        collection=f"spherex_{release}{deep}",
        uri=archived_uri(slew, detector, release, *[version] if version else []),
        path=path,
        mjd_begin=mjd - HALF_EXPOSURE_DAYS,
        mjd_end=mjd + HALF_EXPOSURE_DAYS,
        wavelength_min_um=1.63,
        wavelength_max_um=2.41,
        polygon=polygon,
    )
