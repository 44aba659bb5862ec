"""The summary of a query is the same to whoever reads it, whatever is in it."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from spxdask import BatchConfig, load_query_summary
from spxdask.archive.observation import Observation
from spxdask.errors import RunFolderError
from spxdask.run.query_summary import Field, save_query_summary, summarise_query
from spxdask.science.footprint import Circle
from spxdask.storage import LocalStore


def config(**options) -> BatchConfig:
    field = {"catalog_path": "a.csv", "center_ra": 270.0, "center_dec": 66.56, "radius": 1.0}
    return BatchConfig(**(field | options))


def in_circle(options: BatchConfig, observations) -> tuple[Field, list[bool]]:
    """Return the field of a run in a circle, in which all frames are fetched."""
    circle = Circle(options.center_ra, options.center_dec, options.radius)
    return Field(mode="circle", circles=[circle], n_sources=3), [False] * len(observations)


def save(folder, observations, **options) -> None:
    asked = config(**options)
    field = in_circle(asked, observations)
    save_query_summary(LocalStore(folder), observations, asked, *field)


def observation(**values) -> Observation:
    usual = {
        "obs_id": "2025W51_1A_0684_2",
        "band": "D3",
        "mjd": 61027.2000004,
        "wavelength_um": 2.02,
        "uri": "a/b.fits",
        "download_url": "https://irsa.ipac.caltech.edu/ibe/data/spherex/qr2/a_b-c.fits",
        "size_bytes": 7,
    }
    return Observation(**(usual | values))


def expected(observations) -> list[dict]:
    return [
        {
            "obs_id": o.obs_id,
            "band": o.band,
            "mjd": round(o.mjd, 6),
            "wavelength_um": round(o.wavelength_um, 6),
            "download_url": o.download_url,
        }
        for o in observations
    ]


def read_by_all(path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return [
        load_query_summary(path),
        yaml.safe_load(text),
        YAML(typ="safe", pure=True).load(text),
    ]


# What YAML has other meanings for, in one version or another.
SPECIAL = ["1e3", "12:30", "yes", "null", "~", "0o7", "1_000", "'", "a: b", "a #b", "- a", "", " a"]
SPECIAL += ["\\", "\n", "\x7f", "\ufeff", "2026-01-01", "=", "<<", "%a", "D7"]
SPECIAL += ["2025W51_\u0663", "\U0001f52d"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(SPECIAL)
NUMBER = st.floats(-1e300, 1e300).map(lambda x: round(x, 6)) | st.sampled_from([1e-6, 0.0, 1e22])


@given(
    st.lists(
        st.builds(observation, obs_id=TEXT, band=TEXT, mjd=NUMBER, wavelength_um=NUMBER)
        | st.builds(observation, mjd=NUMBER),
        max_size=4,
    )
)
@example([observation()])
@example([])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_reader_reads_what_was_found(tmp_path_factory, observations):
    folder = tmp_path_factory.mktemp("summary")
    save(folder, observations)
    for found in read_by_all(folder / "query_summary.yaml"):
        assert found["observations"] == expected(observations)
        assert found["n_observations"] == len(observations)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center_ra": 1e-5, "center_dec": -1e-7, "radius": 1.5e-5},
        {"bands": ["D1", "D6"], "mjd_range": (61000.0, 62000.5)},
        {"release": "all"},
        {"release": "qr2", "coverage_mode": "any"},
    ],
)
def test_every_reader_reads_what_was_asked(tmp_path, options):
    observations = [observation(mjd=61000.0 + i, size_bytes=i or None) for i in range(3)]
    save(tmp_path, observations, **options)
    asked = config(**options)
    expected_head = summarise_query(observations, asked, *in_circle(asked, observations))
    assert expected_head["total_bytes"] == 3
    assert expected_head["time_span_days"] == 2.0
    for found in read_by_all(tmp_path / "query_summary.yaml"):
        for name in ("region", "filters", "n_observations", "band_counts", "time_span_days"):
            assert found[name] == expected_head[name]
        assert isinstance(found["query_time"], str)


def test_what_people_read_is_plain(tmp_path):
    save(tmp_path, [observation()])
    text = (tmp_path / "query_summary.yaml").read_text()
    assert text.endswith(
        "observations:\n"
        "- obs_id: 2025W51_1A_0684_2\n"
        "  band: D3\n"
        "  mjd: 61027.2\n"
        "  wavelength_um: 2.02\n"
        "  download_url: https://irsa.ipac.caltech.edu/ibe/data/spherex/qr2/a_b-c.fits\n"
    )


def test_frames_without_a_source_are_marked(tmp_path):
    observations = [observation(mjd=61000.0 + i) for i in range(3)]
    field = Field(
        mode="catalogue", circles=[Circle(10.0, 20.0, 1.5), Circle(30.0, -40.0, 0.5)], n_sources=7
    )
    asked = BatchConfig(catalog_path="a.csv")
    save_query_summary(LocalStore(tmp_path), observations, asked, field, [False, True, False])
    for found in read_by_all(tmp_path / "query_summary.yaml"):
        assert found["region"] == {
            "mode": "catalogue",
            "center_ra": None,
            "center_dec": None,
            "radius_deg": None,
            "coverage_mode": "any",
            "n_sources": 7,
            "n_queries": 2,
        }
        assert found["n_observations"] == 3
        assert found["not_fetched"] == {"no source on the frame": 1}
        marks = [entry.get("not_fetched") for entry in found["observations"]]
        assert marks == [None, "no source on the frame", None]


def test_the_region_of_a_target(tmp_path):
    field = Field(mode="target", circles=[Circle(10.0, 20.0, 0.05)], n_sources=1)
    asked = BatchConfig(target="10 20")
    save_query_summary(LocalStore(tmp_path), [], asked, field, [])
    for found in read_by_all(tmp_path / "query_summary.yaml"):
        region = found["region"]
        assert (region["mode"], region["target"]) == ("target", "10 20")
        assert (region["center_ra"], region["radius_deg"]) == (10.0, 0.05)
        assert found["not_fetched"] == {}


def test_no_credentials_are_written(tmp_path):
    with_password = observation(download_url="https://me:secret@host/a.fits")
    save(tmp_path, [with_password])
    assert "secret" not in (tmp_path / "query_summary.yaml").read_text()


@pytest.mark.parametrize("edit", [("  band: D3\n", "  band: D3  # mine\n"), ("- obs", "-  obs")])
def test_a_file_that_was_edited(tmp_path, edit):
    observations = [observation(), observation(mjd=61028.0)]
    save(tmp_path, observations)
    path = tmp_path / "query_summary.yaml"
    path.write_text(path.read_text().replace(edit[0], edit[1].replace("  obs", " obs"), 1))
    assert load_query_summary(tmp_path)["observations"] == expected(observations)


def test_a_file_of_an_earlier_version(tmp_path):
    observations = [observation(mjd=61000.0 + i) for i in range(5)]
    head = {"query_time": "2026-01-01T00:00:00+00:00", "n_observations": 5}
    entries = yaml.dump(expected(observations), Dumper=yaml.SafeDumper, sort_keys=False)
    path = tmp_path / "query_summary.yaml"
    path.write_text(yaml.dump(head) + "observations:\n" + entries)
    for found in read_by_all(path):
        assert found == head | {"observations": expected(observations)}


@pytest.mark.parametrize("text", [None, "", "- a\n", "a: [\n", "\x00"])
def test_no_summary(tmp_path, text):
    if text is not None:
        (tmp_path / "query_summary.yaml").write_text(text)
    with pytest.raises(RunFolderError, match="no readable query summary") as error:
        load_query_summary(tmp_path)
    assert error.value.path == str(tmp_path)
