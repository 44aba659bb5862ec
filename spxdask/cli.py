"""The command line."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from decimal import Decimal
from typing import Any, NoReturn

from spxdask import __version__
from spxdask.config import (
    SHORT_NAMES,
    BatchConfig,
    PhotometryConfig,
    check_options,
    default_of,
    read_options,
    template,
)
from spxdask.errors import ConfigError, InputError, SpxdaskError

EXIT_DONE, EXIT_FRAMES_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

ALL_OPTIONS = tuple(option.name for option in fields(BatchConfig))
# The options that each stage reads, and which it therefore takes.
STAGES = {
    "query": ALL_OPTIONS,
    "download": (
        "output_dir",
        "max_download_workers",
        "max_retries",
        "stall_timeout",
        "archive_url",
    ),
    "extract": (
        "output_dir",
        "catalog_path",
        "max_extract_workers",
        "per_image_format",
        "photometry",
    ),
    "aggregate": (
        "output_dir",
        "max_extract_workers",
        "num_buckets",
        "keep_bucket_files",
        "per_image_format",
        "lightcurve_format",
    ),
}
COMMANDS = {
    "demo": "the four stages on a simulated sky, checked against its truth",
    "run": "all four stages",
    "query": "find the frames that cover a field",
    "download": "fetch the frames of the query",
    "extract": "measure the catalogue in every frame",
    "aggregate": "write one light curve a source",
    "status": "where a run stands",
    "config": "write a commented YAML file of every option",
}
HEAD = """\
The light of every source you care about, out of every SPHEREx image.
"""
EPILOG = """\
a first run, on a simulated sky, with nothing to download:
  spxdask demo

a real one:
  spxdask run --catalog sources.csv --ra 10.685 --dec 41.269 --radius 0.1 --bands D3 D4

exit status: 0 done, 1 some frames failed, 2 wrong usage or input, 130 stopped
"""
# Options whose flag is not their name.
FLAGS = {name: f"--{short}" for short, name in SHORT_NAMES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = parser.parse_known_args(_no_minus_for_a_flag(arguments))
    if unknown:
        # Of the command, whose help has the flags that there are.
        parser.prog = f"spxdask {options.command or ''}".strip()
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    _log(options.verbose)
    try:
        with _second_interrupt_ends_it():
            return options.run(options)
    except InputError as error:
        print(f"spxdask: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (SpxdaskError, OSError) as error:
        print(f"spxdask: {error}", file=sys.stderr)
        return EXIT_FRAMES_FAILED
    except KeyboardInterrupt:
        print("spxdask: stopped; the same command goes on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _second_interrupt_ends_it() -> Iterator[None]:
    """Let the first Ctrl-C stop a run in good order, and the next one at once."""
    asked = 0

    def interrupt(*_) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            # What workers were writing has no name yet.
            for child in multiprocessing.active_children():
                child.kill()
            print("\nspxdask: stopped at once", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
        print("\nspxdask: stopping; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _plain_number(argument: str) -> str:
    """Write -1e-5 as -0.00001, which argparse does not take for a flag."""
    if re.fullmatch(r"-(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", argument):
        return format(Decimal(argument), "f")
    return argument


def _no_minus_for_a_flag(arguments: Sequence[str]) -> list[str]:
    """Write --dec -66d as --dec=-66d: argparse takes only plain numbers for values."""
    found: list[str] = []
    for argument in map(_plain_number, arguments):
        follows = bool(found) and re.fullmatch(r"--\w[\w-]*", found[-1])
        plain = re.fullmatch(r"-\d+|-\d*\.\d+", argument)
        if follows and not plain and re.match(r"-\.?\d", argument):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _log(verbose: int) -> None:
    """Let our own messages through; Dask's keep the form that Dask gives them."""
    logger = logging.getLogger("spxdask")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


