"""The report of a run: its numbers, its page, and what it does where things are missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from generated import make_run

from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.report.make import is_report_current, make_report, make_report_of_run
from spxdask.report.statistics import find_scatter, find_triplets
from spxdask.report.verdict import judge
from spxdask.run.summary import RunSummary
from spxdask.storage import LocalStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "bell\a\x01", "é &amp; ü"]
N_FRAMES, N_SOURCES = 36, 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 frames of 90 sources, two of which have hostile ids and no row, and two failures."""
    ids = [*(f"s{i}" for i in range(N_SOURCES - 4)), *HOSTILE]
    name = "https://127.0.0.1/a/level2_2025W51_1A_0003_1D4_spx_l2b-v21-2025-354.fits"
    return make_run(
        tmp_path_factory.mktemp("run <b>"),
        n_frames=N_FRAMES,
        n_sources=N_SOURCES,
        ids=ids,
        early_scale=0.97,
        failed={3: f"{name}: HTTP 404 Not Found", 9: "no <b>WCS</b>"},
        shifts={"D2": (0.2, -0.05)},
    )


@pytest.fixture(scope="module")
def numbers(folder):
    return make_report(folder.path)


def read(folder, name: str) -> str:
    return (folder.root.local_path / name).read_text()


def test_its_numbers_are_those_of_the_run(folder, numbers):
    assert json.loads(read(folder, "report.json")) == numbers
    frames, rows = numbers["frames"], numbers["rows"]
    assert frames["by_state"] == {
        **{"measured": 34, "failed": 2, "fetched": 0, "pending": 0, "empty": 0}
    }
    assert [r["release"] for r in frames["by_release"]] == ["qr2", "qr3"]
    n_rows = 34 * (N_SOURCES - 1)
    assert rows["total"] == rows["with_flux"] == rows["with_psf_flux"] == n_rows
    # One row in ten of each table, the first one included.
    assert rows["rejected_by_flags"] == n_rows - rows["good"] == 34 * 9
    by_name = {flag["name"]: flag["rows"] for flag in rows["flags"]}
    assert (by_name["SOURCE"], by_name["BLOOM"], by_name["HOT"]) == (n_rows, 34 * 9, 0)
    assert rows["sources_left_out"] == {"too few pixels for the background": 68}
    coverage = numbers["coverage"]
    assert sum(c["rows"] for c in coverage["channels"]) == n_rows
    assert sum(c["good"] for c in coverage["channels"]) == rows["good"]
    assert coverage["rows_per_source"] == [
        *({"rows": 0, "sources": 1}, {"rows": 34, "sources": N_SOURCES - 1}),
    ]
    assert {b["band"]: b["rows"] for b in coverage["bands"]}["D4"] == 4 * (N_SOURCES - 1)
    assert numbers["missing_sources"]["n"] == 1
    assert len(numbers["missing_sources"]["ids"]) == 1
    assert numbers["light_curves"]["is_up_to_date"] is False


def test_failures_are_grouped_with_the_command_that_tries_again(folder, numbers):
    failures = numbers["frames"]["failures"]
    assert {f["reason"] for f in failures} == {"HTTP 404 Not Found", "no <b>WCS</b>"}
    assert all(f["n"] == 1 and f["stage"] == "extract" for f in failures)
    command = numbers["frames"]["retry_command"]
    assert command == f"spxdask run --output '{folder.path}' --retry-failed"


def make_rows(scatter: float, n: int = 400, n_sources: int = 30) -> dict[str, np.ndarray]:
    """Return rows of sources with steep spectra in D1, whose errors are 1 % of the flux."""
    rng = np.random.default_rng(3)
    source = np.repeat(np.arange(n_sources), n)
    wavelength = np.sort(rng.uniform(0.75, 1.1, (n_sources, n)), axis=1).ravel()
    true = 5000.0 * wavelength**-3.0
    rows = {"source": source, "wavelength": wavelength, "psf_flux_error": 0.01 * true}
    rows["psf_flux"] = true * (1 + 0.01 * scatter * rng.normal(size=len(true)))
    return rows | {name: np.zeros(len(true), int) for name in ("band", "release")}


