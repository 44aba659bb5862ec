"""Slurm's commands, as scripts that stand for them."""

from __future__ import annotations

import os

import pytest
from distributed import Status

from spxdask.cluster.jobqueue import jobqueue_client
from spxdask.cluster.jobqueue.slurm import (
    find_cluster_of_answer,
    find_clusters,
    list_states,
    make_environment,
)


@pytest.mark.parametrize(
    ("directives", "clusters"),
    [
        (["--clusters=other"], "other"),
        (["--clusters other"], "other"),
        (["--exclusive", "-M other"], "other"),
        (["-Mother"], "other"),
        (["--gres=gpu:1 --clusters='a,b'"], "a,b"),
        (["-M one", "--clusters=two  # the newer"], "two"),
        (["--cluster-constraint=big", "--exclusive"], None),
        ([], None),
    ],
)
def test_clusters_of_directives(directives, clusters):
    assert find_clusters(directives) == clusters


@pytest.mark.parametrize(
    ("answer", "cluster"),
    [
        ("Submitted batch job 12 on cluster other\n", "other"),
        ("12;other\n", "other"),
        ("Submitted batch job 12\n", None),
        ("12\n", None),
    ],
)
def test_cluster_of_an_answer(answer, cluster):
    assert find_cluster_of_answer(answer) == cluster


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Put scripts before Slurm's commands; return a function that reads what they recorded."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(**scripts: str):
        for name, text in scripts.items():
            script = tmp_path / "bin" / name
            script.write_text(
                f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.args\n'
                f"env >> {tmp_path}/{name}.env\n{text}\n"
            )
            script.chmod(0o755)

        def recorded(name: str, what: str = "args") -> list[str]:
            return (tmp_path / f"{name}.{what}").read_text().splitlines()

        return recorded

    return put


@pytest.mark.cluster
@pytest.mark.parametrize("answer", [" on cluster other", ""])
def test_a_job_on_another_cluster(commands, write_settings, answer):
    """It is looked for and cancelled there, whether sbatch names the cluster or not."""
    recorded = commands(
        sbatch=f"echo Submitted batch job 12{answer}",
        squeue='case "$*" in *--clusters=other*) echo "12 PENDING";; esac',
        scancel="",
    )
    path = write_settings(minimum=1, job_extra_directives=["--clusters=other"])
    with jobqueue_client(path) as client:
        [job] = client.cluster.workers.values()
        assert (job.job_id, job.slurm_cluster, job.status) == ("12", "other", Status.running)
    assert "--clusters=other" in recorded("squeue")[0]
    assert recorded("scancel") == ["--clusters=other 12"]


@pytest.mark.cluster
def test_settings_of_the_user_do_not_overrule_the_file(commands, write_settings, monkeypatch):
    recorded = commands(sbatch="echo Submitted batch job 12", squeue="echo 12 PENDING", scancel="")
    misleading = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_MEM_PER_CPU": "1M",
        "SBATCH_JOB_NAME": "mine",
        "SBATCH_WAIT": "1",
        "SBATCH_ARRAY_INX": "0-99",
        "SCANCEL_INTERACTIVE": "1",
        "SQUEUE_STATES": "RUNNING",
    }
    for name, value in (misleading | {"SBATCH_ACCOUNT": "m1"}).items():
        monkeypatch.setenv(name, value)
    with jobqueue_client(write_settings(minimum=1, walltime="01:00:00")):
        pass
    seen = {
        (command, line.partition("=")[0])
        for command in ("sbatch", "squeue", "scancel")
        for line in recorded(command, "env")
    }
    assert ("sbatch", "SBATCH_ACCOUNT") in seen
    own = {("sbatch", name) for name in misleading if name.startswith("SBATCH")}
    own |= {("squeue", "SQUEUE_STATES"), ("scancel", "SCANCEL_INTERACTIVE")}
    assert seen & own == set()


def test_the_environment_of_other_commands_is_left_alone(monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert make_environment(["qsub", "x"]) == dict(os.environ)


def test_a_squeue_that_fails_says_nothing_about_jobs(commands):
    commands(squeue="echo 12 PENDING; exit 1")
    assert list_states("other") is None
