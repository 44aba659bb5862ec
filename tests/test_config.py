from __future__ import annotations

import inspect
import os
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from datetime import date, datetime
from pathlib import Path
from typing import Literal, get_args, get_origin

import astropy.units as u
import numpy as np
import pandas as pd
import pytest
import yaml
from astropy.coordinates import Angle, Latitude, Longitude, SkyCoord
from astropy.table import Table
from astropy.time import Time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spxdask.config import (
    BANDS,
    IRSA_ARCHIVE_URL,
    IRSA_TAP_URL,
    RELEASES,
    SHORT_NAMES,
    BatchConfig,
    LiteralPath,
    check_options,
    expand_path,
    load_yaml,
    option_rows,
    read_options,
    template,
    to_yaml,
)
from spxdask.errors import ConfigError
from spxdask.science.flags import FLAGS
from spxdask.science.options import PhotometryConfig, list_options

REQUIRED = {"center_ra": 10.0, "center_dec": -20.0, "radius": 0.5, "catalog_path": "sources.csv"}
PHOTOMETRY_DEFAULTS = {
    "aperture_method": "fwhm",
    "aperture_diameter": 3.0,
    "fwhm_multiplier": 2.5,
    "background_method": "window",
    "window_size": 50,
    "subtract_zodi": True,
    "zodi_scale_min": 0.0,
    "zodi_scale_max": 10.0,
    "min_usable_pixels": 10,
    "bg_sigma_clip_sigma": 3.0,
    "bg_sigma_clip_maxiters": 3,
    "annulus_inner_offset": 1.414,
    "min_annulus_area": 10.0,
    "max_outer_radius": 5.0,
    "max_annulus_attempts": 5,
    "annulus_expansion_step": 0.5,
    "pixel_scale_fallback": 6.2,
    "bad_flags": (0, 1, 2, 6, 7, 9, 10, 11, 14, 15, 17, 19),
    "psf": "nearest",
    "psf_bad_flags": (2, 6, 9, 10, 11, 14, 15, 17),
}
BATCH_DEFAULTS = {
    "target": None,
    "coverage_mode": "any",
    "id_column": None,
    "ra_column": None,
    "dec_column": None,
    "on_bad_row": "error",
    "bands": None,
    "mjd_range": None,
    "release": "latest",
    "max_images": 500,
    "output_dir": "batch_output",
    "keep_images": True,
    "scratch_gb": 5.0,
    "max_download_workers": 4,
    "max_extract_workers": 12,
    "num_buckets": 64,
    "keep_bucket_files": False,
    "report": True,
    "per_image_format": "csv",
    "lightcurve_format": "csv",
    "read": "auto",
    "max_retries": 5,
    "stall_timeout": 30.0,
    "tap_url": IRSA_TAP_URL,
    "archive_url": IRSA_ARCHIVE_URL,
    "archive_endpoint": None,
    "outage_patience": 12 * 3600,
    "calibration": "archive",
    "calibration_pins": (),
    "contaminants_path": None,
    "photometry": PHOTOMETRY_DEFAULTS,
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SPXDASK_TAP_URL", raising=False)
    monkeypatch.delenv("SPXDASK_ARCHIVE_URL", raising=False)


def batch(**options) -> BatchConfig:
    return BatchConfig(**(REQUIRED | options))


def as_written(config) -> dict:
    return {option.name: getattr(config, option.name) for option in fields(config)}


def test_defaults():
    assert as_written(PhotometryConfig()) == PHOTOMETRY_DEFAULTS
    assert PhotometryConfig().window_shape == (50, 50)
    photometry = PhotometryConfig()
    assert as_written(batch()) == REQUIRED | BATCH_DEFAULTS | {"photometry": photometry}
    lists = {name: list(PHOTOMETRY_DEFAULTS[name]) for name in ("bad_flags", "psf_bad_flags")}
    plain = {"photometry": PHOTOMETRY_DEFAULTS | lists, "calibration_pins": {}}
    assert batch().to_dict() == REQUIRED | BATCH_DEFAULTS | plain


def test_default_types():
    for config in (batch(), PhotometryConfig()):
        for option in list_options(type(config)):
            value = getattr(config, option.name)
            if option.annotation in (float, int, bool, str) and value is not None:
                assert type(value) is option.annotation, option.name


def test_irsa_addresses():
    assert IRSA_TAP_URL == "https://irsa.ipac.caltech.edu/TAP"
    assert IRSA_ARCHIVE_URL == "https://irsa.ipac.caltech.edu"


def test_environment_gives_the_addresses(monkeypatch):
    monkeypatch.setenv("SPXDASK_TAP_URL", "http://127.0.0.1:8000/TAP/")
    monkeypatch.setenv("SPXDASK_ARCHIVE_URL", "http://127.0.0.1:8001")
    assert batch().tap_url == "http://127.0.0.1:8000/TAP"
    assert batch().archive_url == "http://127.0.0.1:8001"
    assert batch(tap_url="http://other/TAP").tap_url == "http://other/TAP"
    monkeypatch.setenv("SPXDASK_TAP_URL", "")
    assert batch().tap_url == IRSA_TAP_URL


def test_the_default_flags_are_those_of_the_registry():
    assert PhotometryConfig().bad_flags == tuple(flag.bit for flag in FLAGS if flag.bad)


@pytest.mark.parametrize("name", REQUIRED)
def test_required_options(name):
    rest = {k: v for k, v in REQUIRED.items() if k != name}
    for make in (lambda: BatchConfig(**rest), lambda: BatchConfig.from_dict(rest)):
        with pytest.raises(ConfigError, match=rf"^missing option: {name} \(") as caught:
            make()
        assert caught.value.option == name


def test_the_field():
    assert batch().region == "circle"
    assert batch().fetches_empty_frames
    assert not batch(keep_images=False).fetches_empty_frames
    anywhere = BatchConfig(catalog_path="x.csv")
    assert (anywhere.region, anywhere.fetches_empty_frames) == ("catalogue", False)
    target = BatchConfig(target="10.684 41.269")
    assert (target.region, target.fetches_empty_frames) == ("target", False)
    assert batch(catalog_path=None, target="10.684 41.269").region == "circle"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"radius": None}, "missing option: radius (center_ra, center_dec and radius are given"),
        ({"center_ra": None, "radius": None}, "missing option: center_ra, radius ("),
        ({"target": "10 20"}, "catalog_path and target exclude each other"),
        ({"catalog_path": None, "target": "M31"}, "target must be a position such as '10.684"),
        ({"catalog_path": None, "target": "10 95"}, "(its declination is 95 deg), got '10 95'"),
        ({"catalog_path": None, "target": 10.0}, "such as J004244.3+411609, got 10.0"),
        (
            {"center_ra": None, "center_dec": None, "radius": None, "coverage_mode": "full"},
            "coverage_mode must be any where center_ra, center_dec and radius give no circle",
        ),
    ],
)
def test_options_of_the_field_together(options, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        batch(**options)


def refuses(error: ConfigError, name: str, value, rule: str) -> None:
    """Assert what an error says; a number of the right type breaks only the limits."""
    assert error.option == name
    assert error.value is value or error.value == value
    assert error.rule in rule or rule in error.rule
    assert str(error).startswith(f"{name} must be {error.rule}, got ")
    assert len(str(error)) < 300
    assert "\n" not in str(error)


NOT_NUMBERS = ["3", True, float("nan"), float("inf"), -float("inf"), 10**400, [1.0], 1j]
NOT_INTEGERS = ["3", True, None, 3.0, float("nan"), [1]]
POSITIVE = [0, 0.0, -0.1, None, *NOT_NUMBERS]
AT_LEAST_ONE = [0, -1, *NOT_INTEGERS]
PIXELS = "an integer from 3 to 500 (pixels), or a pair of them"
NO_STORES = ["nowhere://bucket", "http://host/x", "https://host/x", "s3://", "s3:///x", "s3://["]


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("center_ra", [-0.1, 360.1, *NOT_NUMBERS], "a number >= 0 and <= 360"),
        ("center_dec", [-90.1, 90.1, *NOT_NUMBERS], "a number >= -90 and <= 90"),
        ("radius", [90.1, 0, -0.1, *NOT_NUMBERS], "a number > 0 and <= 90"),
        ("catalog_path", ["", b"x", 3, "a\0b"], "a path"),
        ("catalog_path", NO_STORES, "a path, or the URL of a store, such as s3://"),
        ("coverage_mode", ["all", "ANY", None, 3, ["any"]], "any or full"),
        (
            "bands",
            [
                [],
                "D7",
                ["D7"],
                [0],
                [7],
                [True],
                [3.0],
                [["D1"]],
                [None],
                12,
                "",
                {"D1": 1},
                ["all"],
            ],
            "D1 to D6",
        ),
        (
            "mjd_range",
            [[], [61000], [61001, 61000], [1, 2, 3], ["a", "b"], 61000, {61000, 61001}, [[1], 2]],
            "two MJDs",
        ),
        (
            "release",
            [None, 2, "", [], "lates", "al", "q r", "latest,qr2", [1]],
            "latest, all, or names",
        ),
        ("max_images", AT_LEAST_ONE, "an integer >= 1"),
        ("output_dir", ["", None, 3], "a path"),
        ("output_dir", NO_STORES, "a path, or the URL of a store, such as s3://"),
        ("scratch_gb", [1e7, *POSITIVE], "a number > 0 and <= 1000000"),
        ("max_download_workers", [1001, *AT_LEAST_ONE], "an integer >= 1 and <= 1000"),
        ("max_extract_workers", [10001, *AT_LEAST_ONE], "an integer >= 1 and <= 10000"),
        ("num_buckets", [100001, *AT_LEAST_ONE], "an integer >= 1 and <= 100000"),
        ("keep_bucket_files", [0, 1, None, "true"], "true or false"),
        ("per_image_format", ["CSV", "fits", "", None, 1, True], "csv or parquet"),
        ("lightcurve_format", ["Parquet", "both", None, ["csv"]], "csv, parquet or hats"),
        ("max_retries", [-1, 101, *NOT_INTEGERS], "an integer >= 0 and <= 100"),
        ("stall_timeout", [3601, *POSITIVE], "a number > 0 and <= 3600"),
        ("tap_url", ["", "irsa", "ftp://x", "http://", "http://[", None, 3], "http or https URL"),
        ("tap_url", ["http://host:70000/TAP", "http://host:x/TAP"], "http or https URL"),
        ("tap_url", ["s3://bucket/TAP", "file:///TAP"], "http or https URL"),
        (
            "archive_url",
            ["", "irsa", "ftp://x", "gs://b", "https:///x", "http://[", "s3://", "file://", None],
            "an http, https, s3 or file URL, such as s3://nasa-irsa-spherex",
        ),
        ("photometry", [3, [], "fwhm", False], "a PhotometryConfig or a mapping"),
    ],
)
def test_batch_options_have_rules(name, values, allowed):
    for value in values:
        for attempt in (batch, lambda **options: check_options(BatchConfig, options)):
            with pytest.raises(ConfigError) as caught:
                attempt(**{name: value})
            refuses(caught.value, name, value, allowed)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("aperture_method", ["FWHM", None, 1], "fwhm or fixed"),
        ("aperture_diameter", [200.1, *POSITIVE], "a number > 0 and <= 200"),
        ("fwhm_multiplier", [50.1, *POSITIVE], "a number > 0 and <= 50"),
        ("background_method", ["", "sky", None], "window or annulus"),
        ("window_size", [2, 501, 50.0, "50", True, None, [], [50], [50, 2], [5, 5, 5]], PIXELS),
        ("window_size", [{50, 40}, (50.0, 40), (True, 40)], PIXELS),
        ("subtract_zodi", [0, 1, "yes", None], "true or false"),
        ("zodi_scale_min", [None, *NOT_NUMBERS], "a number >= -1000000 and <= 1000000"),
        ("zodi_scale_max", [None, *NOT_NUMBERS], "a number >= -1000000 and <= 1000000"),
        ("zodi_scale_max", [0, -1], "> zodi_scale_min, which is 0.0"),
        ("min_usable_pixels", AT_LEAST_ONE, "an integer >= 1"),
        ("bg_sigma_clip_sigma", POSITIVE, "a number > 0 and <= 1000"),
        ("bg_sigma_clip_maxiters", [-1, *NOT_INTEGERS], "an integer >= 0 and <= 1000"),
        ("annulus_inner_offset", [-1, *NOT_NUMBERS], "a number >= 0 and <= 200"),
        ("min_annulus_area", POSITIVE, "a number > 0 and <= 1000000"),
        ("max_outer_radius", [501, *POSITIVE], "a number > 0 and <= 500"),
        ("max_annulus_attempts", [-1, *NOT_INTEGERS], "an integer >= 0 and <= 1000"),
        ("annulus_expansion_step", POSITIVE, "a number > 0 and <= 100"),
        ("pixel_scale_fallback", POSITIVE, "a number > 0 and <= 1000"),
        (
            "bad_flags",
            [None, 3, "012", [32], [-1], [1.0], [True], ["1"], {1: 2}],
            "of flags",
        ),
    ],
)
def test_photometry_options_have_rules(name, values, allowed):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            PhotometryConfig(**{name: value})
        refuses(caught.value, name, value, allowed)
        with pytest.raises(ConfigError) as caught:
            batch(photometry={name: value})
        refuses(caught.value, f"photometry.{name}", value, allowed)


