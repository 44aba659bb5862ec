"""What a query found, for people and for other programs: query_summary.yaml."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spxdask.archive.observation import Observation
from spxdask.archive.urls import strip_credentials
from spxdask.config import BatchConfig
from spxdask.errors import RunFolderError, SpxdaskError
from spxdask.run.plan import NO_SOURCE
from spxdask.science.footprint import Circle
from spxdask.storage import Store, locate_file

QUERY_SUMMARY_NAME = "query_summary.yaml"

# The list of observations is written and read here, and not by a YAML library, as it may have
# a million entries: these take some seconds here, three minutes with PyYAML's parser in C, and
# most of an hour with ruamel.yaml.

# Text that every YAML parser takes for text, unquoted: exposures, bands, times, files.
_PLAIN = r"\d{4}W\d\d_\w+|D[1-6]|(?:https?|s3|file)://[\w./~+-]+"
_QUOTED = r"'(?:[^'\\\n]|'')*'"
_NUMBER = r"\d+\.\d+"
_ENTRY = re.compile(
    rf"- obs_id: ({_PLAIN}|{_QUOTED})\n"
    rf"  band: ({_PLAIN}|{_QUOTED})\n"
    rf"  mjd: ({_NUMBER})\n"
    rf"  wavelength_um: ({_NUMBER})\n"
    rf"  download_url: ({_PLAIN}|{_QUOTED})\n"
    rf"(  not_fetched: {NO_SOURCE}\n)?",
    re.ASCII,
)
_WORDS = "any|center|full|all|circle|target|catalogue"
_PLAIN_TEXT = re.compile(rf"{_PLAIN}|[a-z]+_[a-z]+|{_WORDS}|qr\d+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Field:
    """The part of the sky that a run is about.

    Attributes
    ----------
    mode : str
        ``circle`` where the configuration names one, ``target`` or ``catalogue`` where the field
        is what the sources cover.
    circles : sequence of Circle
        The archive is asked for the frames of each.
    n_sources : int
        Sources in the catalogue.
    """

    mode: str
    circles: Sequence[Circle]
    n_sources: int


def save_query_summary(
    store: Store,
    observations: Sequence[Observation],
    config: BatchConfig,
    field: Field,
    is_empty: Sequence[bool],
) -> None:
    """Write the summary of a query.

    Parameters
    ----------
    store : Store
        The output folder.
    observations : sequence of Observation
        What was found, in order of time.
    config : BatchConfig
        What was asked for.
    field : Field
        Where it was asked for.
    is_empty : sequence of bool
        Which of the observations are not fetched, as no source can lie on them.
    """
    summary = summarise_query(observations, config, field, is_empty)
    summary["band_counts"] = {_format_text(b): n for b, n in summary["band_counts"].items()}
    with (
        store.atomic_path(QUERY_SUMMARY_NAME) as part,
        open(part, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(_format_mapping(summary))
        file.write("observations:\n" if observations else "observations: []\n")
        file.writelines(map(_format_entry, observations, is_empty))


def summarise_query(
    observations: Sequence[Observation],
    config: BatchConfig,
    field: Field,
    is_empty: Sequence[bool],
) -> dict[str, Any]:
    """Return the summary of a query without its observations.

    Parameters
    ----------
    observations : sequence of Observation
        What was found.
    config : BatchConfig
        What was asked for.
    field : Field
        Where it was asked for.
    is_empty : sequence of bool
        Which of the observations are not fetched, as no source can lie on them.

    Returns
    -------
    dict
        As from `load_query_summary`.
    """
    times = [o.mjd for o in observations]
    # Many circles have no centre in common.
    ra, dec, radius = field.circles[0] if len(field.circles) == 1 else (None, None, None)
    region = {
        "mode": field.mode,
        "center_ra": ra,
        "center_dec": dec,
        "radius_deg": radius,
        "coverage_mode": config.coverage_mode,
    }
    if field.mode != "circle":
        region |= {"n_sources": field.n_sources, "n_queries": len(field.circles)}
    if field.mode == "target":
        region["target"] = config.target
    n_empty = sum(is_empty)
    return {
        "query_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "region": region,
        "filters": {
            "bands": list(config.bands) if config.bands is not None else None,
            "mjd_range": list(config.mjd_range) if config.mjd_range else None,
            "release": config.release,
        },
        "n_observations": len(observations),
        "band_counts": dict(sorted(Counter(o.band for o in observations).items())),
        "time_span_days": round(max(times) - min(times), 6) if times else 0.0,
        "total_bytes": sum(o.size_bytes or 0 for o in observations),
        "not_fetched": {NO_SOURCE: n_empty} if n_empty else {},
    }


def load_query_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the query_summary.yaml of a run.

    Parameters
    ----------
    path : path
        The output folder, or the file itself.

    Returns
    -------
    dict
        query_time, region, filters, n_observations, band_counts, time_span_days,
        total_bytes and observations.

    Raises
    ------
    RunFolderError
        If there is no readable summary.
    """
    store, name = locate_file(path)
    try:
        if not store.exists(name):
            store, name = store / name, QUERY_SUMMARY_NAME
        return _parse(store.get(name).decode())
    except (OSError, SpxdaskError, ValueError, YAMLError) as error:
        raise RunFolderError(f"no readable query summary: {error}", path=path) from error


