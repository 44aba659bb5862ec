"""Download and extraction in one task: a frame goes from the archive to its table in memory."""

from __future__ import annotations

from spxdask.archive.observation import Observation
from spxdask.run.ledger import Outcome
from spxdask.stages.download import FetchOptions, fetch_frame
from spxdask.stages.extract import ExtractOptions, extract_frame


def stream(
    observation: Observation,
    images: str | None,
    per_image: str,
    fetch_options: FetchOptions,
    extract_options: ExtractOptions,
) -> list[Outcome]:
    """Fetch one frame and measure it; the task of a run.

    With both in one task, the download of the next frames overlaps the extraction of this
    one, and a frame is measured before another is requested in its place.

    Parameters
    ----------
    observation : Observation
        The frame.
    images : str or None
        Folder to write the frame to, None if it is not to be kept.
    per_image : str
        Folder of the tables.
    fetch_options : FetchOptions
        Options of the download.
    extract_options : ExtractOptions
        Options of the extraction.

    Returns
    -------
    list of Outcome
        That of the download and, if there was a frame, that of the extraction.
    """
    downloaded, extracted = fetch_frame(
        observation,
        images,
        fetch_options,
        lambda frame: extract_frame(frame, per_image, extract_options),
    )
    return [downloaded] if extracted is None else [downloaded, extracted]
