"""URLs in a form that may be shown."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*@")


def strip_credentials(text: str) -> str:
    """Remove user names and passwords from the URLs in a text.

    Parameters
    ----------
    text : str
        One or more URLs, or a message that contains some.

    Returns
    -------
    str
        The text, fit for messages, logs and files.
    """
    return _CREDENTIALS.sub("", text)