class _Parser(argparse.ArgumentParser):
    """Takes flags in full only, as a new one would change what a shortened one means."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"spxdask: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    commands_help = "".join(f"  {name:<11} {text}\n" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="spxdask",
        usage="spxdask COMMAND [options]      (spxdask COMMAND --help says more)",
        description=f"{HEAD}\n{commands_help}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spxdask {__version__}")
    common = _Parser(add_help=False)
    common.add_argument(
        "-v", "--verbose", action="count", default=0, help="say more; twice for every frame"
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="spxdask"
    )

    def add(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[common], description=COMMANDS[name])
        command.set_defaults(run=run)
        return command

    run = add("run", _run)
    _add_options(run, ALL_OPTIONS)
    run.add_argument(
        "--retry-failed",
        action="store_true",
        help="take only the frames of the folder's last query that failed",
    )
    for stage, names in STAGES.items():
        command = add(stage, _stage)
        _add_options(command, names)
        if stage == "extract":
            command.add_argument(
                "--all", action="store_true", help="measure again what is already measured"
            )
    status = add("status", _status)
    status.add_argument("output_dir", nargs="?", metavar="DIR", default=None)
    status.add_argument(
        "--watch", action="store_true", help="say it again and again, until the run ends"
    )
    demo = add("demo", _demo)
    demo.add_argument("--output", default="demo_output", metavar="DIR", help="default: %(default)s")
    config = add("config", _config)
    config.add_argument("path", nargs="?", help="file to write; standard output without one")
    return parser


def _add_options(command: argparse.ArgumentParser, names: Collection[str]) -> None:
    run = command.add_argument_group("run")
    if "center_ra" in names:
        run.add_argument("--config", metavar="FILE", help="YAML file of options; flags overrule it")
    cluster = run.add_mutually_exclusive_group()
    cluster.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask scheduler to use, or its scheduler file; default: one of our own",
    )
    cluster.add_argument(
        "--jobqueue",
        metavar="FILE",
        help="YAML file of a batch system, whose jobs are the workers (deploy/slurm has one)",
    )
    for option in fields(BatchConfig):
        if option.name in names and option.name != "photometry":
            _add_option(run, option)
    if "photometry" in names:
        photometry = command.add_argument_group("photometry")
        for option in fields(PhotometryConfig):
            _add_option(photometry, option)


def _add_option(group: argparse._ArgumentGroup, option: Field) -> None:
    """Add the flag of an option; the configuration checks its value."""
    flag = FLAGS.get(option.name, "--" + option.name.replace("_", "-"))
    unit = f" [{option.metadata['unit']}]" if "unit" in option.metadata else ""
    how: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    text = option.metadata["help"].replace("%", "%%") + unit
    if option.default is not MISSING or option.default_factory is not MISSING:
        default = default_of(option)
        if default is None:
            text = text.replace("; null for all", "; default: all")
        else:
            text += f"; default: {default}"
    if isinstance(option.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **how)
        return
    count = {"bands": "+", "bad_flags": "*", "mjd_range": 2, "window_size": "+"}.get(option.name)
    metavar = {"bands": "D1..D6", "mjd_range": ("FIRST", "LAST"), "output_dir": "DIR"}
    text_options = ("bands", "catalog_path", "output_dir", "tap_url", "archive_url")
    group.add_argument(
        flag,
        nargs=count,
        type=str if option.name in text_options else _value,
        metavar=metavar.get(option.name, "FILE" if option.name == "catalog_path" else "X"),
        help=text,
        **how,
    )


def _value(text: str) -> int | float | str:
    """Read a number where there is one; what else there is, the configuration judges."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _configuration(options: argparse.Namespace, *, saved: bool) -> BatchConfig:
    """Return options from the folder's last run or from a file, overruled by the flags."""
    from spxdask.run.folder import RunFolder

    flags = _given(options)
    values: dict[str, Any] = {}
    path = None
    if saved:
        if getattr(options, "config", None) is not None:
            raise ConfigError("--retry-failed goes on with the options of the run; drop --config")
        output = flags.get("output_dir", default_of(_field(BatchConfig, "output_dir")))
        values = RunFolder(output).saved_config().to_dict()
    elif options.config is not None:
        path = options.config
        values = _not_overruled(read_options(path), flags)
    with _told_of(path):
        check_options(BatchConfig, values)
    missing = [
        FLAGS.get(f.name, f"--{f.name}")
        for f in fields(BatchConfig)
        if f.default is f.default_factory is MISSING and f.name not in values | flags
    ]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)} (or a --config FILE that has them)")
    check_options(BatchConfig, flags)
    measuring = values.get("photometry") or {}
    merged = values | flags | {"photometry": measuring | flags.get("photometry", {})}
    # What is wrong now is wrong of options together.
    with _told_of(path if measuring else None):
        return BatchConfig.from_dict(merged)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that flags were given for."""
    given = vars(options)
    flags = {f.name: given[f.name] for f in fields(BatchConfig) if f.name in given}
    if "bands" in flags:
        # D3 D4, D3,D4 or D3, D4
        flags["bands"] = [b for text in flags["bands"] for b in text.split(",") if b]
    photometry = {f.name: given[f.name] for f in fields(PhotometryConfig) if f.name in given}
    if isinstance(photometry.get("window_size"), list) and len(photometry["window_size"]) == 1:
        photometry["window_size"] = photometry["window_size"][0]
    return flags | ({"photometry": photometry} if photometry else {})


def _not_overruled(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file that no flag overrules, and that were filled in."""
    required = [f.name for f in fields(BatchConfig) if f.default is f.default_factory is MISSING]
    left = {}
    for name, value in values.items():
        if name == "photometry" and isinstance(value, Mapping):
            overruled = flags.get(name, {})
            left[name] = {key: v for key, v in value.items() if key not in overruled}
        elif name not in flags or name == "photometry":
            left[name] = value
    return {name: v for name, v in left.items() if v is not None or name not in required}


