"""Tables as CSV and Parquet, and their rows as lines of light curves."""

from __future__ import annotations

import csv
import io
import math
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spxdask.tables.csv import read_csv, render_header, render_lines, slice_lines
from spxdask.tables.lines import read_lines, sort_lines
from spxdask.tables.parquet import PARQUET_MARK, encode_parquet
from spxdask.tables.per_image import encode_rows
from spxdask.tables.schema import (
    APERTURE_ONLY,
    LIGHT_CURVE,
    PER_IMAGE,
    SCHEMA,
    SORT_KEYS,
    WITH_PSF,
    Layout,
)

# The columns are spelt out, as they are a file format.
NAMES = [
    "target_id",
    "ra",
    "dec",
    "obs_id",
    "band",
    "mjd",
    "x",
    "y",
    "flux",
    "flux_error",
    "mag_ab",
    "mag_ab_error",
    "wavelength",
    "bandwidth",
    "flag",
    "bg_level",
    "bg_error",
    "aperture_radius",
    "filename",
    "aperture_correction",
    "psf_flux",
    "psf_flux_error",
    "psf_chi2",
    "psf_fraction",
    "neighbour_flux",
    "bad_fraction",
    "bjd_tdb",
]
PER_IMAGE_SCHEMA = pa.schema([SCHEMA.field(name) for name in NAMES])
FLOATS = [name for name in NAMES if pa.types.is_floating(SCHEMA.field(name).type)]

TRICKY_IDS = [
    "39633458707826492",
    "007",
    "NA",
    "nan",
    "NULL",
    "",
    " ",
    " a ",
    "1e5",
    "-0",
    "true",
    ",",
    '"',
    '""',
    'a"b,c\nd\re\r\nf',
    "\n",
    "\n\n",
    "\r",
    "ü\u4e2d\U0001f52d",
    "\ufeffx",
    "\u2028",
    "#comment",
    "'",
    "\t",
    "\\",
    "\\n",
    "=1+1",
    "2026-01-01",
]
TRICKY_FLOATS = [
    5e-324, -5e-324, 2.2250738585072014e-308, 1e308, -1.7976931348623157e308, -0.0, 0.0,
    0.1, 1 / 3, 1e16, 123456789012345680.0, 1e22, 9007199254740993.0, math.nan, 5e-5, 1.0,
    math.inf, -math.inf,
]  # fmt: skip

# NUL and surrogates are not in any catalogue that could be read.
TEXTS = st.sampled_from(TRICKY_IDS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
)
DOUBLES = st.sampled_from(TRICKY_FLOATS) | st.floats()
FLAGS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def rows(draw, max_rows=6):
    n = draw(st.integers(0, max_rows))

    def column(name):
        kind = SCHEMA.field(name).type
        if name == "target_id":
            return draw(st.lists(TEXTS, min_size=n, max_size=n))
        if pa.types.is_string(kind):
            one = draw(TEXTS)
            return [one] * n
        values = FLAGS if name == "flag" else DOUBLES
        return draw(st.lists(values, min_size=n, max_size=n))

    return {name: column(name) for name in NAMES}


def arrays(table: dict[str, list]) -> dict[str, pa.Array]:
    """As the stages hold them: text in Arrow, numbers in numpy."""
    return {
        name: pa.array(values, SCHEMA.field(name).type)
        if SCHEMA.field(name).type == pa.string()
        else np.array(values, SCHEMA.field(name).type.to_pandas_dtype())
        for name, values in table.items()
    }


def written(path, table: dict) -> bytes:
    content = render_header(table) + slice_lines(render_lines(table))
    path.write_bytes(content)
    return content


def bits(value: float) -> bytes:
    """So that -0.0 is not 0.0."""
    return struct.pack("<d", value)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("tables") / "table.csv"


def test_columns():
    assert tuple(NAMES) == PER_IMAGE
    assert tuple(SCHEMA.names) == (*NAMES, "release")
    cut = tuple(n for n in NAMES if n not in ("target_id", "ra", "dec", "filename"))
    assert (*cut, "filename", "release") == LIGHT_CURVE
    assert render_header(NAMES) == ",".join(NAMES).encode() + b"\n"


@given(rows())
@settings(max_examples=40, deadline=None)
def test_round_trip(path, table):
    written(path, arrays(table))
    back = read_csv(path)
    assert back.schema == PER_IMAGE_SCHEMA
    assert back.num_rows == len(table["target_id"])
    for name, values in table.items():
        found = back.column(name).to_pylist()
        if name not in FLOATS:
            assert found == values, name
            continue
        for value, read in zip(values, found, strict=True):
            assert read is None if math.isnan(value) else bits(read) == bits(value), name


