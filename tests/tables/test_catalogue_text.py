"""Catalogues as text: separators, comments, units, quotes, encodings, numbers, ids."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import threading
import zipfile

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue import CatalogueColumns, CatalogueReader, read_catalogue

PLAIN = "targetid,ra,dec\na,10.5,-20.25\nb,11.5,-21.25\n"
SOURCES = {"a": (10.5, -20.25), "b": (11.5, -21.25)}


def write(tmp_path, content, name="sources.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sources(catalogue) -> dict[str, tuple[float, float]]:
    ids = catalogue.target_id.to_pylist()
    return dict(
        zip(ids, zip(catalogue.ra.tolist(), catalogue.dec.tolist(), strict=True), strict=True)
    )


def read(tmp_path, content, **options):
    return sources(read_catalogue(write(tmp_path, content), **options))


def refuse(tmp_path, content, **options) -> CatalogueError:
    with pytest.raises(CatalogueError) as raised:
        read_catalogue(write(tmp_path, content), **options)
    assert raised.value.path == str(tmp_path / "sources.csv")
    return raised.value


# Lines of a header and rows, of which one quote is not closed, and where it opens.
STRAY_QUOTES = {
    "last column": ('targetid,ra,dec,note\na,10,20,"Star\nb,11,21,x\nc,12,22,y\n', 2),
    "first column": ('targetid,ra,dec\n"a,10,20\nb,11,21\n', 2),
    "middle row": ('targetid,ra,dec,note\na,10,20,x\nb,11,21,"Star\nc,12,22,y\n', 3),
    "last row": ('targetid,ra,dec,note\na,10,20,x\nb,11,21,"Star\n', 3),
    "end of file": ('targetid,ra,dec,note\na,10,20,"Star', 2),
    "header": ('targetid,ra,dec,"note\na,10,20,x\nb,11,21,y\n', 1),
    "header, closed below": ('ra,dec,targetid,"mag\n1,2,a,2"0\n3,4,b,20\n', 1),
    "header and a quoted row": ('targetid;ra;dec;"n\na;1;2;"x ""y"""\nb;3;4;z\n', 1),
    "two stray": ('targetid,ra,dec,note\na,10,20,"Star\nb,11,21,x\nc,12,22,"Foo\n', 2),
    "closed by a third": ('targetid,ra,dec,note\na,10,20,"Star\nb,11,21,x\nc,12,22,"\nd,1,2,\n', 2),
    "closed in next row": ('note,targetid,ra,dec\n"Star,a,10,20\nBar",b,11,21\n', 2),
    "sexagesimal": (
        'note,targetid,ra,dec\n"Star,a,10:20:30,20:00:00\nBar",b,11:12:13,-1:2:3\n',
        2,
    ),
    "after comments": ('# by me\n#\n\ntargetid,ra,dec,n\na,1,2,"x\nb,3,4,y\n', 5),
    "after good quotes": ('targetid,ra,dec,n\n"a",1,2,"x, ""y"""\nb,3,4,"z\nc,5,6,\n', 3),
    "line feeds of Windows": ('targetid,ra,dec,n\r\na,1,2,x\r\nb,3,4,"y\r\nc,5,6,z\r\n', 3),
    "semicolons": ('targetid;ra;dec;n\na;1;2;"x\nb;3;4;y\n', 2),
    "far below": ("targetid,ra,dec,n\n" + "s,1,2,x\n" * 9000 + 't,1,2,"x\nu,1,2,y\n', 9002),
}  # fmt: skip


@pytest.mark.parametrize("case", STRAY_QUOTES)
def test_a_stray_quote_is_refused_with_its_line(tmp_path, case):
    text, line = STRAY_QUOTES[case]
    assert f"a quote opens in line {line} and is not closed" in str(refuse(tmp_path, text))


