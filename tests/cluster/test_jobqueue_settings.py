"""The YAML file that describes the jobs, and the job scripts that are made of it."""

from __future__ import annotations

import importlib.util
import re
import socket
import sys
from pathlib import Path

import dask
import pytest
import yaml

from spxdask.cluster.jobqueue import jobqueue_client
from spxdask.cluster.jobqueue.settings import ADAPT_DEFAULTS, SYSTEMS
from spxdask.config import read_options
from spxdask.errors import ClusterError, ConfigError, InputError

DEPLOY = Path(__file__).parents[2] / "deploy" / "slurm"
ON_LOOPBACK = {"interface": "lo", "scheduler-options": {"dashboard_address": "127.0.0.1:0"}}
MALLOC_LINE = "export MALLOC_TRIM_THRESHOLD_=33554432"

# Not by import, which replaces pytest's handler of Ctrl-C.
needs_dask_jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed"
)


def job_script(path: Path) -> str:
    """Return what would be submitted for a job."""
    with jobqueue_client(path) as client:
        return client.cluster.job_script()


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: No such file"):
        job_script(path)


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1", "a mapping of options is needed"),
        ("queue: {}", "unknown key queue"),
        ("jobqeue: {}", "unknown key jobqeue; did you mean jobqueue?"),
        ("adapt: {}", "jobqueue must have .*, got none"),
        ("jobqueue: 4", "jobqueue must be a mapping, got 4"),
        ("jobqueue: {slurm: , pbs: }", "jobqueue must have one section of .*, got slurm, pbs"),
        ("jobqueue: {slrum: }", "unknown key jobqueue.slrum; did you mean slurm?"),
        ("jobqueue: {slurm: [1]}", r"jobqueue.slurm must be a mapping, got \[1\]"),
        ("jobqueue: {slurm: {memory: 1GB}}", "jobqueue.slurm.cores is missing"),
        ("jobqueue: {slurm: {cores: 1}}", "jobqueue.slurm.memory is missing"),
        ("adapt: {minimum_jobs: -1}", "adapt.minimum_jobs must be a whole number >= 0, got -1"),
        ("adapt: {maximum_jobs: 0}", "adapt.maximum_jobs must be a whole number >= 1, got 0"),
        (
            "adapt: {minimum_jobs: 9, maximum_jobs: 8}",
            "maximum_jobs must be a whole number >= 9, got 8",
        ),
        ("adapt: {maximum: 2}", "unknown key adapt.maximum; did you mean maximum_jobs?"),
        ("adapt: 3", "adapt must be a mapping, got 3"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "jobqueue.yaml"
    more = "" if text.startswith(("-", "jobq")) else "\njobqueue: {slurm: {cores: 1, memory: 1GB}}"
    path.write_text(text if text == "adapt: {}" else text + more)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: .*{message}") as caught:
        job_script(path)
    assert "\n" not in str(caught.value)


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "options, message",
    [
        ({"core": 4}, "unknown key jobqueue.slurm.core; did you mean cores?"),
        ({"n_workers": 4}, "unknown key jobqueue.slurm.n-workers"),
        ({"disk": "1GB"}, "unknown key jobqueue.slurm.disk"),
        ({"host": "login1"}, "jobqueue.slurm.host belongs in jobqueue.slurm.scheduler_options"),
        ({"cores": "four"}, "jobqueue.slurm.cores must be a whole number >= 1, got 'four'"),
        ({"cores": True}, "jobqueue.slurm.cores must be .*, got True"),
        ({"cores": 0}, "jobqueue.slurm.cores must be .*, got 0"),
        ({"processes": 3}, "jobqueue.slurm.processes must be <= cores, which is 2, got 3"),
        (
            {"memory": 8},
            "jobqueue.slurm.memory must be an amount with its unit, such as 8GB, got 8",
        ),
        ({"memory": "much"}, "jobqueue.slurm.memory must be .*, got 'much'"),
        # What YAML makes of `queue: no`.
        ({"queue": False}, "jobqueue.slurm.queue must be a text, got False"),
        ({"walltime": ["1"]}, r"jobqueue.slurm.walltime must be a text, got \['1'\]"),
        ({"nanny": "no"}, "jobqueue.slurm.nanny must be true or false, got 'no'"),
        (
            {"job_script_prologue": "module load a"},
            "job-script-prologue must be a list of texts, got",
        ),
        ({"worker_extra_args": [1]}, "worker-extra-args must be a list of texts, got"),
        ({"scheduler-options": ["a"]}, "scheduler-options must be a mapping, got"),
        (
            {"env_extra": ["a"], "job_script_prologue": ["b"]},
            "is given twice, as job_script_prologue",
        ),
        ({"interface": "nonsense0"}, "jobqueue.slurm cannot be used: .*nonsense0"),
        ({"scheduler-options": {"prot": 1}}, "jobqueue.slurm cannot be used: .*prot"),
        ({"log_directory": "/proc/none"}, "jobqueue.slurm cannot be used: .*No such file"),
    ],
)
def test_options_that_are_not_allowed(write_settings, options, message):
    path = write_settings(**options)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: .*{message}") as caught:
        job_script(path)
    assert "\n" not in str(caught.value)