@pytest.mark.parametrize("name", ["center_ra", "center_dec"])
def test_text_that_is_no_number_of_degrees(name):
    for value in ("00:42:44", "-66:30:00", "10d", "ten", ""):
        with pytest.raises(ConfigError) as caught:
            batch(**{name: value})
        assert re.search(r"\d, in decimal degrees \(not as [-:\d]+\)$", caught.value.rule)
    for value in ("3", 400):
        with pytest.raises(ConfigError) as caught:
            batch(**{name: value})
        assert "decimal degrees" not in caught.value.rule


def test_the_sentence_of_an_error():
    with pytest.raises(ConfigError) as caught:
        batch(radius=-1)
    assert str(caught.value) == "radius must be > 0 and <= 90, got -1"
    with pytest.raises(ConfigError) as caught:
        batch(radius=np.float64("nan"))
    assert str(caught.value) == "radius must be a number > 0 and <= 90, got nan"
    with pytest.raises(ConfigError) as caught:
        PhotometryConfig(bad_flags=["HOT", "COLDD"])
    assert "('COLDD' is not a flag, did you mean COLD?), got ['HOT', 'COLDD']" in str(caught.value)


def test_lists_within_lists_without_end():
    endless = []
    endless.append(endless)
    for name in ("bands", "mjd_range", "radius"):
        with pytest.raises(ConfigError, match=rf"^{name} must be .*, got \[\[\.\.\.\]\]$"):
            batch(**{name: endless})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({s: 1}, f"unknown option '{s}': did you mean {name}?")
            for s, name in SHORT_NAMES.items()
        ),
        ({"fwhm_multiplier": 3}, "option 'fwhm_multiplier': it belongs under photometry"),
        ({"window_size": 3}, "unknown option 'window_size': it belongs under photometry"),
        ({"photometry": {"ra": 3}}, "photometry: unknown option 'ra': known options are aperture_"),
        ({"centre_ra": 1.0}, "unknown option 'centre_ra': did you mean center_ra?"),
        ({"radus": 1.0}, "unknown option 'radus': did you mean radius?"),
        ({"num_bucket": 1}, "unknown option 'num_bucket': did you mean num_buckets?"),
        ({"zzz": 1}, "unknown option 'zzz': known options are center_ra, center_dec, "),
        ({7: 1}, "unknown option 7: known options are "),
        ({"photometry": {"window": 3}}, "photometry: unknown option 'window': did you mean "),
        ({"photometry": {"fwhm_mult": 3}}, "did you mean fwhm_multiplier?"),
    ],
)
def test_unknown_options_are_errors_with_a_hint(options, message):
    for attempt in (BatchConfig.from_dict, lambda values: check_options(BatchConfig, values)):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            attempt(REQUIRED | options)
        assert caught.value.option.split(".")[-1] in message