@contextmanager
def _told_of(path: str | None) -> Iterator[None]:
    """Name the file that an option came from, if it came from one."""
    try:
        yield
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"{path}: {error}") from None


def _field(options: type, name: str) -> Field:
    return next(f for f in fields(options) if f.name == name)


def _pipeline(options: argparse.Namespace, *, saved: bool):
    # This sets the levels of Dask's loggers.
    from spxdask.pipeline import BatchPipeline

    if not options.verbose:
        # It announces each shuffle as a warning, and tells of a lost scheduler with a
        # traceback, and we in a sentence.
        logging.getLogger("distributed.shuffle").setLevel(logging.ERROR)
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    return BatchPipeline(
        _configuration(options, saved=saved),
        scheduler=options.scheduler,
        jobqueue=options.jobqueue,
        progress=True,
    )


def _run(options: argparse.Namespace) -> int:
    pipeline = _pipeline(options, saved=options.retry_failed)
    # First, so that a mistake in it costs no cluster.
    _ = pipeline.catalogue
    with pipeline:
        print(pipeline.links, file=sys.stderr)
        summary = pipeline.run_all(retry_failed=options.retry_failed)
    print(summary)
    return EXIT_FRAMES_FAILED if summary.failed else EXIT_DONE


def _stage(options: argparse.Namespace) -> int:
    from spxdask.run.summary import describe

    pipeline = _pipeline(options, saved=options.command != "query")
    with pipeline:
        print(pipeline.links, file=sys.stderr)
        if options.command == "extract":
            pipeline.run_extract(skip_existing=not options.all)
        else:
            getattr(pipeline, f"run_{options.command}")()
    report = pipeline.reports[options.command]
    print(describe(report))
    for filename, reason in report.failed.items():
        print(f"{filename}: {reason}", file=sys.stderr)
    return EXIT_FRAMES_FAILED if report.failed else EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from spxdask.run.status import status, watch

    output = options.output_dir or default_of(_field(BatchConfig, "output_dir"))
    if not options.watch:
        print(status(output))
        return EXIT_DONE
    with suppress(KeyboardInterrupt):
        for found in watch(output):
            # To the top left, and clear what is below.
            clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
            print(f"{clear}{found}\n", flush=True)
    return EXIT_DONE


def _demo(options: argparse.Namespace) -> int:
    from spxdask.demo import run_demo

    return EXIT_FRAMES_FAILED if run_demo(options.output).failed else EXIT_DONE


def _config(options: argparse.Namespace) -> int:
    text = template()
    if options.path is None:
        print(text, end="")
        return EXIT_DONE
    try:
        with open(options.path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{options.path}: {error.strerror}") from error
    print(
        textwrap.dedent(f"""\
        wrote {options.path}; fill in the four options at its top, then
        spxdask run --config {options.path}""")
    )
    return EXIT_DONE
