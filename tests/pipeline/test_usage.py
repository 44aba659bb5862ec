"""Mistakes of the caller end in an error that names them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from spxdask import BatchPipeline, run_batch
from spxdask.errors import ConfigError, InputError, RunFolderError


def test_usage_errors(make_config, client):
    config = make_config()
    with pytest.raises(ConfigError, match="not two of them"):
        BatchPipeline(config, client=client, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="must be a synchronous"):
        BatchPipeline(config, client="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="must be a BatchConfig"):
        BatchPipeline({"radius": 1})
    with pytest.raises(ConfigError, match="not both: radius"):
        run_batch(config, radius=1.0)
    with pytest.raises(ConfigError, match="did you mean radius"):
        run_batch(catalog="x.csv", center_ra=1, center_dec=1, radios=1)
    with pytest.raises(InputError, match="no Dask scheduler at"):
        BatchPipeline(config, scheduler="not-an-address://x").run_query()


def test_stages_name_the_stage_that_must_run_before(make_config, client):
    pipeline = BatchPipeline(make_config(), client=client)
    for stage in (pipeline.run_download, pipeline.run_extract):
        with pytest.raises(RunFolderError, match="run query first"):
            stage()
    with pytest.raises(RunFolderError, match="run query first"):
        _ = pipeline.observations
    with pytest.raises(RunFolderError, match="no per-image tables"):
        pipeline.run_aggregate()
    pipeline.run_query()
    report = pipeline.run_extract()
    assert len(report.failed) == 6
    assert "run download first" in next(iter(report.failed.values()))


def test_too_many_frames_stop_the_run_before_any_download(make_config, client, archive):
    pipeline = BatchPipeline(make_config(max_images=5), client=client)
    n_requests = len(archive.requests)
    with pytest.raises(
        InputError, match=r"6 frames \(0\.\d GB\) .* max_images allows 5; raise max"
    ):
        pipeline.run_all()
    assert {r.path for r in archive.requests[n_requests:]} == {"/TAP/sync"}


@pytest.mark.cluster
@pytest.mark.slow
def test_script_without_main_guard_fails_with_advice(make_config, tmp_path):
    script = tmp_path / "script.py"
    options = make_config(bands=["D1"], max_extract_workers=1).to_dict()
    script.write_text(f"from spxdask import run_batch\nrun_batch(**{options!r})\n")
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "if __name__ == '__main__':" in ended.stderr.splitlines()[-1]
    # That of the script itself; worker processes write none.
    assert ended.stderr.count("Traceback") == 1


@pytest.mark.cluster
@pytest.mark.slow
def test_command_whose_workers_do_not_start_fails_with_advice(make_config, tmp_path):
    make_config(bands=["D1"], max_extract_workers=1).to_yaml(tmp_path / "run.yaml")
    # The interpreter of a worker ends at once.
    dask_options = {"distributed": {"nanny": {"pre-spawn-environ": {"PYTHONHASHSEED": "none"}}}}
    (tmp_path / "dask.yaml").write_text(yaml.safe_dump(dask_options))
    # Clusters of this process leave variables behind that go before the file.
    ours = {"DASK_INTERNAL_INHERIT_CONFIG", "PYTHONHASHSEED"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    ended = subprocess.run(
        [sys.executable, "-m", "spxdask", "run", "--config", tmp_path / "run.yaml"],
        env=environment | {"DASK_CONFIG": str(tmp_path / "dask.yaml")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    [line] = [line for line in ended.stderr.splitlines() if "did not start" in line]
    assert "PYTHONHASHSEED must be" in line
    assert "--scheduler" in line
    assert "__main__" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_program_from_the_standard_input_fails_before_the_query(make_config, archive):
    options = make_config(bands=["D1"]).to_dict()
    code = f"from spxdask import run_batch\nif __name__ == '__main__': run_batch(**{options!r})\n"
    n_requests = len(archive.requests)
    ended = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, check=False
    )
    assert "<stdin> is not a file: save it as a script" in ended.stderr.splitlines()[-1]
    assert len(archive.requests) == n_requests


def test_program_whose_file_is_gone_fails_before_the_query(make_config, archive, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/proc/none/gone.py", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    n_requests = len(archive.requests)
    with pytest.raises(InputError, match=r"gone\.py is not a file: save it as a script"):
        run_batch(**make_config(bands=["D1"]).to_dict())
    assert len(archive.requests) == n_requests