def test_unknown_arguments_are_errors_with_a_hint():
    with pytest.raises(TypeError, match=r"^unknown option 'radus': did you mean radius\?$"):
        batch(radus=1)
    with pytest.raises(TypeError, match="positional"):
        BatchConfig(1.0, 2.0)


def test_unknown_options_come_before_missing_ones():
    with pytest.raises(ConfigError, match=r"^unknown option 'ra': did you mean center_ra\?$"):
        BatchConfig.from_dict({"ra": 10.0, "dec": -20.0})


def test_from_dict_needs_a_mapping():
    with pytest.raises(ConfigError, match="BatchConfig needs a mapping of options, got \\[1\\]"):
        BatchConfig.from_dict([1])


@pytest.mark.parametrize(
    ("name", "value", "becomes"),
    [
        ("center_ra", np.float64(12.5), 12.5),
        ("center_dec", np.float32(-0.5), -0.5),
        ("radius", np.int64(2), 2.0),
        ("radius", 2, 2.0),
        ("center_ra", 0, 0.0),
        ("center_ra", 360, 360.0),
        ("center_ra", np.array(12.5), 12.5),
        ("max_images", np.array(12), 12),
        ("center_ra", Longitude("1d"), 1.0),
        ("center_ra", Angle(1.5, u.deg), 1.5),
        ("center_ra", 90 * u.arcmin, 1.5),
        ("center_dec", Latitude("-66d30m"), -66.5),
        ("center_dec", -0.5 * u.deg, -0.5),
        ("radius", 30 * u.arcmin, 0.5),
        ("radius", u.Quantity(np.float32(0.25), "deg"), 0.25),
        ("catalog_path", Path("data") / "sources.csv", "data/sources.csv"),
        ("catalog_path", np.str_("sources.csv"), "sources.csv"),
        ("output_dir", Path("."), "."),
        ("output_dir", "s3://bucket/run//", "s3://bucket/run"),
        ("output_dir", "memory://run", "memory://run"),
        ("output_dir", "a:b/c", "a:b/c"),
        ("output_dir", "out/", "out/"),
        ("catalog_path", "s3://bucket/sources.csv", "s3://bucket/sources.csv"),
        ("scratch_gb", np.float32(0.5), 0.5),
        ("lightcurve_format", np.str_("parquet"), "parquet"),
        ("coverage_mode", np.str_("full"), "full"),
        ("bands", ("D4", "D3", "D4"), ("D3", "D4")),
        ("bands", "D3", ("D3",)),
        ("bands", "d4, D3", ("D3", "D4")),
        ("bands", 3, ("D3",)),
        ("bands", [4, 3], ("D3", "D4")),
        ("bands", ["4", "D3"], ("D3", "D4")),
        ("bands", np.array([3, 4]), ("D3", "D4")),
        ("mjd_range", ("2025-05-01", "2025-06-01T12:00:00"), (60796.0, 60827.5)),
        ("mjd_range", ("2025-05-01T02:00:00+02:00", "2025-06-01T12:00:00Z"), (60796.0, 60827.5)),
        ("mjd_range", (60000, date(2025, 5, 1)), (60000.0, 60796.0)),
        ("mjd_range", [datetime(2025, 5, 1, 6), pd.Timestamp("2025-06-01")], (60796.25, 60827.0)),
        ("mjd_range", np.array(["2025-05-01", "2025-06-01"], "M8[D]"), (60796.0, 60827.0)),
        ("mjd_range", Time(["2025-05-01", "2025-06-01"]), (60796.0, 60827.0)),
        ("mjd_range", [Time(60796, format="mjd"), Time("2025-06-01")], (60796.0, 60827.0)),
        ("id_column", "my id", "my id"),
        ("bands", {"D6"}, ("D6",)),
        ("bands", ["d4", "D3", "D4"], ("D3", "D4")),
        ("bands", np.array(["D2", "D1"]), ("D1", "D2")),
        ("mjd_range", [np.int32(61000), np.float32(61000.5)], (61000.0, 61000.5)),
        ("mjd_range", np.array([1.0, 1.0]), (1.0, 1.0)),
        ("max_images", np.int16(7), 7),
        ("keep_bucket_files", np.True_, True),
        ("tap_url", "http://host:80/TAP//", "http://host:80/TAP"),
        ("archive_url", "s3://nasa-irsa-spherex/", "s3://nasa-irsa-spherex"),
        ("archive_url", "file:///data/spherex/", "file:///data/spherex"),
        ("archive_url", "HTTPS://Host/Path/", "https://Host/Path"),
        ("archive_url", "S3://nasa-irsa-spherex", "s3://nasa-irsa-spherex"),
        ("archive_url", "File:///Data", "file:///Data"),
        ("tap_url", "HTTP://host:80/TAP", "http://host:80/TAP"),
        ("photometry", {}, PhotometryConfig()),
        ("photometry", None, PhotometryConfig()),
    ],
)
def test_values_are_kept_in_their_plain_type(name, value, becomes):
    config = batch(**{name: value})
    found = getattr(config, name)
    assert found == becomes
    assert type(found) is type(becomes)
    assert BatchConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("center_ra", 3 * u.s),
        ("center_dec", u.Quantity(3)),
        ("radius", 3 * u.pix),
        ("radius", [1, 2] * u.deg),
        ("radius", -1 * u.deg),
        ("center_ra", Angle("-1d")),
        ("stall_timeout", 3 * u.s),
        ("max_images", 3 * u.one),
    ],
)
def test_quantities_that_are_refused(name, value):
    with pytest.raises(ConfigError) as caught:
        batch(**{name: value})
    assert caught.value.option == name
    assert str(caught.value).endswith(f", got {value!r}")
    if name.startswith("center") and value.unit != u.deg:
        assert caught.value.rule == "an angle or a number of degrees"


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "/scratch/me")
    monkeypatch.setenv("RUN", "r1")
    monkeypatch.delenv("NOWHERE", raising=False)
    for name in ("catalog_path", "output_dir"):
        for value, becomes in {
            "~/x": "/home/me/x",
            "~": "/home/me",
            "$WORK/x": "/scratch/me/x",
            "${WORK}/x_${RUN}.csv": "/scratch/me/x_r1.csv",
            "s3://$RUN/a/$RUN": "s3://$RUN/a/r1",
            "file://$WORK/x": "file:///scratch/me/x",
            "a$$b": "a$b",
            "a$/b$1": "a$/b$1",
            "x/~": "x/~",
        }.items():
            if value.startswith("file:"):
                continue
            assert getattr(batch(**{name: value}), name) == becomes
            assert expand_path(Path(value) if "://" not in value else value) == becomes
        for value in ("$NOWHERE/x", "s3://bucket/${NOWHERE}"):
            with pytest.raises(ConfigError) as caught:
                batch(**{name: value})
            assert caught.value.option == name
            assert "($NOWHERE is not" in caught.value.rule
            with pytest.raises(ConfigError, match=r"output_dir must be .*\$NOWHERE is not"):
                expand_path(value)
    for value, becomes in {
        "file://$WORK/mirror/": "file:///scratch/me/mirror",
        "file:~/mirror": "file:/home/me/mirror",
        "https://$RUN/$RUN": "https://$RUN/$RUN",
    }.items():
        assert batch(archive_url=value).archive_url == becomes
    with pytest.raises(ConfigError, match=r"archive_url must be .*\$NOWHERE is not"):
        batch(archive_url="file://$NOWHERE/x")


