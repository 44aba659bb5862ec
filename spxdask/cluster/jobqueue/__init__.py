"""Workers that are jobs of a batch system, submitted by dask-jobqueue as they are needed."""

from spxdask.cluster.jobqueue.cluster import jobqueue_client

__all__ = ["jobqueue_client"]
