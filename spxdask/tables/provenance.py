"""How the rows of a file were made, and whom to cite for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spxdask import __version__

__all__ = ["ACKNOWLEDGMENT", "RELEASE_DOIS", "SOFTWARE_TITLE", "Provenance", "list_citations"]

# `tests/test_docs.py` compares these with CITATION.cff and the README.
SOFTWARE_TITLE = (
    "spxdask: photometry of every catalogue source in every SPHEREx image, on a Dask cluster"
)
RELEASE_DOIS = {"qr2": "10.26131/IRSA652", "qr3": "10.26131/IRSA662"}
ACKNOWLEDGMENT = (
    "This publication makes use of data products from the Spectro-Photometer for the History of "
    "the Universe, Epoch of Reionization and Ices Explorer (SPHEREx), which is a joint project of "
    "the Jet Propulsion Laboratory and the California Institute of Technology, and is funded by "
    "the National Aeronautics and Space Administration."
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What rows depend on: a function of a run's inputs, without paths, hosts and times.

    Attributes
    ----------
    version : str
        That of spxdask.
    digest : str
        Hash of `configuration`.
    configuration : str
        Options that the rows depend on, as YAML.
    calibration : tuple of (str, str)
        Family and tokens of the calibration products.
    releases : tuple of str
        Releases of the archive.
    """

    version: str = __version__
    digest: str = ""
    configuration: str = ""
    calibration: tuple[tuple[str, str], ...] = ()
    releases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as files hold it, with what to cite.

        Returns
        -------
        dict
            Of texts, lists and dicts.
        """
        return {
            "software": f"spxdask {self.version}",
            "releases": list(self.releases),
            "calibration": dict(self.calibration),
            "configuration_digest": self.digest,
            "configuration": self.configuration,
            "citation": list_citations(self.version, self.releases),
            "acknowledgment": ACKNOWLEDGMENT,
        }


def list_citations(version: str, releases: Iterable[str]) -> list[str]:
    """Return what a publication should cite.

    Parameters
    ----------
    version : str
        That of spxdask.
    releases : iterable of str
        Releases whose data were measured; all that are known if there are none.

    Returns
    -------
    list of str
        Software, then data.
    """
    names = list(releases) or list(RELEASE_DOIS)
    data = [
        f"SPHEREx {name.upper()}" + (f", doi:{RELEASE_DOIS[name]}" if name in RELEASE_DOIS else "")
        for name in names
    ]
    return [f"{SOFTWARE_TITLE}, version {version}", *data]
