"""What a run is worth, in plain sentences."""

from __future__ import annotations

import math
from typing import Any

from spxdask.text import format_count

__all__ = ["judge"]

# Reduced chi^2 of bright sources within these limits says that errors are right.
CHI2_LIMITS = (0.7, 1.4)
MIN_FLUXES = 30
# Median ratios farther from 1 than this need attention.
MAX_OFFSET = 0.01
# So do shares of frames or rows above these.
MAX_UNFITTED = 0.05
MAX_REJECTED = 0.3
# A median offset of fewer stars says nothing of a detector.
MIN_STARS_OF_DETECTOR = 10


def judge(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """Judge a run.

    Parameters
    ----------
    numbers : dict
        The content of `report.json` without ``verdict``.

    Returns
    -------
    list of dict
        Of each sentence, the ``level``, ``good``, ``attention`` or ``note``, and the ``text``.
    """
    sentences = [
        *_judge_frames(numbers),
        *_judge_sources(numbers),
        *_judge_calibration(numbers),
        *_judge_errors(numbers["checks"]),
        *_judge_ratios(numbers["checks"]),
        *_judge_astrometry(numbers["frames"]["astrometry"]),
        *_judge_rows(numbers),
    ]
    order = ("attention", "good", "note")
    return [
        {"level": level, "text": text} for level in order for key, text in sentences if key == level
    ]


def _judge_frames(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    frames, rows, curves = numbers["frames"], numbers["rows"], numbers["light_curves"]
    counts, found = frames["by_state"], frames["found"]
    sentences = []
    wanted = found - counts["empty"]
    if not found:
        sentences.append(("attention", "No frame was found, or none was looked for yet."))
    elif counts["measured"] == wanted:
        sentences.append(("good", f"All {format_count(wanted, 'frame')} are measured."))
    else:
        sentences.append(
            ("note", f"{counts['measured']:,} of {format_count(wanted, 'frame')} are measured.")
        )
    if counts["failed"]:
        verb = "has" if counts["failed"] == 1 else "have"
        sentences.append(
            (
                "attention",
                f"{format_count(counts['failed'], 'frame')} {verb} failed: see Frames for the "
                "reasons, and the command that tries again.",
            )
        )
    if left := counts["pending"] + counts["fetched"]:
        verb = "is" if left == 1 else "are"
        sentences.append(
            ("attention", f"{format_count(left, 'frame')} {verb} not measured yet: resume the run.")
        )
    if counts["empty"]:
        sentences.append(
            ("note", f"{format_count(counts['empty'], 'frame')} not fetched: no source on them.")
        )
    if rows["stale_tables"]:
        sentences.append(
            (
                "attention",
                f"{format_count(rows['stale_tables'], 'table')} left out of this report, made with "
                f"other options or sources ({rows['stale_reason']}): run the same command again.",
            )
        )
    if n := sum(rows["tables_not_read"].values()):
        sentences.append(("attention", f"{format_count(n, 'table')} could not be read."))
    if rows["total"] and not curves["is_up_to_date"]:
        sentences.append(
            ("attention", "The light curves are not up to date with the tables: resume the run.")
        )
    elif curves["n"] is not None:
        sentences.append(
            (
                "good",
                f"{format_count(curves['n'], 'light curve')} with "
                f"{format_count(curves['rows'], 'row')} are up to date.",
            )
        )
    return sentences


def _judge_sources(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    run, missing = numbers["run"], numbers["missing_sources"]["n"]
    sentences = []
    if numbers["rows"]["total"]:
        if missing:
            total = format_count(run["n_sources"], "source")
            verb = "has" if missing == 1 else "have"
            sentences.append(("attention", f"{missing:,} of {total} {verb} no row in any table."))
        else:
            sentences.append(
                (
                    "good",
                    f"Each of {format_count(run['n_sources'], 'source')} has at least one row.",
                )
            )
    if run["skipped_catalogue_rows"]:
        skipped = format_count(run["skipped_catalogue_rows"], "row")
        sentences.append(
            ("attention", f"{skipped} of the catalogue skipped: see skipped_rows.csv.")
        )
    return sentences


def _judge_calibration(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    calibration = numbers["calibration"]
    if calibration["asked_for"] == "frame":
        return [("note", "Nothing but what is in the frames was used for calibration.")]
    return [
        ("attention", f"Not calibrated with {family}: {reason}.")
        for family, reason in calibration["missing"].items()
    ]


def _judge_errors(checks: dict[str, Any]) -> list[tuple[str, str]]:
    sentences = []
    for found in checks["errors"].values():
        bright, name = found["bright"], found["flux"]
        if bright["fluxes"] < MIN_FLUXES:
            sentences.append(
                (
                    "note",
                    f"The errors of {name} could not be checked: too few bright isolated sources "
                    "have three fluxes within one spectral channel.",
                )
            )
            continue
        chi2 = bright["chi2"]
        numbers = (
            f"{format_count(bright['fluxes'], 'flux', 'fluxes')} of "
            f"{format_count(bright['sources'], 'bright isolated source')} scatter by "
            f"{chi2**0.5:.2f} times their errors of {_percent(bright['error'])} (chi^2 {chi2:.2f})"
        )
        if chi2 > CHI2_LIMITS[1]:
            text = f"The errors of {name} are too small by a factor of {chi2**0.5:.1f}: {numbers}."
            sentences.append(("attention", text))
        elif chi2 < CHI2_LIMITS[0]:
            text = f"The errors of {name} are cautious: {numbers}."
            sentences.append(("note", text))
        else:
            sentences.append(("good", f"The errors of {name} are honest: {numbers}."))
    return sentences


def _judge_ratios(checks: dict[str, Any]) -> list[tuple[str, str]]:
    sentences = []
    kinds = [("PSF flux / aperture-corrected flux", checks["psf_over_aperture"])]
    kinds += [(f"Flux in {name.upper()}", bands) for name, bands in checks["releases"].items()]
    for name, bands in kinds:
        if not bands:
            continue
        # Only what is significant.
        off = [
            b
            for b in bands
            if abs(b["median"] - 1) > MAX_OFFSET and abs(b["median"] - 1) > 3 * b["error"]
        ]
        if off:
            listed = ", ".join(f"{b['median']:.3f} in {b['band']}" for b in off)
            sentences.append(("attention", f"{name} is off by more than 1 %: {listed}."))
        else:
            worst = max(abs(b["median"] - 1) for b in bands)
            sentences.append(
                ("good", f"{name} agrees to {_percent(worst)} or better in {_join(bands)}.")
            )
    return sentences


def _judge_astrometry(found: dict[str, Any]) -> list[tuple[str, str]]:
    limit = found["max_offset"]
    told = [d for d in found["detectors"] if d["stars"] >= MIN_STARS_OF_DETECTOR]
    if not told:
        return [
            (
                "note",
                "Positions could not be checked: too few bright isolated sources have a PSF flux.",
            )
        ]
    offsets = {d["band"]: math.hypot(d["dx"], d["dy"]) for d in told}
    off = [d for d in told if offsets[d["band"]] > limit]
    sentences = []
    if off:
        listed = ", ".join(
            f"{offsets[d['band']]:.2f} pixels in {d['band']} (dx {d['dx']:+.2f}, dy {d['dy']:+.2f})"
            for d in off
        )
        sentences.append(
            (
                "attention",
                f"Bright sources are more than {limit:g} pixels from where the WCS puts the "
                f"catalogue: {listed}. Apertures are misplaced and fluxes too low; see whether the "
                "catalogue's positions and their epoch are right.",
            )
        )
    else:
        worst = math.ceil(1000 * max(offsets.values())) / 1000
        stars = sum(d["stars"] for d in told)
        sentences.append(
            (
                "good",
                "Bright isolated sources are where the WCS puts the catalogue, to "
                f"{worst:.3f} pixels or better in {_join(told)} ({stars:,} offsets).",
            )
        )
    single = [f for f in found["frames_off"] if f["band"] not in {d["band"] for d in off}]
    if single:
        verb = "has its" if len(single) == 1 else "have their"
        sentences.append(
            (
                "attention",
                f"{format_count(len(single), 'frame')} {verb} bright sources more than {limit:g} "
                "pixels from where the WCS puts the catalogue: see Astrometry for the names.",
            )
        )
    return sentences


def _judge_rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    rows, sentences = numbers["rows"], []
    if rows["total"]:
        good = rows["good"] / rows["total"]
        level = "good" if good > 1 - MAX_REJECTED else "attention"
        text = (
            f"{_percent(good)} of {format_count(rows['total'], 'row')} are good: they have a flux "
            "and no flag that speaks against it."
        )
        sentences.append((level, text))
    for found in numbers["frames"]["detectors"]:
        if found["zodi_not_fitted"] > MAX_UNFITTED * found["frames"]:
            frames = format_count(found["frames"], "frame")
            sentences.append(
                (
                    "attention",
                    f"{found['band']}: the zodiacal light could not be fitted in "
                    f"{found['zodi_not_fitted']:,} of {frames}; the scale there is 1.",
                )
            )
    return sentences


def _percent(value: float) -> str:
    percent = 100 * value
    return f"{percent:.2f} %" if percent < 1 else f"{percent:.1f} %" if percent < 99.95 else "100 %"


def _join(bands: list[dict[str, Any]]) -> str:
    return ", ".join(b["band"] for b in bands)
