"""What workers log reaches the client."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.transfer import fetch_file
from spxdask.cluster.logs import LogForwarder, forward_logs
from spxdask.errors import ArchiveError


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts, self.changed = [], threading.Condition()

    def emit(self, record):
        with self.changed:
            self.texts.append(f"{record.levelname} {record.name} {record.getMessage()}")
            self.changed.notify_all()

    def wait_for(self, text):
        with self.changed:
            arrived = self.changed.wait_for(lambda: any(text in t for t in self.texts), 20)
        assert arrived, self.texts


@pytest.fixture
def listen(client):
    """Return a function that lets the workers send from a level on; it returns a handler."""
    logger = logging.getLogger("spxdask")
    listener, before = Listener(), logger.level

    def listen(level):
        logger.setLevel(level)
        logger.addHandler(listener)
        forward_logs(client)
        return listener

    yield listen
    logger.removeHandler(listener)
    logger.setLevel(before)
    client.unregister_worker_plugin(LogForwarder.name)


def say(text):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("spxdask.somewhere"), level)(f"{level} {text} %d", 7)


@pytest.mark.parametrize(
    ("level", "shown"),
    [(logging.WARNING, ["warning"]), (logging.INFO, ["info", "warning"]),
     (logging.DEBUG, ["debug", "info", "warning"])],
)  # fmt: skip
def test_messages_of_workers_are_shown_from_the_users_level_on(client, listen, level, shown):
    listener = listen(level)
    # Twice, as each run of a process does it.
    forward_logs(client)
    client.submit(say, "a b", pure=False).result()
    listener.wait_for("warning a b 7")
    texts = [text for text in listener.texts if "a b" in text]
    assert texts == [f"{name.upper()} spxdask.somewhere {name} a b 7" for name in shown]


def fetch_from_nowhere(port, n_retries, delay_s):
    """Fetch from a server that is not there, of each test another: similar messages are few."""
    received = ReceivedFile(memoryview(bytearray(10)))
    retry = RetryPolicy(max_retries=n_retries, first_delay_s=delay_s, longest_delay_s=delay_s)
    url = f"http://127.0.0.1:{port}/frame.fits"
    with pytest.raises(ArchiveError):
        fetch_file(url, received, lambda received: None, retry=retry, stall_timeout_s=5.0)


def test_a_retry_is_seen_while_it_is_waited_for(client, listen):
    listener = listen(logging.INFO)
    task = client.submit(fetch_from_nowhere, 9, 1, 6.0, pure=False)
    listener.wait_for("trying again in ")
    assert not task.done()
    [text] = [text for text in listener.texts if "trying again" in text]
    assert text.startswith("INFO spxdask.archive.transfer http://127.0.0.1:9/frame.fits: ")
    assert "Cannot connect to host 127.0.0.1:9: Connection refused; trying" in text
    task.result()


def test_many_retries_are_few_lines(client, listen):
    listener = listen(logging.INFO)
    started = time.monotonic()
    tasks = client.map(fetch_from_nowhere, [7] * 12, [20] * 12, [0.001] * 12, pure=False)
    client.submit(say, "over").result()
    client.gather(tasks)
    listener.wait_for("over")
    lines = [text for text in listener.texts if "trying again" in text]
    # One of each worker and ten seconds at most, and fewer once they are here.
    assert len(lines) <= 1 + (time.monotonic() - started) // 10