@pytest.mark.parametrize(
    "text, ids",
    [
        ('targetid,ra,dec,n\na,1,2,"two\nlines"\nb,3,4,"of, one"\n', ["a", "b"]),
        ('n,targetid,ra,dec\n"two\nlines",a,1,2\n"3\n4\n5",b,3,4\n', ["a", "b"]),
        ('targetid,ra,dec,n\na,1,2,5" off\nb,3,4,x\n', ["a", "b"]),
        ('targetid,ra,dec,n\na,1,2,5\' x 3" disk\nb,3,4,"x"', ["a", "b"]),
        ('targetid,ra,dec,size (")\na,1,2,3\nb,3,4,5\n', ["a", "b"]),
        ('targetid,ra,dec\n"a ""b"" c",1,2\n"""",3,4\n', ['"', 'a "b" c']),
        ('targetid,ra,dec\n"a\n#b",1,2\n"c\r",3,4\n', ["a\n#b", "c\r"]),
        ('targetid,ra,dec,n\n"a" ,1,2,"x" y\nb,3,4,""\n', ["a ", "b"]),
        ('targetid,ra,dec,n\na,1,2,"x\ny" \nb,3,4,z"z\n', ["a", "b"]),
    ],
)  # fmt: skip
def test_quotes_that_are_right(tmp_path, text, ids):
    assert sorted(read(tmp_path, text)) == ids


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", " "),
        PLAIN.replace(",", "   "),
        PLAIN.replace(",", ";").replace(".", ","),
        'targetid;ra;dec;"x,y"\na;10.5;-20.25;"1,2,3"\nb;11.5;-21.25;,,\n',
        "targetid;ra;dec;x,y,z,t\na;10.5;-20.25;1\nb;11.5;-21.25;2\n",
        'targetid,ra,dec,"two\nlines"\na,10.5,-20.25,x\nb,11.5,-21.25,y\n',
        'targetid,ra,dec,"a;b;c;d;e"\na,10.5,-20.25,1\nb,11.5,-21.25,2\n',
        "# made by hand\n\n# twice, and, again\n" + PLAIN,
        PLAIN.replace("\nb", "\n# a remark, with, commas\n#\nb") + "# the end",
        PLAIN.replace("\nb", "\n\n\nb") + "\n\n",
        "# remarks\n# " + PLAIN,
        "#targetid ra dec\na 10.5 -20.25\nb 11.5 -21.25\n",
        PLAIN.replace("dec\n", "dec\n,deg,deg\n"),
        PLAIN.replace("dec\n", "dec\n---,degrees,degrees\n"),
        PLAIN.replace("dec\n", "dec\n--,[deg],(deg)\n"),
        PLAIN.replace("ra,dec", "ra [deg],dec (degrees)"),
        "#\n#Coosys\n" + PLAIN.replace("dec\n", "dec\n ,deg,deg\n---,---,---\n").replace(",", "\t"),
        PLAIN.replace("-", "\u2212"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        "\ufeff" + PLAIN,
        "\ufeff# remark\n" + PLAIN,
        PLAIN.replace("10.5", "370.5").replace("370.5", "+10.5 ").replace("11.5", "1.15e1"),
    ],
)
def test_forms_of_text(tmp_path, text):
    assert read(tmp_path, text) == SOURCES


def test_row_that_is_commented_out_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = read(tmp_path, PLAIN + "#c,1,2\n# d,3,4\n# not, a, row\n")
    assert found == SOURCES
    assert "2 lines beginning with # taken as comments" in caplog.text
    assert "(line 4, 5)" in caplog.text
    assert read(tmp_path, PLAIN + '"#c",1,2\n') == SOURCES | {"#c": (1.0, 2.0)}


def zipped(**files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(PLAIN.encode()),
        gzip.compress(PLAIN[:20].encode()) + gzip.compress(PLAIN[20:].encode()),
        bz2.compress(PLAIN.encode()),
        lzma.compress(PLAIN.encode()),
        zipped(**{"x.csv": PLAIN}),
        zipped(**{"x.csv": PLAIN, "__MACOSX/._x.csv": "?", ".DS_Store": "?"}),
        gzip.compress(zipped(**{"x.csv": PLAIN})),
    ],
    ids=["gz", "two gz", "bz2", "xz", "zip", "zip of a Mac", "zip in gz"],
)
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x"])
def test_compressed_files(tmp_path, content, name):
    assert sources(read_catalogue(write(tmp_path, content, name))) == SOURCES