def test_paths_are_expanded_once(monkeypatch, tmp_path):
    monkeypatch.setenv("ODD", "/data/a$HOME")
    config = batch(output_dir="$ODD/x", catalog_path=LiteralPath("/a$ODD.csv"))
    assert (config.output_dir, config.catalog_path) == ("/data/a$HOME/x", "/a$ODD.csv")
    round_trips(config, tmp_path / "run.yaml")
    assert replace(config, max_images=1).output_dir == config.output_dir
    assert type(batch(catalog_path=LiteralPath("plain")).catalog_path) is str


@pytest.mark.parametrize(
    ("value", "becomes", "shape"),
    [
        (np.int64(31), 31, (31, 31)),
        ([20, 40], (20, 40), (20, 40)),
        ((np.int64(20), 40), (20, 40), (20, 40)),
        (np.array([20, 40]), (20, 40), (20, 40)),
    ],
)
def test_window_size(value, becomes, shape):
    config = PhotometryConfig(window_size=value)
    assert config.window_size == becomes
    assert config.window_shape == shape
    assert PhotometryConfig.from_dict(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        ([], ()),
        ([21, 0, 21], (0, 21)),
        ((np.int64(3), np.uint8(31)), (3, 31)),
        (np.array([5, 4]), (4, 5)),
        ({9, np.int64(2)}, (2, 9)),
        (["hot", "SOURCE", 10, 0], (0, 10, 21)),
        (np.array(["COLD"]), (11,)),
    ],
)
def test_bad_flags(value, becomes):
    config = PhotometryConfig(bad_flags=value)
    assert config.bad_flags == becomes
    assert {type(bit) for bit in config.bad_flags} <= {int}


