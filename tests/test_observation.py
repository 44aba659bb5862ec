"""What a frame is called, which version is the newer, and what is never made a path."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spxdask.errors import ArchiveError
from spxdask.observation import Observation, check_uri, filename_identity, is_level2_name

URI = (
    "ibe/data/spherex/qr2/level2/2025W51_1A/l2b-v21-2025-354/3/"
    "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
)
OBSERVATION = Observation(
    obs_id="2025W51_1A_0684_2",
    band="D3",
    mjd=61027.5,
    wavelength_um=2.02,
    uri=URI,
    download_url=f"http://127.0.0.1/{URI}",
    size_bytes=71_600_000,
)


def test_names():
    assert OBSERVATION.filename == "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354.fits"
    assert OBSERVATION.stem == "level2_2025W51_1A_0684_2D3_spx_l2b-v21-2025-354"
    assert filename_identity(OBSERVATION.filename) == (OBSERVATION.obs_id, OBSERVATION.band)
    assert pickle.loads(pickle.dumps(OBSERVATION)) == OBSERVATION


def test_a_d_in_the_obs_id_is_not_the_detector():
    name = "level2_2025W51_1D_0684_2D6_spx_l2b-v1-2025-001.fits"
    assert filename_identity(name) == ("2025W51_1D_0684_2", "D6")


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("qr2/{}l2b-v21-2025-354", "qr3/{}l2b-v21-2025-354"),
        ("qr9/{}l2b-v99-2030-354", "qr10/{}l2b-v1-2026-001"),
        ("qr2/{}l2b-v9-2025-354", "qr2/{}l2b-v10-2025-354"),
        ("qr2/{}l2b-v21-2025-354", "qr2/{}l2b-v21-2026-001"),
        ("qr2/{}l2b-v21-2025-099", "qr2/{}l2b-v21-2025-100"),
        ("elsewhere/{}l2b-v99-2030-001", "qr2/{}l2b-v1-2025-001"),
    ],
)
def test_the_newer_version(older, newer):
    name = "level2/level2_2025W51_1A_0684_2D3_spx_"
    older, newer = (replace(OBSERVATION, uri=f"{o.format(name)}.fits") for o in (older, newer))
    assert older.recency < newer.recency


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        (URI, True),
        (OBSERVATION.filename, True),
        (f"{URI}\n", False),
        (f"{URI}.gz", False),
        (URI.replace("D3_", "D7_"), False),
        (URI.replace("level2_", "level3_"), False),
        (URI.replace("0684", "06.84"), False),
        (URI.replace("0684", "0" * 60), False),
        (f"{URI}/", False),
        ("", False),
        ("ibe/data/spherex/qr2/epsf/cal-epsf-v3-2026-191/3/epsf_D3_spx_cal.fits", False),
    ],
)
def test_names_of_level2_files(uri, is_one):
    assert is_level2_name(uri) is is_one


NAME = OBSERVATION.filename
HOSTILE = [
    f"../../{NAME}",
    f"ibe/../../etc/{NAME}",
    f"ibe/./{NAME}",
    f"ibe/a..b/{NAME}",
    f"/etc/{NAME}",
    f"//evil.example/{NAME}",
    f"ibe//{NAME}",
    f"http://evil.example/{NAME}",
    f"file:///etc/{NAME}",
    f"user@evil.example/{NAME}",
    f"ibe/a\0b/{NAME}",
    f"ibe/a\nb/{NAME}",
    f"ibe\\..\\{NAME}",
    f"ibe/%2e%2e/{NAME}",
    f"ibe/a?b/{NAME}",
    f"ibe/a#b/{NAME}",
    f"ibe/a b/{NAME}",
    f"ibe/~root/{NAME}",
    f"ibe/\u2024\u2024/{NAME}",
    f"ibe/-rf/{NAME}",
    NAME.replace("v21", "v\u0662\u0661"),
    "",
]


@pytest.mark.parametrize("uri", HOSTILE)
def test_a_hostile_uri_is_refused(uri):
    with pytest.raises(ArchiveError, match="unusable URI") as caught:
        check_uri(uri)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_long_uri_does_not_fill_the_message():
    with pytest.raises(ArchiveError) as caught:
        check_uri("//" + "x" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("uri", [URI, NAME, "a/b.c+d-e_f/9"])
def test_a_plain_uri_passes(uri):
    check_uri(uri)


@given(
    st.lists(st.text("ab.%/\\:?#@~ \0\n\u00e9-", min_size=0, max_size=6), min_size=1, max_size=5)
)
def test_what_passes_stays_below_its_folder(parts):
    uri = "/".join(parts)
    try:
        check_uri(uri)
    except ArchiveError:
        return
    assert all(part and part[0] not in ".-" and ".." not in part for part in uri.split("/"))
    assert not set(uri) & set("%\\:?#@~ \0\n")
