"""The index of the catalogue: searching circles, saving, fingerprints."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spxdask.science.catalogue import Catalogue
from spxdask.science.sphere import angular_distance


def make(ra, dec, ids=None) -> Catalogue:
    ids = [f"s{i}" for i in range(len(ra))] if ids is None else ids
    return Catalogue.from_arrays(pa.array(ids, pa.large_string()), ra, dec)


def sky(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))


@pytest.fixture(scope="module")
def all_sky():
    ra, dec = sky(20_000)
    ra[:4], dec[:4] = [0.0, 360.0, 12.0, 12.0], [0.0, 10.0, 90.0, -90.0]
    return ra, dec, make(ra, dec)


@settings(deadline=None, max_examples=100)
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


def test_fingerprint_sees_every_field():
    ra, dec = sky(10)
    prints = {make(ra, dec).fingerprint, make(ra, dec[::-1]).fingerprint}
    prints.add(make(ra[:9], dec[:9]).fingerprint)
    prints.add(make([1.0, 1.0], [2.0, 2.0], ["ab", "c"]).fingerprint)
    prints.add(make([1.0, 1.0], [2.0, 2.0], ["a", "bc"]).fingerprint)
    assert len(prints) == 5
    assert make(ra, dec).fingerprint in prints


NEAR = [("ab", 10.0, 20.0), ("c", 10.01, 20.01), ("ü, e", 9.99, 19.99), ("7", 10.0, 20.02)]
FAR = [(f"far{i}", 40.0 * i, -20.0 + 7 * i) for i in range(9)]


def digest_near(tmp_path, rows):
    ids, ra, dec = zip(*rows, strict=True)
    catalogue = make(ra, dec, ids)
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
