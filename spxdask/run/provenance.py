"""What the rows of a run were made with and of: for tables that leave its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from spxdask import __version__
from spxdask.archive.calibration import CalibrationSet
from spxdask.config import BatchConfig

__all__ = ["ACKNOWLEDGMENT", "DATA_DOIS", "describe_provenance", "digest_config", "list_citations"]

ACKNOWLEDGMENT = (
    "This publication makes use of data products from the Spectro-Photometer for the History of "
    "the Universe, Epoch of Reionization and Ices Explorer (SPHEREx), which is a joint project of "
    "the Jet Propulsion Laboratory and the California Institute of Technology, and is funded by "
    "the National Aeronautics and Space Administration."
)
# By release of the archive.
DATA_DOIS = {"qr2": "10.26131/IRSA652", "qr3": "10.26131/IRSA662"}
# Options that the rows depend on.
OPTIONS = (
    "center_ra",
    "center_dec",
    "radius",
    "coverage_mode",
    "bands",
    "mjd_range",
    "release",
    "calibration",
    "calibration_pins",
    "contaminants_path",
    "photometry",
)


def digest_config(config: BatchConfig) -> str:
    """Return a hash of the options that the rows of a run depend on.

    Parameters
    ----------
    config : BatchConfig
        Of the run.

    Returns
    -------
    str
        16 hexadecimal digits; the same wherever the output folder is.
    """
    options = config.to_dict()
    text = json.dumps({name: options.get(name) for name in OPTIONS}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def list_citations(releases: Iterable[str]) -> list[str]:
    """Return what to cite for data of some releases.

    Parameters
    ----------
    releases : iterable of str
        Such as ``qr2``.

    Returns
    -------
    list of str
        Those of which the DOI is known, and spxdask.
    """
    data = [
        f"SPHEREx {release.upper()}: https://doi.org/{DATA_DOIS[release]}"
        for release in sorted(releases)
        if release in DATA_DOIS
    ]
    return [*data, f"spxdask {__version__}: CITATION.cff in its repository"]


def describe_provenance(
    config: BatchConfig | None, calibration: CalibrationSet | None, releases: Iterable[str]
) -> dict[str, Any]:
    """Return what the rows of a run were made with and of.

    Parameters
    ----------
    config : BatchConfig or None
        Of the run, None if it is not known.
    calibration : CalibrationSet or None
        Its products, None if they are not known.
    releases : iterable of str
        Those of its frames.

    Returns
    -------
    dict
        Of texts, lists of texts and mappings of texts: ``spxdask``, ``configuration``,
        ``releases``, ``calibration``, ``citation`` and ``acknowledgment``.
    """
    releases = sorted(releases)
    return {
        "spxdask": __version__,
        "configuration": "" if config is None else digest_config(config),
        "releases": releases,
        "calibration": {} if calibration is None else dict(calibration.tokens),
        "citation": list_citations(releases),
        "acknowledgment": ACKNOWLEDGMENT,
    }