def test_arguments_are_not_changed():
    bands, options = ["D2", "D1"], {"bad_flags": [3, 1]}
    batch(bands=bands, photometry=options)
    assert bands == ["D2", "D1"]
    assert options == {"bad_flags": [3, 1]}


def between(low, high, **more):
    return st.floats(low, high, **more)


PHOTOMETRY = st.fixed_dictionaries(
    {},
    optional={
        "aperture_method": st.sampled_from(["fwhm", "fixed"]),
        "aperture_diameter": between(0, 200, exclude_min=True),
        "fwhm_multiplier": between(0, 50, exclude_min=True),
        "background_method": st.sampled_from(["window", "annulus"]),
        "window_size": st.integers(3, 500)
        | st.tuples(st.integers(3, 500), st.integers(3, 500))
        | st.lists(st.integers(3, 500), min_size=2, max_size=2),
        "subtract_zodi": st.booleans(),
        "zodi_scale_min": between(-1e6, 0),
        "zodi_scale_max": between(0, 1e6, exclude_min=True) | st.integers(1, 1000000),
        "min_usable_pixels": st.integers(1, 10**30),
        "bg_sigma_clip_sigma": between(0, 1000, exclude_min=True),
        "bg_sigma_clip_maxiters": st.integers(0, 1000),
        "annulus_inner_offset": between(0, 200),
        "min_annulus_area": between(0, 1e6, exclude_min=True),
        "max_outer_radius": between(0, 500, exclude_min=True),
        "max_annulus_attempts": st.integers(0, 1000),
        "annulus_expansion_step": between(0, 100, exclude_min=True),
        "pixel_scale_fallback": between(0, 1000, exclude_min=True),
        "bad_flags": st.lists(st.integers(0, 31)),
    },
).map(
    # A fixed aperture has to leave room for its background; that is tested by itself.
    lambda options: {k: v for k, v in options.items() if k != "aperture_method" or v == "fwhm"}
)
# Those that are expanded are tested by themselves; - is the standard input.
PATHS = st.text(min_size=1).filter(
    lambda text: not set("\0$") & set(text) and "://" not in text and text[0] != "~" and text != "-"
) | st.sampled_from(
    [
        "null",
        "2026-01-01",
        "1e3",
        "- a",
        "a: b",
        "'",
        "#x",
        "yes",
        " x ",
        "0x1F",
        "a\nb",
        "é",
        "\udc80",
        "\x85",
        "a\u2028b",
    ]
)
BATCH = st.fixed_dictionaries(
    {
        "center_ra": between(0, 360),
        "center_dec": between(-90, 90),
        "radius": between(0, 90, exclude_min=True),
        "catalog_path": PATHS,
    },
    optional={
        "coverage_mode": st.sampled_from(["any", "full"]),
        "bands": st.none() | st.lists(st.sampled_from(BANDS), min_size=1),
        "mjd_range": st.none() | st.tuples(between(0, 1e6), between(0, 1e6)).map(sorted).map(tuple),
        "release": st.sampled_from((*RELEASES, "qr3", "dr1", "qr2,qr3")),
        "max_images": st.integers(1),
        "output_dir": PATHS,
        "keep_images": st.booleans(),
        "scratch_gb": between(0, 1e6, exclude_min=True),
        "max_download_workers": st.integers(1, 1000),
        "max_extract_workers": st.integers(1, 10000),
        "num_buckets": st.integers(1, 100000),
        "keep_bucket_files": st.booleans(),
        "report": st.booleans(),
        "per_image_format": st.sampled_from(["csv", "parquet"]),
        "lightcurve_format": st.sampled_from(["csv", "parquet", "hats"]),
        "max_retries": st.integers(0, 100),
        "stall_timeout": between(0, 3600, exclude_min=True),
        "tap_url": st.just("http://127.0.0.1:80/TAP"),
        "archive_url": st.just("https://example.org/a b?c=ü#'"),
        "photometry": PHOTOMETRY,
    },
)


