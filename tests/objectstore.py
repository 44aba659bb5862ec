"""An object store on 127.0.0.1: moto's S3, and the environment in which it is found."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3fs import S3FileSystem

BUCKET = "bucket"


@contextmanager
def serving() -> Iterator[S3FileSystem]:
    """Serve an empty bucket, `BUCKET`, to this process and to those that it starts."""
    # Imported here, as most processes of pytest serve none.
    from botocore.loaders import JSONFileLoader
    from moto.backends import get_backend
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    # It says each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        # Each new session reads a megabyte of descriptions.
        read = functools.cache(JSONFileLoader().load_file)
        patch.setattr(JSONFileLoader, "load_file", lambda _, path: copy.copy(read(path)))
        find(patch, "http://{}:{}".format(*server.get_host_and_port()))
        try:
            S3FileSystem.clear_instance_cache()
            store = S3FileSystem(use_listings_cache=False)
            store.mkdir(BUCKET)
            yield store
        finally:
            S3FileSystem.clear_instance_cache()
            server.stop()
            server._server.server_close()
            get_backend("s3")["123456789012"]["global"].reset()


def find(patch: pytest.MonkeyPatch, url: str) -> None:
    """Set the environment in which a store is found, and nothing of the user's."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_CONFIG_FILE", "/dev/null")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", url)
