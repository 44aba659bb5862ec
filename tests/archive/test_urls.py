"""What is shown of a URL."""

from __future__ import annotations

import pytest

from spxdask.archive.urls import strip_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host.org/a", "https://host.org/a"),
        ("https://secret@host.org", "https://host.org"),
        ("https://me:sec@ret@host.org:8443/a@b", "https://host.org:8443/a@b"),
        ("//me:secret@host.org/", "//host.org/"),
        ("s3://me:secret@bucket/a: http://me:secret@[::1]/b", "s3://bucket/a: http://[::1]/b"),
        ("https://host.org/a@b?c=d@e", "https://host.org/a@b?c=d@e"),
        ("https://host.org?c=d@e", "https://host.org?c=d@e"),
        ("https://host.org: ask help@host.org", "https://host.org: ask help@host.org"),
        ("no URL", "no URL"),
    ],
)
def test_names_and_passwords_are_not_shown(text, shown):
    assert strip_credentials(text) == shown
