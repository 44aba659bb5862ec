"""One source from a position or a name, as people write it."""

from __future__ import annotations

import pytest

from spxdask.tables.target import make_target_catalogue, parse_target

M31 = (10.684583, 41.269167)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("10.684583 41.269167", M31),
        ("  10.684583,  +41.269167 ", M31),
        ("10.684583-41.269167", (10.684583, -41.269167)),
        ("10.684583d +41.269167 deg", M31),
        ("10.684583° +41.269167°", M31),
        ("10.684583° \N{MINUS SIGN}41.269167°", (10.684583, -41.269167)),
        ("00h42m44.3s +41d16m09s", M31),
        ("00h42m44.3s+41d16m09s", M31),
        ("0h42m44.3s, 41d16m09s", M31),
        ("00:42:44.3 +41:16:09", M31),
        ("00:42:44.3 41:16:09", M31),
        ("00 42 44.3 +41 16 09", M31),
        ("00 42 44.3 41 16 09", M31),
        ("10d41m04.5s +41d16m09s", M31),
        ("10°41\u203204.5\u2033 +41°16\u203209\u2033", M31),
        ("00:00:00 -00:30:00", (0.0, -0.5)),
        ("J004244.3+411609", M31),
        ("J004244.30-411609.0", (10.684583, -41.269167)),
        ("SDSS J004244.30+411609.0", M31),
        ("2MASS J00424430+4116090", M31),
        ("WISEAJ004244.30+411609.0", M31),
        ("-10.5 20", (349.5, 20.0)),
        ("360 90", (0.0, 90.0)),
        ("0 -90", (0.0, -90.0)),
    ],
)
def test_positions(text, position):
    assert parse_target(text) == pytest.approx(position, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M31",
        "NGC 224",
        "10.684",
        "10.684 41.269 3",
        "1 2 3",
        "nan nan",
        "inf 0",
        "a b",
        "10 95",
        "400 3",
        "-200 3",
        "00:61:00 +10:00:00",
        "24:30:00 +10:00:00",
        "00h42m44s +41h16m09s",
        "J0042+4116",
        "B004244.3+411609",
        "J244244.3+411609",
        "++10 5",
        "10 -+5",
        "10,20,30",
        ",10",
        "10 20\0",
    ],
)
def test_what_is_no_position(text):
    with pytest.raises(ValueError, match=r"^$|^ \(its .* deg\)$"):
        parse_target(text)


def test_a_catalogue_of_one():
    catalogue = make_target_catalogue(" 00h42m44.3s   +41d16m09s")
    assert catalogue.target_id.to_pylist() == ["00h42m44.3s +41d16m09s"]
    assert (catalogue.ra[0], catalogue.dec[0]) == pytest.approx(M31, abs=1e-6)
    again = make_target_catalogue("00h42m44.3s +41d16m09s")
    assert catalogue.fingerprint == again.fingerprint


def test_a_coarse_name_is_a_warning(caplog):
    make_target_catalogue("J004244.3+411609")
    assert not caplog.records
    make_target_catalogue("J004244+411609")
    [record] = caplog.records
    assert "to a whole second of right ascension" in record.getMessage()
