"""The user's catalogue: what is understood, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from spxdask.errors import CatalogueError
from spxdask.tables.catalogue import read_catalogue


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "sources.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_ids_are_text_to_the_last_character(tmp_path):
    ids = [
        "39633458707826492",
        "39633458707826493",
        "007",
        "1e5",
        "NA",
        "nan",
        "null",
        "a b",
        "ü/..",
        "=1+1",
    ]
    rows = "".join(f"{i},{10 + k},{k}\n" for k, i in enumerate(ids))
    catalogue = read_catalogue(write(tmp_path, "targetid,ra,dec\n" + rows))
    in_file_order = np.argsort(catalogue.row)
    assert [catalogue.target_id[int(i)].as_py() for i in in_file_order] == ids


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("TargetID,RA,Dec\na,1,2\n", "utf-8"),
        ("targetid,ra,dec\r\na,1,2\r\n", "utf-8-sig"),
        ('"ra","name","targetid","DEC"\n1.0,"x,\ny","a"," 2.0 "\n', "utf-8"),
        ("dec, targetid ,ra,mag,mag\n2,a,1,7,8\n\n", "utf-8"),
        ("targetid,ra,dec\na,+1.0e0,2", "utf-8"),
        ("obs_id,Target_ID,ra,dec\nx,a,1,2\n", "utf-8"),
        ('targetid,ra,dec,"note; more"\na,1,2,x\n', "utf-8"),
        ("targetid,ra,dec,a\tb\na,1,2,x\n", "utf-8"),
    ],
)
def test_headers_and_quoting(tmp_path, text, encoding):
    catalogue = read_catalogue(write(tmp_path, text, encoding))
    assert catalogue.target_id.to_pylist() == ["a"]
    assert (catalogue.ra[0], catalogue.dec[0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no column targetid"),
        ("targetid,ra\na,1\n", "no column dec"),
        ("targetid,ra,dec,RA\na,1,2,3\n", "2 columns ra; name the one to use with ra_column"),
        ("TargetID,targetid,ra,dec\na,a,1,2\n", "2 columns targetid"),
        ("a,1,2\nb,3,4\n", "no column targetid"),
        ("targetid,ra,dec\n", "no rows"),
        ("targetid,ra,dec\na,1,2\n,3,4\n", r"targetid is empty in data row 2"),
        ("targetid,ra,dec\na,1,2\n  ,3,4\n", r"targetid is empty in data row 2"),
        ("targetid,ra,dec\na,1,2\nb,1,2\na,3,4\n", r"more than once in data row 3 \('a'\)"),
        ("targetid,ra,dec\na,1h,2\n", r"ra is not a number in data row 1 \('1h'\)"),
        ("targetid,ra,dec\na,1,\n", r"dec is missing in data row 1 \('a'\); line 2"),
        ("targetid,ra,dec\na,-180.1,2\n", "ra is not within -180 to 360"),
        ("targetid,ra,dec\na,1,nan\n", r"dec is missing in data row 1 \('a'\)"),
        ("targetid,ra,dec\na,inf,1\n", "ra is not within"),
        ("targetid,ra,dec\n" + "".join(f"s{i},1,91\n" for i in range(9)), "and 4 more"),
        ("targetid,ra,dec\na,1\n", "not readable as CSV"),
        (f"targetid,ra,dec,{'x' * 140_000}\na,1,2,3\n", "not readable as CSV: field larger"),
        (f"targetid,ra,dec\n{'x' * 140_000},1,2\nb,1\n", "not readable as CSV: field larger"),
    ],
)
def test_bad_catalogues_say_where(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(CatalogueError, match=says) as raised:
        read_catalogue(path)
    assert raised.value.path == str(path)


def test_bad_rows_are_named(tmp_path):
    path = write(tmp_path, "targetid,ra,dec\n" + "".join(f"s{i},1,{85 + i}\n" for i in range(20)))
    with pytest.raises(CatalogueError) as raised:
        read_catalogue(path)
    assert raised.value.rows == tuple(range(7, 21))
    text = path.read_text().replace("s3,", "s2,", 1).replace(",9", ",8").replace(",10", ",8")
    with pytest.raises(CatalogueError) as raised:
        read_catalogue(write(tmp_path, text))
    assert raised.value.rows == (4,)


def test_ids_are_kept_to_the_last_character(tmp_path):
    text = 'targetid,ra,dec\n a,1,2\na,3,4\n" b c\t",3,4\nü\u00a0 ,5,6\n'
    ids = read_catalogue(write(tmp_path, text)).target_id.to_pylist()
    assert sorted(ids) == sorted([" a", "a", " b c\t", "ü\u00a0 "])


def test_the_name_that_our_tables_have(tmp_path):
    ids = read_catalogue(write(tmp_path, "target_id,ra,dec\nb,1,2\n")).target_id.to_pylist()
    assert ids == ["b"]
    both = write(tmp_path, "target_id,targetid,ra,dec\nb,a,1,2\n")
    assert read_catalogue(both).target_id.to_pylist() == ["a"]


def test_missing_file_and_binary(tmp_path):
    with pytest.raises(CatalogueError, match="No such file"):
        read_catalogue(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00targetid,ra,dec\n")
    with pytest.raises(CatalogueError, match="not readable as CSV"):
        read_catalogue(tmp_path / "b.csv")
