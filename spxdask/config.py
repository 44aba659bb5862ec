"""Every option of a run: its default, what is allowed, and what it does, said once.

The dataclasses below are the single source for the Python API, the YAML files, the
command line's flags and the commented template that ``spxdask config`` writes.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml
from fsspec import available_protocols

from spxdask.errors import ConfigError, StoreError
from spxdask.storage import read_file

BANDS = ("D1", "D2", "D3", "D4", "D5", "D6")
RELEASES = ("latest", "qr2", "qr3", "all")
IRSA_TAP_URL = "https://irsa.ipac.caltech.edu/TAP"
IRSA_ARCHIVE_URL = "https://irsa.ipac.caltech.edu"
# What the command line calls some options, and what they are called everywhere else.
SHORT_NAMES = {
    "ra": "center_ra",
    "dec": "center_dec",
    "catalog": "catalog_path",
    "coverage": "coverage_mode",
    "output": "output_dir",
}

Check = Callable[[Any], Any]
T = TypeVar("T")


def _option(default: Any, check: Check, help: str, **more: Any) -> Any:
    """Declare an option: `check` returns the value in its final type or raises ValueError."""
    how = {"default_factory": default} if callable(default) else {"default": default}
    return field(**how, metadata={"check": check, "help": help, **more})


def _number(low: float, high: float, *, open_low: bool = False) -> Check:
    def check(value: Any) -> float:
        inside = (
            not isinstance(value, bool)
            and isinstance(value, int | float)
            and low <= value <= high
            and not (open_low and value == low)
        )
        if not inside:
            least = f"above {low:g}" if open_low else f"from {low:g}"
            raise ValueError(f"a number {least} to {high:g}")
        return float(value)

    return check


def _degrees(low: float, high: float, sexagesimal: str) -> Check:
    number = _number(low, high)

    def check(value: Any) -> float:
        try:
            return number(value)
        except ValueError as error:
            if not isinstance(value, str) or _reads_as_number(value):
                raise
            hint = f"degrees as a decimal number, {sexagesimal} is not one"
            raise ValueError(f"{error}: {hint}") from None

    return check


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _integer(low: int, high: int | None = None) -> Check:
    def check(value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < low
            or (high is not None and value > high)
        ):
            raise ValueError(
                f"an integer from {low}" + (f" to {high}" if high is not None else " up")
            )
        return int(value)

    return check


def _choice(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _path(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("a path")
    return text


def _scheme(value: Any) -> str:
    """Return the scheme of a URL that names something, "" for anything else."""
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    named = parts.path.strip("/") if parts.scheme == "file" else parts.netloc
    return parts.scheme if named else ""


def _url(value: Any) -> str:
    if _scheme(value) not in ("http", "https"):
        raise ValueError("an http or https URL")
    return _plain_url(value)


def _archive(value: Any) -> str:
    if _scheme(value) not in ("http", "https", "s3", "file"):
        raise ValueError("an http, https, s3 or file URL, such as s3://nasa-irsa-spherex")
    return _plain_url(value)


def _plain_url(url: str) -> str:
    """Write the scheme in lower case, as those who look at it expect, and no slash at the end."""
    scheme, colon, rest = url.partition(":")
    return scheme.lower() + colon + rest.rstrip("/")


def _file_or_url(value: Any) -> str:
    text = _path(value)
    scheme = text.partition("://")[0] if "://" in text else ""
    stores = set(available_protocols()) - {"http", "https"}
    if scheme and (scheme not in stores or not _scheme(text)):
        raise ValueError("a path, or the URL of a store, such as s3://bucket/folder")
    return text.rstrip("/") if scheme else text


def _bands(value: Any) -> list[str] | None:
    if value is None:
        return None
    listed = isinstance(value, list | set | frozenset) and len(value) > 0
    names = {b.upper() if isinstance(b, str) else None for b in value} if listed else set()
    if not names or not names <= set(BANDS):
        raise ValueError(f"a list of some of {BANDS[0]} to {BANDS[-1]}, or null for all")
    return sorted(names)


def _mjd_range(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    day = _number(0, 1e6)
    try:
        first, last = (day(v) for v in value) if isinstance(value, list) else ()
    except ValueError:
        first, last = 1.0, 0.0
    if first > last:
        raise ValueError("two MJDs, the earlier first, or null for all")
    return first, last


def _window_size(value: Any) -> int | tuple[int, int]:
    pixels = _integer(3, 500)
    try:
        if not isinstance(value, list):
            return pixels(value)
        height, width = (pixels(v) for v in value)
    except ValueError:
        raise ValueError("an integer from 3 to 500 (pixels), or a pair: height, width") from None
    return height, width


def _bad_flags(value: Any) -> list[int]:
    bit = _integer(0, 31)
    try:
        if not isinstance(value, list | set | frozenset):
            raise ValueError
        return sorted({bit(v) for v in value})
    except ValueError:
        raise ValueError("a list of flag bits, integers from 0 to 31") from None


def _native(value: Any) -> Any:
    """Make numpy's scalars and arrays Python's own, and tuples lists, also within others."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_native(v) for v in value]
    return {_native(v) for v in value} if isinstance(value, set | frozenset) else value


