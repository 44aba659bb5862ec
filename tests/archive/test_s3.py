"""Versions of objects in a bucket."""

from __future__ import annotations

import pytest
from objectstore import BUCKET, serving

from spxdask.archive.retry import RetryPolicy
from spxdask.archive.s3 import open_bucket
from spxdask.archive.version import ask_versions


@pytest.fixture
def bucket():
    open_bucket.cache_clear()
    with serving() as store:
        yield store
    open_bucket.cache_clear()


def test_an_object_that_is_replaced_has_another_version(bucket):
    urls = [f"s3://{BUCKET}/frame.fits", f"s3://{BUCKET}/none.fits"]
    versions = []
    for content in (b"one", b"two"):
        bucket.pipe_file(f"{BUCKET}/frame.fits", content)
        version, reason = ask_versions(urls, RetryPolicy(max_retries=0), 10.0)
        versions.append(version)
        assert isinstance(reason, str)
    assert versions[0].differs(versions[1])
    assert versions[0].modified_at is not None
