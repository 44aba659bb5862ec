"""Which format a file is in, by its content and then by its name, and the table in it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.choices import CatalogueColumns
from spxdask.tables.catalogue.delimited import open_delimited
from spxdask.tables.catalogue.raw import ArrowTable, RawTable, flatten
from spxdask.tables.parquet import PARQUET_MARK

__all__ = ["ParquetTable", "open_content"]

COMPRESSIONS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": (".gz", gzip.decompress),
    b"BZh": (".bz2", bz2.decompress),
    b"\xfd7zXZ\0": (".xz", lzma.decompress),
    b"(\xb5/\xfd": (".zst", lambda content: _decompress_zstd(content)),
    b"PK\x03\x04": (".zip", lambda content: _unzip(content)),
}
# Files may be compressed, and lie in an archive then.
MAX_COMPRESSIONS = 3
HEAD_BYTES = 1 << 16
# Formats of astropy's that are recognised by the name of a file alone.
SUFFIXES = {
    ".tex": "ascii.latex",
    ".rst": "ascii.rst",
    ".html": "ascii.html",
    ".htm": "ascii.html",
    ".tdat": "ascii.tdat",
    ".qdp": "ascii.qdp",
}


def open_content(content: bytes, name: str, choice: CatalogueColumns) -> RawTable:
    """Open the table in a file.

    Parameters
    ----------
    content : bytes
        The file.
    name : str
        Its name, for formats that the content does not tell.
    choice : CatalogueColumns
        Decides between several tables in a file.

    Returns
    -------
    RawTable

    Raises
    ------
    CatalogueError
        If the file is not of its format, or of none that is known.
    """
    for _ in range(MAX_COMPRESSIONS):
        mark = next((m for m in COMPRESSIONS if content.startswith(m)), None)
        if mark is None:
            break
        suffix, decompress = COMPRESSIONS[mark]
        try:
            content = decompress(content)
        except CatalogueError:
            raise
        except (
            *(OSError, EOFError, ValueError, RuntimeError),
            *(lzma.LZMAError, zlib.error, zipfile.BadZipFile),
        ) as error:
            raise CatalogueError(f"not readable as {suffix[1:]}: {error}") from error
        name = name.removesuffix(suffix)
    if content.startswith(PARQUET_MARK):
        return ParquetTable([io.BytesIO(content)])
    if content.startswith(b"ARROW1"):
        return ArrowTable(pa.ipc.open_file(pa.BufferReader(content)).read_all())
    if content.startswith(b"SIMPLE  ="):
        return _open_by("FITS", _open_fits, content, choice)
    head = content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.search(rb"<(\w+:)?VOTABLE\b", head, re.IGNORECASE):
        return _open_by("VOTable", _open_votable, content, choice)
    suffix = PurePath(name).suffix.lower()
    for is_it, format_name in _list_formats(head, suffix):
        if is_it:
            return _open_by(format_name, _open_by_astropy, content, choice, format_name)
    if re.match(rb"<(!doctype html|html)\b", head, re.IGNORECASE):
        raise CatalogueError("a web page, not a table: was it the answer to a failed download?")
    table = open_delimited(content, choice)
    if table is not None:
        return table
    return _open_by("ascii", _open_by_astropy, content, choice, "ascii")


def _list_formats(head: bytes, suffix: str) -> Iterator[tuple[bool, str]]:
    """Yield whether a file is of a format of astropy's, and its name."""
    yield head.startswith(b"# %ECSV"), "ascii.ecsv"
    yield head.startswith((b"\\", b"|")) and _is_ipac(head), "ascii.ipac"
    yield re.search(rb"^Byte-by-byte", head, re.IGNORECASE | re.MULTILINE) is not None, "ascii.cds"
    yield re.match(rb"#\s*1\s+[A-Za-z]\w*\b", head) is not None, "ascii.sextractor"
    yield head.startswith(b"\x89HDF"), "hdf5"
    yield head.startswith(b"#ASDF"), "asdf"
    yield suffix in SUFFIXES, SUFFIXES.get(suffix, "")


def _is_ipac(head: bytes) -> bool:
    """Return whether the first line that is no keyword begins with a bar and ends with one."""
    rest = (line.strip() for line in head.splitlines() if not line.startswith(b"\\"))
    first = next(rest, b"")
    second = next(rest, b"")
    # A header alone is that of a text separated by bars.
    return first[:1] == first[-1:] == second[:1] == second[-1:] == b"|" and bool(
        re.match(rb"\|\s*(i|int|integer|l|long|d|double|r|real|f|float|c|char|date)\s*\|", second)
    )


def _open_by(
    format_name: str, opener: Callable[..., RawTable], content: bytes, *args: Any
) -> RawTable:
    """Open a table by a library, and make a sentence of whatever it raises."""
    import warnings

    label = format_name.removeprefix("ascii.").upper() if "." in format_name else format_name
    with warnings.catch_warnings():
        # What is odd about other columns is none of our business.
        warnings.simplefilter("ignore")
        try:
            return opener(content, *args)
        except CatalogueError:
            raise
        # Readers raise what comes up in them for a damaged file.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CatalogueError(f"not readable as {label}: {reason}") from error