def _checked(option: Field, value: Any) -> Any:
    """Return the value of an option in its final type."""
    try:
        return option.metadata["check"](_native(value))
    except ConfigError as error:
        raise ConfigError(f"{option.name}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{option.name} is {value!r}; allowed is {error}") from None
    except RecursionError:
        raise ConfigError(f"{option.name} has lists within lists without end") from None


def _refuse_unknown(options: type, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is no option, with the one that may be meant."""
    known = [option.name for option in fields(options)]
    for key in values:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1)
        if options is BatchConfig and key in SHORT_NAMES:
            hint = f"{key} is {SHORT_NAMES[key]} here"
        elif options is BatchConfig and key in {o.name for o in fields(PhotometryConfig)}:
            hint = f"{key} belongs under photometry"
        elif near:
            hint = f"did you mean {near[0]}?"
        else:
            hint = f"known are {', '.join(known)}"
        raise ConfigError(f"unknown option {key!r}; {hint}")


def check_options(options: type, values: Mapping[str, Any]) -> None:
    """Check some options of a configuration, each by itself.

    Raises
    ------
    ConfigError
        If a name is unknown or a value is not allowed whatever the other options are.
    """
    _refuse_unknown(options, values)
    for option in fields(options):
        if option.name not in values:
            continue
        value = values[option.name]
        if option.name != "photometry" or not isinstance(value, Mapping):
            _checked(option, value)
            continue
        try:
            check_options(PhotometryConfig, value)
        except ConfigError as error:
            raise ConfigError(f"photometry: {error}") from None


class _Options:
    """What the two configurations have in common: checks, dictionaries, YAML."""

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = _checked(option, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Make a configuration from a mapping, such as a parsed YAML file.

        Raises
        ------
        ConfigError
            If a key is unknown, a required one is missing, or a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} needs a mapping of options, got {values!r}")
        _refuse_unknown(cls, values)
        missing = [o.name for o in fields(cls) if _required(o) and o.name not in values]
        if missing:
            raise ConfigError(f"missing option: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts, lists and mappings, as YAML holds them."""
        return _plain(asdict(self))

    @classmethod
    def from_yaml(cls: type[T], path: str | os.PathLike) -> T:
        """Read a configuration from a YAML file; raise ConfigError naming the file."""
        values = read_options(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_yaml(self, path: str | os.PathLike | None = None) -> str:
        """Return the configuration as YAML; also write it to `path` if one is given."""
        text = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e3 is a number, 12:30 is not, and no key comes twice."""

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = f"line {key.start_mark.line + 1} has a list or mapping for a name"
                raise yaml.constructor.ConstructorError(problem=problem)
        keys = [key.value for key, _ in node.value]
        if len(keys) > len(set(keys)):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(problem=f"{twice} is given more than once")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number, and escapes rare line breaks."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?\d+$"),
    "tag:yaml.org,2002:float": re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
        for first, rules in _class.yaml_implicit_resolvers.items()
    }
    for _tag, _rule in _NUMBERS.items():
        _class.add_implicit_resolver(_tag, _rule, list("-+.0123456789"))
# A leading zero is no octal number.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_options(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file of options; raise ConfigError naming the file when it is none."""
    try:
        values = _parsed(read_file(path).decode())
    # PyYAML lets a ValueError through for a date such as 2026-02-31.
    except (OSError, StoreError, ValueError, yaml.YAMLError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {reason}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of options is needed")
    return values or {}


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("lists or mappings within each other without end") from None
    # For a value that does not fit its tag, such as !!bool maybe.
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("a value is not of the kind that its tag says") from error


def _required(option: Field) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _unit(option: Field) -> str:
    return f" [{option.metadata['unit']}]" if "unit" in option.metadata else ""


def _documented(options: type[T]) -> type[T]:
    """Describe every option in the docstring, before what is raised."""
    lines = ["Parameters", "----------"]
    for option in fields(options):
        default = ""
        if option.default is not MISSING:
            default = f", default {option.default!r}"
        elif not _required(option):
            # As the environment may decide which it is.
            default = ", optional"
        text = option.metadata["help"].replace("null for", "None for") + _unit(option)
        text = text.removesuffix(": the options below")
        lines.append(f"{option.name} : {option.type}{default}")
        lines += textwrap.wrap(text, 88, initial_indent="    ", subsequent_indent="    ")
    head, raises, rest = inspect.cleandoc(options.__doc__).partition("Raises\n")
    options.__doc__ = head + "\n".join(lines) + "\n\n" + raises + rest
    return options


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@_documented
@dataclass(frozen=True, kw_only=True)
class PhotometryConfig(_Options):
    """How a source is measured. Pixels are 6.15 arcsec.

    Raises
    ------
    ConfigError
        If a value is not allowed; the message names the option, the value and the rule.
    """

    aperture_method: str = _option(
        "fwhm",
        _choice("fwhm", "fixed"),
        "'fwhm' scales the aperture with each frame's PSF, 'fixed' keeps it",
    )
    aperture_diameter: float = _option(
        3.0, _number(0, 200, open_low=True), "diameter of the fixed aperture", unit="pixels"
    )
    fwhm_multiplier: float = _option(
        2.5, _number(0, 50, open_low=True), "diameter of the fwhm aperture", unit="PSF FWHM"
    )
    background_method: str = _option(
        "window",
        _choice("window", "annulus"),
        "'window' takes the local background from a rectangle about the source, 'annulus' from "
        "a ring about the aperture",
    )
    window_size: int | tuple[int, int] = _option(
        50,
        _window_size,
        "size of the background window; one number, or height and width",
        unit="pixels",
    )
    subtract_zodi: bool = _option(True, _flag, "fit and subtract the zodiacal light model")
    zodi_scale_min: float = _option(
        0.0, _number(-1e6, 1e6), "a fitted zodiacal scale must be above this, or 1 is used"
    )
    zodi_scale_max: float = _option(
        10.0, _number(-1e6, 1e6), "a fitted zodiacal scale must not be above this, or 1 is used"
    )
    min_usable_pixels: int = _option(
        10, _integer(1), "pixels that a background needs before SOURCE pixels are let in"
    )
    bg_sigma_clip_sigma: float = _option(
        3.0,
        _number(0, 1000, open_low=True),
        "background clipping limit",
        unit="standard deviations",
    )
    bg_sigma_clip_maxiters: int = _option(
        3, _integer(0, 1000), "background clipping rounds, at most"
    )
    annulus_inner_offset: float = _option(
        1.414, _number(0, 200), "gap between aperture and annulus", unit="pixels"
    )
    min_annulus_area: float = _option(
        10.0, _number(0, 1e6, open_low=True), "area of the first annulus", unit="pixels"
    )
    max_outer_radius: float = _option(
        5.0, _number(0, 500, open_low=True), "the annulus grows no farther than this", unit="pixels"
    )
    max_annulus_attempts: int = _option(
        5, _integer(0, 1000), "times the annulus is grown before SOURCE pixels are let in"
    )
    annulus_expansion_step: float = _option(
        0.5, _number(0, 100, open_low=True), "growth of the outer radius each time", unit="pixels"
    )
    pixel_scale_fallback: float = _option(
        6.2,
        _number(0, 1000, open_low=True),
        "used, with a warning, when a header has no usable scale",
        unit="arcsec",
    )
    bad_flags: list[int] = _option(
        lambda: [0, 1, 2, 6, 7, 9, 10, 11, 14, 15, 17, 19],
        _bad_flags,
        "flag bits that make a pixel unusable for background and zodiacal fit",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.zodi_scale_min < self.zodi_scale_max:
            raise ConfigError(
                f"zodi_scale_max is {self.zodi_scale_max!r}; allowed is a number above "
                f"zodi_scale_min, which is {self.zodi_scale_min!r}"
            )

        radius = self.aperture_diameter / 2
        height, width = self.window_shape
        if self.aperture_method == "fixed" and self.background_method == "annulus":
            if radius + self.annulus_inner_offset >= self.max_outer_radius:
                raise ConfigError(
                    f"max_outer_radius is {self.max_outer_radius!r}; allowed is a number above "
                    "aperture_diameter / 2 + annulus_inner_offset, which is "
                    f"{radius + self.annulus_inner_offset!r}"
                )
        elif self.aperture_method == "fixed":
            room = height * width - math.pi * (radius + 0.707) ** 2
            if room < self.min_usable_pixels:
                raise ConfigError(
                    f"window_size is {self.window_size!r}; allowed is one that has "
                    f"min_usable_pixels, {self.min_usable_pixels}, outside the aperture"
                )

    @property
    def window_shape(self) -> tuple[int, int]:
        """Height and width of the background window, pixels."""
        size = self.window_size
        return size if isinstance(size, tuple) else (size, size)


def _photometry(value: Any) -> PhotometryConfig:
    if isinstance(value, PhotometryConfig):
        return value
    # In YAML, what a heading with nothing but comments below it is.
    if value is None:
        return PhotometryConfig()
    if isinstance(value, Mapping):
        return PhotometryConfig.from_dict(value)
    raise ValueError("a PhotometryConfig or a mapping of its options")


@_documented
@dataclass(frozen=True, kw_only=True)
class BatchConfig(_Options):
    """A run: where on the sky, which catalogue, which frames, how.

    Raises
    ------
    ConfigError
        If a value is not allowed; the message names the option, the value and the rule.
    """

    center_ra: float = field(
        metadata={
            "check": _degrees(0, 360, "00:42:44"),
            "help": "centre of the field, ICRS",
            "unit": "deg",
        }
    )
    center_dec: float = field(
        metadata={
            "check": _degrees(-90, 90, "-66:30:00"),
            "help": "centre of the field, ICRS",
            "unit": "deg",
        }
    )
    radius: float = field(
        metadata={
            "check": _number(0, 90, open_low=True),
            "help": "radius of the field",
            "unit": "deg",
        }
    )
    catalog_path: str = field(
        metadata={
            "check": _file_or_url,
            "help": "CSV file with the columns targetid (or target_id), ra, dec; a path or a URL "
            "(s3://...)",
        }
    )
    coverage_mode: str = _option(
        "any",
        _choice("any", "full"),
        "'any' takes frames that touch the field, 'full' those that hold all of it",
    )
    bands: list[str] | None = _option(
        None, _bands, "detectors to use, of D1 to D6, such as [D3, D4]; null for all"
    )
    mjd_range: tuple[float, float] | None = _option(
        None,
        _mjd_range,
        "first and last mid-exposure time, both included; null for all",
        unit="MJD",
    )
    release: str = _option(
        "latest",
        _choice(*RELEASES),
        "'latest' keeps the newest version of each exposure; 'qr2' or 'qr3' looks at one "
        "release only; 'all' keeps every version",
    )
    max_images: int = _option(
        500, _integer(1), "more frames than this is an error, before any download"
    )
    output_dir: str = _option(
        "batch_output",
        _file_or_url,
        "folder of everything the run writes; a path or a URL (s3://...)",
    )
    keep_images: bool = _option(
        True, _flag, "keep the frames in images/; else each is let go once it is measured"
    )
    scratch_gb: float = _option(
        5.0,
        _number(0, 1e6, open_low=True),
        "a worker holds no more frames than this at once, nor than a quarter of its memory",
        unit="GB",
    )
    max_download_workers: int = _option(
        4, _integer(1, 1000), "connections to the archive at once, for the whole cluster"
    )
    max_extract_workers: int = _option(
        12, _integer(1, 10000), "worker processes of the embedded cluster, at most one a core"
    )
    num_buckets: int = _option(
        64, _integer(1, 100000), "output partitions of the shuffle; more if they would be large"
    )
    keep_bucket_files: bool = _option(
        False, _flag, "keep the shuffled, sorted partitions as Parquet beside the light curves"
    )
    per_image_format: str = _option(
        "csv", _choice("csv", "parquet"), "'csv' or 'parquet', for the tables in per_image/"
    )
    lightcurve_format: str = _option(
        "csv",
        _choice("csv", "parquet"),
        "'csv' is a file a source; 'parquet' one dataset of num_buckets files, for a million "
        "sources",
    )
    max_retries: int = _option(
        5, _integer(0, 100), "times a failed request to the archive is repeated"
    )
    stall_timeout: float = _option(
        30.0,
        _number(0, 3600, open_low=True),
        "a transfer without a byte for this long is given up",
        unit="s",
    )
    tap_url: str = _option(
        lambda: os.environ.get("SPXDASK_TAP_URL") or IRSA_TAP_URL,
        _url,
        "the archive's TAP service; the default is SPXDASK_TAP_URL from the environment, or IRSA's",
    )
    archive_url: str = _option(
        lambda: os.environ.get("SPXDASK_ARCHIVE_URL") or IRSA_ARCHIVE_URL,
        _archive,
        "a frame is at this URL + '/' + its URI: https, s3 (the public bucket or a copy of it) "
        "or file (a mirror); the default is SPXDASK_ARCHIVE_URL from the environment, or IRSA's",
    )
    photometry: PhotometryConfig = _option(
        PhotometryConfig, _photometry, "how a source is measured: the options below"
    )


def template() -> str:
    """Return a YAML file of every option with its default, each with a comment."""
    head = "A spxdask run. The four options without a value have to be given."
    return "\n".join([f"# {head}", *_lines(BatchConfig, ""), ""])


def _lines(options: type, indent: str) -> Iterator[str]:
    for option in fields(options):
        text = option.metadata["help"] + _unit(option)
        yield ""
        yield from textwrap.wrap(
            text, 88, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if _required(option):
            yield f"{indent}{option.name}:"
        elif option.name == "photometry":
            yield f"{indent}{option.name}:"
            yield from _lines(PhotometryConfig, indent + "  ")
        else:
            value = default_of(option)
            listed = yaml.safe_dump([_plain(value)], default_flow_style=True, width=1000)
            yield f"{indent}{option.name}: {listed.strip()[1:-1]}"


def default_of(option: Field) -> Any:
    """Return the default of an option that has one."""
    return option.default if option.default_factory is MISSING else option.default_factory()
