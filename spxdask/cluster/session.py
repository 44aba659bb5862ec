"""The cluster of a run: a given one, or one that is started when work for it turns up."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from distributed import Client

from spxdask.cluster.connect import check_versions, connect
from spxdask.cluster.embedded import WORKER_TTL_S, embedded_client, require_main_guard
from spxdask.cluster.frozen import FrozenTimes, FrozenWatch, watch_frozen
from spxdask.cluster.jobqueue import jobqueue_client
from spxdask.cluster.limits import warn_of_small_workers
from spxdask.cluster.logs import forward_logs
from spxdask.cluster.page import show_page
from spxdask.cluster.shuffle import unregister_stale_plugins
from spxdask.cluster.tasks import run_one
from spxdask.cluster.workers import keep_local_workers, prepare_workers
from spxdask.errors import ConfigError

__all__ = ["Client", "ClusterSession"]

logger = logging.getLogger(__name__)


class ClusterSession:
    """Where the tasks of a run are computed.

    Parameters
    ----------
    max_processes, n_downloads : int
        Worker processes of an embedded cluster, at most, and downloads at the same time.
    client : distributed.Client, optional
        Cluster to use; it stays open.
    scheduler : str, optional
        Address of a scheduler, or its scheduler file, to connect to instead.
    jobqueue : path, optional
        YAML file of a batch system whose jobs are to be the workers. With none of the
        three, the cluster is one of this machine's size.
    on_connect : callable
        Called with the client, and lines that name its pages, before a cluster is first used.
    save_stacks : callable
        Takes a name and the stacks of a worker that was frozen; returns where they are saved.
    frozen_times : FrozenTimes, optional
        When a worker counts as frozen; by default after a minute on an embedded cluster, after
        three on others.

    Raises
    ------
    ConfigError
        If more than one of the three is given, or the client cannot be used.
    """

    def __init__(
        self,
        *,
        max_processes: int,
        n_downloads: int,
        client: Client | None = None,
        scheduler: str | None = None,
        jobqueue: str | os.PathLike | None = None,
        on_connect: Callable[[Client, str], None] = lambda client, links: None,
        save_stacks: Callable[[str, str], str] = lambda name, stacks: "not saved",
        frozen_times: FrozenTimes | None = None,
    ) -> None:
        if [client, scheduler, jobqueue].count(None) < 2:
            raise ConfigError("give a client, a scheduler or a jobqueue file, not two of them")
        if client is not None and (not isinstance(client, Client) or client.asynchronous):
            raise ConfigError(
                option="client", rule="a synchronous distributed.Client", value=client
            )
        self._max_processes, self._n_downloads = max_processes, n_downloads
        self._given, self._scheduler, self._jobqueue = client, scheduler, jobqueue
        self._on_connect, self._save_stacks = on_connect, save_stacks
        silent_s = WORKER_TTL_S if self.is_embedded else FrozenTimes().silent_s
        self._frozen_times = frozen_times or FrozenTimes(silent_s=silent_s)
        self._watch: FrozenWatch | None = None
        self._n_replaced_before = 0
        self._client: Client | None = client
        self._open: ExitStack | None = None
        self._prepared: str | None = None
        self._page: str | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the cluster is one that is started on this machine for the run."""
        return self._given is None and self._scheduler is None and self._jobqueue is None

    @property
    def has_cluster(self) -> bool:
        """Whether there is a cluster that need not be started."""
        return self._client is not None or self._scheduler is not None

    @property
    def dashboard_link(self) -> str | None:
        """Address of the Dask dashboard, while there is a cluster."""
        return self._client.dashboard_link if self._client is not None else None

    @property
    def page_link(self) -> str | None:
        """Address of the page about the run beside the dashboard, while there is one."""
        return self._page if self.dashboard_link else None

    @property
    def n_replaced(self) -> int:
        """Number of workers that were frozen, or had tasks that hung, and were replaced."""
        return self._n_replaced_before + (self._watch.n_replaced if self._watch else 0)

    @property
    def links(self) -> str:
        """Lines for people that name the two pages."""
        page = f"\nframes      {self.page_link}" if self.page_link else ""
        return f"dashboard   {self.dashboard_link}{page}"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep a cluster that is started within the block until its end."""
        if self._open is not None:
            yield
            return
        try:
            with ExitStack() as self._open:
                if self._given is not None:
                    self._open.enter_context(keep_local_workers(self._given.cluster))
                yield
        finally:
            self._n_replaced_before, self._watch = self.n_replaced, None
            self._open, self._client = None, self._given

    def connect(self) -> Client:
        """Return the client; start the cluster if there is none yet. Only within `hold`.

        Returns
        -------
        Client
            The same one each time.
        """
        if self._client is None:
            assert self._open is not None
            if self._jobqueue is not None:
                made = jobqueue_client(self._jobqueue)
            elif self._scheduler is not None:
                made = connect(self._scheduler)
            else:
                made = embedded_client(
                    max_processes=self._max_processes, n_downloads=self._n_downloads
                )
            self._client = self._open.enter_context(made)
        if self._watch is None:
            assert self._open is not None
            # First of all, as each of the other calls may meet a worker that does not answer.
            watching = watch_frozen(self._client, self._frozen_times, self._save_stacks)
            self._watch = self._open.enter_context(watching)
        self._prepare(self._client, self._watch)
        return self._client

    def run_once(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a call on the cluster; in this process if there is no cluster yet.

        Parameters
        ----------
        name : str
            Name of the task on the dashboard.
        function : callable
            What is called.
        *arguments
            With these arguments.

        Returns
        -------
        object
            What the call returned.
        """
        if not self.has_cluster:
            # A run with nothing left to do needs no cluster.
            return function(*arguments)
        return run_one(self.connect(), function, *arguments, key=(name, uuid.uuid4().hex))

    def require_main_guard(self) -> None:
        """Raise InputError where an embedded cluster could not be started."""
        if self.is_embedded:
            require_main_guard()

    def _prepare(self, client: Client, watch: FrozenWatch) -> None:
        """Check, once, that a cluster can be used, and have its scheduler show the run."""
        if self._prepared == client.id:
            return
        if not self.is_embedded:
            if not check_versions(client) and self._jobqueue is None:
                address = client.scheduler.address
                logger.warning("%s has no worker yet; waiting for the first", address)
            unregister_stale_plugins(client)
            warn_of_small_workers(client)
        prepare_workers(client)
        watch.arm_workers(is_shared=not self.is_embedded and self._jobqueue is None)
        forward_logs(client)
        self._prepared, self._page = client.id, show_page(client)
        self._on_connect(client, self.links)
