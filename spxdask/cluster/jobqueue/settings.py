"""Reading and checking the YAML file that describes the jobs."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import signal
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask
from dask.utils import parse_bytes

from spxdask.cluster.dask_internals import get_default_processes, get_keywords
from spxdask.cluster.page import choose_dashboard_port
from spxdask.cluster.workers import MALLOC_ENVIRONMENT
from spxdask.config import read_options
from spxdask.errors import ConfigError, InputError

# The classes of dask-jobqueue, by what its files call their batch systems.
SYSTEMS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "oar": "OARCluster",
    "htcondor": "HTCondorCluster",
}
# The section `adapt` and its defaults.
ADAPT_DEFAULTS = {"minimum_jobs": 1, "maximum_jobs": 20}
# A worker leaves in good order before the batch system ends its job: earlier by a tenth of
# the job's time, but by no more than 15 minutes.
LIFETIME_MARGIN = 0.1
MAX_LIFETIME_MARGIN_S = 900
# A number of bytes below this is a number of GB without its unit.
MIN_MEMORY_BYTES = 1_000_000

# Keys that dask-jobqueue has renamed.
_RENAMED = {
    "name": "job_name",
    "extra": "worker_extra_args",
    "env_extra": "job_script_prologue",
    "header_skip": "job_directives_skip",
    "job_extra": "job_extra_directives",
}
_SCHEDULER_KEYWORDS = ("dashboard_address", "host")
# Keywords that spxdask sets, or that a file cannot hold.
_NOT_IN_FILES = {
    *("self", "scheduler", "name", "job_cls", "loop", "asynchronous", "n_workers"),
    *("scheduler_cls", "config_name", "base_class_kwargs", "job_kwargs", "kwargs"),
    *_SCHEDULER_KEYWORDS,
}
_COUNTS = ("cores", "processes", "job_cpu", "ncpus")
_BOOLEANS = ("nanny", "security", "use_stdin")
_LISTS = (
    *("job_script_prologue", "worker_extra_args", "job_directives_skip"),
    *("job_extra_directives", "submit_command_extra", "cancel_command_extra"),
)

_Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The content of the file, checked and completed.

    Attributes
    ----------
    path : str
        The file.
    system : str
        The batch system, a key of `SYSTEMS`.
    cluster_class : type
        Its class in dask-jobqueue.
    keywords : dict
        Keywords of that class.
    minimum_jobs, maximum_jobs : int
        The numbers of jobs between which the cluster stays.
    """

    path: str
    system: str
    cluster_class: Any
    keywords: dict[str, Any]
    minimum_jobs: int
    maximum_jobs: int


def read_settings(path: _Path) -> Settings:
    """Read and check a file.

    Parameters
    ----------
    path : path
        YAML file; see `spxdask.cluster.jobqueue.cluster.jobqueue_client`.

    Returns
    -------
    Settings

    Raises
    ------
    ConfigError
        If the file cannot be used.
    InputError
        If dask-jobqueue is not installed.
    """
    values = read_options(path)
    _refuse_unknown_keys(path, "", values, ("jobqueue", "adapt"))
    systems = _as_section(path, "jobqueue", values.get("jobqueue"))
    _refuse_unknown_keys(path, "jobqueue.", systems, SYSTEMS)
    if len(systems) != 1:
        found = ", ".join(systems) or "none"
        rule = f"one section of {', '.join(SYSTEMS)}"
        raise ConfigError(f"jobqueue must have {rule}, got {found}", option="jobqueue", path=path)
    [(system, section)] = systems.items()
    limits = _check_limits(path, _as_section(path, "adapt", values.get("adapt")))
    section = _as_section(path, f"jobqueue.{system}", section)
    cluster_class = getattr(_import_dask_jobqueue(), SYSTEMS[system])
    known = get_keywords(cluster_class) - _NOT_IN_FILES
    # dask-jobqueue would use Dask's configuration, too, for what the file leaves out; read
    # here, it is checked like the file.
    site = dask.config.get(f"jobqueue.{system}", {})
    options = _check_options("Dask's configuration", system, site, known, ignore_unknown=True)
    options |= _check_options(path, system, section, known)
    return Settings(
        path=os.fspath(path),
        system=system,
        cluster_class=cluster_class,
        keywords=_complete_options(path, system, options),
        **limits,
    )


def _import_dask_jobqueue() -> Any:
    """Import dask-jobqueue, and undo that the import replaces the handler of Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue")
    except ModuleNotFoundError as error:
        raise InputError(
            f"workers in batch jobs need dask-jobqueue ({error}): pip install 'spxdask[jobqueue]'"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)


def _check_limits(path: _Path, section: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of jobs, with defaults for what the file leaves out."""
    _refuse_unknown_keys(path, "adapt.", section, ADAPT_DEFAULTS)
    limits = ADAPT_DEFAULTS | {key: value for key, value in section.items() if value is not None}
    least = 0
    for key, value in limits.items():
        if not _is_count(value, least):
            rule = f"a whole number >= {least}"
            raise ConfigError(option=f"adapt.{key}", value=value, rule=rule, path=path)
        least = max(1, value)
    return limits


