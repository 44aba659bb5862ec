"""Which calibration products the frames of a run are measured with, kept in its folder."""

from __future__ import annotations

import json

from spxdask.archive.calibration import CalibrationSet, ProductSource
from spxdask.archive.retry import RetryPolicy
from spxdask.config import BatchConfig
from spxdask.storage import Store

__all__ = ["load_calibration", "make_product_source", "save_calibration"]

CALIBRATION_NAME = "calibration.json"


def make_product_source(config: BatchConfig) -> ProductSource | None:
    """Return where the products of a run come from.

    Parameters
    ----------
    config : BatchConfig
        The run.

    Returns
    -------
    ProductSource or None
        None if nothing but what is in the frames is used.
    """
    if config.calibration == "frame":
        return None
    return ProductSource(
        url=config.archive_url if config.calibration == "archive" else config.calibration,
        retry=RetryPolicy(max_retries=config.max_retries),
        stall_timeout_s=config.stall_timeout,
        endpoint=config.archive_endpoint,
    )


def save_calibration(folder: Store, config: BatchConfig, calibration: CalibrationSet) -> None:
    """Save the products of a run.

    Parameters
    ----------
    folder : Store
        The state folder of the run.
    config : BatchConfig
        The run.
    calibration : CalibrationSet
        What its frames are measured with.
    """
    content = {"options": _list_options(config), **json.loads(calibration.to_json())}
    folder.put(CALIBRATION_NAME, json.dumps(content, indent=1).encode())


def load_calibration(folder: Store, config: BatchConfig) -> CalibrationSet | None:
    """Return the products of a run.

    Parameters
    ----------
    folder : Store
        The state folder of the run.
    config : BatchConfig
        The run.

    Returns
    -------
    CalibrationSet or None
        None if none were saved, or with other options. With ``calibration: frame``, the empty set.
    """
    source = make_product_source(config)
    if source is None:
        return CalibrationSet()
    if not folder.exists(CALIBRATION_NAME):
        return None
    text = folder.get(CALIBRATION_NAME)
    try:
        if json.loads(text)["options"] != _list_options(config):
            return None
        return CalibrationSet.from_json(text, source)
    except (ValueError, TypeError, KeyError):
        # Written by another version; the next query writes it again.
        return None


def _list_options(config: BatchConfig) -> list:
    """Return what the choice of products depends on besides the frames, as JSON has it."""
    pins = [[family, [*tokens]] for family, tokens in config.calibration_pins]
    needs_psf = config.photometry.psf != "none"
    return [config.calibration, config.archive_url, pins, needs_psf]
