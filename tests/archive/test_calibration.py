"""Calibration products: which are found, in each way of listing, and what becomes of bad ones."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import objectstore
import pytest
from astropy.io import fits

from spxdask.archive.calibration import (
    CalibrationSet,
    ProductSource,
    find_products,
    find_releases,
    obtain_calibration,
    obtain_product,
    open_in_cache,
)
from spxdask.archive.retry import RetryPolicy
from spxdask.errors import ArchiveError, InputError
from spxdask.science.calibration import open_products
from spxdask.science.families import EPSF, FAMILIES, FLUX_CORRECTION, SOLID_ANGLE, SPECTRAL_WCS
from spxdask.simulate.archive import BUCKET, Fault, SimulatedArchive, make_mirror
from spxdask.simulate.products import ArchivedProduct, make_products

LISTING = "ibe/dir/list/spherex"
QUICK = RetryPolicy(max_retries=2, first_delay_s=0.0, longest_retry_after_s=0.0)
NEWEST = {
    (EPSF, "D1"): "cal-epsf-v1-2026-191",
    (EPSF, "D3"): "cal-epsf-v2-2026-191",
    (SPECTRAL_WCS, "D1"): "cal-swcs-v5-2026-191",
    (SPECTRAL_WCS, "D3"): "cal-swcs-v5-2026-191",
    (SOLID_ANGLE, "D1"): "cal-sapm-v3-2026-191",
    (SOLID_ANGLE, "D3"): "cal-sapm-v3-2026-191",
    (FLUX_CORRECTION, "D1"): "cal-flxc-v1-2026-191",
    (FLUX_CORRECTION, "D3"): "cal-flxc-v1-2026-191",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[ArchivedProduct]:
    """Products whose maps are too small to be used, where only their names matter."""
    return make_products(
        tmp_path_factory.mktemp("small"), detectors=(1, 3), families=FAMILIES, size=8
    )


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> list[ArchivedProduct]:
    """Usable products of two detectors."""
    tokens = {*NEWEST.values(), "cal-wcs-v4-2025-254"} - {"cal-sapm-v3-2026-191"}
    return make_products(tmp_path_factory.mktemp("products"), detectors=(1, 3), tokens=tokens)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "products"


def source(url: str, **options) -> ProductSource:
    return ProductSource(**({"url": url, "retry": QUICK, "stall_timeout_s": 5.0} | options))


def find_tokens(where: ProductSource, bands=("D1", "D3")) -> dict[tuple[str, str], str]:
    releases = find_releases(where, [])
    found = {family: find_products(where, family, bands, releases=releases) for family in FAMILIES}
    return {(family, band): one.token for family in found for band, one in found[family].items()}


def pick(products, family: str, band: str = "D3", token: str | None = None) -> ArchivedProduct:
    return next(
        p
        for p in products
        if p.family == family
        and p.detector == int(band[1:])
        and p.token == (token or NEWEST[family, band])
    )


def copy(product: ArchivedProduct, folder: Path) -> ArchivedProduct:
    """Return a product whose file may be changed."""
    path = folder / product.path.name
    shutil.copyfile(product.path, path)
    return replace(product, path=path)


def obtain(where: ProductSource, **options) -> CalibrationSet:
    defaults = {
        "bands": ["D3"],
        "releases": ["qr3"],
        "pins": {},
        "skipped": {SOLID_ANGLE, SPECTRAL_WCS},
    }
    return obtain_calibration(where, **(defaults | options))


@pytest.mark.slow
def test_the_server_lists_the_newest_of_each_family_and_band(small):
    with SimulatedArchive([], products=small) as archive:
        assert find_tokens(source(archive.archive_url)) == NEWEST


def test_a_store_behind_http_lists_its_bucket(small):
    """The bucket's own HTTPS address has no listing of IRSA's kind, and other paths."""
    with SimulatedArchive([], products=small) as archive:
        url = f"{archive.url}/{BUCKET}"
        assert find_tokens(source(url)) == NEWEST


@pytest.mark.parametrize("prefix", ["", "ibe/data/spherex"])
def test_a_mirror_is_listed_in_both_layouts(small, tmp_path, prefix):
    make_mirror(tmp_path / "a mirror" / prefix, products=small)
    (tmp_path / "a mirror" / prefix / "qr3" / "nothing").symlink_to(tmp_path / "nowhere")
    where = source((tmp_path / "a mirror").as_uri())
    assert find_tokens(where) == NEWEST


@pytest.mark.s3
def test_a_bucket_is_listed_at_its_end_point(small, monkeypatch):
    objectstore.find(monkeypatch, "http://127.0.0.1:9")
    with SimulatedArchive([], products=small) as archive:
        where = source(f"s3://{BUCKET}", endpoint=archive.url)
        assert find_tokens(where) == NEWEST
        # Nothing is remembered of an earlier listing.
        archive.remove_file(pick(small, EPSF, "D1").uri)
        assert (EPSF, "D1") not in find_tokens(where)


@pytest.mark.s3
def test_a_product_is_fetched_from_the_end_point(products, monkeypatch, cache):
    objectstore.find(monkeypatch, "http://127.0.0.1:9")
    with SimulatedArchive([], products=products) as archive:
        found = obtain(source(f"s3://{BUCKET}", endpoint=archive.url))
    assert found.tokens == {EPSF: NEWEST[EPSF, "D3"]}


def test_a_later_date_counts_only_within_a_version(small, tmp_path):
    (one,) = make_products(
        tmp_path / "new", detectors=(3,), tokens={"cal-epsf-v2-2026-191"}, size=8
    )
    others = [
        replace(one, release="dr1", token="cal-epsf-v10-2026-001"),
        replace(one, release="dr1", token="cal-epsf-v9-2027-300"),
        replace(one, token="cal-epsf-v11-latest"),
    ]
    with SimulatedArchive([], products=[*small, *others]) as archive:
        assert find_tokens(source(archive.archive_url))[EPSF, "D3"] == "cal-epsf-v10-2026-001"


@pytest.mark.slow
def test_pins_are_taken_in_place_of_the_newest(products, cache):
    pins = {SPECTRAL_WCS: ["cal-wcs-v4-2025-254"]}
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        found = obtain(where, pins=pins, skipped={SOLID_ANGLE, EPSF})
        both = {EPSF: [NEWEST[EPSF, "D1"], NEWEST[EPSF, "D3"]]}
        some = obtain(where, bands=["D1", "D3"], pins=both)
        with pytest.raises(InputError, match=r"calibration_pins: epsf: .*v1-2026-191 for D3 at"):
            obtain(where, bands=["D1", "D3"], pins={EPSF: [NEWEST[EPSF, "D1"]]})
    assert found.tokens == {SPECTRAL_WCS: "cal-wcs-v4-2025-254"}
    assert some.tokens == {EPSF: "cal-epsf-v1-2026-191 (D3: cal-epsf-v2-2026-191)"}


def test_a_family_that_lacks_a_band_is_used_for_none(products, cache):
    with SimulatedArchive([], products=products) as archive:
        archive.remove_file(pick(products, EPSF, "D1").uri)
        found = obtain(source(archive.archive_url), bands=["D1", "D3"])
        fetched = [r.path for r in archive.requests if r.path.endswith(".fits")]
    assert not found.products
    assert "no product for D1" in found.missing[EPSF]
    assert not fetched


def test_flux_corrections_are_for_early_releases(products, cache):
    with SimulatedArchive([], products=products) as archive:
        found = obtain(source(archive.archive_url), releases=["qr2", "qr3"])
    assert {*found.choose("D3", is_early=True)} == {EPSF, FLUX_CORRECTION}
    assert {*found.choose("D3", is_early=False)} == {EPSF}
    assert found.choose("D1", is_early=False) == {}
    assert CalibrationSet.from_json(found.to_json(), found.source) == found


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2880])


def _set(path: Path, extension: str | int, name: str, value) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus[extension].header[name] = value


def _replace_data(path: Path, extension: str, change) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus[extension].data = change(hdus[extension].data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "spoil", "words"),
    [
        (FLUX_CORRECTION, _cut, "cut short"),
        (FLUX_CORRECTION, lambda path: path.write_text("<html>no</html>"), ""),
        (FLUX_CORRECTION, lambda path: _set(path, 1, "DETECTOR", 4), "detector 4, not D3"),
        (
            FLUX_CORRECTION,
            lambda path: _replace_data(path, "IMAGE", lambda data: data[:100]),
            "pixels",
        ),
        (
            FLUX_CORRECTION,
            lambda path: _replace_data(path, "IMAGE", lambda data: 3 * data),
            "not within",
        ),
        (SPECTRAL_WCS, lambda path: _set(path, "CWAVE", "BUNIT", "nm"), "BUNIT of CWAVE"),
        (SPECTRAL_WCS, lambda path: _set(path, "CBAND", "EXTNAME", "OTHER"), "CBAND"),
        (
            SPECTRAL_WCS,
            lambda path: _replace_data(path, "CWAVE", lambda data: 1000 * data),
            "CWAVE: 100% of the values",
        ),
        (EPSF, lambda path: _set(path, "EPSF", "EXTNAME", "OTHER"), "EPSF"),
        (EPSF, lambda path: _set(path, "EPSF", "DETECTOR", 2), "detector 2, not D3"),
    ],
)
def test_what_is_no_such_product_is_not_used(products, tmp_path, cache, family, spoil, words):
    product = copy(pick(products, family), tmp_path)
    spoil(product.path)
    with SimulatedArchive([], products=[product]) as archive:
        found = obtain(
            source(archive.archive_url), releases=["qr2"], skipped={*FAMILIES} - {family}
        )
        n_requests = sum(r.path.endswith(".fits") for r in archive.requests)
    assert not found.products
    assert words in found.missing[family]
    assert product.path.name in found.missing[family]
    # The same bytes a second time settle it.
    assert n_requests == 2
    assert not [*cache.glob("*.fits")]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(truncate=4000),
        Fault(short=2880),
        Fault(html=True),
        Fault(garbage=True),
        Fault(status=503, retry_after_s=0),
    ],
)
def test_a_transfer_that_fails_is_repeated(products, cache, fault):
    product = pick(products, EPSF)
    with SimulatedArchive([], products=products, faults={product.uri: [fault]}) as archive:
        found = obtain(source(archive.archive_url))
    assert [*cache.glob("*.fits")] == [cache / found.products[0].filename]
    assert (cache / found.products[0].filename).read_bytes() == product.path.read_bytes()


@pytest.mark.parametrize("fault", [Fault(truncate=4000), Fault(short=2880), Fault(status=403)])
def test_a_product_that_is_never_whole_is_not_used(products, cache, fault):
    faults = {pick(products, EPSF).uri: itertools.repeat(fault)}
    with SimulatedArchive([], products=products, faults=faults) as archive:
        found = obtain(source(archive.archive_url))
    assert {*found.missing} == {EPSF}
    assert not [*cache.glob("*.fits")]


def test_a_product_that_was_replaced_is_fetched_again(products, tmp_path, cache):
    product = copy(pick(products, EPSF), tmp_path)
    with SimulatedArchive([], products=[product]) as archive:
        where = source(archive.archive_url)
        (first,) = obtain(where).products
        (same,) = obtain(where).products
        n_requests = sum(r.path.endswith(".fits") for r in archive.requests)
        _set(product.path, 0, "HISTORY", "again")
        os.utime(product.path, (2e9, 2e9))
        (second,) = obtain(where).products
    assert first == same
    assert n_requests == 1
    assert first.token == second.token
    assert first.checksum != second.checksum
    # What was mapped stays as it is.
    assert (cache / first.filename).exists()


def _obtain_in_process(url: str, folder: Path, results) -> None:
    results.put(obtain(source(url), folder=folder).products)


@pytest.mark.slow
def test_two_processes_fetch_it_once(products, tmp_path):
    spawn = get_context("spawn")
    results = spawn.Queue()
    with SimulatedArchive([], products=products) as archive:
        arguments = (archive.archive_url, tmp_path / "shared", results)
        processes = [spawn.Process(target=_obtain_in_process, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        n_requests = sum(r.path.endswith(".fits") for r in archive.requests)
    assert found[0] == found[1] != ()
    assert n_requests == 1


def test_threads_fetch_it_once(products, cache):
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        threads = [threading.Thread(target=obtain, args=(where,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(r.path.endswith(".fits") for r in archive.requests) == 1


@pytest.mark.parametrize("loss", ["record", "content", "cut", "changed"])
def test_a_cache_that_lost_something_is_filled_again(products, cache, loss):
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        (product,) = obtain(where).products
        content, (record,) = cache / product.filename, cache.glob("*.json")
        whole = content.read_bytes()
        if loss == "record":
            record.unlink()
        elif loss == "content":
            content.unlink()
        else:
            content.write_bytes(whole[:-1] + (b"x" if loss == "changed" else b""))
        assert obtain(where).products == (product,)
        assert sum(r.path.endswith(".fits") for r in archive.requests) == 2
    assert content.read_bytes() == whole
    assert json.loads(record.read_bytes())["product"]["checksum"] == product.checksum


def test_a_copied_cache_is_as_good(products, cache, tmp_path):
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        expected = obtain(where)
        shutil.copytree(cache, tmp_path / "copy", copy_function=shutil.copyfile)
        assert obtain(where, folder=tmp_path / "copy") == expected
        assert sum(r.path.endswith(".fits") for r in archive.requests) == 1


def test_a_cache_that_cannot_be_written(products, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "file"))
    with (
        SimulatedArchive([], products=products) as archive,
        pytest.raises(InputError, match="SPXDASK_CACHE"),
    ):
        obtain(source(archive.archive_url))


def test_a_machine_without_the_file_fetches_it(products, tmp_path, monkeypatch, cache):
    product = copy(pick(products, EPSF), tmp_path)
    with SimulatedArchive([], products=[product]) as archive:
        where = source(archive.archive_url)
        (found,) = obtain(where).products
        monkeypatch.setenv("SPXDASK_CACHE", str(tmp_path / "other machine"))
        path = open_in_cache(found, where)
        assert path.is_relative_to(tmp_path / "other machine")
        assert open_products({EPSF: path}, "D3").psf is not None
        path.unlink()
        # Other content of the same length.
        _set(product.path, 0, "TELESCOP", "OTHER")
        with pytest.raises(ArchiveError, match="replaced"):
            open_in_cache(found, where)
        with pytest.raises(ArchiveError, match="is not in"):
            open_in_cache(found, None)


@pytest.mark.parametrize(
    "fault", [Fault(status=503, retry_after_s=0), Fault(html=True), Fault(truncate=20)]
)
def test_an_archive_that_does_not_list_is_asked_a_few_times(small, cache, fault):
    faults = {f"{LISTING}/": itertools.repeat(fault)}
    with SimulatedArchive([], products=small, faults=faults) as archive:
        patient = replace(QUICK, max_retries=100)
        found = obtain(source(archive.archive_url, retry=patient), skipped=())
        assert len(archive.requests) == 3
    assert {*found.missing} == {SPECTRAL_WCS, SOLID_ANGLE, EPSF}
    assert all("cannot be listed" in reason for reason in found.missing.values())


def test_a_server_without_any_listing_has_no_products(cache):
    faults = {LISTING: itertools.repeat(Fault(status=403))}
    with SimulatedArchive([], faults=faults) as archive:
        found = obtain(source(archive.archive_url))
    assert {*found.missing} == {EPSF}


def test_recorded_products_are_used_in_an_outage(products, cache):
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        recorded = obtain(where)
    pins = {EPSF: [NEWEST[EPSF, "D3"]]}
    where = replace(where, retry=replace(QUICK, max_retries=0))
    assert obtain(where, recorded=recorded).products == recorded.products
    assert obtain(where, recorded=recorded, pins=pins).products == recorded.products
    assert {*obtain(where, recorded=recorded).kept} == {EPSF}
    # Not if a band is added, or the file is lost.
    assert {*obtain(where, recorded=recorded, bands=["D1", "D3"]).missing} == {EPSF}
    (cache / recorded.products[0].filename).unlink()
    assert {*obtain(where, recorded=recorded).missing} == {EPSF}
    with pytest.raises(InputError, match="calibration_pins: epsf: "):
        obtain(where, recorded=recorded, pins=pins)


def test_a_listing_cannot_name_a_path(small, tmp_path):
    """Names are compared with those of products, and never used as they are."""
    product = replace(pick(small, EPSF), token="..")
    with SimulatedArchive([], products=[product]) as archive:
        assert find_tokens(source(archive.archive_url)) == {}


def test_the_length_of_a_product_is_limited(products, cache):
    with SimulatedArchive([], products=products) as archive:
        where = source(archive.archive_url)
        located = find_products(where, EPSF, ["D3"], releases=["qr3"])["D3"]
        for size in (0, 1 << 40):
            with pytest.raises(ArchiveError, match=f"{size} bytes"):
                obtain_product(replace(located, size=size), where)
        assert obtain_product(replace(located, size=None), where).size == located.size
