"""Calibration products: what is in the files, and the three ways in which they are listed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import objectstore
import pytest
import requests
from astropy.io import fits
from astropy.table import Table
from s3fs import S3FileSystem

from spxdask.simulate.archive import BUCKET, ArchivedFrame, Fault, SimulatedArchive, make_mirror
from spxdask.simulate.detector import make_gain_map
from spxdask.simulate.frames import (
    CALIBRATED_SCENE,
    Exposure,
    VaryingPsf,
    make_planes,
    make_sky,
    write_frame,
)
from spxdask.simulate.products import CATALOG, make_products

pytestmark = pytest.mark.slow

LISTING = "ibe/dir/list/spherex"
NEWEST = {
    "cal-sapm-v3-2026-191",
    "cal-swcs-v5-2026-191",
    "cal-epsf-v1-2026-191",
    "cal-epsf-v2-2026-191",
    "cal-flxc-v1-2026-191",
}
EXPOSURE = Exposure(
    obs_id="2025W51_1A_0684_2",
    detector=5,
    ra=10.0880653194,
    dec=40.8987511044,
    roll_deg=33.0,
    mjd_begin=61027.214984375,
)
WINDOW = (900, 900, 60, 50)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The newest products of detector 5, of full size."""
    folder = tmp_path_factory.mktemp("products")
    return {
        product.family: product.path
        for product in make_products(folder, detectors=[5], tokens=NEWEST)
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """All products of two detectors, of a few pixels, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("tree")
    return folder, make_products(folder, detectors=[1, 3], size=20)


@pytest.fixture(scope="module")
def archived(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames") / EXPOSURE.filename
    path.write_bytes(b"a frame")
    return ArchivedFrame.of(EXPOSURE, path)


@pytest.fixture
def served(tree, archived):
    with SimulatedArchive([archived], products=tree[1]) as archive:
        yield archive


def simulate(tmp_path, release, options=CALIBRATED_SCENE):
    exposure = replace(EXPOSURE, release=release)
    sky = make_sky(exposure.ra, exposure.dec, 0.1, n_sources=5, min_separation_arcsec=60.0, seed=1)
    planes = make_planes(exposure, sky, options, window=WINDOW)
    path = tmp_path / f"{release}.fits"
    write_frame(path, exposure, planes, window=WINDOW)
    return exposure, planes, path


def test_paths_are_the_archive_s(tmp_path):
    products = make_products(tmp_path, size=4)
    assert all(product.path == tmp_path / product.key for product in products)
    assert {product.uri for product in products} >= {
        "ibe/data/spherex/qr3/epsf/cal-epsf-v1-2026-191/1/epsf_D1_spx_cal-epsf-v1-2026-191.fits",
        "ibe/data/spherex/qr3/epsf/cal-epsf-v2-2026-191/3/epsf_D3_spx_cal-epsf-v2-2026-191.fits",
        "ibe/data/spherex/qr2/spectral_channels/cal-sch-v1-2026-106/"
        "spectral_channels_spx_cal-sch-v1-2026-106.fits.gz",
        "ibe/data/spherex/qr3/spectral_wcs/cal-swcs-v5-2026-191/5/"
        "spectral_wcs_D5_spx_cal-swcs-v5-2026-191.fits",
        "ibe/data/spherex/qr2/spectral_wcs/cal-wcs-v4-2025-254/5/"
        "spectral_wcs_D5_spx_cal-wcs-v4-2025-254.fits",
    }
    # Version 2 of the EPSF is for detector 3 alone, and version 1 for all others.
    epsf = {(p.token[9:11], p.detector) for p in products if p.family == "epsf"}
    assert epsf == {("v2", 3), *(("v1", detector) for detector in (1, 2, 4, 5, 6))}
    assert len(products) == sum(len(detectors) for *_, detectors in CATALOG) == 55
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == sorted(product.path for product in products)
    for product in products:
        with fits.open(product.path) as hdus:
            hdus.verify("exception")


@pytest.mark.parametrize("asked", [{"families": ["psf"]}, {"tokens": ["cal-epsf-v9-2026-191"]}])
def test_unknown_products_are_refused(tmp_path, asked):
    with pytest.raises(ValueError, match="unknown"):
        make_products(tmp_path, **asked)
    assert not any(tmp_path.iterdir())


def test_wavelength_maps_against_the_frame_s_table(full, tmp_path):
    with fits.open(full["spectral_wcs"]) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["CWAVE", "CBAND", "WCS-WAVE"]
        assert hdus["CWAVE"].header["BUNIT"] == hdus["CBAND"].header["BUNIT"] == "um"
        wave, band = hdus["CWAVE"].data, hdus["CBAND"].data
        lattice = hdus["WCS-WAVE"].data["VALUES"][0]
    assert wave.shape == band.shape == (2040, 2040)
    np.testing.assert_allclose(
        lattice[[0, -1]][:, [0, -1], 0], wave[[0, -1]][:, [0, -1]], rtol=1e-6
    )
    x0, y0, nx, ny = WINDOW
    y, x = np.mgrid[y0 : y0 + ny, x0 : x0 + nx]
    for release in ("qr2", "qr3"):
        exposure, planes, path = simulate(tmp_path, release)
        table_wave, table_band = exposure.wavelength(x, y)
        offset = wave[y, x] - table_wave
        # Version 5 is 0.0064 um from what frames before QR3 say; tables are good to 1 nm.
        np.testing.assert_allclose(offset, 0.0064, atol=1e-3)
        np.testing.assert_allclose(band[y, x], table_band, rtol=1e-3)
        at_source = wave[np.rint(planes.y).astype(int) + y0, np.rint(planes.x).astype(int) + x0]
        np.testing.assert_allclose(planes.wavelength_um, at_source, atol=5e-4)
        values = fits.getdata(path, "WCS-WAVE")["VALUES"][0][..., 0]
        shift = values - exposure.wave_table()[2][..., 0]
        np.testing.assert_allclose(shift, 0.0064 if release == "qr3" else 0.0, atol=1e-9)


def test_wavelengths_without_the_shift(tmp_path):
    options = {"detectors": [5], "families": ["spectral_wcs"], "size": 30}
    old, new = (
        fits.getdata(p.path, "CWAVE") for p in make_products(tmp_path / "shifted", **options)
    )
    np.testing.assert_allclose(new - old, 0.0064, atol=1e-6)
    old, new = (
        fits.getdata(p.path, "CWAVE")
        for p in make_products(tmp_path / "same", wavelength_shift=False, **options)
    )
    np.testing.assert_array_equal(new, old)


def test_solid_angles_are_those_of_the_frames(full):
    areas = fits.getdata(full["solid_angle_pixel_map"], "IMAGE")
    assert areas.shape == (2040, 2040)
    assert areas.dtype.newbyteorder("=") == np.float32
    assert fits.getheader(full["solid_angle_pixel_map"], "IMAGE")["BUNIT"] == "arcsec2"
    corners = EXPOSURE.wcs().all_pix2world(
        *np.array([(x, y) for y in (99.5, 100.5) for x in (1899.5, 1900.5)]).T, 0
    )
    ra, dec = np.radians(corners)
    width_x = np.hypot((ra[1] - ra[0]) * np.cos(dec[0]), dec[1] - dec[0])
    # The pixels are all but squares: the area of one is the product of its edges times the sine.
    edge_x = np.array([(ra[1] - ra[0]) * np.cos(dec[0]), dec[1] - dec[0]])
    edge_y = np.array([(ra[2] - ra[0]) * np.cos(dec[0]), dec[2] - dec[0]])
    area = abs(edge_x[0] * edge_y[1] - edge_x[1] * edge_y[0]) * np.degrees(3600.0) ** 2
    assert width_x > 0.0
    assert areas[100, 1900] == pytest.approx(area, rel=1e-4)


def test_epsf_product_is_that_of_the_frames(full, tmp_path):
    _, _, path = simulate(tmp_path, "qr3")
    with fits.open(full["epsf"]) as product, fits.open(path) as frame:
        assert [hdu.name for hdu in product[1:]] == ["EPSF", "EPSF_MOSAIC"]
        rows, mosaic = product["EPSF"].data, product["EPSF_MOSAIC"].data
        assert rows.names == frame["EPSF"].data.names
        assert rows.names[:6] == ["BINX", "BINY", "XCENTER", "YCENTER", "XWIDTH", "YWIDTH"]
        assert rows.names[6:] == ["NSTAR", "NEFF_MEAN", "CWAVE", "CBAND", "EPSF"]
        for name in rows.names:
            np.testing.assert_array_equal(rows[name], frame["EPSF"].data[name])
        row = rows[(rows["BINX"] == 4) & (rows["BINY"] == 17)][0]
        block = mosaic[17 * 33 : 18 * 33, 4 * 33 : 5 * 33]
        np.testing.assert_array_equal(block, row["EPSF"])


def test_epsf_of_another_psf(tmp_path):
    one, other = (
        fits.getdata(
            make_products(tmp_path / name, tokens=["cal-epsf-v2-2026-191"], psf=psf)[0].path
        )
        for name, psf in (("one", None), ("other", VaryingPsf(variation=0.0, elongation=0.0)))
    )
    assert len(one) == len(other) == 451
    assert np.ptp(one["NEFF_MEAN"]) > 10 * np.ptp(other["NEFF_MEAN"])


def test_flux_corrections_undo_the_gains(full):
    product = fits.getdata(full["l3_flux_corrections"], "IMAGE").astype(float)
    gain = make_gain_map(5)
    wild = product != gain
    assert 1e-4 < wild.mean() < 5e-4
    assert np.isnan(product).any()
    assert (np.nanmin(product), np.nanmax(product)) == pytest.approx((0.011, 3653.0))
    assert np.count_nonzero((product < 0.5) | (product > 2.0)) > 500


def test_cubes_list_their_zones_as_their_time_did(tmp_path):
    products = make_products(tmp_path, detectors=[2], families=["average_psf"])
    listed = {}
    for product in products:
        with fits.open(product.path) as hdus:
            header, cube = hdus["PSF"].header, hdus["PSF"].data
            listed[product.token] = header["XCTR_2"] != header["XCTR_1"]
            assert (cube.shape, header["OVERSAMP"]) == ((121, 101, 101), 10)
    assert listed == {
        "cal-psf-v4-2025-161": False,
        "cal-psf-v5-2025-206": False,
        "cal-psf-v5-2026-082": True,
    }


def test_channels(tmp_path):
    (product,) = make_products(tmp_path, families=["spectral_channels"], detectors=[], size=50)
    assert product.path.read_bytes()[:2] == b"\x1f\x8b"
    rows = Table.read(product.path, hdu="SPECTRAL_CHANNELS")
    assert rows.colnames == [
        *("DETECTOR", "SUBCHAN", "WAVELENGTH", "WL_MIN", "WL_MAX", "R", "R_STD", "BANDWIDTH")
    ]
    assert len(rows) == 102
    assert (rows["DETECTOR"][20], rows["SUBCHAN"][20]) == (2, 4)
    assert (rows["WL_MIN"] < rows["WAVELENGTH"]).all()
    assert rows["WAVELENGTH"][0] == 0.753
    channels = fits.getdata(product.path, "CHANNEL_MAP")
    assert channels.shape == (6, 50, 50)
    # The lowest rows have the shortest wavelengths.
    assert set(np.unique(channels[:, :5])) == {1, 2}
    for detector, plane in enumerate(channels, start=1):
        wavelength, _ = replace(EXPOSURE, detector=detector).wavelength(25, np.arange(50))
        limits = rows[(rows["DETECTOR"] == detector)][plane[:, 25].astype(int) - 1]
        assert (wavelength < limits["WL_MAX"] + 0.002).all()


def read(archive, path, **headers):
    request = urllib.request.Request(f"{archive.url}/{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers.get_content_type(), response.read()


def names(archive, folder):
    kind, body = read(archive, f"{LISTING}/{folder}")
    assert kind == "application/x-ndjson"
    return [json.loads(line)["name"] for line in body.splitlines()]


def test_listing_for_programs(served, tree):
    for slash in ("", "/"):
        assert names(served, f"qr3/epsf{slash}") == ["cal-epsf-v1-2026-191", "cal-epsf-v2-2026-191"]
    assert names(served, "qr3/epsf/cal-epsf-v2-2026-191") == ["3"]
    assert names(served, "") == ["qr2", "qr3"]
    assert "level2" in names(served, "qr2")
    _, body = read(served, f"{LISTING}/qr3/epsf/cal-epsf-v1-2026-191/1")
    (entry,) = map(json.loads, body.splitlines())
    path = tree[0] / "qr3/epsf/cal-epsf-v1-2026-191/1" / entry["name"]
    assert set(entry) == {"name", "last_modified", "size"}
    assert entry["size"] == path.stat().st_size
    _, body = read(served, f"{LISTING}/qr3")
    assert {json.loads(line)["size"] for line in body.splitlines()} == {None}
    # A part of a folder's name is not a folder.
    for folder in ("qr4/epsf", "qr3/eps", "qr3/epsf/cal-epsf-v2-2026-191/1"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(served, f"{LISTING}/{folder}")


def test_listing_for_people_names_no_file(served):
    kind, body = read(served, f"{LISTING}/qr3/epsf", Accept="text/html,application/xhtml+xml,*/*")
    assert kind == "text/html"
    assert b"cal-epsf" not in body


def test_products_are_served_and_fail_as_frames_do(served, tree):
    product = next(p for p in tree[1] if p.family == "epsf")
    assert read(served, product.uri)[1] == product.path.read_bytes()
    faults = [Fault(status=503), Fault(html=True), Fault(truncate=100), Fault(short=2880)]
    served.add_faults(product.uri, faults)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        read(served, product.uri)
    assert read(served, product.uri)[0] == "text/html"
    with pytest.raises(Exception, match="IncompleteRead"):
        read(served, product.uri)
    assert len(read(served, product.uri)[1]) == 2880
    listing = f"{LISTING}/qr3/epsf"
    served.add_faults(listing, [Fault(status=502), Fault(html=True), Fault(short=40)])
    with pytest.raises(urllib.error.HTTPError, match="502"):
        read(served, listing)
    assert read(served, listing)[0] == "text/html"
    assert len(read(served, listing)[1]) == 40
    assert len(names(served, "qr3/epsf")) == 2


def test_products_come_and_go(served, tree, tmp_path):
    (newer,) = make_products(tmp_path, detectors=[1], tokens=["cal-sapm-v3-2026-191"], size=8)
    newer = replace(newer, token="cal-sapm-v4-2026-300")
    served.add_products([newer])
    assert names(served, "qr3/solid_angle_pixel_map")[-1] == "cal-sapm-v4-2026-300"
    assert read(served, newer.uri)[1] == newer.path.read_bytes()
    served.remove_file(newer.uri)
    assert names(served, "qr3/solid_angle_pixel_map") == ["cal-sapm-v3-2026-191"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(served, newer.uri)
    with pytest.raises(KeyError):
        served.remove_file(newer.uri)


def list_bucket(archive, **query):
    answer = requests.get(f"{archive.url}/{BUCKET}/", {"list-type": "2"} | query, timeout=10)
    answer.raise_for_status()
    root = ElementTree.fromstring(answer.content)
    space = root.tag.removesuffix("ListBucketResult")
    keys = [e.text for e in root.iterfind(f"{space}Contents/{space}Key")]
    prefixes = [e.text for e in root.iterfind(f"{space}CommonPrefixes/{space}Prefix")]
    assert int(root.findtext(f"{space}KeyCount")) == len(keys) + len(prefixes)
    token = root.findtext(f"{space}NextContinuationToken")
    assert root.findtext(f"{space}IsTruncated") == ("true" if token else "false")
    return keys, prefixes, token


def test_bucket_lists_folders_and_keys(served, tree):
    keys, prefixes, _ = list_bucket(served, prefix="qr3/epsf/", delimiter="/")
    assert keys == []
    assert prefixes == ["qr3/epsf/cal-epsf-v1-2026-191/", "qr3/epsf/cal-epsf-v2-2026-191/"]
    keys, prefixes, _ = list_bucket(served, prefix="qr3/epsf/", **{"encoding-type": "url"})
    assert (keys, prefixes) == (sorted(p.key for p in tree[1] if p.family == "epsf"), [])
    assert list_bucket(served, prefix="nothing/", delimiter="/") == ([], [], None)


@pytest.mark.parametrize("delimiter", ["", "/"])
def test_bucket_gives_a_page_at_a_time(served, tree, delimiter):
    query = {"prefix": "qr2/" if delimiter else "", "delimiter": delimiter}
    whole, prefixes, token = list_bucket(served, **query)
    assert token is None
    found, found_prefixes, pages = [], [], 0
    more = {}
    while True:
        keys, common, token = list_bucket(served, **query, **{"max-keys": "2"}, **more)
        found, found_prefixes, pages = found + keys, found_prefixes + common, pages + 1
        if token is None:
            break
        more = {"continuation-token": token}
    assert (found, found_prefixes) == (whole, prefixes)
    assert pages == -(-(len(whole) + len(prefixes)) // 2) > 1


def test_requests_that_the_bucket_refuses(served):
    url = f"{served.url}/{BUCKET}"
    for query in (
        {},
        {"list-type": "2", "continuation-token": "?"},
        {"list-type": "2", "max-keys": "-1"},
    ):
        answer = requests.get(url, query, timeout=10)
        assert (answer.status_code, "InvalidArgument" in answer.text) == (400, True)


def test_bucket_by_s3fs(served, tree, archived, monkeypatch):
    objectstore.find(monkeypatch, served.url)
    store = S3FileSystem(
        anon=True,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"retries": {"max_attempts": 0}},
    )
    assert sorted(store.ls(f"{BUCKET}/qr3/epsf")) == [
        f"{BUCKET}/qr3/epsf/cal-epsf-v1-2026-191",
        f"{BUCKET}/qr3/epsf/cal-epsf-v2-2026-191",
    ]
    product = tree[1][0]
    assert store.cat_file(f"{BUCKET}/{product.key}") == product.path.read_bytes()
    assert store.info(f"{BUCKET}/{product.key}")["size"] == product.path.stat().st_size
    frame = f"{BUCKET}/{archived.uri.removeprefix('ibe/data/spherex/')}"
    assert store.cat_file(frame, start=2, end=5) == b"fra"
    with pytest.raises(FileNotFoundError):
        store.ls(f"{BUCKET}/qr9")
    with pytest.raises(FileNotFoundError):
        store.cat_file(f"{BUCKET}/qr9/nothing")
    served.add_faults(BUCKET, [Fault(status=503)])
    store.retries = 1
    with pytest.raises(OSError, match="Unavailable"):
        store.ls(f"{BUCKET}/qr3/epsf")


def test_an_object_that_changed_is_not_sent(served, tree):
    url = f"{served.url}/{BUCKET}/{tree[1][0].key}"
    tag = requests.get(url, timeout=10).headers["ETag"]
    for if_match, status in ((tag, 206), ('"other"', 412)):
        headers = {"Range": "bytes=10-19", "If-Match": if_match}
        assert requests.get(url, headers=headers, timeout=10).status_code == status


def test_mirror_is_the_bucket_on_a_disk(tree, archived, tmp_path):
    folder, products = tree
    make_mirror(tmp_path / "mirror", [archived], products)
    expected = {product.key for product in products} | {
        archived.uri.removeprefix("ibe/data/spherex/")
    }
    found = {
        str(path.relative_to(tmp_path / "mirror"))
        for path in (tmp_path / "mirror").rglob("*")
        if path.is_file()
    }
    assert found == expected
    # Products that are in their place already stay there.
    make_mirror(folder, [], products)
    make_mirror(tmp_path / "mirror", [archived], products)
    other = replace(archived, path=products[0].path)
    with pytest.raises(FileExistsError):
        make_mirror(tmp_path / "mirror", [other])
