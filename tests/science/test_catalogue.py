from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spxdask.errors import CatalogueError
from spxdask.science.catalogue import Catalogue
from spxdask.science.sphere import angular_distance


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
    catalogue = Catalogue.from_csv(write(tmp_path, "targetid,ra,dec\n" + rows))
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
    catalogue = Catalogue.from_csv(write(tmp_path, text, encoding))
    assert catalogue.target_id.to_pylist() == ["a"]
    assert (catalogue.ra[0], catalogue.dec[0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no column targetid"),
        ("targetid,ra\na,1\n", "no column dec"),
        ("targetid,ra,dec,RA\na,1,2,3\n", "2 columns ra;"),
        ("TargetID,targetid,ra,dec\na,a,1,2\n", "2 columns targetid"),
        ("targetid;ra;dec\na;1;2\n", "has to be comma-separated, and its header has ';'"),
        ("targetid\tra\tdec\na\t1\t2\n", "has to be comma-separated, and its header has a tab"),
        ("targetid|ra|dec\na|1|2\n", "no column targetid or target_id; the header has to"),
        ("targetid,ra,dec\n", "no rows"),
        ("targetid,ra,dec\na,1,2\n,3,4\n", r"targetid is empty in data row 2"),
        ("targetid,ra,dec\na,1,2\n  ,3,4\n", r"targetid is empty in data row 2"),
        ("targetid,ra,dec\na,1,2\nb,1,2\na,3,4\n", r"more than once in data row 3 \('a'\)"),
        ("targetid,ra,dec\na,1h,2\n", r"ra is not a number in data row 1 \('1h'\)"),
        ("targetid,ra,dec\na,1,\n", r"dec is not a number in data row 1 \(''\)"),
        ("targetid,ra,dec\na,-0.1,2\n", "ra is not within 0 to 360"),
        ("targetid,ra,dec\na,1,nan\n", "dec is not within -90 to 90"),
        ("targetid,ra,dec\na,inf,1\n", "ra is not within"),
        ("targetid,ra,dec\n" + "".join(f"s{i},1,91\n" for i in range(9)), "and 4 more"),
        ("targetid,ra,dec\na,1\n", "not readable as CSV"),
    ],
)
def test_bad_catalogues_say_where(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(CatalogueError, match=says) as raised:
        Catalogue.from_csv(path)
    assert str(path) in str(raised.value)


def test_ids_are_kept_to_the_last_character(tmp_path):
    text = 'targetid,ra,dec\n a,1,2\na,3,4\n" b c\t",3,4\nü\u00a0 ,5,6\n'
    ids = Catalogue.from_csv(write(tmp_path, text)).target_id.to_pylist()
    assert sorted(ids) == sorted([" a", "a", " b c\t", "ü\u00a0 "])


def test_the_name_that_our_tables_have(tmp_path):
    ids = Catalogue.from_csv(write(tmp_path, "target_id,ra,dec\nb,1,2\n")).target_id.to_pylist()
    assert ids == ["b"]
    both = write(tmp_path, "target_id,targetid,ra,dec\nb,a,1,2\n")
    assert Catalogue.from_csv(both).target_id.to_pylist() == ["a"]


def test_missing_file_and_binary(tmp_path):
    with pytest.raises(CatalogueError, match="No such file"):
        Catalogue.from_csv(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00targetid,ra,dec\n")
    with pytest.raises(CatalogueError, match="not readable as CSV"):
        Catalogue.from_csv(tmp_path / "b.csv")


def sky(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))


def make(ra, dec, tmp_path):
    rows = "".join(
        f"s{i},{a!r},{d!r}\n"
        for i, (a, d) in enumerate(zip(ra.tolist(), dec.tolist(), strict=True))
    )
    return Catalogue.from_csv(write(tmp_path, "targetid,ra,dec\n" + rows))


@pytest.fixture(scope="module")
def all_sky(tmp_path_factory):
    ra, dec = sky(20_000)
    ra[:4], dec[:4] = [0.0, 360.0, 12.0, 12.0], [0.0, 10.0, 90.0, -90.0]
    return ra, dec, make(ra, dec, tmp_path_factory.mktemp("catalogue"))


@settings(deadline=None, max_examples=200)
@given(
    ra=st.floats(0, 360),
    dec=st.one_of(st.floats(-90, 90), st.sampled_from([-90.0, 90.0, 89.0, -88.5, 0.0])),
    radius=st.floats(0.01, 20),
)
def test_circle_search_equals_brute_force(all_sky, ra, dec, radius):
    file_ra, file_dec, catalogue = all_sky
    found = catalogue.row[catalogue.within(ra, dec, radius)]
    expected = np.flatnonzero(angular_distance(ra, dec, file_ra, file_dec) <= radius)
    np.testing.assert_array_equal(found, expected)


def test_saved_catalogue_is_the_same(all_sky, tmp_path):
    catalogue = all_sky[2]
    catalogue.save(tmp_path / "catalogue.arrow")
    opened = Catalogue.open(tmp_path / "catalogue.arrow")
    assert opened.fingerprint == catalogue.fingerprint
    assert opened.target_id.equals(catalogue.target_id)
    for name in ("ra", "dec", "row"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(catalogue, name))
    np.testing.assert_array_equal(opened.within(10, 10, 5), catalogue.within(10, 10, 5))


def test_fingerprint_sees_every_field(tmp_path):
    ra, dec = sky(10)
    prints = {make(ra, dec, tmp_path).fingerprint, make(ra, dec[::-1], tmp_path).fingerprint}
    prints.add(make(ra[:9], dec[:9], tmp_path).fingerprint)
    prints.add(Catalogue.from_csv(write(tmp_path, "targetid,ra,dec\nab,1,2\nc,1,2\n")).fingerprint)
    prints.add(Catalogue.from_csv(write(tmp_path, "targetid,ra,dec\na,1,2\nbc,1,2\n")).fingerprint)
    assert len(prints) == 5
    assert make(ra, dec, tmp_path).fingerprint in prints


NEAR = [("ab", 10.0, 20.0), ("c", 10.01, 20.01), ("ü, e", 9.99, 19.99), ("7", 10.0, 20.02)]
FAR = [(f"far{i}", 40.0 * i, -20.0 + 7 * i) for i in range(9)]


def digest_near(tmp_path, rows):
    text = "".join(f'"{name}",{ra!r},{dec!r}\n' for name, ra, dec in rows)
    catalogue = Catalogue.from_csv(write(tmp_path, "targetid,ra,dec\n" + text))
    digest = catalogue.digest(catalogue.within(10.0, 20.0, 0.1))
    catalogue.save(tmp_path / "catalogue.arrow")
    opened = Catalogue.open(tmp_path / "catalogue.arrow")
    assert opened.digest(opened.within(10.0, 20.0, 0.1)) == digest
    return digest


@pytest.mark.parametrize(
    "rows",
    [FAR + NEAR, NEAR + FAR, [*FAR[:3], *NEAR[:2], *FAR[3:5], *NEAR[2:], *FAR[5:]]],
    ids=["before", "behind", "between"],
)
def test_digest_does_not_see_other_sources(tmp_path, rows):
    assert digest_near(tmp_path, rows) == digest_near(tmp_path, NEAR)


def test_digest_sees_every_field(tmp_path):
    (ab, *position), (c, *other), *rest = NEAR
    changed = [
        NEAR,
        [("aB", *position), (c, *other), *rest],
        [("a", *position), ("bc", *other), *rest],
        [("abc", *position), *rest],
        [("ab", 10.0 + 1e-14, 20.0), (c, *other), *rest],
        [("ab", 10.0, 20.0 + 1e-14), (c, *other), *rest],
        [(c, *other), (ab, *position), *rest],
        [(c, *position), (ab, *other), *rest],
        NEAR[1:],
        NEAR[:-1],
        [*NEAR, ("d", 10.0, 20.0)],
        FAR,
    ]
    assert len({digest_near(tmp_path, rows) for rows in changed}) == len(changed)
    assert digest_near(tmp_path, FAR) == digest_near(tmp_path, FAR[:1])
