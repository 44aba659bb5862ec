"""XXH64 against published values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spxdask.science.content_hash import hash_content

# From test suites of other implementations.
KNOWN = {
    b"": "ef46db3751d8e999",
    b"a": "d24ec4f1a98c6e5b",
    b"as": "1c330fb2d66be179",
    b"asd": "631c37ce72a97393",
    b"asdf": "415872f599cea71e",
    b"abc": "44bc2cf5ad770999",
    # Exactly 63 characters, which exercises every branch.
    b"Call me Ishmael. Some years ago--never mind how long precisely-": "02a2e85470d6fd96",
}


@pytest.mark.parametrize("content", KNOWN)
def test_known_values(content):
    assert hash_content(content) == f"xxh64:{KNOWN[content]}"


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_byte_counts(content, data):
    at = data.draw(st.integers(0, len(content) - 1))
    other = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    assert hash_content(other) != hash_content(content)
    assert hash_content(content + b"\0") != hash_content(content)
    assert hash_content(memoryview(content)) == hash_content(bytearray(content))
