"""The command line."""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from spxdask import UNSUPPORTED_PLATFORM, __version__
from spxdask.config import (
    FIELD,
    FRAMES,
    WORKERS,
    BatchConfig,
    check_options,
    expand_path,
    list_missing,
    name_file,
    read_options,
    template,
)
from spxdask.errors import ConfigError, InputError, SpxdaskError
from spxdask.science.options import OptionInfo, PhotometryConfig, list_options
from spxdask.text import wrap_report

if TYPE_CHECKING:
    from spxdask.pipeline import BatchPipeline
    from spxdask.run.summary import RunSummary

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

BATCH_OPTIONS = {info.name: info for info in list_options(BatchConfig)}
PHOTOMETRY_OPTIONS = {info.name: info for info in list_options(PhotometryConfig)}
# Each stage takes the options that it reads.
STAGES = {
    "query": tuple(BATCH_OPTIONS),
    "download": (
        "output_dir",
        "max_download_workers",
        "max_retries",
        "stall_timeout",
        "archive_url",
        "archive_endpoint",
        "outage_patience",
    ),
    "extract": (
        "output_dir",
        "catalog_path",
        "id_column",
        "ra_column",
        "dec_column",
        "on_bad_row",
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
# The options that decide which calibration products are used.
CALIBRATION_OPTIONS = (
    "output_dir",
    "bands",
    "calibration",
    "calibration_pins",
    "archive_url",
    "archive_endpoint",
    "max_retries",
    "stall_timeout",
)


class _Command(NamedTuple):
    group: str
    summary: str
    usage: str


_FIELD_USAGE = "--catalog FILE [--ra DEG --dec DEG --radius DEG] [options]"
_WORKERS_HELP = {
    "--scheduler": (
        "ADDRESS",
        "Dask scheduler to use, or its scheduler file; by default a cluster is started here",
    ),
    "--jobqueue": (
        "FILE",
        "YAML file of a batch system, whose jobs are the workers (deploy/slurm has one)",
    ),
}
# In the order in which they are shown.
COMMANDS = {
    "run": _Command("every day", "all four stages", _FIELD_USAGE),
    "resume": _Command(
        "every day", "the last run of a folder, from where it ended", "[DIR] [options]"
    ),
    "status": _Command("every day", "how far a run is", "[DIR] [--watch]"),
    "plot": _Command(
        "every day", "draw spectrum or light curve of a source", "ID [--output DIR] [-o FILE]"
    ),
    "report": _Command("every day", "report.html: what a run is worth", "[DIR]"),
    "demo": _Command(
        "first steps",
        "the four stages on a simulated sky, checked against its truth",
        "[--output DIR]",
    ),
    "config": _Command("first steps", "write a commented YAML file of every option", "[FILE]"),
    "query": _Command("one stage", "find the frames that cover a field", _FIELD_USAGE),
    "download": _Command("one stage", "fetch the frames of the query", "[--output DIR] [options]"),
    "extract": _Command(
        "one stage", "measure the catalogue in every frame", "[--output DIR] [options]"
    ),
    "aggregate": _Command(
        "one stage", "write one light curve per source", "[--output DIR] [options]"
    ),
    "inject": _Command(
        "checks",
        "measure artificial sources in the frames of a run",
        "[--output DIR] [options]",
    ),
    "calibration": _Command(
        "checks",
        "calibration products: used, newest, fetched ahead",
        "[--output DIR] [--fetch] [options]",
    ),
}
HEAD = "The light of every source you care about, out of every SPHEREx image."
EPILOG = """\
a first run, on a simulated sky, with nothing to download:
  spxdask demo

a real one:
  spxdask run --catalog sources.csv --ra 10.685 --dec 41.269 --radius 0.1 \\
      --bands D3 D4

exit status: 0 done, 1 frames failed or nothing found, 2 wrong usage or input,
130 stopped
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Whoever reads its output may stop reading: that is no error.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name; that of this process by default.

    Returns
    -------
    int
        The exit status: 0 done, 1 frames failed or nothing found, 2 wrong usage or input, 130
        stopped.
    """
    if sys.platform == "win32":
        print(f"spxdask: {UNSUPPORTED_PLATFORM}", file=sys.stderr)
        return EXIT_USAGE
    try:
        return _run_command(arguments)
    finally:
        # Here, as Python reports it as an error at its end that it cannot write what is left.
        try:
            _print("", end="")
        except SpxdaskError as error:
            print(f"spxdask: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)


def _run_command(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Ids and paths may hold characters that the locale's encoding does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = parser.parse_known_args(_attach_negative_values(arguments))
    if unknown:
        # The help of the command lists the flags that it has.
        parser.prog = f"spxdask {options.command or ''}".strip()
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        with _log_to_stderr(options.verbose), _stop_at_second_interrupt():
            return options.run(options)
    except InputError as error:
        print(f"spxdask: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (SpxdaskError, OSError) as error:
        print(f"spxdask: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("spxdask: stopped; the same command resumes the run", file=sys.stderr)
        return EXIT_INTERRUPTED


def _print(text: object, end: str = "\n") -> bool:
    """Print to standard output; return whether anyone reads it, which nobody has to."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # What is left to be written must not be an error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return False
        raise SpxdaskError(f"standard output cannot be written: {error.strerror}") from error
    return True


@contextmanager
def _stop_at_second_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C stop a run in good order, and the next one at once."""
    n_interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal n_interrupts
        n_interrupts += 1
        if n_interrupts > 1:
            # Files that workers are writing do not have their final names yet.
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


def _write_out(argument: str) -> str:
    """Write -1e-5 as -0.00001, which argparse does not take for a flag."""
    if re.fullmatch(r"-(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", argument):
        return format(Decimal(argument), "f")
    return argument


def _attach_negative_values(arguments: Sequence[str]) -> list[str]:
    """Write --dec -66d as --dec=-66d, so that the configuration can report the invalid value.

    argparse interprets -66d as a flag, as click and typer do a value that begins with a
    letter; none of them has an option to prevent this.
    """
    attached: list[str] = []
    for argument in map(_write_out, arguments):
        follows_flag = bool(attached) and re.fullmatch(r"--\w[\w-]*", attached[-1])
        is_number = re.fullmatch(r"-\d+|-\d*\.\d+", argument)
        if follows_flag and not is_number and re.match(r"-\.?\d", argument):
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


@contextmanager
def _log_to_stderr(verbose: int) -> Iterator[None]:
    """Print the messages of spxdask; those of Dask keep the form that Dask gives them."""
    logger = logging.getLogger("spxdask")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Parser(argparse.ArgumentParser):
    """Accepts flags in full only, as a new flag would change what a shortened one means."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"spxdask: {message}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # Nobody has to read it; without a buffer, Python says so here.
        with suppress(BrokenPipeError):
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spxdask",
        usage="spxdask COMMAND [options]      (spxdask COMMAND --help shows the options)",
        description=f"{HEAD}\n\n{_list_commands()}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--version", action="version", version=f"spxdask {__version__}")
    _add_help(general)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="spxdask"
    )
    for name in COMMANDS:
        _add_command(commands, name)
    return parser


def _list_commands() -> str:
    lines: list[str] = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(f"{group}:")
        lines += [
            f"  {name:<11} {command.summary}"
            for name, command in COMMANDS.items()
            if command.group == group
        ]
    return "\n".join(lines)


def _add_help(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="help", help="show this help and exit")


def _add_command(commands: Any, name: str) -> None:
    """Add a command, its options in groups, those of every day first."""
    command: _Parser = commands.add_parser(
        name,
        usage=f"spxdask {name} {COMMANDS[name].usage}",
        description=COMMANDS[name].summary,
        add_help=False,
    )
    command.set_defaults(run=_RUNNERS.get(name, _stage))
    if name == "run":
        groups = _add_options(command, BATCH_OPTIONS)
        groups[FRAMES].add_argument(
            "--retry-failed",
            action="store_true",
            help="process only the frames of the folder's last query that failed",
        )
        _add_recheck(groups[FRAMES])
        _add_dry_run(groups[FRAMES])
    elif name in STAGES:
        groups = _add_options(command, STAGES[name])
        if name == "query":
            _add_dry_run(groups[FRAMES])
        if name == "download":
            _add_recheck(groups[FRAMES])
        if name == "extract":
            groups[FRAMES].add_argument(
                "--all", action="store_true", help="measure again what is already measured"
            )
    elif name == "resume":
        _add_folder(command)
        _add_cluster(command.add_argument_group("workers"))
    elif name == "plot":
        command.add_argument("target_id", metavar="ID", help="id of the source in the catalogue")
        _add_option(command, BATCH_OPTIONS["output_dir"])
        command.add_argument(
            "--light-curve", action="store_true", help="flux against time, not wavelength"
        )
        command.add_argument(
            "-o",
            "--file",
            metavar="FILE",
            help="picture to write, of the kind that its ending names; default: ID.png, or "
            "ID-light-curve.png",
        )
    elif name == "status":
        _add_folder(command)
        command.add_argument(
            "--watch", action="store_true", help="report again and again, until the run ends"
        )
    elif name == "report":
        command.add_argument("output_dir", nargs="?", metavar="DIR", help="the output folder")
    elif name == "demo":
        command.add_argument(
            "--output", default="demo_output", metavar="DIR", help="default: %(default)s"
        )
    elif name == "inject":
        _add_injection(command)
    elif name == "calibration":
        command.add_argument(
            "--config", metavar="FILE", help="YAML file of options; flags take precedence"
        )
        for option in CALIBRATION_OPTIONS:
            _add_option(command, BATCH_OPTIONS[option])
        command.add_argument(
            "--fetch", action="store_true", help="fetch what is not in the cache of this machine"
        )
    else:
        command.add_argument(
            "path", nargs="?", metavar="FILE", help="file to write; standard output without one"
        )
    general = command.add_argument_group("general")
    general.add_argument(
        "-v", "--verbose", action="count", default=0, help="log more; twice for every frame"
    )
    _add_help(general)


def _add_injection(command: argparse.ArgumentParser) -> None:
    """Add what an injection may be given; it checks the values itself."""
    group = command.add_argument_group("sources")
    for flag, metavar, description in (
        ("--frames", "N", "at most so many frames, evenly over bands and time; default: 12"),
        ("--per-frame", "N", "sources on each frame, if there is room; default: 200"),
        ("--min-snr", "RATIO", "flux over error of a source that is detected; default: 5"),
        ("--seed", "N", "the same seed makes the same sources and noise; default: 1"),
    ):
        group.add_argument(
            flag, type=_value, metavar=metavar, help=description, default=argparse.SUPPRESS
        )
    group.add_argument(
        "--magnitudes",
        nargs=2,
        type=_value,
        metavar=("BRIGHT", "FAINT"),
        help="AB magnitudes of the brightest and the faintest; default: 13 21",
        default=argparse.SUPPRESS,
    )
    _add_option(command.add_argument_group("folder"), BATCH_OPTIONS["output_dir"])


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("output_dir", nargs="?", metavar="DIR", help="the output folder")


def _add_dry_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be fetched, and how long it may take; change nothing",
    )


def _add_recheck(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recheck",
        action="store_true",
        help="ask the archive which frames it has replaced, and fetch those again",
    )


def _add_options(
    command: argparse.ArgumentParser, names: Collection[str]
) -> dict[str, argparse._ArgumentGroup]:
    """Add the flags of some options; return the groups of flags by their headings."""
    infos = [info for info in BATCH_OPTIONS.values() if info.nested is None]
    if "photometry" in names:
        infos += PHOTOMETRY_OPTIONS.values()
    # Also those without an option of this command; argparse shows no empty ones.
    groups = {
        title: command.add_argument_group(title)
        for title in dict.fromkeys(info.group for info in infos)
    }
    if "center_ra" in names:
        groups[FIELD].add_argument(
            "--config", metavar="FILE", help="YAML file of options; flags take precedence"
        )
    _add_cluster(groups[WORKERS])
    for info in infos:
        if info.name in names or info.name in PHOTOMETRY_OPTIONS:
            _add_option(groups[info.group], info)
    return groups


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    """Add the flags that name a cluster."""
    cluster = group.add_mutually_exclusive_group()
    for flag, (metavar, description) in _WORKERS_HELP.items():
        cluster.add_argument(flag, metavar=metavar, help=description)


def _add_option(group: argparse._ActionsContainer, info: OptionInfo) -> None:
    """Add the flag of an option; the configuration checks its value."""
    how: dict[str, Any] = {"dest": info.name, "default": argparse.SUPPRESS}
    how["help"] = _help_text(info).replace("%", "%%")
    if info.annotation is bool:
        group.add_argument(info.flag, action=argparse.BooleanOptionalAction, **how)
        return
    group.add_argument(
        info.flag,
        nargs=info.nargs,
        type=str if info.annotation in (str, str | None) else _value,
        metavar=info.metavar,
        **how,
    )


def _help_text(info: OptionInfo) -> str:
    text, default = info.description_with_unit, info.default
    if info.required:
        return text
    if default is None:
        return text.replace("; null for ", "; default: ")
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text}; default: {default}"


def _value(text: str) -> int | float | str:
    """Read a number where there is one; the configuration judges everything else."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _configuration(options: argparse.Namespace, *, saved: bool) -> BatchConfig:
    """Return options from the folder's last run or from a file, overruled by the flags."""
    from spxdask.run.folder import RunFolder

    flags = _collect_flags(options)
    values: dict[str, Any] = {}
    path = None
    saved = saved or _means_last_run(options, flags)
    if saved:
        if getattr(options, "config", None) is not None:
            raise ConfigError("--retry-failed uses the options of the last run; drop --config")
        output = expand_path(flags.get("output_dir", BATCH_OPTIONS["output_dir"].default))
        values = RunFolder(output).saved_config().to_dict()
    elif options.config is not None:
        path = expand_path(options.config, "--config")
        values = _not_overruled(read_options(path), flags)
    with name_file(path):
        check_options(BatchConfig, values)
    for name, other in (("target", "catalog_path"), ("catalog_path", "target")):
        if name in flags and other not in flags:
            values.pop(other, None)
    missing = [BATCH_OPTIONS[name].flag for name in list_missing(values | flags)]
    if not any((values | flags).get(name) is not None for name in ("catalog_path", "target")):
        missing.append("--catalog or --target")
    if missing:
        raise ConfigError(f"missing {', '.join(missing)} (or a --config FILE that has them)")
    check_options(BatchConfig, flags)
    measuring = values.get("photometry") or {}
    merged = values | flags | {"photometry": measuring | flags.get("photometry", {})}
    # Each option by itself is right, so that an error is one of options together.
    with name_file(path if measuring else None):
        return BatchConfig.from_dict(merged)


def _means_last_run(options: argparse.Namespace, flags: Mapping[str, Any]) -> bool:
    """Return whether a folder with a run is named and no sources are: its last run is meant."""
    from spxdask.run.folder import CONFIG_NAME, RunFolder

    if (
        options.config is not None
        or "output_dir" not in flags
        or {"catalog_path", "target"} & {*flags}
    ):
        return False
    folder = RunFolder(expand_path(flags["output_dir"]))
    if not folder.state.exists(CONFIG_NAME):
        return False
    print(f"spxdask: with the options of the last run in {folder.path}", file=sys.stderr)
    return True


def _collect_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that flags were given for."""
    given = vars(options)
    flags = {name: given[name] for name in BATCH_OPTIONS if name in given}
    if "bands" in flags:
        # D3 D4, D3,D4 or D3, D4
        flags["bands"] = [b for text in flags["bands"] for b in str(text).split(",") if b]
    photometry = {name: given[name] for name in PHOTOMETRY_OPTIONS if name in given}
    if isinstance(photometry.get("window_size"), list) and len(photometry["window_size"]) == 1:
        [photometry["window_size"]] = photometry["window_size"]
    return flags | ({"photometry": photometry} if photometry else {})


def _not_overruled(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file that no flag overrules."""
    left = {}
    for name, value in values.items():
        if name == "photometry" and isinstance(value, Mapping):
            overruled = flags.get(name, {})
            left[name] = {key: v for key, v in value.items() if key not in overruled}
        elif name not in flags or name == "photometry":
            left[name] = value
    return left


def _pipeline(config: BatchConfig, options: argparse.Namespace) -> BatchPipeline:
    from spxdask.run.folder import RunFolder
    from spxdask.run.sources import RunSources

    sources = RunSources(config, RunFolder(config.output_dir))
    if options.command in ("run", "resume", "query", "extract"):
        # Before the import of Dask, which takes seconds, and long before a cluster is started.
        sources.read()
    # Before the levels of Dask's loggers are set, as the import of Dask sets them, too.
    from spxdask.pipeline import BatchPipeline

    if not options.verbose:
        # Dask reports a lost scheduler with a traceback where spxdask does so in a sentence.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    return BatchPipeline(
        sources, scheduler=options.scheduler, jobqueue=options.jobqueue, progress=True
    )


def _run(options: argparse.Namespace) -> int:
    config = _configuration(options, saved=options.retry_failed)
    if options.dry_run:
        return _print_estimate(config, options)
    pipeline = _pipeline(config, options)
    return _print_summary(
        pipeline.run_all(retry_failed=options.retry_failed, recheck=options.recheck)
    )


def _resume(options: argparse.Namespace) -> int:
    from spxdask.run.folder import RunFolder

    output = expand_path(options.output_dir or BATCH_OPTIONS["output_dir"].default)
    pipeline = _pipeline(RunFolder(output).saved_config(), options)
    return _print_summary(pipeline.run_all())


def _print_summary(summary: RunSummary) -> int:
    _print(wrap_report(str(summary)))
    return EXIT_FAILED if summary.failed or not summary.n_measured else EXIT_DONE


def _print_estimate(config: BatchConfig, options: argparse.Namespace) -> int:
    from spxdask.run.folder import RunFolder
    from spxdask.run.sources import RunSources
    from spxdask.stages.estimate import estimate_run

    if options.jobqueue is not None:
        from spxdask.cluster.jobqueue.settings import read_settings

        # What a run would refuse is refused here, too.
        read_settings(options.jobqueue)
    estimate = estimate_run(config, RunSources(config, RunFolder(config.output_dir)))
    _print(wrap_report(str(estimate)))
    return EXIT_DONE if estimate.has_sources else EXIT_FAILED


def _stage(options: argparse.Namespace) -> int:
    from spxdask.run.summary import describe_stage

    config = _configuration(options, saved=options.command != "query")
    if options.command == "query" and options.dry_run:
        return _print_estimate(config, options)
    pipeline = _pipeline(config, options)
    if options.command == "extract":
        pipeline.run_extract(skip_existing=not options.all)
    elif options.command == "download":
        pipeline.run_download(recheck=options.recheck)
    else:
        getattr(pipeline, f"run_{options.command}")()
    report = pipeline.reports[options.command]
    _print(wrap_report(describe_stage(report)))
    for filename, reason in report.failed.items():
        print(f"{filename}: {reason}", file=sys.stderr)
    is_empty = options.command == "query" and not report.total
    return EXIT_FAILED if report.failed or is_empty else EXIT_DONE


def _plot(options: argparse.Namespace) -> int:
    from spxdask import open_run
    from spxdask.storage.names import file_stem

    given = vars(options)
    run = open_run(expand_path(given.get("output_dir", BATCH_OPTIONS["output_dir"].default)))
    light_curve = run[options.target_id]
    draw = light_curve.plot_light_curve if options.light_curve else light_curve.plot_spectrum
    axes = draw()
    kind = "-light-curve" if options.light_curve else ""
    path = expand_path(options.file or f"{file_stem(options.target_id)}{kind}.png", "--file")
    try:
        axes.figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(getattr(error, "strerror", None) or str(error), path=path) from error
    _print(path)
    return EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from spxdask.run.status import read_status, watch_status

    output = expand_path(options.output_dir or BATCH_OPTIONS["output_dir"].default)
    if not options.watch:
        _print(wrap_report(str(read_status(output))))
        return EXIT_DONE
    with suppress(KeyboardInterrupt):
        for found in watch_status(output):
            # Move the cursor to the top left, and clear the screen below it.
            clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
            if not _print(f"{clear}{wrap_report(str(found))}\n"):
                break
    return EXIT_DONE


def _report(options: argparse.Namespace) -> int:
    from spxdask.report.make import make_report
    from spxdask.run.folder import REPORT_NAMES, RunFolder

    output = expand_path(options.output_dir or BATCH_OPTIONS["output_dir"].default)
    for sentence in make_report(output)["verdict"]:
        _print(f"{sentence['level']:<11} {sentence['text']}")
    _print(f"{'report':<11} {RunFolder(output).root.path_to(REPORT_NAMES[0])}")
    return EXIT_DONE


def _demo(options: argparse.Namespace) -> int:
    from spxdask.demo import run_demo

    return EXIT_FAILED if run_demo(options.output).failed else EXIT_DONE


def _inject(options: argparse.Namespace) -> int:
    from spxdask.inject import run_injection

    given = vars(options)
    names = ("frames", "per_frame", "magnitudes", "min_snr", "seed")
    report = run_injection(
        expand_path(given.get("output_dir", BATCH_OPTIONS["output_dir"].default)),
        **{name: given[name] for name in names if name in given},
        progress=True,
    )
    _print(report)
    return EXIT_FAILED if report.failed else EXIT_DONE


def _config(options: argparse.Namespace) -> int:
    text = template()
    if options.path is None:
        _print(text, end="")
        return EXIT_DONE
    path = expand_path(options.path, "FILE")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(error.strerror or str(error), path=path) from error
    _print(f"wrote {path}; fill in catalog_path, and what else is to be other than it is, then")
    _print(f"spxdask run --config {path}")
    return EXIT_DONE


def _calibration(options: argparse.Namespace) -> int:
    from spxdask.run.calibration import describe_products, load_calibration, survey_products
    from spxdask.run.folder import CONFIG_NAME, RunFolder

    flags = _collect_flags(options)
    check_options(BatchConfig, flags)
    values: dict[str, Any] = {}
    if options.config is not None:
        path = expand_path(options.config, "--config")
        with name_file(path):
            values = _not_overruled(read_options(path), flags)
            check_options(BatchConfig, values)
    output = (values | flags).get("output_dir", BATCH_OPTIONS["output_dir"].default)
    folder = RunFolder(expand_path(output))
    used = None
    if "output_dir" in flags or folder.state.exists(CONFIG_NAME):
        saved = folder.saved_config()
        used = load_calibration(folder.state, saved)
        values = saved.to_dict() | values
    wanted = {name: v for name, v in (values | flags).items() if name in CALIBRATION_OPTIONS}
    # Neither catalogue nor field are read.
    config = BatchConfig.from_dict({"catalog_path": "-"} | wanted)
    if config.calibration == "frame":
        _print("calibration is 'frame': nothing but what is in the frames is used")
        return EXIT_DONE
    statuses = survey_products(config, used, fetch=options.fetch)
    _print(describe_products(statuses))
    is_complete = not any(status.problem for status in statuses)
    return EXIT_DONE if is_complete else EXIT_FAILED


_RUNNERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "resume": _resume,
    "plot": _plot,
    "status": _status,
    "report": _report,
    "demo": _demo,
    "config": _config,
    "inject": _inject,
    "calibration": _calibration,
}
