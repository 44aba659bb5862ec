"""Text with one row a line: CSV, and the same with semicolons, tabs or bars."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue.angles import MISSING, NUMBER, SEXAGESIMAL
from spxdask.tables.catalogue.choices import CatalogueColumns, find_bracketed_unit
from spxdask.tables.catalogue.raw import RawTable, flatten
from spxdask.tables.catalogue.units import is_angle_unit

__all__ = ["DelimitedTable", "open_delimited"]

DELIMITERS = (",", ";", "\t", "|")
QUOTE, NEWLINE, RETURN = b'"\n\r'
# A header may go on over so many lines, in quotes.
MAX_HEADER_LINES = 100
# Lines of units and of dashes below a header, at most.
MAX_UNIT_LINES = 2
# Missing numbers as pyarrow compares them, which is by case.
NULLS = [*{form for text in MISSING for form in (text, text.upper(), text.title())}, "NaN", "<NA>"]
# So that one row of very many columns fits.
BLOCK_BYTES = 4 << 20
MAX_LINES_QUOTED = 5
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+\Z")
COMMENT = re.compile(rb"^#[^\r\n]*(?:\r\n|\n|\r|\Z)", re.MULTILINE)
# A quoted value of a header, and a quote that begins one, whatever separates them.
QUOTED = re.compile(rb'(?:^|(?<=[,;\t|]))"(?:[^"]|"")*"')
OPEN_QUOTE = re.compile(rb'(?:^|[,;\t|])"')
# A decimal or sexagesimal number.
COORDINATE = re.compile(f"{NUMBER}|{SEXAGESIMAL}")
MAX_TEXT_LENGTH = 80


def open_delimited(content: bytes, choice: CatalogueColumns) -> DelimitedTable | None:
    """Find the header, the separator and the first row of a text.

    Parameters
    ----------
    content : bytes
        The file.
    choice : CatalogueColumns
        Decides what is a header.

    Returns
    -------
    DelimitedTable or None
        None for a text whose columns are separated by spaces.

    Raises
    ------
    CatalogueError
        If the text is in another encoding, or its header is not closed.
    """
    refuse_other_encodings(content)
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    first, comments = _skip_comments(content, start)
    header, after = _read_header(content, first)
    _refuse_rows_in_header(header, _line_of(content, first))
    candidates = [(header, after)]
    if comments:
        # As numpy.savetxt writes it, below remarks if there are any.
        candidates.append((_decode(content[slice(*comments[-1])]).lstrip("#").strip(), first))
    for text, data in candidates:
        for delimiter in DELIMITERS:
            names = _split(text, delimiter)
            if choice.fit(names):
                return DelimitedTable(content, names, delimiter, data, choice)
        if choice.fit(text.split()):
            return None
    delimiter = max(DELIMITERS, key=lambda d: len(_split(header, d)))
    return DelimitedTable(content, _split(header, delimiter), delimiter, after, choice)


class DelimitedTable(RawTable):
    """A text with one row a line.

    Parameters
    ----------
    content : bytes
        The file.
    names : sequence of str
        The header.
    delimiter : str
        What separates columns.
    data : int
        Where the lines below the header begin, bytes.
    choice : CatalogueColumns
        Decides which columns have units.
    """

    def __init__(
        self,
        content: bytes,
        names: Sequence[str],
        delimiter: str,
        data: int,
        choice: CatalogueColumns,
    ) -> None:
        units = {i: unit for i, name in enumerate(names) if (unit := find_bracketed_unit(name))}
        super().__init__([name.strip() for name in names], units)
        self._content = content
        self._delimiter = delimiter
        self._data = data
        self._positions: tuple[int, ...] = ()
        if choice.fit(self.names):
            try:
                found = choice.find(self.names)
            except CatalogueError:
                # It is raised again for whoever needs the columns.
                return
            self._positions = (found["ra"], found["dec"])
            self._skip_units()

    def _skip_units(self) -> None:
        """Take units from the lines below the header, and step over them."""
        for _ in range(MAX_UNIT_LINES):
            self._data, _ = _skip_comments(self._content, self._data)
            line = LINE.match(self._content, self._data)
            if line is None:
                return
            text, after = _decode(line[0]).rstrip("\r\n"), line.end()
            cells = [cell.strip() for cell in _split(text, self._delimiter)]
            is_ruler = bool(text.strip()) and all(re.fullmatch("[-=+]*", cell) for cell in cells)
            if len(cells) != len(self.names) and not is_ruler:
                return
            positions = [] if is_ruler else [cells[i] for i in self._positions]
            given = [cell for cell in positions if cell not in ("", "-", "--")]
            if not is_ruler and not (given and all(map(is_angle_unit, given))):
                return
            if not is_ruler:
                self.units |= {i: cell for i, cell in enumerate(cells) if cell}
            self._data = after

    def read(
        self, columns: Collection[int], numbers: Collection[int], *, skip_malformed: bool = False
    ) -> dict[int, pa.Array]:
        """See `RawTable.read`."""
        quoted = self._find_quoted_lines()
        body = self._drop_comments(quoted)
        if body is None:
            return {i: pa.array([], pa.large_string()) for i in columns}
        bad: list[pa_csv.InvalidRow] = []

        def take_malformed(row: pa_csv.InvalidRow) -> str:
            bad.append(row)
            return "skip" if skip_malformed else "error"

        def parse(types: dict[str, pa.DataType]) -> pa.Table:
            bad.clear()
            return pa_csv.read_csv(
                pa.BufferReader(body),
                read_options=pa_csv.ReadOptions(
                    column_names=[str(i) for i in range(len(self.names))], block_size=BLOCK_BYTES
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=self._delimiter,
                    newlines_in_values=bool(quoted),
                    invalid_row_handler=take_malformed,
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=[str(i) for i in columns],
                    column_types=types,
                    strings_can_be_null=False,
                    null_values=NULLS,
                ),
            )

        texts = {str(i): pa.large_string() for i in columns}
        try:
            try:
                table = parse(texts | {str(i): pa.float64() for i in numbers})
            except pa.ArrowInvalid:
                if bad and not skip_malformed:
                    raise
                # Numbers in another form than decimal.
                table = parse(texts)
        except pa.ArrowInvalid as error:
            if bad:
                self._refuse_malformed()
            self._refuse_undecodable(columns, parse)
            raise CatalogueError(f"not readable as CSV: {error}") from error
        if bad:
            self.malformed = self._find_malformed()
        found = {i: flatten(table.column(str(i))) for i in columns}
        if self._delimiter != "|":
            return found
        # Tables with bars are padded for people.
        is_text = {i: pa.types.is_large_string(column.type) for i, column in found.items()}
        return {i: pc.utf8_trim_whitespace(c) if is_text[i] else c for i, c in found.items()}

    def find_lines(self, rows: Collection[int]) -> dict[int, int]:
        """See `RawTable.find_lines`."""
        wanted, found = set(rows), {}
        is_row = ((line, cells) for line, cells in self._read_records() if self._is_whole(cells))
        for row, (line, _) in enumerate(is_row):
            if row in wanted:
                found[row] = line
                if len(found) == len(wanted):
                    break
        return found

    def _is_whole(self, cells: Sequence[str]) -> bool:
        return len(cells) == len(self.names)

    def _read_records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield each row as texts, with the number of its first line, slowly."""
        number, first, is_within = _line_of(self._content, self._data) - 1, 0, False

        def lines() -> Iterator[str]:
            nonlocal number, first, is_within
            body = io.BytesIO(memoryview(self._content)[self._data :])
            for line in io.TextIOWrapper(body, encoding="latin-1", newline=""):
                number += 1
                if not is_within:
                    if line.startswith("#") or not line.strip("\r\n"):
                        continue
                    first, is_within = number, True
                yield line

        for cells in _parse(lines(), self._delimiter):
            is_within = False
            yield first, cells

    def _find_quoted_lines(self) -> list[tuple[int, int]]:
        """Return where the quoted values begin and end that go over several lines.

        A quote that is opened and not closed swallows the rows below it. It is refused.
        """
        content, data = self._content, self._data
        if content.find(b'"', data) < 0:
            return []
        view = np.frombuffer(content, np.uint8, offset=data)
        quotes = np.flatnonzero(view == QUOTE)
        if self._are_regular(view, quotes):
            breaks = np.flatnonzero(view == NEWLINE)
            if content.find(b"\r", data) >= 0:
                breaks = np.concatenate([breaks, np.flatnonzero(view == RETURN)])
            # A break behind an odd number of quotes is within a pair of them.
            before = np.searchsorted(quotes, breaks)
            within = np.unique(before[before % 2 == 1])
            starts, ends = quotes[within - 1], quotes[within]
            found = list(zip(starts.tolist(), ends.tolist(), strict=True))
        else:
            found = self._scan_quotes((quotes + data).tolist())
            found = [(start - data, end - data) for start, end in found]
        found = [(start + data, end + data) for start, end in found]
        for start, end in found:
            self._refuse_swallowed_rows(start, end)
        return found

    def _are_regular(self, view: np.ndarray, quotes: np.ndarray) -> bool:
        """Return whether quotes stand in pairs about whole values, doubled within them."""
        if len(quotes) % 2:
            return False
        borders = np.zeros(256, bool)
        borders[[QUOTE, NEWLINE, RETURN, ord(self._delimiter)]] = True
        starts, ends = quotes[0::2], quotes[1::2]
        before, behind = starts[starts > 0] - 1, ends[ends < len(view) - 1] + 1
        return bool(borders[view[before]].all() and borders[view[behind]].all())

    def _scan_quotes(self, quotes: Sequence[int]) -> list[tuple[int, int]]:
        """Return the quoted values of several lines, by the rules of the CSV reader."""
        content, border = self._content, {NEWLINE, RETURN, ord(self._delimiter)}
        found, upcoming = [], iter(quotes)
        for start in upcoming:
            # Within a value, a quote is a character like others.
            if start > self._data and content[start - 1] not in border:
                continue
            for end in upcoming:
                if content[end + 1 : end + 2] != b'"':
                    break
                next(upcoming)
            else:
                raise self._unclosed(start)
            if b"\n" in content[start:end] or b"\r" in content[start:end]:
                found.append((start, end))
        for start, end in found:
            behind = re.compile(rb"[ ]*").match(content, end + 1).end()  # type: ignore[union-attr]
            if behind < len(content) and content[behind] not in border:
                raise self._unclosed(start)
        return found

    def _refuse_swallowed_rows(self, start: int, end: int) -> None:
        """Raise an error if the lines of a quoted value are rows each."""
        content = self._content
        first = max(content.rfind(b"\n", 0, start), content.rfind(b"\r", 0, start)) + 1
        last = min(i for i in (content.find(b"\n", end), len(content)) if i >= 0)
        lines = content[first:last].decode("latin-1").splitlines()
        if sum(map(self._looks_like_row, lines)) > 1:
            raise self._unclosed(start)

    def _looks_like_row(self, line: str) -> bool:
        """Return whether a line has all columns, and numbers for the position."""
        cells = [cell.strip() for cell in line.replace('"', "").split(self._delimiter)]
        n_columns = len(self.names)
        if len(cells) < n_columns or not self._positions:
            return False
        # A separator within quotes moves the columns on one of its sides.
        aligned = (cells[:n_columns], cells[-n_columns:])
        return any(all(COORDINATE.match(row[i]) for i in self._positions) for row in aligned)

    def _unclosed(self, start: int) -> CatalogueError:
        line = _line_of(self._content, start)
        return CatalogueError(
            f"a quote opens in line {line} and is not closed in its row: close it, or remove it"
        )

    def _drop_comments(self, quoted: Sequence[tuple[int, int]]) -> pa.Buffer | None:
        """Return the rows without lines that begin with #, None if nothing is left."""
        content, data = self._content, self._data
        kept = []
        # One byte is found much faster than two.
        if content.find(b"#", data) >= 0:
            starts = np.array([start for start, _ in quoted], np.int64)
            suspects = []
            for comment in COMMENT.finditer(content, data):
                i = int(np.searchsorted(starts, comment.start())) - 1
                if i >= 0 and comment.start() < quoted[i][1]:
                    continue
                kept.append(content[data : comment.start()])
                data = comment.end()
                if self._looks_like_row(comment[0].decode("latin-1").lstrip("#").rstrip()):
                    suspects.append(_line_of(content, comment.start()))
            if suspects:
                listed = ", ".join(map(str, suspects[:MAX_LINES_QUOTED]))
                self.warnings.append(
                    f"{len(suspects):,} line{'s' * (len(suspects) > 1)} beginning with # taken as "
                    f"comments, though they look like rows (line {listed}); an id that begins "
                    "with # must be in quotes"
                )
        if kept:
            content, data = b"".join([*kept, content[data:]]), 0
        if re.compile(rb"[^\s]").search(content, data) is None:
            return None
        return pa.py_buffer(content).slice(data)

    def _find_malformed(self) -> dict[int, str]:
        """Return the lines with another number of columns than the header."""
        return {
            line: f"{len(cells)} column{'s' * (len(cells) != 1)}, the header has {len(self.names)}"
            for line, cells in self._read_records()
            if not self._is_whole(cells)
        }

    def _refuse_malformed(self) -> None:
        found = self._find_malformed()
        listed = ", ".join(map(str, list(found)[:MAX_LINES_QUOTED]))
        if found:
            first = found[min(found)]
            raise CatalogueError(
                f"not readable as CSV: line {listed} has {first}"
                if len(found) == 1
                else f"not readable as CSV: {len(found):,} lines with another number of columns "
                f"than the header: {listed} (the first has {first})"
            )

    def _refuse_undecodable(
        self, columns: Collection[int], parse: Callable[[dict[str, pa.DataType]], pa.Table]
    ) -> None:
        """Raise an error for the first value of these columns that is not UTF-8."""
        try:
            table = parse({str(i): pa.large_binary() for i in columns})
        except pa.ArrowInvalid:
            return
        for i in columns:
            for row, value in enumerate(table.column(str(i)).to_pylist()):
                try:
                    value.decode()
                except UnicodeDecodeError:
                    line = self.find_lines([row]).get(row, row + 1)
                    raise CatalogueError(
                        f"line {line}: {self.names[i]} is not in UTF-8, but perhaps in Latin-1, "
                        f"got {value[:MAX_TEXT_LENGTH]!r}: save the file as UTF-8"
                    ) from None