def _open_fits(content: bytes, choice: CatalogueColumns) -> RawTable:
    from astropy.io import fits
    from astropy.table import Table

    from spxdask.tables.catalogue.astropy_table import AstropyTable

    with fits.open(io.BytesIO(content), character_as_bytes=False) as hdus:
        tables = [hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU | fits.TableHDU)]
        if not tables:
            raise CatalogueError("the FITS file has no table, but images alone")
        chosen = next((hdu for hdu in tables if choice.fit(hdu.columns.names)), tables[0])
        return AstropyTable(Table.read(chosen), choice)


def _open_votable(content: bytes, choice: CatalogueColumns) -> RawTable:
    from astropy.io.votable import parse

    from spxdask.tables.catalogue.astropy_table import AstropyTable

    document = parse(io.BytesIO(content), verify="ignore")
    tables = [table.to_table(use_names_over_ids=True) for table in document.iter_tables()]
    if not tables:
        raise CatalogueError("the VOTable holds no table: is it the answer to a failed query?")
    chosen = next((table for table in tables if choice.fit(table.colnames)), tables[0])
    return AstropyTable(chosen, choice)


def _open_by_astropy(content: bytes, choice: CatalogueColumns, format_name: str) -> RawTable:
    from astropy.io.ascii import convert_numpy
    from astropy.table import Table

    from spxdask.tables.catalogue.astropy_table import AstropyTable, take_units

    if not format_name.startswith("ascii"):
        return AstropyTable(Table.read(io.BytesIO(content), format=format_name), choice)
    text = content.removeprefix(b"\xef\xbb\xbf")
    try:
        lines = text.decode().splitlines()
    except UnicodeDecodeError:
        lines = text.decode("latin-1").splitlines()
    # Where the format has no types, ids stay text to the last character.
    is_typed = format_name in ("ascii.ecsv", "ascii.ipac", "ascii.cds")
    if is_typed:
        return AstropyTable(Table.read(lines, format=format_name), choice)
    as_text = {"*": [convert_numpy(str)]}
    table = Table.read(lines, format=format_name, converters=as_text)
    return AstropyTable(take_units(table, choice), choice)


def _decompress_zstd(content: bytes) -> bytes:
    return pa.input_stream(pa.BufferReader(content), compression="zstd").read()


def _unzip(content: bytes) -> bytes:
    """Return the one file in an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        if "[Content_Types].xml" in names:
            raise CatalogueError("an office document, not a table: save it as CSV")
        # macOS adds files of its own.
        names = [n for n in names if not n.startswith("__MACOSX/") and PurePath(n).name[:1] != "."]
        if len(names) != 1:
            listed = ", ".join(names[:5]) or "none"
            raise CatalogueError(f"a zip archive must hold one file, got {len(names)}: {listed}")
        return archive.read(names[0])


class ParquetTable(RawTable):
    """A Parquet file, or several that are one dataset.

    Parameters
    ----------
    files : sequence of binary files
        Open for as long as they are read, with the columns of the first.
    """

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        try:
            self._files = [pq.ParquetFile(file) for file in files]
        except pa.ArrowException as error:
            raise CatalogueError(f"not readable as Parquet: {error}") from error
        schema = self._files[0].schema_arrow
        super().__init__(schema.names, _find_units(schema))

    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """See `RawTable.read`."""
        names = {i: self.names[i] for i in columns}
        try:
            tables = [file.read(columns=list(names.values())) for file in self._files]
            table = pa.concat_tables(tables, promote_options="permissive")
            return {i: flatten(table.column(name)) for i, name in names.items()}
        except (pa.ArrowException, KeyError, OSError) as error:
            raise CatalogueError(f"not readable as Parquet: {error}") from error


def _find_units(schema: pa.Schema) -> dict[int, str]:
    """Return the units that a schema states, as a field of metadata or as astropy does."""
    units = {}
    header = (schema.metadata or {}).get(b"table_meta_yaml")
    if header is not None:
        from astropy.table.meta import get_header_from_yaml

        described = get_header_from_yaml(header.decode().split("\n"))["datatype"]
        by_name = {column["name"]: column.get("unit") for column in described}
        units = {i: str(by_name[n]) for i, n in enumerate(schema.names) if by_name.get(n)}
    for i, field in enumerate(schema):
        stated = (field.metadata or {}).get(b"unit")
        if stated:
            units[i] = stated.decode(errors="replace")
    return units


def sort_names(names: Iterable[str]) -> list[str]:
    """Return the names of the Parquet files of a dataset, part.2 before part.10.

    Parameters
    ----------
    names : iterable of str
        All names in its folder.

    Returns
    -------
    list of str
        Without hidden files and those that begin with an underscore.
    """
    parts = [n for n in names if n.endswith((".parquet", ".parq", ".pq"))]
    shown = [n for n in parts if not any(p.startswith((".", "_")) for p in PurePath(n).parts)]
    return sorted(
        shown,
        key=lambda n: [
            (not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", n)
        ],
    )