@pytest.mark.parametrize(
    "content, says",
    [
        (gzip.compress(PLAIN.encode())[:-9], "not readable as gz"),
        (bz2.compress(PLAIN.encode())[:-9], "not readable as bz2"),
        (zipped(**{"x.csv": PLAIN, "y.csv": PLAIN}), "must hold one file, got 2: x.csv, y.csv"),
        (zipped(**{"[Content_Types].xml": "", "xl/sheet.xml": ""}), "an office document"),
        (PLAIN.encode("utf-16"), "the text is UTF-16"),
        (PLAIN.encode("utf-16-le"), "the text is UTF-16"),
        (PLAIN.encode("utf-16-be"), "the text is UTF-16"),
        (PLAIN.encode("utf-32"), "the text is UTF-32"),
        (PLAIN.encode("utf-32-be"), "the text is UTF-32"),
        (b"\x00\x01\x02abc" * 50, "neither text nor a table"),
        (b"\x80\x04\x95abc\x00\x00\x00\x00\x00def" * 10, "neither text nor a table"),
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "a web page"),
        ("targetid,ra,dec\na,1,2\nb,1\nc,1,2,3\n", "2 lines with another number of columns"),
        ("# x\ntargetid,ra,dec\na,1,2\n\nb,1\n", "line 5 has 2 columns, the header has 3"),
    ],
    # Compressed content differs from process to process, and pytest-xdist compares the names.
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "content",
)  # fmt: skip
def test_files_that_are_refused(tmp_path, content, says):
    assert says in str(refuse(tmp_path, content))


@pytest.mark.parametrize("n_before", [0, 5000])
def test_other_columns_may_be_in_latin_1(tmp_path, n_before):
    rows = "".join(f"s{i},1,2,plain\n" for i in range(n_before))
    text = f"targetid,ra,dec,Größe\n{rows}a,10.5,-20.25,Mäh\nb,11.5,-21.25,x\n"
    found = read(tmp_path, text.encode("latin-1"))
    assert {i: found[i] for i in "ab"} == SOURCES
    wrong = text.replace("\nb,", "\nbä,").encode("latin-1")
    message = str(refuse(tmp_path, wrong))
    assert f"line {n_before + 3}: targetid is not in UTF-8, but perhaps in Latin-1" in message
    assert read(tmp_path, text.replace("\nb,", "\nbä,"))["bä"] == SOURCES["b"]


@pytest.mark.parametrize(
    "id_name", ["targetid", "target_id", "Source_ID", "id", "objID", "NAME", "designation"]
)
@pytest.mark.parametrize(
    "ra_name, dec_name",
    [
        ("ra", "dec"),
        ("RAJ2000", "DEJ2000"),
        ("_RA", "_DE"),
        ("RA_ICRS", "DE_ICRS"),
        ("ra_deg", "dec_deg"),
        ("raMean", "decMean"),
        ("ra", "decl"),
        ("_RAJ2000", "_DEJ2000"),
        ("ALPHA_J2000", "DELTA_J2000"),
    ],
)
def test_usual_names_of_columns(tmp_path, id_name, ra_name, dec_name):
    header = f"x,{dec_name}, {id_name} ,ra_error,{ra_name}\n"
    assert read(tmp_path, header + "0,-20.25,a,9,10.5\n0,-21.25,b,9,11.5\n") == SOURCES


def test_exact_names_win(tmp_path):
    text = "id,name,targetid,raj2000,ra,dec,dej2000,target_id\nx,y,a,1,10.5,-20.25,2,z\n"
    assert read(tmp_path, text) == {"a": SOURCES["a"]}


