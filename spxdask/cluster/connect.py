"""Clusters that others have started: connecting to them, and checking that they can be used."""

from __future__ import annotations

import asyncio
import json
import os
import pydoc
import struct
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from distributed import Client, Security
from distributed import comm as comms

from spxdask import __version__
from spxdask.errors import ClusterError, InputError

CONNECT_TIMEOUT_S = 20.0


def connect(scheduler: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Client:
    """Connect to a scheduler.

    Parameters
    ----------
    scheduler : str
        Its address, such as ``tcp://10.0.0.5:8786``, or the file that it writes when it is
        started with ``--scheduler-file``.
    timeout_s : float
        Seconds to wait for an answer.

    Returns
    -------
    Client

    Raises
    ------
    InputError
        If no scheduler answers there.
    """
    try:
        address = scheduler
        if "://" not in scheduler and os.path.isfile(scheduler):
            address = str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
        _require_answer(address, timeout_s)
        # What its user computes elsewhere must not move to it.
        return Client(address, timeout=timeout_s, set_as_default=False)
    # What another server answers may fail in any way.
    except Exception as error:
        reason = str(error) or f"no answer in {timeout_s:g} s"
        if isinstance(error, MemoryError | struct.error):
            reason = "what answers is no server of Dask"
        raise InputError(
            f"no Dask scheduler at {scheduler!r}, which is neither the address of one nor its "
            f"scheduler file: {reason}"
        ) from error


def _require_answer(address: str, timeout_s: float) -> None:
    """Raise an error of any kind unless a server of Dask answers in time.

    A client waits without end for one that takes its connection and is silent.
    """
    answered: Future[None] = Future()

    async def ask() -> None:
        options = Security().get_connection_args("client")
        comm = await asyncio.wait_for(comms.connect(address, timeout_s, **options), timeout_s + 1)
        await comm.close()

    def run() -> None:
        try:
            answered.set_result(asyncio.run(ask()))
        except Exception as error:
            answered.set_exception(error)

    # This thread may have an event loop, as in a notebook; and a Ctrl-C ends the wait.
    threading.Thread(target=run, name="spxdask-connect", daemon=True).start()
    answered.result()


def check_versions(client: Client) -> int:
    """Check that every worker has the same spxdask as this process.

    Workers that join later are checked by their tasks; see
    `spxdask.cluster.tasks.error_as_value`.

    Parameters
    ----------
    client : Client
        Of any cluster.

    Returns
    -------
    int
        The number of workers.

    Raises
    ------
    ClusterError
        If a worker has another version, or none.
    """
    # A function of the standard library, which a worker without spxdask can run, too.
    found = client.run(pydoc.locate, "spxdask.__version__", on_error="return")
    for address, version in found.items():
        # A worker that has just died gives an OSError; the scheduler replaces it.
        if version != __version__ and not isinstance(version, OSError):
            raise version_mismatch_error(address, version)
    return len(found)


def version_mismatch_error(
    address: str, worker_version: Any, client_version: str = __version__
) -> ClusterError:
    """Return the error for a worker whose spxdask is not that of the client.

    Parameters
    ----------
    address : str
        The worker.
    worker_version : str or object
        Its version; whatever is no text stands for a worker without spxdask.
    client_version : str
        The version of the client, by default that of this process.

    Returns
    -------
    ClusterError
    """
    has = f"spxdask {worker_version}" if isinstance(worker_version, str) else "no spxdask"
    return ClusterError(
        f"the worker {address} has {has}, the client spxdask {client_version}: install the same "
        "version for both"
    )


def scheduler_lost_error(client: Client) -> ClusterError:
    """Return the error for a client whose scheduler does not answer any more.

    Parameters
    ----------
    client : Client
        The client that lost it.

    Returns
    -------
    ClusterError
    """
    return ClusterError(
        f"the Dask scheduler at {client.scheduler.address} is gone; the same command "
        "resumes the run"
    )