@given(rows())
@settings(max_examples=30, deadline=None)
def test_other_readers_see_the_same(path, table):
    content = written(path, arrays(table)).decode()
    parsed = list(csv.reader(io.StringIO(content, newline=""), strict=True))
    assert parsed[0] == NAMES
    by_column = dict(zip(NAMES, zip(*parsed[1:], strict=True), strict=False))
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame) == NAMES
    assert len(frame) == len(parsed) - 1 == len(table["target_id"])
    for name, values in table.items():
        found = list(by_column.get(name, ()))
        assert list(frame[name]) == found, name
        if name in FLOATS:
            for value, text in zip(values, found, strict=True):
                assert text == "" if math.isnan(value) else bits(float(text)) == bits(value)
        else:
            assert found == [str(value) for value in values], name


@pytest.mark.parametrize("value", TRICKY_FLOATS)
def test_numbers_have_no_digit_too_many(value):
    line = render_lines({"flux": np.array([value])})[0].as_py()
    text = line.removesuffix("\n")
    if math.isnan(value):
        assert text == ""
        return
    digits = [c for c in text.split("e")[0] if c.isdigit()]
    shortest = [c for c in repr(value).split("e")[0] if c.isdigit()]
    assert "".join(digits).strip("0") == "".join(shortest).strip("0")


@given(rows(max_rows=8), st.data())
@settings(max_examples=30, deadline=None)
def test_any_run_of_lines_is_what_rendering_the_run_gives(table, data):
    columns = arrays(table)
    lines = render_lines(columns)
    n = len(table["target_id"])
    assert len(lines) == n
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    run = {name: column[start:stop] for name, column in columns.items()}
    expected = bytes(slice_lines(render_lines(run)))
    assert bytes(slice_lines(lines, start, stop)) == expected
    # Neither an array that starts inside its buffers nor one that is a slice of lines is new.
    assert bytes(slice_lines(lines[start:stop])) == expected
    assert expected == "".join(lines[start:stop].to_pylist()).encode()


@given(rows(max_rows=8), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_arrays_with_an_offset(table, start, length):
    columns = {
        name: pa.array(
            [None if isinstance(v, float) and math.isnan(v) else v for v in values],
            SCHEMA.field(name).type,
        ).slice(start, length)
        for name, values in table.items()
    }
    plain = {name: values[start : start + length] for name, values in table.items()}
    assert render_lines(columns).equals(render_lines(arrays(plain)))


def test_zero_rows(path):
    assert written(path, arrays({name: [] for name in NAMES})) == render_header(NAMES)
    back = read_csv(path)
    assert back.schema == PER_IMAGE_SCHEMA
    assert back.num_rows == 0


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int64(), pa.float64()])
def test_null_is_missing_and_its_row_stays(kind):
    lines = render_lines({"a": pa.array([None, None], kind), "b": np.array([1, 2])})
    assert lines.to_pylist() == [",1\n", ",2\n"]


def test_every_line_of_a_large_table_comes_back(path):
    """Over several of the reader's blocks of a megabyte, with quotes across their edges."""
    n = 30_000
    rng = np.random.default_rng(1)
    columns = arrays({name: [] for name in NAMES})
    columns |= {name: rng.normal(size=n) for name in FLOATS}
    ids = [f'id,"{k}"\n{"x" * (k % 97)}' for k in range(n)]
    columns |= {"target_id": pa.array(ids), "flag": np.arange(n)}
    columns |= {name: pa.repeat("t", n) for name in ("obs_id", "band", "filename")}
    assert len(written(path, columns)) > 4 << 20
    back = read_csv(path)
    assert back.column("target_id").to_pylist() == ids
    assert back.column("flag").to_pylist() == list(range(n))
    for name in FLOATS:
        assert np.array_equal(back.column(name).to_numpy(), columns[name]), name