def _as_section(path: _Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ConfigError(option=key, value=value, rule="a mapping", path=path)
    return value or {}


def _refuse_unknown_keys(
    path: _Path, section: str, keys: Iterable[Any], known: Collection[str]
) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(known))}"
            option = f"{section}{key}"
            raise ConfigError(f"unknown key {option}; {hint}", option=option, path=path)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_options(
    path: _Path,
    system: str,
    section: Mapping[str, Any],
    known: set[str],
    *,
    ignore_unknown: bool = False,
) -> dict[str, Any]:
    """Return the options of a section, keys as Python's and under their present names."""
    options: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        name = _RENAMED.get(name, name)
        option = f"jobqueue.{system}.{key}"
        if name not in known:
            if ignore_unknown:
                continue
            if name in _SCHEDULER_KEYWORDS:
                raise ConfigError(
                    f"{option} belongs in jobqueue.{system}.scheduler_options",
                    option=option,
                    path=path,
                )
            _refuse_unknown_keys(path, f"jobqueue.{system}.", [key], {*known, *_RENAMED})
        # The file that comes with dask-jobqueue lists all keys, most of them with null.
        if value is None:
            continue
        rule = _find_broken_rule(name, value, system)
        if rule is not None:
            raise ConfigError(option=option, value=value, rule=rule, path=path)
        if options.get(name) and value:
            raise ConfigError(f"{option} is given twice, as {name}", option=option, path=path)
        options[name] = options.get(name) or value
    return options


def _find_broken_rule(name: str, value: Any, system: str) -> str | None:
    """Return what a value must be, None if it is that."""
    if name in _COUNTS:
        return None if _is_count(value, 1) else "a whole number >= 1"
    if name in _BOOLEANS:
        return None if isinstance(value, bool) else "true or false"
    if name == "scheduler_options" or (name, system) == ("job_extra_directives", "htcondor"):
        return None if isinstance(value, dict) else "a mapping"
    if name in _LISTS:
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return None if is_list else "a list of texts"
    if name == "memory":
        with suppress(ValueError):
            is_amount = isinstance(value, str | int)
            if is_amount and parse_bytes(str(value)) >= MIN_MEMORY_BYTES:
                return None
        return "an amount with its unit, such as 8GB"
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    return None if is_text else "a text"


def _complete_options(path: _Path, system: str, options: dict[str, Any]) -> dict[str, Any]:
    """Add what a run needs to the options, where the user left it open."""
    for key in ("cores", "memory"):
        if key not in options:
            option = f"jobqueue.{system}.{key}"
            raise ConfigError(f"{option} is missing", option=option, path=path)
    cores = options["cores"]
    # Given explicitly, so that dask-jobqueue knows how many workers a job has.
    processes = options.get("processes") or get_default_processes(cores)
    if processes > cores:
        raise ConfigError(
            option=f"jobqueue.{system}.processes",
            value=processes,
            rule=f"<= cores, which is {cores}",
            path=path,
        )
    # The workers of jobs do not inherit the configuration of this process. These lines come
    # first, so that those of the user can change what they set.
    environment = [f"export {name}={value}" for name, value in MALLOC_ENVIRONMENT.items()]
    arguments = [*options.get("worker_extra_args", [])]
    if not any("--lifetime" in argument for argument in arguments):
        arguments += _lifetime_arguments(system, options.get("walltime"))
    scheduler = {"dashboard_address": f":{choose_dashboard_port()}"}
    return options | {
        "processes": processes,
        "job_script_prologue": [*environment, *options.get("job_script_prologue", [])],
        "worker_extra_args": arguments,
        "scheduler_options": scheduler | options.get("scheduler_options", {}),
    }


def _lifetime_arguments(system: str, walltime: Any) -> list[str]:
    """Return the arguments that have a worker leave before its job's time is over."""
    total_s = _parse_walltime(system, str(walltime))
    if not total_s:
        return []
    margin_s = min(total_s * LIFETIME_MARGIN, MAX_LIFETIME_MARGIN_S)
    return [f"--lifetime {total_s - margin_s:.0f}s", f"--lifetime-stagger {margin_s / 2:.0f}s"]


def _parse_walltime(system: str, text: str) -> int | None:
    """Return the seconds of a job's time, None if it is not understood, or without end."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d?):(\d\d?)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif system == "slurm" and (match := re.fullmatch(r"(\d+)-(\d+)(?::(\d\d?))?", text)):
        days, hours, minutes, seconds = *(int(part or 0) for part in match.groups()), 0
    elif system == "slurm" and (match := re.fullmatch(r"(\d+)(?::(\d\d?))?", text)):
        days, hours, minutes, seconds = 0, 0, *(int(part or 0) for part in match.groups())
    elif system == "lsf" and (match := re.fullmatch(r"(?:(\d+):)?(\d+)", text)):
        days, hours, minutes, seconds = 0, *(int(part or 0) for part in match.groups()), 0
    else:
        return None
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
