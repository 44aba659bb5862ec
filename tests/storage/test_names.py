"""Names stay in their folder and differ, whatever ids hold."""

from __future__ import annotations

import os
import string
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from spxdask.storage import LocalStore, file_stem
from spxdask.storage.local import part_path

LIMIT_BYTES = 200
HOSTILE = st.text(st.sampled_from("./\\%~aA2EFe\x00\x1f\x7f\x85\n é\u2028\ud800\udcff"), max_size=8)
ANY_TEXT = st.text(st.characters(), max_size=30)
LONG = st.builds(
    lambda head, body, n, tail: head + body * n + tail,
    st.sampled_from(["", ".", "/", "é", "%"]),
    st.sampled_from(["a", "é", "\U0001f52d", ".", "/", "..", "%2F"]),
    st.integers(15, 210),
    st.sampled_from(["", "1", "2", "/", "."]),
)
IDS = ANY_TEXT | HOSTILE | LONG


@st.composite
def near_pairs(draw):
    """An id, and one that an encoding, a cut or a changed character could take for it."""
    first = draw(IDS)
    change = draw(
        st.sampled_from(
            [
                file_stem,
                lambda t: quote(t, safe="", errors="surrogatepass"),
                lambda t: unquote(t, errors="replace"),
                lambda t: t.replace(".", "%2E"),
                lambda t: t.replace("%", "%25"),
                lambda t: t + " ",
                lambda t: t + ".",
                lambda t: "." + t,
                lambda t: t[:-1],
                lambda t: t.swapcase(),
                lambda t: t[:100],
                lambda t: file_stem(t) + "%~" + 64 * "0",
            ]
        )
    )
    return first, change(first)


def assert_good_name(stem: str) -> None:
    assert not set("/\\\0") & set(stem)
    assert stem not in ("", ".", "..")
    assert not stem.startswith(".")
    assert ".." not in stem
    assert len(stem.encode("utf-8")) <= LIMIT_BYTES


@given(IDS)
@example("")
@example(".")
@example("..")
@example("../../etc/passwd")
@example("a/..")
@example("\ud800")
@example("x" * 200)
@example("x" * 201)
@example("/" * 67)
@settings(max_examples=100, deadline=None)
def test_stem_is_a_file_name(target_id):
    assert_good_name(file_stem(target_id))
    assert file_stem(target_id) == file_stem(target_id)


@pytest.mark.slow
@given(st.tuples(IDS, IDS) | near_pairs())
@example(("a/b", "a%2Fb"))
@example(("a%2Fb", "a%252Fb"))
@example((".a", "%2Ea"))
@example(("", "%"))
@example(("39633458707826492", "39633458707826493"))
@example(("x" * 201, "x" * 202))
@example(("x" * 199 + "é", "x" * 199 + "è"))
@settings(max_examples=200, deadline=None)
def test_two_ids_never_share_a_name(pair):
    first, second = pair
    assume(first != second)
    assert file_stem(first) != file_stem(second)


REFUSED = ' "*:<>?|@=é'


@given(st.tuples(IDS, IDS) | near_pairs())
@example(("a:b", "a%3Ab"))
@example(("a b", "a+b"))
@example((":" * 70, ":" * 71))
@settings(max_examples=100, deadline=None)
def test_refused_characters_are_in_no_name(pair):
    first, second = (file_stem(target_id, REFUSED) for target_id in pair)
    assert_good_name(first)
    assert not set(first) & set(REFUSED)
    assert (first == second) == (pair[0] == pair[1])


def test_ids_without_refused_characters_keep_their_names():
    assert file_stem("a,b;c", REFUSED) == "a,b;c"
    assert file_stem('M31 "arm"', REFUSED) == "M31%20%22arm%22"


def test_a_cut_name_is_not_another_id_s_name():
    name = file_stem("x" * 300)
    assert file_stem(name) != name


@given(st.integers(10**16, 10**17 - 2))
@settings(deadline=None)
def test_neighbours_of_17_digits_differ(number):
    assert file_stem(str(number)) == str(number)
    assert file_stem(str(number + 1)) != file_stem(str(number))


@given(st.text(string.ascii_letters + string.digits + "-_+ :=,;()[]~#'\"*?é\u4e2d", min_size=1))
@example("39633458707826492")
@example("SPHEREx J100.5+20")
@example("a.b.csv")
@example("007")
@example("nan")
@settings(deadline=None)
def test_plain_ids_are_their_own_name(target_id):
    assume(len(target_id.encode()) <= LIMIT_BYTES)
    assert file_stem(target_id) == target_id


@given(st.lists(IDS, min_size=1, max_size=5, unique=True))
@example(["", ".", "..", "/", "\0", "\ud800", "\udc80", "é", "e\u0301", "a\n", "CON", "-rf"])
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_id_gets_a_file_of_its_own(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    for k, target_id in enumerate(ids):
        LocalStore(folder).put_many([(f"{file_stem(target_id)}.csv", str(k).encode())])
    assert len(list(folder.iterdir())) == len(ids)
    for k, target_id in enumerate(ids):
        assert (folder / f"{file_stem(target_id)}.csv").read_text() == str(k)


@given(IDS)
@settings(deadline=None)
def test_part_names_fit_a_directory_entry(target_id):
    path = Path("folder") / f"{file_stem(target_id)}.csv"
    assert part_path(path) != part_path(path)
    assert part_path(path).parent == path.parent
    assert len(os.fsencode(part_path(path).name)) <= 255
