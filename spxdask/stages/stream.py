"""Download and extract in one: a frame goes from the archive to its table in memory."""

from __future__ import annotations

from spxdask.archive.observation import Observation
from spxdask.run.ledger import Outcome
from spxdask.stages.download import FetchOptions, fetched
from spxdask.stages.extract import ExtractOptions, extract_frame


def stream(
    observation: Observation,
    images: str | None,
    per_image: str,
    fetch: FetchOptions,
    measure: ExtractOptions,
) -> list[Outcome]:
    """Fetch one frame and measure it; the task of a run.

    So download of the next frames overlaps extraction of this one, and what has come is
    measured before more is asked for.

    Parameters
    ----------
    observation : Observation
    images : str or None
        Folder to keep the frame in, if it is to be kept.
    per_image : str
        Folder of the tables.
    fetch, measure
        Options of the two stages.

    Returns
    -------
    list of Outcome
        That of the download and, if there was a frame, that of the extraction.
    """
    measured = []
    with fetched(observation, images, fetch) as image:
        if image.frame is not None:
            measured = [extract_frame(image.frame, per_image, measure)]
    return [image.outcome, *measured]
