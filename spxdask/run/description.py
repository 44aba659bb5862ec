"""What a run says of its tables: in Parquet files, and in two files beside the light curves."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping

from spxdask.archive.calibration import CalibrationSet, Product
from spxdask.config import BatchConfig, dump_yaml
from spxdask.run.folder import COLUMNS_NAME, README_NAME
from spxdask.run.recipe import Recipe
from spxdask.storage import Store
from spxdask.tables.metadata import describe_columns
from spxdask.tables.provenance import Provenance
from spxdask.tables.schema import Layout

__all__ = ["describe_frame", "describe_run", "save_description"]

logger = logging.getLogger(__name__)

# Options on which the rows of light curves depend, besides the photometry's. Not among them are
# paths and URLs, which differ between machines.
OPTIONS = (
    "target",
    "center_ra",
    "center_dec",
    "radius",
    "bands",
    "mjd_range",
    "release",
    "coverage_mode",
    "calibration_pins",
)
# Its first line tells the file from one of the user.
README_START = "Light curves of SPHEREx sources, measured by spxdask\n"


def describe_frame(recipe: Recipe, products: Mapping[str, Product], release: str) -> Provenance:
    """Return how the table of a frame is made.

    Parameters
    ----------
    recipe : Recipe
        Its configuration is that of the options which are read.
    products : mapping of str to Product
        Calibration products by family.
    release : str
        That of the frame.

    Returns
    -------
    Provenance
    """
    return Provenance(
        digest=recipe.digest,
        configuration=json.dumps(recipe.steps, sort_keys=True),
        calibration=tuple(sorted((family, p.token) for family, p in products.items())),
        releases=(release,) if release else (),
    )


def describe_run(
    config: BatchConfig, calibration: CalibrationSet | None, releases: Iterable[str]
) -> Provenance:
    """Return how the light curves of a run are made.

    Parameters
    ----------
    config : BatchConfig
        The run. Only options that the rows depend on are described.
    calibration : CalibrationSet or None
        Its products, None if they are not known.
    releases : iterable of str
        Those of its frames; empty ones are left out.

    Returns
    -------
    Provenance
    """
    values = {name: getattr(config, name) for name in OPTIONS}
    values["calibration_pins"] = {name: [*tokens] for name, tokens in config.calibration_pins}
    for name in ("bands", "mjd_range"):
        values[name] = None if values[name] is None else list(values[name])
    text = dump_yaml(values | {"photometry": config.photometry.to_dict()})
    return Provenance(
        digest=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        configuration=text,
        calibration=tuple(sorted(calibration.tokens.items())) if calibration else (),
        releases=tuple(sorted(set(filter(None, releases)))),
    )


def save_description(folder: Store, provenance: Provenance, layout: Layout) -> None:
    """Write what the light curves are: a text for people, and the same as YAML for programs.

    They stand beside the folder of the light curves, as some libraries read all files of a folder
    of Parquet files.

    Parameters
    ----------
    folder : Store
        The output folder.
    provenance : Provenance
        How they were made.
    layout : Layout
        The columns of the tables.
    """
    names = [*layout.light_curve, *(n for n in layout.per_image if n not in layout.light_curve)]
    columns = [
        {
            **column,
            "per_image": column["name"] in layout.per_image,
            "lightcurves": column["name"] in layout.light_curve,
        }
        for column in describe_columns(names)
    ]
    about = provenance.to_dict()
    folder.put(COLUMNS_NAME, dump_yaml({**about, "columns": columns}).encode())
    if folder.exists(README_NAME):
        present = folder.get(README_NAME)
        if not present.startswith(README_START.encode()):
            logger.warning(
                "%s is not of spxdask and stays: what the light curves are is in %s",
                folder.path_to(README_NAME),
                COLUMNS_NAME,
            )
            return
    folder.put(README_NAME, _write_readme(about, columns).encode())


def _write_readme(about: dict, columns: list[dict]) -> str:
    calibration = [f"  {family}: {tokens}" for family, tokens in about["calibration"].items()]
    table = [
        f"  {column['name']:<20}{'[' + column['unit'] + ']' if column['unit'] else '':<18}"
        f"{column['description']}"
        for column in columns
    ]
    configuration = [f"  {line}" for line in about["configuration"].splitlines()]
    lines = [
        "",
        "lightcurves/  one table a source, a row a frame, in order of time (CSV),",
        "              or one dataset of all sources (Parquet)",
        "per_image/    one table a frame, a row a source",
        f"{COLUMNS_NAME}  all of this text for programs, with UCDs of the columns",
        "",
        f"Software: {about['software']}",
        f"Releases: {', '.join(about['releases']) or 'not known'}",
        "Calibration products:",
        *(calibration or ["  none"]),
        "",
        "Columns:",
        *table,
        "",
        "Cite:",
        *(f"  {text}" for text in about["citation"]),
        "Acknowledge:",
        f"  {about['acknowledgment']}",
        "",
        f"Options that the rows depend on (digest {about['configuration_digest']}):",
        *configuration,
    ]
    return README_START + "\n".join(lines) + "\n"