@pytest.mark.parametrize("scatter", [0.5, 1.0, 2.0])
def test_the_scatter_about_a_spectrum_is_that_of_the_errors_times_a_factor(scatter):
    found = find_triplets(make_rows(scatter), "psf")
    assert len(found.residual) == 30 * 398
    assert np.mean(found.residual**2) == pytest.approx(scatter**2, rel=0.05)
    assert find_scatter(found.scatter / found.flux) == pytest.approx(0.01 * scatter, rel=0.05)
    assert np.median(found.error / found.flux) == pytest.approx(0.01, rel=0.05)


def test_fluxes_farther_apart_than_a_channel_are_not_compared():
    rows = make_rows(1.0, n=3, n_sources=2)
    rows["wavelength"] = np.array([0.80, 0.81, 0.815, 0.80, 0.81, 0.83])
    assert find_triplets(rows, "psf").source.tolist() == [0]
    rows["release"] = np.array([0, 1, 1, 0, 0, 0])
    assert len(find_triplets(rows, "psf").source) == 0


@pytest.mark.parametrize("chi2, level", [(0.5, "note"), (1.0, "good"), (4.0, "attention")])
def test_honest_errors_are_told_from_small_ones(numbers, chi2, level):
    changed = json.loads(json.dumps(numbers))
    bright = {"sources": 50, "fluxes": 500, "error": 0.002, "chi2": chi2}
    changed["checks"]["errors"]["psf"]["bright"] = bright
    found = [s for s in judge(changed) if s["text"].startswith("The errors of psf_flux are")]
    assert [s["level"] for s in found] == [level]


def test_a_step_between_releases_is_seen(numbers):
    bands = numbers["checks"]["releases"]["qr2 / qr3"]
    assert len(bands) == 6
    for band in bands:
        assert abs(band["median"] - 0.97) < 5 * band["error"] + 0.003
    assert any(
        s["level"] == "attention" and s["text"].startswith("Flux in QR2 / QR3 is off")
        for s in numbers["verdict"]
    )
    for band in numbers["checks"]["psf_over_aperture"]:
        assert band["median"] == pytest.approx(1.0, abs=0.002)


def test_a_detector_whose_stars_are_off_is_seen(numbers):
    found = numbers["frames"]["astrometry"]
    assert (found["frames"], found["stars"]) == (34, 34 * 20)
    by_band = {d["band"]: d for d in found["detectors"]}
    # Two frames of D4 have failed.
    assert (by_band["D2"]["stars"], by_band["D4"]["stars"]) == (120, 80)
    assert by_band["D2"]["dx"] == pytest.approx(0.2, abs=0.01)
    assert by_band["D2"]["dy"] == pytest.approx(-0.05, abs=0.01)
    assert (by_band["D2"]["scatter"], by_band["D2"]["error"]) == (0.03, 0.02)
    assert 0.003 < by_band["D2"]["dx_scatter"] < 0.011
    assert [f["band"] for f in found["frames_off"]] == ["D2"] * 6
    [text] = [s["text"] for s in numbers["verdict"] if "pixels from where" in s["text"]]
    assert re.search(r"0\.2[01] pixels in D2 \(dx \+0\.[12]\d, dy -0\.0[456]\)", text)


@pytest.mark.parametrize(
    ("shift", "stars", "levels"),
    [((0.2, 0.0), 9, ["note"]), ((0.02, 0.0), 10, ["good"]), ((0.08, 0.08), 10, ["attention"])],
)
def test_an_offset_is_judged_where_enough_stars_tell_it(numbers, shift, stars, levels):
    changed = json.loads(json.dumps(numbers))
    [one] = [d for d in numbers["frames"]["astrometry"]["detectors"] if d["band"] == "D1"]
    one = one | {"stars": stars, "dx": shift[0], "dy": shift[1]}
    changed["frames"]["astrometry"] |= {"detectors": [one], "stars": stars, "frames_off": []}
    words = ("Positions", "Bright isolated", "Bright sources")
    assert [s["level"] for s in judge(changed) if s["text"].startswith(words)] == levels
    changed["frames"]["astrometry"]["frames_off"] = [{"filename": "a", "band": "D3", "offset": 0.3}]
    texts = [s["text"] for s in judge(changed) if s["text"].startswith("1 frame has its bright")]
    assert len(texts) == (stars >= 10)


def test_the_same_state_makes_the_same_bytes(folder, numbers):
    page = read(folder, "report.html")
    content = read(folder, "report.json")
    assert is_report_current(folder.path)
    make_report(folder.path)
    assert (read(folder, "report.html"), read(folder, "report.json")) == (page, content)
    summary = RunSummary(stages={}, n_sources=N_SOURCES, output=folder.path)
    assert make_report_of_run(summary, connect=lambda: None).endswith("(already there)")