@pytest.mark.parametrize(
    "header, option, candidates",
    [
        ("source_id,name,ra,dec", "id_column (--id-column)", "source_id, name"),
        ("targetid,RAJ2000,_RAJ2000,dec", "ra_column (--ra-column)", "RAJ2000, _RAJ2000"),
        ("targetid,ra,de_icrs,DEJ2000", "dec_column (--dec-column)", "de_icrs, DEJ2000"),
        ("targetid,ra,RA,dec", "ra_column (--ra-column)", "ra, RA"),
    ],
)
def test_ambiguous_names_are_refused(tmp_path, header, option, candidates):
    message = str(refuse(tmp_path, f"{header}\n1,2,3,4\n"))
    assert f"name the one to use with {option}: {candidates}" in message


def test_columns_that_are_named(tmp_path):
    text = "name,id,ra,RA,d\na,x,10.5,1,-20.25\nb,y,11.5,2,-21.25\n"
    choice = CatalogueColumns(target_id="name", ra="ra", dec="D")
    assert read(tmp_path, text, columns=choice) == SOURCES
    error = refuse(tmp_path, text, columns=CatalogueColumns(target_id="name", ra="ra", dec="delta"))
    assert "no column delta, which dec_column names; the columns: name, id, ra, RA, d" in str(error)
    error = refuse(tmp_path, text, columns=CatalogueColumns(target_id="name", ra="d", dec="d"))
    assert "must be different columns" in str(error)
    text = "bar;ra;dec\na;10.5;-20.25\nb;11.5;-21.25\n"
    assert read(tmp_path, text, columns=CatalogueColumns(target_id="bar")) == SOURCES


SEXAGESIMAL = [
    ("00:42:44.33", "+41:16:07.5"),
    ("00 42 44.33", "-41 16 07.5"),
    ("00h42m44.33s", "-00d16m07.5s"),
    ("00h 42m 44.33s", "-41° 16' 07.5\""),
    ("23:59:59.999", "\u221200:00:01"),
    ("12:30", "-5 30.5"),
    ("0h42.5m", "5d30.25m"),
    ("1:2:3", "89:59:60.0"),
    ("00\u02b042\u1d5044.33\u02e2", "41\u00b016\u203207.5\u2033"),
]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("ra, dec", SEXAGESIMAL)
def test_sexagesimal_positions(tmp_path, ra, dec, separator):
    cells = ["s", ra, dec.replace('"', '""')]
    rows = separator.join(["id", "ra", "dec"]) + "\n" + separator.join(f'"{c}"' for c in cells)
    tidy = str.maketrans("\u02b0\u1d50\u02e2\u00b0\u2032\u2033\u2212", "hmsd'\"-")
    expected = SkyCoord(
        ra.translate(tidy),
        dec.translate(tidy).replace("60.0", "59.9999999999"),
        unit=(u.hourangle, u.deg),
    )
    [(found_ra, found_dec)] = read(tmp_path, rows).values()
    assert found_ra == pytest.approx(expected.ra.deg, abs=1e-10)
    assert found_dec == pytest.approx(expected.dec.deg, abs=1e-10)


@pytest.mark.parametrize(
    "units, ra, dec, expected",
    [
        ("h:m:s,d:m:s", "00:42:44", "41:16:07", (10.0 + 41 / 60, 41 + 16 / 60 + 7 / 3600)),
        ('"""h:m:s""","""d:m:s"""', "00:42:00", "41:30:00", (10.5, 41.5)),
        ("deg,deg", "10:30:00", "41:30:00", (10.5, 41.5)),
        ("hourangle,deg", "0.7", "-20.25", (10.5, -20.25)),
        ("h,deg", "0.7", "-20.25", (10.5, -20.25)),
        ("rad,rad", "0.5", "-0.25", (np.rad2deg(0.5), np.rad2deg(-0.25))),
        ("radian,rad", "-0.5", "-0.25", (360 - np.rad2deg(0.5), np.rad2deg(-0.25))),
        ("arcsec,arcmin", "36000", "-60", (10.0, -1.0)),
    ],
)  # fmt: skip
def test_units_of_columns(tmp_path, units, ra, dec, expected):
    [found] = read(tmp_path, f"id,ra,dec\n,{units}\ns,{ra},{dec}\n").values()
    assert found == pytest.approx(expected, abs=1e-12)


