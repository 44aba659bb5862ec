"""Messages of workers, brought to where the user reads those of the run."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from distributed import Client, Worker, WorkerPlugin

TOPIC = "spxdask-log"
LOGGER = "spxdask"

logger = logging.getLogger(__name__)


def forward_logs(client: Client) -> None:
    """Have the workers send what they log of spxdask to this process, now and in future.

    Such as why a request to the archive is repeated, and when: a worker has no handler for it.

    Parameters
    ----------
    client : Client
        Of the cluster. Messages are sent from the level on that spxdask's logger has here.
    """
    level = min(logging.getLogger(LOGGER).getEffectiveLevel(), logging.WARNING)
    try:
        client.subscribe_topic(TOPIC, _handle)
        client.register_plugin(LogForwarder(level))
    except Exception as error:
        # A scheduler that accepts no plugins answers with whatever error its Python raises. The
        # run works without messages.
        logger.warning("messages of workers are not shown: %s", error)


def _handle(event: tuple[float, Any]) -> None:
    """Log what a worker has logged."""
    _, message = event
    record = logging.makeLogRecord(message)
    target = logging.getLogger(record.name)
    if target.isEnabledFor(record.levelno):
        target.handle(record)


class LogForwarder(WorkerPlugin):
    """Worker plugin that sends records of spxdask's loggers to the clients.

    Parameters
    ----------
    level : int
        The least level of records that are sent.
    """

    name = "spxdask-log"

    def __init__(self, level: int) -> None:
        self._level = level
        # A worker in the client's process needs nobody to bring its messages.
        self._client_process = (socket.gethostname(), os.getpid())
        self._handler: _Sender | None = None

    def setup(self, worker: Worker) -> None:
        """Begin to send.

        Parameters
        ----------
        worker : distributed.Worker
            The worker that the plugin is registered on.
        """
        if self._client_process == (socket.gethostname(), os.getpid()):
            return
        target = logging.getLogger(LOGGER)
        target.setLevel(self._level)
        self._handler = _Sender(worker)
        target.addHandler(self._handler)

    def teardown(self, worker: Worker) -> None:
        """End it.

        Parameters
        ----------
        worker : distributed.Worker
            The worker that the plugin is registered on.
        """
        if self._handler is not None:
            logging.getLogger(LOGGER).removeHandler(self._handler)


class _Sender(logging.Handler):
    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        message = {
            "name": record.name,
            "levelno": record.levelno,
            "levelname": record.levelname,
            "created": record.created,
            "msg": getattr(record, "single_message", None) or record.getMessage(),
            # What tells similar records from others; see `spxdask.archive.throttle`.
            "kind": getattr(record, "kind", None),
            "n_similar": getattr(record, "n_similar", 0),
        }
        try:
            self._worker.log_event(TOPIC, message)
        except Exception:
            # As logging itself does, which must not cost a task.
            self.handleError(record)