def round_trips(config, path):
    """Through YAML, dictionaries and pickle; repr tells -0.0 from 0.0 and 1 from 1.0."""
    text = to_yaml(config, path)
    assert path.read_text(encoding="utf-8") == text
    for back in (
        load_yaml(type(config), path),
        type(config).from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
    ):
        assert back == config
        assert repr(back) == repr(config)
        assert hash(back) == hash(config)


@given(PHOTOMETRY)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_photometry_round_trip(tmp_path, options):
    config = PhotometryConfig(**options)
    round_trips(config, tmp_path / "photometry.yaml")
    assert config == PhotometryConfig.from_dict(options)


@given(BATCH)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_batch_round_trip(tmp_path, options):
    config = BatchConfig(**options)
    round_trips(config, tmp_path / "run.yaml")
    assert config.catalog_path == options["catalog_path"]
    assert config.center_ra == options["center_ra"]


def test_configurations_differ_by_any_option():
    assert batch() == batch()
    assert batch() != batch(max_images=499)
    assert batch() != batch(photometry={"window_size": 51})
    assert PhotometryConfig() != PhotometryConfig(bad_flags=[])


def test_options_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        batch().radius = 2.0


def test_what_dataclasses_offer():
    config = batch(bands=["D1"])
    assert replace(config, radius=2).radius == 2.0
    assert asdict(config)["photometry"]["window_size"] == 50
    with pytest.raises(ConfigError, match=r"^radius must be"):
        replace(config, radius="2")
    assert len({config, batch(bands=("D1",)), batch()}) == 2


