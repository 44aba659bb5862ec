"""The command line as a user meets it: what it prints, and its exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import simulated
import yaml

import spxdask
from spxdask.cli import COMMANDS, main
from spxdask.config import BatchConfig
from spxdask.science.options import PhotometryConfig, list_options
from spxdask.simulate.archive import Fault, SimulatedArchive


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    sky = simulated.field_sky(20)
    exposures = [simulated.exposure(0, 3), simulated.exposure(1, 4)]
    return sky, simulated.simulate(tmp_path_factory.mktemp("archive"), exposures, sky)


@pytest.fixture
def run(frames, tmp_path, monkeypatch, client, capfd):
    """Call the command line in a folder with a catalogue, against an archive and a cluster."""
    sky, found = frames
    simulated.write_catalogue(
        tmp_path / "sources.csv", [f"s{i}" for i in range(len(sky))], sky.ra, sky.dec
    )
    monkeypatch.chdir(tmp_path)
    with SimulatedArchive([f.archived for f in found]) as archive:
        monkeypatch.setenv("SPXDASK_TAP_URL", archive.tap_url)
        monkeypatch.setenv("SPXDASK_ARCHIVE_URL", archive.archive_url)

        def call(*arguments: str, scheduler: bool = True) -> tuple[int, str, str]:
            extra = ["--scheduler", client.scheduler.address] if scheduler else []
            try:
                status = main([*arguments, *extra])
            except SystemExit as exit_:
                status = exit_.code
            return status, *capfd.readouterr()

        call.archive = archive
        yield call


FIELD = ["--catalog", "sources.csv", "--ra", "270", "--dec", "66.56", "--radius", "0.05"]


def test_run_ends_with_the_summary(run, tmp_path):
    status, out, err = run("run", *FIELD, "--bands", "D3", "D4")
    assert status == 0
    for text in ("2 frames found", "2 of 2 frames", "light curves", "with a measurement", "failed"):
        assert text in out
    assert "dashboard" in err
    assert all(len(line) <= 80 or str(tmp_path) in line for line in out.splitlines())
    # No bars when not on a terminal.
    assert "it/s" not in err
    assert "frames/s]" not in err
    assert list((tmp_path / "batch_output" / "lightcurves").glob("*.csv"))


def test_dry_run_tells_what_would_be_fetched_and_changes_nothing(run, tmp_path):
    status, out, _ = run("run", *FIELD, "--dry-run", "--no-keep-images")
    assert status == 0
    for text in ("2 frames found, 2 needed", "D3          1 frame, ", "connections of 2 MB/s"):
        assert text in out
    assert all(len(line) <= 80 or str(tmp_path) in line for line in out.splitlines())
    assert not (tmp_path / "batch_output").exists()
    assert not any(request.path.endswith(".fits") for request in run.archive.requests)
    assert run("run", *FIELD, "--no-keep-images")[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, out, _ = run("query", *FIELD, "--dry-run", "--no-keep-images")
    assert (status, "2 frames are there" in out) == (0, True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "option", ["--calibration", "--contaminants", "--jobqueue"], ids=lambda o: o.strip("-")
)
def test_a_dry_run_refuses_what_a_run_refuses(run, tmp_path, option):
    arguments = [*FIELD, option, str(tmp_path / "nowhere")]
    status, _, err = run("run", *arguments, "--dry-run", scheduler=False)
    assert status == 2
    assert str(tmp_path / "nowhere") in err
    assert "unrecognized" not in err
    assert not run.archive.requests


def test_a_catalogue_elsewhere_is_refused_before_the_download(run, tmp_path):
    simulated.write_catalogue(tmp_path / "far.csv", ["a"], [90.0], [-66.0])
    status, out, _ = run("run", "--catalog", "far.csv", *FIELD[2:], "--output", "far")
    assert status == 1
    assert "no source of the catalogue lies on any of these frames" in " ".join(out.split())
    assert not any(request.path.endswith(".fits") for request in run.archive.requests)
    assert not list((tmp_path / "far" / "images").iterdir())
    status, out, _ = run("run", "--catalog", "far.csv", *FIELD[2:], "--dry-run")
    assert (status, "a run fetches none" in " ".join(out.split())) == (1, True)


def test_the_last_run_of_a_folder_is_resumed_by_its_name(run, tmp_path):
    assert run("query", *FIELD, "--output", "o", "--num-buckets", "3")[0] == 0
    status, out, err = run("run", "--output", "o")
    assert (status, "2 of 2 frames" in out) == (0, True)
    assert f"with the options of the last run in {tmp_path / 'o'}" in err
    status, out, _ = run("resume", "o", "-vv")
    assert (status, "2 frames (already there)" in out) == (0, True)
    assert BatchConfig.from_yaml(tmp_path / "o" / "state" / "config.yaml").num_buckets == 3
    assert run("resume", "nowhere")[0] == 2


def test_verbose_tells_each_stage_and_each_frame(run, frames):
    _, _, err = run("run", *FIELD, "-v")
    assert "query: begins" in err
    assert "aggregate" in err
    assert frames[1][0].exposure.filename not in err
    _, _, err = run("extract", "--all", "-vv")
    assert f"extract {frames[1][0].exposure.filename}: done" in err


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["config"]])
def test_a_reader_that_stops_is_no_error(arguments, unbuffered):
    with subprocess.Popen(
        [sys.executable, "-m", "spxdask", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_output_on_a_full_disk_is_one_sentence():
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "spxdask", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == "spxdask: standard output cannot be written: No space left on device\n"


@pytest.mark.slow
def test_a_message_that_nobody_reads_changes_no_status(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "spxdask", "run", "--catalog", str(tmp_path / "none.csv")]
    with open(writer, "wb") as messages:
        assert subprocess.run(command, stderr=messages).returncode == 2


@pytest.mark.slow
def test_no_file_of_a_run_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os; from spxdask import __main__; "
        "__main__.main = lambda: print(os.open('a', os.O_CREAT)) or 0; __main__.run()"
    )
    closed = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable]
    ended = subprocess.run([*closed, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    assert int(ended.stdout) > 2
    # Nor are messages among the output.
    command = [*closed, "-m", "spxdask", "run", "--catalog", "none.csv"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, b"")


@pytest.mark.slow
def test_an_interrupt_may_end_the_reader_of_messages_first(run, tmp_path):
    assert run("query", *FIELD, "--output", "o")[0] == 0
    with subprocess.Popen(
        [sys.executable, "-m", "spxdask", "status", str(tmp_path / "o"), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline()
        # As with "2>&1 | tee log", where tee gets the interrupt, too.
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait() == 0


@pytest.mark.slow
def test_a_mistake_in_the_catalogue_is_told_before_dask_is_imported(tmp_path):
    (tmp_path / "bad.csv").write_text("targetid,ra,dec\n1,abc,2\n")
    code = (
        "import sys; from spxdask.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(100 if 'distributed' in sys.modules else status)"
    )
    command = [sys.executable, "-c", code, "run", "--catalog", str(tmp_path / "bad.csv")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, "bad.csv: ra is not a number" in ended.stderr) == (2, True)


def test_stages_find_the_saved_configuration(run, tmp_path):
    query = ["query", *FIELD, "--output", "o", "--aperture-method", "fixed", "--num-buckets", "3"]
    assert run(*query)[0] == 0
    for stage in ("download", "extract", "aggregate"):
        status, out, _ = run(stage, "--output", "o")
        assert status == 0
        assert out.startswith(stage)
    saved = BatchConfig.from_yaml(tmp_path / "o" / "state" / "config.yaml")
    assert saved.photometry == PhotometryConfig(aperture_method="fixed")
    assert saved.num_buckets == 3
    assert run("extract", "--output", "o")[1].count("2 frames, ") == 1
    status, out, _ = run("extract", "--output", "o", "--all")
    assert status == 0
    assert "already there" not in out


def test_stages_take_only_the_options_they_read(run):
    assert run("query", *FIELD)[0] == 0
    status, _, err = run("download", "--bands", "D1")
    assert status == 2
    assert "--bands" in err


def test_tables_and_light_curves_in_another_format(run, tmp_path):
    assert run("query", *FIELD)[0] == 0
    assert run("download")[0] == 0
    assert run("extract", "--per-image-format", "parquet")[0] == 0
    tables = list((tmp_path / "batch_output" / "per_image").iterdir())
    assert [path.suffix for path in tables] == [".parquet"] * 2
    curves = ["--lightcurve-format", "parquet", "--num-buckets", "2"]
    assert run("aggregate", *curves)[0] == 0
    found = list((tmp_path / "batch_output" / "lightcurves").iterdir())
    assert found
    assert {path.suffix for path in found} == {".parquet"}
    status, _, err = run("aggregate", "--per-image-format", "csv")
    assert status == 2
    assert "run extract first" in err


@pytest.mark.parametrize("bands", [["D3,d5"], ["d3", "D5"], ["D3,", "d5"]])
def test_bands_as_people_write_them(run, tmp_path, bands):
    assert run("query", *FIELD, "--bands", *bands)[0] == 0
    saved = BatchConfig.from_yaml(tmp_path / "batch_output" / "state" / "config.yaml")
    assert saved.bands == ("D3", "D5")


def test_small_negative_coordinates(run, tmp_path):
    arguments = ["run", *FIELD[:4], "--dec", "-1e-5", *FIELD[6:]]
    status, out, _ = run(*arguments)
    assert (status, "no frame covers the field" in out) == (1, True)
    summary = yaml.safe_load((tmp_path / "batch_output" / "query_summary.yaml").read_text())
    assert summary["region"]["center_dec"] == -1e-5


def test_failed_frames_show_in_the_exit_status(run, frames):
    uri = frames[1][0].exposure.uri
    run.archive.add_faults(uri, [Fault(status=404)])
    status, out, _ = run("run", *FIELD)
    assert status == 1
    assert "failed      1 frame\n" in out
    assert frames[1][0].exposure.filename in out
    assert "404" in out
    assert run("run", *FIELD)[0] == 0


def test_retry_failed_takes_the_options_of_the_run_it_ends(run, frames, tmp_path):
    uri = frames[1][0].exposure.uri
    faults = [Fault(status=404), Fault(status=503, retry_after_s=0)]
    run.archive.add_faults(uri, [*faults, faults[1], faults[0]])
    options = ["--output", "o", "--aperture-method", "fixed", "--max-retries", "0"]
    options += ["--num-buckets", "2"]
    assert run("run", *FIELD, *options)[0] == 1
    # From another folder, too.
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    again = ["run", "--retry-failed", "--output", "../o"]
    for more, status, says in [
        ([], 1, "HTTP 503 Service Unavailable (after 1 attempt)"),
        (["--max-retries", "1"], 1, "HTTP 404"),
        ([], 0, "1 of 1 frame"),
        ([], 0, "nothing to do"),
    ]:
        asked = len(run.archive.requests)
        ended, out, err = run(*again, *more)
        assert (ended, says in out) == (status, True), out
        assert "Traceback" not in err
        paths = [request.path for request in run.archive.requests[asked:]]
        assert paths == [f"/{uri}"] * (0 if says == "nothing to do" else 1 + len(more) // 2)
    tables = [p.read_text() for p in (tmp_path / "o" / "per_image").iterdir()]
    assert len(tables) == 2
    assert all(",1.5,level2_" in table for table in tables)
    saved = BatchConfig.from_yaml(tmp_path / "o" / "state" / "config.yaml")
    assert (saved.max_retries, saved.photometry.aperture_method) == (1, "fixed")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "missing --catalog or --target (or a --config FILE"),
        (["run", *FIELD, "--target", "M31"], "target must be a position such as '10.684 41.269'"),
        (["run", *FIELD, "--target", "1 2"], "catalog_path and target exclude each other"),
        (["run", *FIELD[:2], "--coverage", "full"], "coverage_mode must be any where"),
        (["run", *FIELD[:-1], "-1"], "radius must be > 0 and <= 90, got -1"),
        (["run", *FIELD[:-1], "wide"], "radius must be a number > 0 and <= 90, got 'wide'"),
        (["run", *FIELD, "--ra", "00:42:44"], "decimal degrees (not as 00:42:44), got '00:42:44'"),
        (["run", *FIELD, "--dec", "-66:30:00"], "center_dec must be a number >= -90 and"),
        (["run", *FIELD, "--dec", "-66d30m"], "(not as -66:30:00), got '-66d30m'"),
        (["run", *FIELD, "--radius", "-.5d"], "<= 90, got '-.5d'"),
        (["run", *FIELD, "--mjd-range", "-1e5", "3"], "or null for all, got [-100000, 3]"),
        (
            ["run", *FIELD, "--dec", "-1e99999999999"],
            ">= -90 and <= 90, got -inf",
        ),
        (["run", *FIELD, "--dec"], "spxdask: argument --dec: expected one argument"),
        (["run", *FIELD, "--out", "o"], "unrecognized arguments: --out o; see spxdask run --help"),
        (["run", *FIELD, "--bands", "D7"], "D1 to D6, or null for all, got ['D7']"),
        (["run", *FIELD, "--bands", ","], "bands must be a list of some of D1 to D6"),
        (["run", *FIELD, "--coverage", "some"], "coverage_mode must be any or full, got 'some'"),
        (["run", *FIELD, "--output", "$NOT_SET/o"], "($NOT_SET is not; $$ is a dollar sign), got"),
        (["download", "--output", "$NOT_SET/o"], "output_dir must be a path of variables that"),
        (["status", "$NOT_SET/o"], "output_dir must be a path of variables that are set"),
        (["run", *FIELD, "--bad-flags", "HOTT"], "did you mean HOT?), got ['HOTT']"),
        (["run", *FIELD, "--bands", "7"], "D1 to D6, or null for all, got ['7']"),
        (
            ["run", *FIELD, "--window-size", "2"],
            "photometry.window_size must be an integer",
        ),
        (["run", *FIELD, "--mjd-range", "3", "1"], "mjd_range must be two MJDs, the earlier first"),
        (["run", *FIELD, "--catalog", "no.csv"], "no.csv: No such file"),
        (["run", *FIELD, "--config", "no.yaml"], "no.yaml: No such file"),
        (["run", *FIELD, "--max-images", "1"], "max_images allows 1; raise max_images"),
        (["download", "--output", "empty"], "not the output folder of a run"),
        (["run", "--retry-failed"], "batch_output is not the output folder of a run"),
        (["run", "--retry-failed", "--output", "empty"], "empty is not the output folder of a run"),
        (["status"], "batch_output is not the output folder of a run"),
        (["run", *FIELD, "--output", "sources.csv"], "sources.csv: "),
        (["bogus"], "invalid choice: 'bogus'"),
        (["run", *FIELD, "--frob"], "--frob; see spxdask run --help"),
        (["--frob"], "--frob; see spxdask --help"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(run, arguments, says):
    # At the end, the scheduler would be the value of an option that lacks one.
    takes = arguments[0] in ("run", "download") and arguments[-1] not in ("--frob", "--dec")
    status, _, err = run(*arguments, scheduler=takes)
    assert status == 2
    # Where the run's pages are may come before it.
    assert len([line for line in err.splitlines() if "http://" not in line]) == 1
    assert err.splitlines()[-1].startswith("spxdask: ")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        ("ra: 270\n", [], "run.yaml: unknown option 'ra': did you mean center_ra?"),
        ("output: o\n", FIELD, "unknown option 'output': did you mean output_dir?"),
        ("fwhm_multiplier: 3\n", FIELD, "run.yaml: unknown option 'fwhm_multiplier': it be"),
        ("radius: 400\n", [], "run.yaml: radius must be > 0 and <= 90, got 400"),
        ("max_images: many\n", FIELD, "run.yaml: max_images must be an integer >= 1, got"),
        ("photometry: fwhm\n", FIELD, "run.yaml: photometry must be a PhotometryConfig or"),
        ("photometry: {bad_flags: 3}\n", FIELD, "run.yaml: photometry.bad_flags must be"),
        ("photometry: {window: 3}\n", FIELD, "run.yaml: photometry: unknown option 'window': did"),
        (
            "photometry: {aperture_diameter: 10, background_method: annulus}\n",
            [*FIELD, "--aperture-method", "fixed"],
            "run.yaml: photometry.max_outer_radius must be > ",
        ),
        # A mistake in a flag is not one of the file.
        ("max_images: 3\n", [*FIELD, "--bands", "D7"], "spxdask: bands must be a list of some of"),
        ("max_images: 3\n", FIELD[:-2], "spxdask: missing --radius (or a --config FILE"),
        ("center_ra:\nradius: 1\n", FIELD[:2], "spxdask: missing --ra, --dec (or"),
        ("catalog_path:\n", [], "spxdask: missing --catalog or --target (or"),
        (
            "photometry: {window_size: 20}\n",
            [*FIELD, "--fwhm-multiplier", "-1"],
            "spxdask: photometry.fwhm_multiplier must be > 0 and <= 50, got -1",
        ),
        (
            "photometry:\n",
            [*FIELD, "--aperture-method", "fixed", "--window-size", "3"],
            "spxdask: photometry.window_size must be large enough",
        ),
    ],
)
def test_mistakes_in_a_file_name_it(run, tmp_path, content, flags, says):
    (tmp_path / "run.yaml").write_text(content)
    status, _, err = run("run", *flags, "--config", "run.yaml")
    assert status == 2
    assert says in err
    assert err.startswith("spxdask: ")
    assert err.count("\n") == 1
    # A mistake in a flag is not one of the file.
    assert ("run.yaml: " in err) == (not says.startswith("spxdask: "))


def test_flags_overrule_mistakes_in_a_file(run, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "radius: 400\nphotometry:\n  window_size: 3\n  aperture_method: fixed\n"
    )
    assert run("query", "--config", "run.yaml", *FIELD, "--window-size", "30")[0] == 0
    saved = BatchConfig.from_yaml(tmp_path / "batch_output" / "state" / "config.yaml")
    assert (saved.radius, saved.photometry.window_size) == (0.05, 30)


def test_unreachable_archive_is_status_1(run, monkeypatch):
    monkeypatch.setenv("SPXDASK_TAP_URL", "http://127.0.0.1:9/TAP")
    status, _, err = run("run", *FIELD, "--max-retries", "0")
    assert status == 1
    assert "http://127.0.0.1:9/TAP" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_config_template_is_a_run(run, tmp_path):
    status, out, _ = run("config", "run.yaml", scheduler=False)
    assert status == 0
    assert "spxdask run --config run.yaml" in out
    text = (tmp_path / "run.yaml").read_text()
    values = {"center_ra": 270, "center_dec": 66.56, "radius": 0.05, "catalog_path": "sources.csv"}
    for name, value in values.items():
        text = text.replace(f"\n{name}:\n", f"\n{name}: {value}\n")
    (tmp_path / "run.yaml").write_text(text)
    assert BatchConfig.from_yaml(tmp_path / "run.yaml") == BatchConfig(**values)
    # Flags overrule the file.
    assert run("run", "--config", "run.yaml", "--bands", "D3", "--window-size", "20", "30")[0] == 0
    saved = yaml.safe_load((tmp_path / "batch_output" / "state" / "config.yaml").read_text())
    assert saved["bands"] == ["D3"]
    assert saved["photometry"]["window_size"] == [20, 30]
    status, _, err = run("config", "run.yaml", scheduler=False)
    assert status == 2
    assert "run.yaml: File exists" in err
    assert run("config", scheduler=False)[1].startswith("# A spxdask run")


def test_paths_and_flags_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAME", "r1")
    query = ["query", *FIELD[2:], "--catalog", "~/sources.csv", "--output", "~/$NAME"]
    assert run(*query, "--bad-flags", "hot", "COLD", "3")[0] == 0
    saved = BatchConfig.from_yaml(tmp_path / "r1" / "state" / "config.yaml")
    assert saved.photometry.bad_flags == (3, 10, 11)
    assert saved.catalog_path == str(tmp_path / "sources.csv")
    assert run("download", "--output", "~/$NAME")[0] == 0
    assert run("status", "~/$NAME", scheduler=False)[0] == 0


def test_a_folder_with_a_dollar_sign_in_its_name(run, tmp_path, monkeypatch):
    (tmp_path / "a$HOME").mkdir()
    monkeypatch.chdir(tmp_path / "a$HOME")
    assert run("query", *FIELD[2:], "--catalog", "../sources.csv", "--output", "o")[0] == 0
    assert run("download", "--output", "o")[0] == 0
    assert list((tmp_path / "a$HOME" / "o" / "images").iterdir())


def test_help_shows_the_commands_in_groups(run):
    status, out, _ = run("--help", scheduler=False)
    assert status == 0
    positions = [out.index(f"\n  {command} ") for command in COMMANDS]
    assert positions == sorted(positions)
    for group in ("every day", "first steps", "one stage"):
        assert f"\n{group}:\n" in out
    assert run(scheduler=False)[0] == 2


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(*command.split(), "--help", scheduler=False)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith(f"usage: spxdask {command}")
    assert out.rstrip().endswith("130 stopped" if not command else "show this help and exit")


def test_help_of_run_shows_every_option_in_groups(run):
    _, out, _ = run("run", "--help", scheduler=False)
    for info in [*list_options(BatchConfig), *list_options(PhotometryConfig)]:
        if info.nested is None:
            assert f"\n  {info.flag}" in out
            assert out.index(f"\n{info.group}:\n") < out.index(f"\n  {info.flag}")
    for flag in ("--config", "--scheduler", "--jobqueue", "--retry-failed", "--no-subtract-zodi"):
        assert flag in out
    headings = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[:5] == ["field and catalogue:", "output:", "frames:", "workers:", "archive:"]
    assert headings[-1] == "general:"


def test_unsupported_platform_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["status"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("spxdask: spxdask runs on Linux, macOS and WSL; ")
    assert said.count("\n") == 1
    with pytest.raises(ImportError, match="runs on Linux, macOS and WSL"):
        _ = spxdask.BatchPipeline


def test_the_command_line_is_there_without_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import spxdask.cli as c; c._parser()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_and_entry_point():
    out = subprocess.run(
        [sys.executable, "-m", "spxdask", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("spxdask 0.")


def test_help_does_not_wait_for_dask():
    code = "import sys, spxdask.cli as c; c._parser(); print('dask' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