def test_units_that_are_refused(tmp_path):
    assert "the unit of ra must be one of angles" in str(
        refuse(tmp_path, "id,ra [Jy],dec\na,1,2\n")
    )


def test_decimal_beside_sexagesimal_hours_is_refused(tmp_path):
    error = refuse(tmp_path, "id,ra,dec\na,00:42:44,1\nb,10.5,2\n")
    assert "ra is decimal where other rows are sexagesimal in data row 2 ('10.5')" in str(error)
    assert error.rows == (2,)
    # A degree is a degree.
    found = read(tmp_path, "id,ra,dec\na,10d30m,1:30\nb,10.5,2\n")
    assert found == {"a": (10.5, 1.5), "b": (10.5, 2.0)}


@pytest.mark.parametrize("ra", ["25:61:00", "1h", "12:30.5:10", "1:2:3:4", "x", "12:00:61"])
def test_what_is_no_number(tmp_path, ra):
    assert "ra is not a number in data row 1" in str(refuse(tmp_path, f"id;ra;dec\na;{ra};1\n"))


def test_right_ascension_from_minus_180(tmp_path):
    found = read(tmp_path, "id,ra,dec\na,-180,0\nb,-0.5,0\nc,0,0\nd,360,0\ne,179.5,0\n")
    assert [found[i][0] for i in "abcde"] == [180.0, 359.5, 0.0, 360.0, 179.5]
    assert "ra is not within -180 to 360" in str(refuse(tmp_path, "id,ra,dec\na,25:00:00,0\n"))


MISSING = "targetid,ra,dec\na,1,2\n,3,4\nc,,6\n\nd,7,NaN\ne,8,null\nf,9,10\ng,x,1\nh,400,1\n"


def test_rows_without_id_or_position(tmp_path):
    error = refuse(tmp_path, MISSING)
    assert "targetid is empty in data row 2 (''); line 3" in str(error)
    assert "on_bad_row: skip" in str(error)
    error = refuse(tmp_path, MISSING.replace("\n,3", "\nb,3").replace("c,,", "c,5,"))
    assert "dec is missing in data rows 4 ('d'), 5 ('e'), 2 in all; lines 6, 7" in str(error)
    assert error.rows == (4, 5)


def test_bad_rows_are_skipped_and_listed(tmp_path, caplog):
    reader = CatalogueReader(write(tmp_path, MISSING + "short,1\n"), on_bad_row="skip")
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        assert sources(reader.read()) == {"a": (1.0, 2.0), "f": (9.0, 10.0)}
    assert "7 rows are skipped" in caplog.text
    rows = [(s.row, s.line, s.reason.split(" in ")[0], s.values[:1]) for s in reader.skipped]
    assert rows == [
        (2, 3, "targetid is empty", ("",)),
        (3, 4, "ra is missing", ("c",)),
        (4, 6, "dec is missing", ("d",)),
        (5, 7, "dec is missing", ("e",)),
        (7, 9, "ra is not a number", ("g",)),
        (8, 10, "ra is not within -180 to 360 deg", ("h",)),
        (None, 11, "2 columns, the header has 3", ()),
    ]
    with pytest.raises(CatalogueError, match="none of 1 rows can be used"):
        read_catalogue(write(tmp_path, "id,ra,dec\na,,\n"), on_bad_row="skip")


def test_skipped_rows_leave_the_same_catalogue(tmp_path):
    path = write(tmp_path, PLAIN.replace("\nb", "\nx,,\nb"))
    skipped = read_catalogue(path, on_bad_row="skip")
    plain = read_catalogue(write(tmp_path, PLAIN, "plain.csv"))
    assert skipped.fingerprint == plain.fingerprint
    assert skipped.target_id.equals(plain.target_id)