class Tags(HTMLParser):
    """Collects the elements of a page, and where they lead."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.names.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href") and v is not None]
        assert not [k for k, _ in attributes if k.startswith("on")]


def test_the_page_loads_nothing_and_escapes_what_is_from_outside(folder, numbers):
    page = read(folder, "report.html")
    tags = Tags()
    tags.feed(page)
    assert not tags.names & {"script", "img", "b>", "iframe", "link"}
    assert all(a.startswith(("#", "https://doi.org/")) for a in tags.addresses)
    assert "no &lt;b&gt;WCS&lt;/b&gt;" in page
    # What does not print is written out, in texts from outside alone.
    assert set(re.findall(r"\\[xu]\w\w", page)) <= {r"\x07", r"\x01"}
    for number in re.findall(r"(?:nan|inf)\b", page):
        pytest.fail(f"{number} in the page")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_chromium_shows_it_without_an_error(folder, numbers, tmp_path):
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"),
        "--dump-dom",
        (folder.root.local_path / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # What a page does wrong is on the console; other lines are about the machine.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    for text in ("3,026", "of 36 frames measured", "HTTP 404 Not Found", "BLOOM", "--retry-failed"):
        assert text in done.stdout
    assert done.stdout.count("<svg") >= 20


def test_a_run_without_tables_or_query_is_reported(tmp_path):
    folder = make_run(tmp_path, n_frames=6, n_sources=5, failed=dict.fromkeys(range(6), "broken"))
    found = make_report(folder.path)
    assert (found["frames"]["by_state"]["failed"], found["rows"]["total"]) == (6, 0)
    assert found["missing_sources"]["n"] == 5
    assert found["checks"]["errors"]["aperture"]["bright"]["fluxes"] == 0
    assert found["frames"]["astrometry"]["detectors"] == []
    (tmp_path / "state" / "observations.parquet").unlink()
    found = make_report(folder.path)
    assert found["frames"]["found"] == 0
    with pytest.raises(RunFolderError, match="not the output folder"):
        make_report(tmp_path / "elsewhere")


def test_tables_that_cannot_be_read_are_counted(tmp_path):
    folder = make_run(tmp_path, n_frames=6, n_sources=20, table_format="parquet")
    names = sorted((tmp_path / "per_image").iterdir())
    whole = names[0].read_bytes()
    names[0].write_bytes(b"x" * len(whole))
    names[1].unlink()
    found = make_report(folder.path)
    assert found["rows"]["tables"] == 4
    assert sum(found["rows"]["tables_not_read"].values()) == 1
    # One that is gone is stale, as for the light curves.
    assert found["rows"]["stale_tables"] == 1
    texts = [s["text"] for s in found["verdict"] if s["level"] == "attention"]
    assert "1 table could not be read." in texts


def test_a_failure_does_not_cost_the_run(tmp_path, caplog):
    summary = RunSummary(stages={}, n_sources=0, output=str(tmp_path))
    text = make_report_of_run(summary, connect=lambda: None)
    assert text.startswith("not made: ")
    assert [r.getMessage() for r in caplog.records] == [f"no report was made: {text[10:]}"]


def test_the_command_prints_the_verdict(folder, numbers, capsys):
    assert main(["report", folder.path]) == 0
    out = capsys.readouterr().out
    assert "attention   2 frames have failed" in out
    assert str(LocalStore(folder.path).path_to("report.html")) in out


def test_dask_and_one_process_count_the_same(folder, numbers):
    from spxdask.report import tables

    found = [
        tables.Table(name=p.name, bytes=p.stat().st_size, release=0)
        for p in sorted((folder.root.local_path / "per_image").iterdir())
    ]
    catalogue = next((folder.root.local_path / "state").glob("catalogue-*"))
    options = tables.TallyOptions(
        per_image=str(folder.per_image), catalogue=str(catalogue), stride=3
    )
    one = tables.read_tables(found, options)
    many = tables.read_tables(found, options, group_bytes=30_000)
    for name, value in vars(one).items():
        if name == "sample":
            assert {k: v.tolist() for k, v in value.items()} == {
                k: v.tolist() for k, v in many.sample.items()
            }
        else:
            np.testing.assert_array_equal(value, getattr(many, name))
    assert set(one.sample["source"] % 3) == {0}
