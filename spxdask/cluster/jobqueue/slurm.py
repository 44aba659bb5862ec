"""What is particular to Slurm: several clusters, and a user's own settings of its commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

SQUEUE_TIMEOUT_S = 5.0
# Slurm's names for the states of jobs that will not run any more. Such jobs are listed for some
# minutes.
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}

# Variables with which a user sets options of sbatch overrule the lines of a script. These would
# have it wait for the job, submit many jobs at once, or write the job's output elsewhere.
_MISLEADING = {"SBATCH_WAIT", "SBATCH_ARRAY_INX", "SBATCH_OUTPUT", "SBATCH_ERROR"}
# The variables of those options whose name is not that of the variable.
_VARIABLES = {
    "time": ("TIMELIMIT",),
    "array": ("ARRAY_INX",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "mem-per-cpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "mem-per-gpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}
_LONG_NAMES = {
    **{"A": "account", "a": "array", "C": "constraint", "e": "error", "G": "gpus", "i": "input"},
    **{"J": "job-name", "M": "clusters", "m": "distribution", "O": "overcommit", "o": "output"},
    **{"p": "partition", "q": "qos", "S": "core-spec", "t": "time", "W": "wait"},
}


def find_clusters(directives: Iterable[str]) -> str | None:
    """Return the clusters that options of sbatch name.

    Parameters
    ----------
    directives : iterable of str
        Options as they stand behind ``#SBATCH``.

    Returns
    -------
    str or None
        One name, or several with commas; None if there is no such option.
    """
    found = None
    for name, value in _parse_options(directives):
        if name == "clusters":
            found = value
    return found


def find_cluster_of_answer(answer: str) -> str | None:
    """Return the cluster that sbatch submitted a job to.

    Parameters
    ----------
    answer : str
        What it wrote.

    Returns
    -------
    str or None
        None if it names none, as for the cluster that this machine belongs to.
    """
    match = re.search(r"\bon cluster (\S+)|^\d+;(\S+)", answer, re.MULTILINE)
    return (match[1] or match[2]) if match else None


def make_environment(command: Sequence[str]) -> dict[str, str]:
    """Return the environment for a command, without what would have it do another thing.

    Parameters
    ----------
    command : sequence of str
        The command. That of any other batch system gets the environment as it is.

    Returns
    -------
    dict of str to str
        For squeue and scancel without the user's settings for them. For sbatch without the
        settings that a line of the script is about, which they would overrule, and without
        those with which it does not submit one job.
    """
    program = os.path.basename(command[0])
    if program == "sbatch":
        left_out = {*_MISLEADING}
        for name, _ in _parse_options(_read_directives(command)):
            variables = _VARIABLES.get(name, (name.replace("-", "_").upper(),))
            left_out |= {f"SBATCH_{variable}" for variable in variables}
        if "SBATCH_CLUSTERS" in left_out:
            left_out.add("SLURM_CLUSTERS")
        return {key: value for key, value in os.environ.items() if key not in left_out}
    prefixes = {"squeue": "SQUEUE_", "scancel": "SCANCEL_"}
    if program not in prefixes:
        return dict(os.environ)
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(prefixes[program]) and key != "SLURM_CLUSTERS"
    }


def list_states(clusters: str | None) -> dict[str, str] | None:
    """Return the jobs of this user that Slurm knows.

    Parameters
    ----------
    clusters : str or None
        The clusters to ask; None for that of this machine.

    Returns
    -------
    dict of str to str, or None
        Slurm's name of the state by job number; None if Slurm does not answer now.
    """
    # By number, as not all users have a name, in a container for example.
    command = ["squeue", "--noheader", "--format=%A %T", "--states=all", f"--user={os.getuid()}"]
    if clusters is not None:
        command.append(f"--clusters={clusters}")
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=SQUEUE_TIMEOUT_S,
            start_new_session=True,
            env=make_environment(command),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # With several clusters, there are lines that name them.
    rows = (line.strip().partition(" ") for line in answer.stdout.splitlines())
    return {number: state.strip() for number, _, state in rows if number.isdecimal()}


def _read_directives(command: Sequence[str]) -> Iterator[str]:
    """Yield the options in the script that a command submits."""
    with suppress(OSError, UnicodeDecodeError):
        for line in Path(command[-1]).read_text(encoding="utf-8").splitlines():
            if line.startswith("#SBATCH"):
                yield line.removeprefix("#SBATCH")


def _parse_options(directives: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the long names of options, and their values."""
    for directive in directives:
        try:
            words = shlex.split(directive, comments=True)
        except ValueError:
            words = directive.split()
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                yield name, value if equals else following
            elif word.startswith("-") and len(word) > 1:
                yield _LONG_NAMES.get(word[1], word[1]), word[2:] or following