def refuse_other_encodings(content: bytes) -> None:
    """Raise an error for text of two or four bytes a character, and for what is no text.

    Parameters
    ----------
    content : bytes
        A file that begins as no known format does.

    Raises
    ------
    CatalogueError
        If that is so; it names the encoding.
    """
    head = content[:400]
    encoding = ""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "UTF-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif b"\0" in head:
        # Without a mark at its beginning, most characters have zeros at the same places.
        places = [head[i::4].count(0) > len(head[i::4]) / 2 for i in range(4)]
        encoding = {1: "", 2: "UTF-16", 3: "UTF-32"}.get(sum(places), "")
        if not encoding or places == [True, True, False, False]:
            raise CatalogueError("not readable as CSV: neither text nor a table of a known format")
    if encoding:
        raise CatalogueError(f"not readable as CSV: the text is {encoding}; save it as UTF-8")


def _skip_comments(content: bytes, start: int) -> tuple[int, list[tuple[int, int]]]:
    """Return where the first line begins that is neither empty nor a comment, and the comments."""
    comments = []
    for line in LINE.finditer(content, start):
        if line[0].startswith(b"#"):
            comments.append(line.span())
        elif line[0].strip(b"\r\n"):
            return line.start(), comments
    return len(content), comments


def _read_header(content: bytes, start: int) -> tuple[str, int]:
    """Return the header as text, and where the line below it begins."""
    end = start
    for number, line in enumerate(LINE.finditer(content, start)):
        end = line.end()
        # A quoted name may go on in the next line.
        is_open = OPEN_QUOTE.search(QUOTED.sub(b"", content[start:end])) is not None
        if not is_open or number > MAX_HEADER_LINES:
            break
    if end > start and is_open:
        raise CatalogueError(
            f"a quote opens in line {_line_of(content, start)} and is not closed in the header: "
            "close it, or remove it"
        )
    return _decode(content[start:end]).rstrip("\r\n"), end


def _refuse_rows_in_header(header: str, line: int) -> None:
    """Raise an error for a quote of the header that swallows rows, and is closed in one of them."""
    top, *others = header.replace('"', "").splitlines() or [""]
    for delimiter in DELIMITERS:
        n_columns = top.count(delimiter)
        if n_columns > 1 and any(text.count(delimiter) >= n_columns for text in others):
            raise CatalogueError(
                f"a quote opens in line {line} and is not closed in its row: close it, or remove it"
            )


def _split(text: str, delimiter: str) -> list[str]:
    return next(_parse(io.StringIO(text, newline=""), delimiter), [])


def _parse(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of each row."""
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        # Such as a value of over 100,000 characters.
        raise CatalogueError(f"not readable as CSV: {error}") from error


def _decode(text: bytes) -> str:
    """Decode a header; names that are not needed may be in any encoding."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _line_of(content: bytes, position: int) -> int:
    """Return the number of the line that a byte is in, 1 for the first."""
    end = b"\n" if b"\n" in content else b"\r"
    return content.count(end, 0, position) + 1
