"""File names made from the ids of targets."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

# A directory entry holds 255 bytes on common file systems, the suffix included.
MAX_NAME_BYTES = 200
# Characters among them that punctuation has; they are encoded wherever the file is.
NEVER_IN_NAMES = "/\\%"
# s3fs does not take what follows ?versionId= for a part of the name.
_UNSAFE = re.compile(r"[/\\%\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\.|\.\.|\?versionId=")


def file_stem(target_id: str, refused: str = "") -> str:
    """Turn a target id into a file name without its suffix.

    An id that can be a file name is returned as it is. An id with a slash, a backslash, a
    control character, a surrogate, a percent sign, a leading dot or two dots in a row is
    percent-encoded. An id that is, or would become, longer than 200 bytes is cut and ends in
    the SHA-256 of the id after ``%~``, which no encoded name holds. An empty id becomes a
    bare ``%``. So two ids never share a name, and no name leaves its folder.

    Parameters
    ----------
    target_id : str
        Any text.
    refused : str
        Further characters that a file name cannot have; an id with one of them is
        percent-encoded, too.

    Returns
    -------
    str
        At most 200 bytes in UTF-8.
    """
    stem = target_id or "%"
    if _UNSAFE.search(target_id) or any(c in target_id for c in refused):
        safe = "".join(c for c in " +,=@:;()[]" if c not in refused)
        stem = quote(target_id, safe=safe, errors="surrogatepass")
        if stem.startswith(".") or ".." in stem:
            stem = stem.replace(".", "%2E")
    encoded = stem.encode("utf-8")
    if len(encoded) <= MAX_NAME_BYTES:
        return stem
    digest = hashlib.sha256(target_id.encode("utf-8", "surrogatepass")).hexdigest()
    return encoded[:100].decode("utf-8", "ignore") + "%~" + digest