@example(2**32 - 1)
@given(st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_unsigned_flags(flag):
    assert render_lines({"flag": np.array([flag], np.uint32)}).to_pylist() == [f"{flag}\n"]


# For regrouping


def lines_of(text: bytes, layout: Layout = WITH_PSF, release: str = "") -> pa.Table:
    """Read the lines of a table, which the reader may overwrite."""
    return read_lines(bytearray(text), layout, release)


def as_line(row: list[str], release: str = "") -> str:
    """Return the line of a light curve for the cells of a row of a table."""
    return ",".join([*row[3:18], *row[19:], row[18], release]) + "\n"


@pytest.mark.parametrize("layout", [APERTURE_ONLY, WITH_PSF])
@pytest.mark.parametrize("quoted", [False, True])
def test_lines_for_regrouping_are_the_text_of_the_table(quoted, layout):
    rows = [
        ["39633458707826492", "1", "2", "o_1", "D3", "61000.25", *map(str, range(12)), "a.fits"],
        ["é;x", "1e-7", "-2", "o_1", "D4", "61000.5", *[""] * 12, "b.fits"],
    ]
    n_more = len(layout.per_image) - 19
    rows = [[*rows[0], *map(str, range(n_more))], [*rows[1], *[""] * n_more]]
    if quoted:
        rows[0][0], rows[1][0] = 'say "a, b"', "two\nlines"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([layout.per_image, *rows])
    got = lines_of(text.getvalue().encode(), layout, "qr2")
    assert got.column_names == ["target_id", "mjd", "obs_id", "band", "line"]
    assert got.column("target_id").to_pylist() == [row[0] for row in rows]
    assert got.column("mjd").to_pylist() == [61000.25, 61000.5]
    assert got.column("obs_id").to_pylist() == ["o_1", "o_1"]
    assert got.column("band").to_pylist() == ["D3", "D4"]
    assert got.column("line").to_pylist() == [as_line(row, "qr2") for row in rows]
    unknown = lines_of(text.getvalue().encode(), layout).column("line").to_pylist()
    assert unknown == [as_line(row) for row in rows]


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_tables_of_two_layouts_are_not_mixed(two_rows, how):
    """Columns that other tables lack would be lost, or left empty, without a word."""
    full = encode_rows({name: two_rows[name] for name in NAMES}, how)
    basic = encode_rows({name: two_rows[name] for name in APERTURE_ONLY.per_image}, how)
    assert len(lines_of(full)) == len(lines_of(basic, APERTURE_ONLY)) == 2
    with pytest.raises(pa.ArrowInvalid, match="it has the column aperture_correction"):
        lines_of(full, APERTURE_ONLY)
    with pytest.raises((KeyError, pa.ArrowException), match="aperture_correction"):
        lines_of(basic)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text[:-1],
        lambda text: text.replace(b"target_id,ra,dec", b"ra,dec,target_id"),
    ],
)
def test_lines_of_tables_by_other_writers(change):
    row = ["7", "8", "9", "o_1", "D3", "61000.25", *map(str, range(12)), "a.fits"]
    row += map(str, range(8))
    text = change((",".join(PER_IMAGE) + "\n" + ",".join(row) + "\n").encode())
    got = lines_of(text)
    assert got.column("line").to_pylist() == [as_line(row)]
    assert got.column("target_id").to_pylist() == (["9"] if text.startswith(b"ra,") else ["7"])


def test_lines_of_an_empty_table_and_of_a_broken_one():
    header = render_header(PER_IMAGE)
    assert len(lines_of(header)) == 0
    with pytest.raises(pa.ArrowInvalid, match="Expected 27 columns, got 3"):
        lines_of(header + b"a,1,2\n")
    with pytest.raises(pa.ArrowInvalid):
        lines_of(b"")


# Parquet


def as_values(table: pa.Table) -> dict[str, list]:
    """So that -0.0 is not 0.0, and missing is missing."""
    found = {name: table.column(name).to_pylist() for name in table.column_names}
    for name in set(FLOATS) & set(found):
        found[name] = [None if v is None else bits(v) for v in found[name]]
    return found


@pytest.mark.slow
@given(rows(max_rows=8))
@settings(max_examples=40, deadline=None)
def test_both_formats_hold_the_same(path, table):
    columns = arrays(table)
    text, data = (encode_rows(columns, how) for how in ("csv", "parquet"))
    assert text == render_header(NAMES) + slice_lines(render_lines(columns))
    back = pq.read_table(pa.BufferReader(data))
    assert back.schema.equals(PER_IMAGE_SCHEMA)
    assert as_values(back) == as_values(read_csv(pa.BufferReader(text)))
    # Not a number is missing in both.
    assert back.column("flux").null_count == sum(map(math.isnan, table["flux"]))