@pytest.mark.parametrize("options", [BatchConfig, PhotometryConfig])
def test_the_signature_has_every_option(options):
    parameters = inspect.signature(options).parameters
    assert list(parameters) == [option.name for option in fields(options)]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert required == set()
    assert "FieldInfo" not in str(parameters.values())


def test_rows_of_a_table_of_options(monkeypatch):
    monkeypatch.setenv("SPXDASK_TAP_URL", "http://127.0.0.1:9/TAP")
    rows = {name: rest for name, *rest in option_rows(BatchConfig)}
    assert [*rows, "photometry"] == [option.name for option in fields(BatchConfig)]
    assert rows["radius"] == [
        "null",
        "radius of the field; null for the sky about the sources [deg]",
    ]
    assert [rows[name][0] for name in ("bands", "keep_images")] == ["null", "true"]
    assert rows["tap_url"][0] == IRSA_TAP_URL
    rows = {name: rest for name, *rest in option_rows(PhotometryConfig)}
    assert list(rows) == [option.name for option in fields(PhotometryConfig)]
    assert rows["bad_flags"][0] == str(list(PHOTOMETRY_DEFAULTS["bad_flags"]))


def test_nothing_heavy_is_imported_for_options():
    for module, without in {
        "spxdask.science.options": "numpy ruamel.yaml yaml fsspec upath dask astropy fcntl",
        "spxdask.config": "ruamel.yaml yaml fsspec upath dask astropy fcntl",
    }.items():
        code = f"import sys, {module}; print({set(without.split())} & set(sys.modules))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout.strip() == "set()", out.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"center_ra: [", "line 1: expected the node content, but found"),
        (b"- 1\n- 2\n", "a mapping of options is needed"),
        (b"", "missing option: catalog_path (or target)"),
        (b"\xff\xfe\xfa", "decode"),
        (b"output_dir: 2026-02-31\n", "day"),
        (b"max_image: 3\n", "did you mean max_images?"),
        (b"ra: 3\n", "did you mean center_ra?"),
        (b"? [a, b]\n: 1\n", "unknown option ('a', 'b'): known options are"),
        (b"radius: 1\n{a: b}: 1\n", "line 2: a list or mapping cannot be the name of an option"),
        (b"!!map [a]\n", "expected a mapping node"),
        (b"[" * 1000, "within each other without end"),
        (b"a: " + b"{a: " * 1000, "within each other without end"),
        (
            b"bands: &all [*all]\n" + yaml.safe_dump(REQUIRED).encode(),
            "bands must be a list of some of D1 to D6, or null for all, got [[...]]",
        ),
        (b"x: !!int [1]\n", "line 1: expected a scalar node, but found sequence"),
        (b"x: !!bool maybe\n", "unknown value 'maybe'"),
        (b"x: !!timestamp soon\n", "line 1: failed to construct timestamp"),
        (
            b"center_ra: 400\ncenter_dec: 0\nradius: 1\ncatalog_path: x\n",
            "<= 360, got 400",
        ),
        (b"x: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        BatchConfig.from_yaml(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_heading_with_nothing_below_it_means_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(REQUIRED) + "photometry:\n  # window_size: 30\n")
    assert BatchConfig.from_yaml(path) == batch()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: No such file or directory$"):
        BatchConfig.from_yaml(tmp_path / "absent.yaml")


def test_errors_survive_the_way_between_processes():
    with pytest.raises(ConfigError) as caught:
        batch(radius=-1)
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is ConfigError
    assert str(back) == str(caught.value)
    assert (back.option, back.value, back.rule) == ("radius", -1, "> 0 and <= 90")
    assert isinstance(back, ValueError)


@pytest.mark.parametrize(
    "value",
    [
        Table({"ra": [1.0]}),
        pd.DataFrame({"ra": [1.0]}),
        SkyCoord(1, 2, unit="deg"),
        np.zeros(2, [("ra", float)]),
    ],
    ids=["Table", "DataFrame", "SkyCoord", "array"],
)
def test_a_catalogue_may_be_an_object(value):
    config = batch(catalog_path=value)
    assert config == batch(catalog_path=value)
    assert hash(config.catalog_path) == hash(batch(catalog_path=value).catalog_path)
    assert replace(config, radius=2.0).catalog_path == config.catalog_path
    assert f"catalog_path=<{type(value).__name__}>" in repr(config)
    with pytest.raises(ConfigError, match="which YAML cannot hold") as raised:
        config.to_yaml()
    assert raised.value.option == "catalog_path"


@pytest.mark.parametrize("value", [{"ra": [1.0]}, [1, 2], np.zeros(2), pd.Series([1.0]), 1 * u.deg])
def test_other_objects_are_no_catalogue(value):
    with pytest.raises(ConfigError, match="a table, a DataFrame or a SkyCoord"):
        batch(catalog_path=value)


def filled_template() -> str:
    text = template()
    for name, value in REQUIRED.items():
        assert text.count(f"\n{name}:\n") == 1
        text = text.replace(f"\n{name}:\n", f"\n{name}: {value}\n")
    return text


def test_template_names_every_option():
    parsed = yaml.safe_load(template())
    assert list(parsed) == [option.name for option in fields(BatchConfig)]
    assert list(parsed["photometry"]) == [option.name for option in fields(PhotometryConfig)]
    assert {name for name, value in parsed.items() if value is None} == {
        *REQUIRED, "target", "id_column", "ra_column", "dec_column", "archive_endpoint", "bands",
        "mjd_range", "contaminants_path",
    }  # fmt: skip


def test_every_option_of_the_template_is_explained():
    lines = template().splitlines()
    assert max(map(len, lines)) <= 100
    options = [i for i, line in enumerate(lines) if re.match(r" *\w+:", line)]
    assert len(options) == len(fields(BatchConfig)) + len(fields(PhotometryConfig))
    assert all(lines[i - 1].lstrip().startswith("# ") for i in options)


@pytest.mark.parametrize(
    ("options", "n_choices"), [(BatchConfig, 5), (PhotometryConfig, 3)], ids=["run", "photometry"]
)
def test_choices_are_named_where_the_option_is_explained(options, n_choices):
    found = {
        option.name: (option, get_args(option.annotation))
        for option in list_options(options)
        if get_origin(option.annotation) is Literal
    }
    assert len(found) == n_choices
    for name, (option, choices) in found.items():
        assert all(f"'{choice}'" in option.description for choice in choices), name


@pytest.mark.parametrize("options", [BatchConfig, PhotometryConfig])
def test_every_option_is_a_parameter_of_the_docstring(options):
    head, parameters = inspect.getdoc(options).split("Parameters\n----------\n")
    parameters, raises = parameters.split("\n\nRaises\n------\n")
    assert head.endswith("\n\n")
    assert raises.startswith("ConfigError\n    ")
    named = [line for line in parameters.splitlines() if not line.startswith("    ")]
    assert [line.split(" : ")[0] for line in named] == [option.name for option in fields(options)]
    assert max(map(len, parameters.splitlines())) <= 100
    assert parameters.count("\n    ") >= len(named)


def test_the_docstring_does_not_follow_the_environment():
    code = "from spxdask import BatchConfig; print(BatchConfig.__doc__)"
    env = os.environ | {"SPXDASK_TAP_URL": "http://127.0.0.1:9/TAP"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert "tap_url : str, optional" in out
    assert "127.0.0.1" not in out


def test_filled_template_is_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(filled_template(), encoding="utf-8")
    assert BatchConfig.from_yaml(path) == batch()


def test_unfilled_template_asks_for_what_is_missing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(template(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.yaml: missing option: catalog_path \(or target\)"):
        BatchConfig.from_yaml(path)


def test_template_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SPXDASK_TAP_URL", "http://127.0.0.1:9/TAP")
    assert yaml.safe_load(template())["tap_url"] == "http://127.0.0.1:9/TAP"


def test_yaml_is_read_as_people_mean_it(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["center_ra: 1e1", "center_dec: -05", "radius: .5", "catalog_path: 007.csv"]
    path.write_text("\n".join(lines))
    config = BatchConfig.from_yaml(path)
    assert (config.center_ra, config.center_dec, config.radius) == (10.0, -5.0, 0.5)
    assert config.catalog_path == "007.csv"
    path.write_text("\n".join(["center_dec: -1:30", *lines[:1], *lines[2:]]))
    with pytest.raises(ConfigError, match=r"center_dec must be .*, got '-1:30'$"):
        BatchConfig.from_yaml(path)
    path.write_text("\n".join([*lines, "radius: 2"]))
    with pytest.raises(ConfigError, match=r"line 5: radius is given more than once$"):
        BatchConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"aperture_diameter": 10.0, "background_method": "annulus"},
            "max_outer_radius must be > aperture_diameter / 2 + annulus_inner_offset, which",
        ),
        (
            {"aperture_diameter": 8.0, "window_size": 8},
            "window_size must be large enough",
        ),
    ],
)
def test_fixed_apertures_leave_room_for_their_background(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PhotometryConfig(aperture_method="fixed", **options)
    check_options(PhotometryConfig, {"aperture_method": "fixed", **options})
    assert PhotometryConfig(aperture_method="fwhm", **options)


def test_yaml_is_version_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: 010\nb: 12:30\nc: no\nd: 1e3\ne: true\nf: 01:00:00\ng:\n")
    expected = {"a": 10, "b": "12:30", "c": "no", "d": 1e3, "e": True, "f": "01:00:00", "g": None}
    found = read_options(path)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(v) for v in expected.values()]
    path.write_text("keep_images: no\n")
    with pytest.raises(ConfigError, match="keep_images must be true or false, got 'no'"):
        check_options(BatchConfig, read_options(path))
    path.write_text("output_dir: 2026-01-01\n")
    with pytest.raises(ConfigError, match=r"output_dir must be a path, .*got datetime.date"):
        check_options(BatchConfig, read_options(path))