def test_ids_that_went_through_a_float(tmp_path, caplog):
    text = "id,ra,dec\n3.963345870782649e+16,1,2\n4295806720.0,3,4\n1e5,5,6\nv1.0,7,8\n"
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = read(tmp_path, text)
    assert set(found) == {"3.963345870782649e+16", "4295806720.0", "1e5", "v1.0"}
    [record] = caplog.records
    assert "2 ids, such as '3.963345870782649e+16', went through a floating-point" in record.message
    assert str(tmp_path / "sources.csv") in record.message
    error = refuse(tmp_path, "id,ra,dec\n3.96334e+16,1,2\n3.96334e+16,3,4\n")
    assert "targetid occurs more than once in data row 2 ('3.96334e+16')" in str(error)
    assert "went through a floating-point number" in str(error)
    assert "floating" not in str(refuse(tmp_path, "id,ra,dec\na,1,2\na,3,4\n"))


def test_ids_that_are_one_number_in_two_forms(tmp_path):
    assert set(read(tmp_path, "id,ra,dec\n7,1,2\n007,3,4\n+7,3,4\n")) == {"7", "007", "+7"}


def test_motions_are_kept_in_the_order_of_the_sky(tmp_path, caplog):
    text = (
        "source_id,ra,dec,pmra,pmdec,parallax,ref_epoch\n,deg,deg,mas/yr,arcsec/yr,mas,yr\n"
        "a,10,20,1.5,-0.002,3,2016.0\nb,9,-20,,,,\n"
    )
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = read_catalogue(write(tmp_path, text))
    assert caplog.records == []
    assert found.target_id.to_pylist() == ["b", "a"]
    np.testing.assert_array_equal(found.pmra, [np.nan, 1.5])
    np.testing.assert_allclose(found.pmdec, [np.nan, -2.0], rtol=1e-15)
    np.testing.assert_array_equal(found.parallax, [np.nan, 3.0])
    np.testing.assert_array_equal(found.ref_epoch, [np.nan, 2016.0])
    still = read_catalogue(write(tmp_path, "id,ra,dec\na,10,20\nb,9,-20\n"))
    assert still.fingerprint == found.fingerprint
    assert still.pmra is None


def test_motions_that_cannot_be_used_do_no_harm(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = read_catalogue(
            write(tmp_path, "id,ra,dec,pmra [Jy],pmdec,parallax\na,1,2,3,x,\nb,3,4,3,-5,\n")
        )
    assert found.pmra is None
    assert found.parallax is None
    np.testing.assert_array_equal(found.pmdec, [np.nan, -5.0])
    assert "pmra is not used" in caplog.text
    assert "pmdec is no number in 1 of the rows" in caplog.text


def test_motions_of_no_star_are_kept_with_a_warning(tmp_path, caplog):
    """As where epochs are Julian dates, or motions are in arcsec a century."""
    text = "id,ra,dec,pmra,pmdec,ref_epoch\na,1,2,10358,3,2457389\nb,3,4,-12000,1,2016\n"
    with caplog.at_level(logging.WARNING, logger="spxdask"):
        found = read_catalogue(write(tmp_path, text))
    np.testing.assert_array_equal(found.pmra, [10358, -12000])
    assert "pmra is not within -10500 to 10500 mas/yr in 1 of the rows" in caplog.text
    assert "ref_epoch is not within 1800 to 2100 yr" in caplog.text
    assert len(caplog.records) == 2


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(PLAIN.encode()),))
    writer.start()
    reader = CatalogueReader(path)
    assert not reader.can_be_read_again
    catalogue = reader.read()
    writer.join()
    assert sources(catalogue) == SOURCES
    assert reader.read() is catalogue


def test_a_descriptor_is_read_once(tmp_path):
    with write(tmp_path, PLAIN).open("rb") as file:
        reader = CatalogueReader(f"/dev/fd/{file.fileno()}")
        assert sources(reader.read()) == SOURCES
        assert sources(reader.read()) == SOURCES


def test_stores_that_cannot_be_opened_are_a_sentence():
    with pytest.raises(CatalogueError, match="the store cannot be read") as raised:
        read_catalogue("github://o:r/x.csv")
    assert raised.value.path == "github://o:r/x.csv"