@needs_dask_jobqueue
def test_a_port_that_is_taken(write_settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = {"port": taken.getsockname()[1], "dashboard_address": "127.0.0.1:0"}
        with pytest.raises(ConfigError, match=r"cannot be used: .*Address already in use"):
            job_script(write_settings(scheduler_options=options))


def test_dask_jobqueue_is_not_installed(write_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(InputError, match=r"need dask-jobqueue .*pip install"):
        job_script(write_settings())


@needs_dask_jobqueue
def test_a_sites_file_works_as_it_is(tmp_path):
    # Every key of the file that dask-jobqueue comes with, and old names.
    default = Path(importlib.util.find_spec("dask_jobqueue").origin).with_name("jobqueue.yaml")
    section = yaml.safe_load(default.read_text())["jobqueue"]["slurm"]
    section |= ON_LOOPBACK | {
        "name": "photometry",
        "cores": 4,
        "processes": 2,
        "memory": "6GB",
        "account": 4711,
        "queue": "regular",
        "env-extra": ["module load python"],
        "job-extra": ["--qos=low"],
        "walltime": "01:00:00",
    }
    path = tmp_path / "jobqueue.yaml"
    path.write_text(yaml.safe_dump({"jobqueue": {"slurm": section}, "adapt": {"minimum_jobs": 0}}))
    message = job_script(path)
    for line in ("-J photometry", "-A 4711", "-p regular", "--qos=low", "-t 01:00:00"):
        assert f"#SBATCH {line}\n" in message
    for argument in ("--nworkers 2", "--nthreads 2", "--interface lo", "--death-timeout 60"):
        assert re.search(rf" {argument}\s", message)
    # Lines of the user come last, so that they decide.
    assert (
        message.index(MALLOC_LINE)
        < message.index("module load python")
        < message.index("dask_worker")
    )


@needs_dask_jobqueue
def test_what_a_file_leaves_out_is_as_dask_is_configured(write_settings):
    of_site = {
        "jobqueue.slurm.queue": "of-site",
        "jobqueue.slurm.walltime": "02:00:00",
        "jobqueue.slurm.job-script-prologue": ["module load of-site"],
    }
    with dask.config.set(of_site):
        # The defaults come with the import, and leave alone what is set.
        message = job_script(write_settings(queue="of-file"))
    assert "-p of-file\n" in message
    assert "-t 02:00:00\n" in message
    assert "\nmodule load of-site\n" in message


@needs_dask_jobqueue
def test_the_file_in_deploy(tmp_path):
    options = read_options(DEPLOY / "jobqueue.yaml")
    assert options["adapt"] == ADAPT_DEFAULTS
    options["adapt"]["minimum_jobs"] = 0
    options["jobqueue"]["slurm"] |= ON_LOOPBACK | {"log-directory": str(tmp_path / "logs")}
    path = tmp_path / "jobqueue.yaml"
    path.write_text(yaml.safe_dump(options))
    assert "--nthreads 4 --memory-limit 7.45GiB" in job_script(path)


@needs_dask_jobqueue
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_sets_up_its_workers(write_settings, system):
    more = {"htcondor": {"disk": "1GB"}, "oar": {"memory_per_core_property_name": "memcore"}}
    message = job_script(write_settings(system, **more.get(system, {})))
    assert MALLOC_LINE in message
    assert ("--lifetime " in message) == (system != "htcondor")


@needs_dask_jobqueue
@pytest.mark.parametrize(
    "system, walltime, lifetime",
    [
        ("slurm", "04:00:00", "13500s --lifetime-stagger 450s"),
        ("slurm", "00:10:00", "540s --lifetime-stagger 30s"),
        ("slurm", "2-00:00:00", "171900s --lifetime-stagger 450s"),
        ("slurm", "1-12", "128700s --lifetime-stagger 450s"),
        ("slurm", 60, "3240s --lifetime-stagger 180s"),
        ("slurm", "60:30", "3267s --lifetime-stagger 182s"),
        ("lsf", "01:00", "3240s --lifetime-stagger 180s"),
        ("slurm", "UNLIMITED", None),
        ("slurm", "0", None),
        ("pbs", "90", None),
    ],
)
def test_workers_leave_before_the_time_is_over(write_settings, system, walltime, lifetime):
    message = job_script(write_settings(system, walltime=walltime))
    found = re.search(r"--lifetime (\S+ --lifetime-stagger \S+)", message)
    assert (found and found[1]) == lifetime


@needs_dask_jobqueue
def test_a_lifetime_of_the_users_stays(write_settings):
    message = job_script(write_settings(worker_extra_args=["--lifetime 2h"], walltime="04:00:00"))
    assert re.findall("--lifetime[^ ]* [^ ]+", message) == ["--lifetime 2h"]


@needs_dask_jobqueue
def test_the_dashboard_is_where_the_user_wants_it(write_settings):
    with jobqueue_client(write_settings()) as client:
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        assert client.dashboard_link != "http://127.0.0.1:0/status"


@needs_dask_jobqueue
def test_no_batch_system_here(write_settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"jobqueue.yaml: there is no sbatch on this machine"):
        job_script(write_settings(minimum=1))


@needs_dask_jobqueue
def test_an_error_carries_its_values(write_settings):
    path = write_settings(processes=3)
    with pytest.raises(ConfigError) as caught:
        job_script(path)
    error = caught.value
    assert (error.path, error.option) == (str(path), "jobqueue.slurm.processes")
    assert (error.value, error.rule) == (3, "<= cores, which is 2")
