"""What the last aggregation was made of, so that the same is not done twice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from spxdask.config import BatchConfig
from spxdask.run.folder import RunFolder
from spxdask.run.observations import Observations
from spxdask.run.plan import MeasurementInputs, TableChoice, choose_tables, plan_frames
from spxdask.storage import Store

RECORD_NAME = "aggregation.json"


@dataclass(frozen=True, kw_only=True)
class AggregationRecord:
    """An aggregation that ended well.

    Attributes
    ----------
    tables : str
        Hash of the per-image tables and the options that the light curves were made of.
    files : str
        Hash of the names and lengths of the files that were there in the end.
    n_light_curves, n_rows : int
        What was written.
    seconds : float
        Time that it took, s; 0 where that is not known.
    """

    tables: str
    files: str
    n_light_curves: int
    n_rows: int
    seconds: float = 0.0


def save_aggregation(state: Store, record: AggregationRecord) -> None:
    """Write the record.

    Parameters
    ----------
    state : Store
        Folder of what the run knows.
    record : AggregationRecord
        Replaces the one before.
    """
    state.put(RECORD_NAME, json.dumps(dataclasses.asdict(record)).encode())


def load_aggregation(state: Store) -> AggregationRecord | None:
    """Return the record.

    Parameters
    ----------
    state : Store
        Folder of what the run knows.

    Returns
    -------
    AggregationRecord or None
        None when there is none, or none that this version understands.
    """
    try:
        return AggregationRecord(**json.loads(state.get(RECORD_NAME)))
    except (FileNotFoundError, ValueError, TypeError):
        # Without a record, light curves are made again.
        return None


def discard_aggregation(state: Store) -> None:
    """Delete the record, before anything that it was made of changes.

    Parameters
    ----------
    state : Store
        Folder of what the run knows.
    """
    if state.exists(RECORD_NAME):
        state.delete_many([RECORD_NAME])


def choose_query_tables(
    folder: RunFolder, config: BatchConfig, observations: Observations, inputs: MeasurementInputs
) -> TableChoice:
    """Choose the per-image tables that light curves of a query's frames are made of.

    Parameters
    ----------
    folder : RunFolder
        Its ledger is up to date.
    config : BatchConfig
        The run.
    observations : Observations
        The frames of the query.
    inputs : MeasurementInputs
        What the tables have to be made with.

    Returns
    -------
    TableChoice
    """
    sizes = folder.per_image.list_sizes()
    planned = plan_frames(
        observations,
        folder.ledger,
        inputs,
        image_sizes={},
        table_sizes=sizes,
        stages=("extract",),
        table_format=config.per_image_format,
        retry_failed=False,
        fetch_empty=config.fetches_empty_frames,
    )
    return choose_tables(
        planned,
        folder.ledger,
        inputs,
        recipes=folder.ledger.recipes,
        table_sizes=sizes,
        table_format=config.per_image_format,
    )
