"""Download and extraction in one task: a frame goes from the archive to its table in memory."""

from __future__ import annotations

from spxdask.archive.limiter import REQUESTS
from spxdask.archive.observation import Observation
from spxdask.run.ledger import Outcome
from spxdask.stages.download import FetchOptions, fetch_frame
from spxdask.stages.extract import ExtractOptions, extract_frame, list_outcomes
from spxdask.stages.partial import may_be_read_by_rows, stream_rows


def stream(
    observation: Observation,
    images: str | None,
    per_image: str,
    fetch_options: FetchOptions,
    extract_options: ExtractOptions,
) -> list[Outcome]:
    """Fetch one frame and measure it; the task of a run.

    With both in one task, the download of the next frames overlaps the extraction of this
    one, and a frame is measured before another is requested in its place. Of a frame that is not
    kept, only the rows come that its sources need, where the options ask for that.

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
    REQUESTS.limit = fetch_options.requests_at_once
    if may_be_read_by_rows(observation, images, fetch_options, extract_options):
        return stream_rows(observation, per_image, fetch_options, extract_options)
    downloaded, extracted = fetch_frame(
        observation,
        images,
        fetch_options,
        lambda frame: extract_frame(frame, per_image, extract_options),
    )
    return list_outcomes(downloaded, extracted)