def timed(table: dict[str, list]) -> dict[str, list]:
    """As no frame is without its time."""
    return table | {"mjd": [0.0 if math.isnan(v) else v for v in table["mjd"]]}


@pytest.mark.slow
@given(rows(max_rows=8).map(timed))
@settings(max_examples=40, deadline=None)
def test_lines_for_regrouping_are_the_same_from_both_formats(table):
    one, other = (lines_of(encode_rows(arrays(table), how)) for how in ("csv", "parquet"))
    assert one.schema == other.schema
    assert as_values(one) == as_values(other)


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_one_value_for_all_rows(how):
    """As extract gives what is the same for a whole frame."""
    one = {"obs_id": "o_1", "band": "D3", "mjd": 61000.1, "filename": 'a ",b".fits'}
    one["aperture_radius"] = math.nan
    columns = arrays({name: [] for name in NAMES})
    columns |= {name: np.array([0.5, math.nan]) for name in FLOATS}
    columns |= {"target_id": pa.array(["a", "b"], pa.large_string())}
    columns |= {"flag": np.array([0, 2**32 - 1], np.uint32)} | one
    data = pa.BufferReader(encode_rows(columns, how))
    back = read_csv(data) if how == "csv" else pq.read_table(data)
    assert back.schema.equals(PER_IMAGE_SCHEMA)
    assert back.column("target_id").to_pylist() == ["a", "b"]
    assert back.column("flag").to_pylist() == [0, 2**32 - 1]
    assert back.column("flux").to_pylist() == [0.5, None]
    for name, value in one.items():
        assert (
            back.column(name).to_pylist()
            == [None if value is one["aperture_radius"] else value] * 2
        )
    # And of no row at all.
    empty = {name: value if name in one else columns[name][:0] for name, value in columns.items()}
    data = pa.BufferReader(encode_rows(empty, how))
    back = read_csv(data) if how == "csv" else pq.read_table(data)
    assert (back.schema, back.num_rows) == (PER_IMAGE_SCHEMA, 0)


@pytest.fixture
def two_rows():
    columns = {name: np.array([0.5, math.nan]) for name in FLOATS}
    columns |= {"target_id": pa.array(["7", "8"]), "mjd": np.array([61000.0, 61001.0])}
    return columns | {"flag": np.array([1, 2]), "obs_id": "o", "band": "D3", "filename": "f"}


def test_parquet_by_other_writers(two_rows):
    """With other types, in another order, with columns of their own."""
    lines = lines_of(encode_rows(two_rows, "parquet"))
    table = pq.read_table(pa.BufferReader(encode_rows(two_rows, "parquet")))
    other = table.select(sorted(table.column_names)).to_pandas()
    other = other.astype({"target_id": int, "flag": "uint32", "band": "category"})
    other = other.assign(more="x")
    data = encode_parquet(pa.Table.from_pandas(other))
    assert lines_of(data) == lines


@pytest.mark.parametrize("name", SORT_KEYS)
def test_rows_without_what_orders_them_are_refused(two_rows, name):
    table = pq.read_table(pa.BufferReader(encode_rows(two_rows, "parquet")))
    field = SCHEMA.field(name)
    some = pa.array([table.column(name)[0].as_py(), None], field.type)
    table = table.set_column(SCHEMA.names.index(name), field, some)
    with pytest.raises(pa.ArrowInvalid, match="each row needs target_id, mjd, obs_id, band"):
        lines_of(encode_parquet(table))


def test_parquet_of_another_kind_and_damaged_parquet(two_rows):
    with pytest.raises(KeyError, match="target_id"):
        lines_of(encode_parquet(pa.table({"a": [1, 2]})))
    whole = encode_rows(two_rows, "parquet")
    for bad in (whole[:-1], whole[:100], whole[:4], PARQUET_MARK + b"\0" * 100):
        with pytest.raises((pa.ArrowException, OSError)):
            lines_of(bad)


@given(rows(max_rows=6).map(timed))
@settings(max_examples=30, deadline=None)
def test_sorting_the_lines_of_a_light_curve(table):
    table["release"] = [f"qr{2 + len(text) % 2}" for text in table["target_id"]]
    lines = render_lines(arrays({name: table[name] for name in LIGHT_CURVE})).to_pylist()
    keyed = zip(table["mjd"], table["obs_id"], table["band"], lines, strict=True)
    expected = [line for *_, line in sorted(keyed)]
    assert sort_lines("".join(lines).encode(), WITH_PSF) == "".join(expected).encode()