def _parse(text: str) -> dict[str, Any]:
    """Return the content of a summary."""
    head, _, entries = text.partition("\nobservations:\n")
    observations, end = [], 0
    while entry := _ENTRY.match(entries, end):
        obs_id, band, mjd, wavelength_um, download_url, not_fetched = entry.groups()
        observations.append(
            {
                "obs_id": _unquote(obs_id),
                "band": _unquote(band),
                "mjd": float(mjd),
                "wavelength_um": float(wavelength_um),
                "download_url": _unquote(download_url),
            }
            | ({"not_fetched": NO_SOURCE} if not_fetched else {})
        )
        end = entry.end()
    if end == len(entries):
        summary: dict[str, Any] = _load_yaml(head)
        return summary | {"observations": observations} if entries else summary
    # Written by another program, or edited.
    return _load_yaml(text)


def _load_yaml(text: str) -> dict[str, Any]:
    found = YAML(typ="safe", pure=True).load(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a mapping")
    return found


def _unquote(text: str) -> str:
    """Return what plain or quoted text stands for."""
    return text[1:-1].replace("''", "'") if text.startswith("'") else text


def _format_entry(observation: Observation, is_empty: bool) -> str:
    """Return the lines of one observation."""
    not_fetched = f"  not_fetched: {NO_SOURCE}\n" if is_empty else ""
    return (
        f"- obs_id: {_format_text(observation.obs_id)}\n"
        f"  band: {_format_text(observation.band)}\n"
        f"  mjd: {_format_number(round(observation.mjd, 6))}\n"
        f"  wavelength_um: {_format_number(round(observation.wavelength_um, 6))}\n"
        f"  download_url: {_format_text(strip_credentials(observation.download_url))}\n"
        f"{not_fetched}"
    )


def _format_mapping(mapping: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a mapping of names to values, lists of values and mappings."""
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:\n"
            yield from _format_mapping(value, f"{indent}  ")
        elif isinstance(value, list) and value:
            yield f"{indent}{name}:\n"
            yield from (f"{indent}- {_format_value(item)}\n" for item in value)
        else:
            yield f"{indent}{name}: {_format_value(value)}\n"


def _format_value(value: Any) -> str:
    """Return a value as every YAML parser reads it."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return _format_number(value)
    if isinstance(value, str):
        return _format_text(value)
    # Integers, and empty lists and mappings.
    return str(value)


def _format_number(value: float) -> str:
    """Return a number with a decimal point, which YAML 1.1 asks for."""
    if not math.isfinite(value):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[repr(value)]
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def _format_text(text: str) -> str:
    """Return text, quoted where a parser could take it for something else."""
    if _PLAIN_TEXT.fullmatch(text):
        return text
    if text.isascii() and text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    escaped = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{"".join(escaped)}"'
