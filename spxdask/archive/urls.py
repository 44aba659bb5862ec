"""URLs as they may be shown."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """Return a text without the user names and passwords in its URLs, for messages."""
    return _CREDENTIALS.sub("", text)
