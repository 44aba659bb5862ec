"""Every option of a run, and the YAML files that hold them.

`BatchConfig` is the single source for the Python API, the YAML files, the command line's
flags, the commented template that ``spxdask config`` writes and the documentation's table.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field
from datetime import UTC, date, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from spxdask.errors import ConfigError, StoreError
from spxdask.science.families import FAMILIES
from spxdask.science.options import (
    CheckedOptions,
    PhotometryConfig,
    check_options,
    checked_options,
    list_options,
    option,
)
from spxdask.text import format_html_table

__all__ = [
    "BANDS",
    "IRSA_ARCHIVE_URL",
    "IRSA_TAP_URL",
    "RELEASES",
    "SHORT_NAMES",
    "BatchConfig",
    "LiteralPath",
    "check_options",
    "dump_yaml",
    "expand_path",
    "list_missing",
    "load_yaml",
    "name_file",
    "option_rows",
    "read_options",
    "sort_bands",
    "template",
    "to_yaml",
]

BANDS = ("D1", "D2", "D3", "D4", "D5", "D6")
# What `release` may be besides names of releases.
RELEASES = ("latest", "all")
RELEASE_NAME = re.compile("[a-z][a-z0-9]*")
IRSA_TAP_URL = "https://irsa.ipac.caltech.edu/TAP"
IRSA_ARCHIVE_URL = "https://irsa.ipac.caltech.edu"

FIELD, OUTPUT, FRAMES = "field and catalogue", "output", "frames"
WORKERS, ARCHIVE, CALIBRATION, PHOTOMETRY = "workers", "archive", "calibration", "photometry"

T = TypeVar("T", bound=CheckedOptions)


class LiteralPath(str):
    """A path that is not expanded: a dollar sign in it is a dollar sign."""


_TOKEN = re.compile(r"cal-[0-9a-z.-]{1,60}")
_VARIABLE = re.compile(r"\$(?:(?P<escape>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})")


def _expand(text: str) -> str:
    """Expand ``~`` and ``$VAR`` as a shell does; ``$$`` is a dollar sign."""

    def value_of(match: re.Match[str]) -> str:
        if match["escape"]:
            return "$"
        name = match["name"] or match["braced"]
        # An empty variable would turn $SCRATCH/run into /run.
        if not os.environ.get(name):
            raise ValueError(
                f"a path of variables that are set (${name} is not; $$ is a dollar sign)"
            )
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, text))
    return _keep(expanded)


def _keep(text: str) -> str:
    """Return a text that is not to be expanded, marked if it could be."""
    return LiteralPath(text) if "$" in text else str(text)


def _check_path(value: Any) -> str:
    """Return the path of a file or folder, or the URL of a store."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("{rule}")
    if "://" not in text:
        return _keep(text) if isinstance(text, LiteralPath) else _expand(text)
    # It is imported here because its import takes as long as that of this module.
    from fsspec import available_protocols

    scheme, _, rest = text.partition("://")
    stores = set(available_protocols()) - {"http", "https"}
    if scheme not in stores or not _scheme(text):
        raise ValueError("{rule}")
    if isinstance(text, LiteralPath):
        return _keep(text.rstrip("/"))
    host, slash, path = rest.rstrip("/").partition("/")
    return _keep(f"{scheme}://{host}{slash}{_expand(path)}")


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a check that lets None pass."""
    return lambda value: None if value is None else check(value)


def _check_target(value: Any) -> str:
    # It is imported here because few runs have one.
    from spxdask.tables.target import parse_target

    if not isinstance(value, str):
        raise ValueError("{rule}")
    try:
        parse_target(value)
    except ValueError as error:
        raise ValueError(f"{{rule}}{error}") from None
    return value


def _check_catalogue(value: Any) -> Any:
    """Return the path of a catalogue, or a table of whatever library as a GivenCatalogue."""
    if isinstance(value, str | os.PathLike):
        # As programs of the shell call their standard input.
        return _check_path("/dev/stdin" if value == "-" else value)
    # It is imported here because it brings pyarrow.
    from spxdask.tables.catalogue import GivenCatalogue, is_catalogue

    if not is_catalogue(value):
        raise ValueError("{rule}")
    return value if isinstance(value, GivenCatalogue) else GivenCatalogue(value)


def _scheme(value: Any) -> str:
    """Return the scheme of a URL that names something, "" for anything else."""
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        # Raises where the port is no port.
        _ = parts.port
    except ValueError:
        return ""
    named = parts.path.strip("/") if parts.scheme == "file" else parts.netloc
    return parts.scheme if named else ""


def _check_tap_url(value: Any) -> str:
    if _scheme(value) not in ("http", "https"):
        raise ValueError("{rule}")
    return _normalise(value)


def _check_endpoint(value: Any) -> str | None:
    return None if value is None else _check_tap_url(value)


def _check_archive_url(value: Any) -> str:
    is_mirror = isinstance(value, str) and value[:5].lower() == "file:"
    if is_mirror and not isinstance(value, LiteralPath):
        # This precedes the check, because file://$DATA/mirror has a host until $DATA is expanded.
        _, slashes, path = re.split("^[^:]*:(//)?", value)
        value = _keep(f"file:{slashes or ''}{_expand(path)}")
    if _scheme(value) not in ("http", "https", "s3", "file"):
        raise ValueError("{rule}")
    normal = _normalise(value)
    return _keep(normal) if is_mirror else normal


def _check_calibration(value: Any) -> str:
    """Return a keyword, or the base URL of a tree of products."""
    if value in ("archive", "frame"):
        return str(value)
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if "://" in text or text.startswith("file:"):
        return _check_archive_url(text)
    path = _check_path(value)
    return _keep(Path(path).absolute().as_uri())


def _check_pins(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the tokens of each family, sorted."""
    pairs: list[Any] = [*value.items()] if isinstance(value, Mapping) else value or []
    if not isinstance(pairs, list | tuple):
        raise ValueError("{rule}")
    pins: dict[str, set[str]] = {}
    for pair in pairs:
        split = tuple(pair.split("=", 1)) if isinstance(pair, str) else pair
        if not isinstance(split, list | tuple) or len(split) != 2:
            raise ValueError("{rule}")
        family, tokens = split
        if family not in FAMILIES:
            raise ValueError(f"{{rule}}; families are {', '.join(FAMILIES)}")
        tokens = [tokens] if isinstance(tokens, str) else tokens
        if not isinstance(tokens, list | tuple) or not all(
            isinstance(token, str) and _TOKEN.fullmatch(token) for token in tokens
        ):
            raise ValueError("{rule}, such as cal-epsf-v1-2026-191")
        pins.setdefault(family, set()).update(tokens)
    return tuple((family, tuple(sorted(pins[family]))) for family in sorted(pins))


def _normalise(url: str) -> str:
    """Return a URL with its scheme in lower case, for comparisons, and no slash at the end."""
    scheme, colon, rest = url.partition(":")
    return scheme.lower() + colon + rest.rstrip("/")


def _to_degrees(value: Any) -> Any:
    """Return astropy's angles in degrees, without importing astropy, and other values unchanged."""
    if not hasattr(value, "unit") or not hasattr(value, "to_value"):
        return value
    try:
        degrees = value.to_value("deg")
    # UnitConversionError is a subclass of both.
    except (TypeError, ValueError):
        raise ValueError("an angle or a number of degrees") from None
    # An angle is an array without dimensions.
    return degrees.tolist() if hasattr(degrees, "tolist") else degrees


def _coordinate(sexagesimal: str) -> BeforeValidator:
    """Return a validator of degrees whose error has an example of what is refused."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and not _reads_as_number(value):
            raise ValueError(f"{{rule}}, in decimal degrees (not as {sexagesimal})")
        return _to_degrees(value)

    return BeforeValidator(check)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sort_bands(value: Any) -> Any:
    """Return bands, by name or number, as names in upper case, sorted, without duplicates.

    Parameters
    ----------
    value : str, int, or tuple or set of them
        Several in a text are separated by spaces, commas or semicolons.

    Returns
    -------
    tuple of str
        They may be names of no band. Values of other types are returned unchanged.

    Raises
    ------
    ValueError
        If a band is neither text nor an integer.
    """
    if isinstance(value, str):
        value = tuple(re.split(r"[,;\s]+", value.strip()))
    elif type(value) is int:
        value = (value,)
    if not isinstance(value, tuple | set | frozenset):
        return value
    if not all(type(band) in (str, int) for band in value):
        raise ValueError("{rule}")
    names = (str(band).strip().upper() for band in value)
    return tuple(sorted({f"D{name}" if name in "123456" else name for name in names}))


# The day 0 of the Modified Julian Date.
_MJD_ZERO = datetime(1858, 11, 17, tzinfo=UTC)


def _to_mjd(value: Any) -> Any:
    """Return a date or time in UTC as MJD; other values are returned unchanged."""
    # An astropy Time, without importing astropy.
    if hasattr(value, "mjd") and hasattr(value, "utc"):
        return value.utc.mjd.tolist() if hasattr(value.mjd, "tolist") else float(value.utc.mjd)
    if isinstance(value, str) and "-" in value.strip()[1:]:
        with suppress(ValueError):
            value = datetime.fromisoformat(value.strip())
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return value
    # A time without a zone is UTC.
    time = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return (time - _MJD_ZERO) / timedelta(days=1)


def _to_mjds(value: Any) -> Any:
    """Return two dates or times as MJDs."""
    mjds = _to_mjd(value)
    if isinstance(mjds, list | tuple):
        return tuple(_to_mjd(mjd) for mjd in mjds)
    return mjds


def _check_release(value: Any) -> Any:
    """Return the names of releases in lower case, sorted, separated by commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set | frozenset) or not names:
        raise ValueError("{rule}")
    found = {name.strip().lower() if isinstance(name, str) else "" for name in names}
    if not all(map(RELEASE_NAME.fullmatch, found)) or (len(found) > 1 and found & {*RELEASES}):
        raise ValueError("{rule}")
    for name in found - {*RELEASES}:
        if difflib.get_close_matches(name, RELEASES):
            raise ValueError("{rule}")
    return ",".join(sorted(found))


def _check_order(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and value[0] > value[1]:
        raise ValueError("{rule}")
    return value


def _as_photometry(value: Any) -> Any:
    # In YAML, the value of a heading with only comments below it is None.
    if value is None or isinstance(value, Mapping):
        return PhotometryConfig.from_dict(value or {})
    return value


_PATH_RULE = "a path, or the URL of a store, such as s3://bucket/folder"
_Mjd = Annotated[float, Field(ge=0, le=1_000_000)]
_Format = Literal["csv", "parquet"]


@checked_options
class BatchConfig(CheckedOptions):
    """A run: where on the sky, which catalogue, which frames, how.

    Angles may be numbers of degrees or astropy's Angle, Longitude, Latitude or Quantity; times
    may be MJDs, ISO dates, datetime or Time; sequences may be lists, tuples or arrays. In paths,
    ``~`` and ``$VAR`` are expanded.

    Raises
    ------
    ConfigError
        If a value is not allowed; the message names the option, the rule and the value.
    """

    center_ra: Annotated[
        float | None,
        option(
            "centre of the field, ICRS; null for the sky about the sources",
            unit="deg",
            group=FIELD,
            flag="ra",
            metavar="DEG",
            ge=0,
            le=360,
        ),
        _coordinate("00:42:44"),
    ] = None
    center_dec: Annotated[
        float | None,
        option(
            "centre of the field, ICRS; null for the sky about the sources",
            unit="deg",
            group=FIELD,
            flag="dec",
            metavar="DEG",
            ge=-90,
            le=90,
        ),
        _coordinate("-66:30:00"),
    ] = None
    radius: Annotated[
        float | None,
        option(
            "radius of the field; null for the sky about the sources",
            unit="deg",
            group=FIELD,
            metavar="DEG",
            gt=0,
            le=90,
        ),
        BeforeValidator(_to_degrees),
    ] = None
    catalog_path: Annotated[
        str | None,
        option(
            "table of sources with columns of id, ra and dec: CSV, Parquet, FITS, VOTable, ECSV, "
            "IPAC, MRT and others, compressed or not, or a folder of Parquet files; a path or a "
            "URL (s3://...); in Python also a table, a DataFrame or a SkyCoord",
            group=FIELD,
            rule=f"{_PATH_RULE}, a table, a DataFrame or a SkyCoord",
            flag="catalog",
            metavar="FILE",
        ),
        PlainValidator(_optional(_check_catalogue)),
    ] = None
    target: Annotated[
        str | None,
        option(
            "one source instead of a catalogue: a position, or a name that has it, such as "
            "'10.684 41.269', '00h42m44s +41d16m09s' or J004244.3+411609; null for the sources of "
            "catalog_path",
            group=FIELD,
            rule="a position such as '10.684 41.269' (degrees) or '00h42m44s +41d16m09s', or a "
            "name that has it to the second, such as J004244.3+411609",
            metavar="POSITION",
        ),
        PlainValidator(_optional(_check_target)),
    ] = None
    id_column: Annotated[
        str | None,
        option(
            "column of the ids in the catalogue; null for targetid or another usual name",
            group=FIELD,
            rule="the name of a column, or null",
            metavar="NAME",
        ),
    ] = None
    ra_column: Annotated[
        str | None,
        option(
            "column of the right ascension; null for ra or another usual name",
            group=FIELD,
            rule="the name of a column, or null",
            metavar="NAME",
        ),
    ] = None
    dec_column: Annotated[
        str | None,
        option(
            "column of the declination; null for dec or another usual name",
            group=FIELD,
            rule="the name of a column, or null",
            metavar="NAME",
        ),
    ] = None
    on_bad_row: Annotated[
        Literal["error", "skip"],
        option(
            "what becomes of rows of the catalogue without id or position: 'error' ends the run, "
            "'skip' leaves them out, counts them, and lists them in skipped_rows.csv",
            group=FIELD,
        ),
    ] = "error"
    output_dir: Annotated[
        str,
        option(
            "folder of everything the run writes; a path or a URL (s3://...)",
            group=OUTPUT,
            rule=_PATH_RULE,
            flag="output",
            metavar="DIR",
        ),
        PlainValidator(_check_path),
    ] = "batch_output"
    per_image_format: Annotated[
        _Format, option("'csv' or 'parquet', for the tables in per_image/", group=OUTPUT)
    ] = "csv"
    lightcurve_format: Annotated[
        Literal["csv", "parquet", "hats"],
        option(
            "'csv' is a file per source; 'parquet' one dataset of num_buckets files, for a million "
            "sources; 'hats' is that and, in hats/, a catalogue for LSDB with nested light curves",
            group=OUTPUT,
        ),
    ] = "csv"
    keep_images: Annotated[
        bool,
        option("keep the frames in images/; if false, each is deleted once measured", group=OUTPUT),
    ] = True
    num_buckets: Annotated[
        int,
        option(
            "output partitions of the shuffle; more if they would be large",
            group=OUTPUT,
            ge=1,
            le=100_000,
        ),
    ] = 64
    keep_bucket_files: Annotated[
        bool,
        option(
            "keep the shuffled, sorted partitions as Parquet beside the light curves",
            group=OUTPUT,
        ),
    ] = False
    report: Annotated[
        bool,
        option("write report.html and report.json at the end of a run", group=OUTPUT),
    ] = True
    bands: Annotated[
        Annotated[tuple[Literal["D1", "D2", "D3", "D4", "D5", "D6"], ...], Field(min_length=1)]
        | None,
        option(
            "detectors to use, of D1 to D6, such as D3, [D3, D4] or [3, 4]; null for all",
            group=FRAMES,
            rule="a list of some of D1 to D6, or null for all",
            metavar="BAND",
            nargs="+",
        ),
        BeforeValidator(sort_bands),
    ] = None
    mjd_range: Annotated[
        tuple[_Mjd, _Mjd] | None,
        option(
            "first and last mid-exposure time, both included, as MJD or ISO 8601 in UTC, where a "
            "date is its 0h; null for all",
            unit="MJD",
            group=FRAMES,
            rule="two MJDs, the earlier first, or ISO dates, or null for all",
            metavar=("FIRST", "LAST"),
            nargs=2,
        ),
        BeforeValidator(_to_mjds),
        AfterValidator(_check_order),
    ] = None
    release: Annotated[
        str,
        option(
            "'latest' keeps the newest version of each exposure, of whatever release; names such "
            "as 'qr3', or 'qr2,qr3', restrict that to these releases; 'all' keeps every version",
            group=FRAMES,
            rule="latest, all, or names of releases such as qr3 or qr2,qr3",
            metavar="NAME",
        ),
        BeforeValidator(_check_release),
    ] = "latest"
    coverage_mode: Annotated[
        Literal["any", "full"],
        option(
            "'any' takes frames that touch the field, 'full' those that hold all of it",
            group=FRAMES,
            flag="coverage",
        ),
    ] = "any"
    max_images: Annotated[
        int,
        option("more frames than this is an error, before any download", group=FRAMES, ge=1),
    ] = 500
    max_extract_workers: Annotated[
        int,
        option(
            "worker processes of the embedded cluster; never more than there are cores",
            group=WORKERS,
            ge=1,
            le=10_000,
        ),
    ] = 12
    scratch_gb: Annotated[
        float,
        option(
            "limit of the frames that a worker holds at once; a quarter of its memory is another",
            unit="GB",
            group=WORKERS,
            gt=0,
            le=1_000_000,
        ),
    ] = 5.0
    max_download_workers: Annotated[
        int,
        option(
            "connections to the archive at once, for the whole cluster",
            group=ARCHIVE,
            ge=1,
            le=1000,
        ),
    ] = 4
    read: Annotated[
        Literal["auto", "whole", "rows"],
        option(
            "'rows' fetches of a frame that is not kept only the rows of pixels that its sources "
            "need, 'whole' the whole file; 'auto' does what is faster, frame by frame",
            group=ARCHIVE,
        ),
    ] = "auto"
    max_retries: Annotated[
        int,
        option("times a failed request to the archive is repeated", group=ARCHIVE, ge=0, le=100),
    ] = 5
    stall_timeout: Annotated[
        float,
        option(
            "a transfer without a byte for this long is given up",
            unit="s",
            group=ARCHIVE,
            gt=0,
            le=3600,
        ),
    ] = 30.0
    tap_url: Annotated[
        str,
        option(
            "the archive's TAP service; the default is SPXDASK_TAP_URL from the environment, or "
            "IRSA's",
            group=ARCHIVE,
            rule="an http or https URL",
            metavar="URL",
            default_text=IRSA_TAP_URL,
        ),
        PlainValidator(_check_tap_url),
    ] = field(default_factory=lambda: os.environ.get("SPXDASK_TAP_URL") or IRSA_TAP_URL)
    archive_url: Annotated[
        str,
        option(
            "a frame is at this URL + '/' + its URI: https, s3 (the public bucket or a copy of it) "
            "or file (a mirror); the default is SPXDASK_ARCHIVE_URL from the environment, or "
            "IRSA's",
            group=ARCHIVE,
            rule="an http, https, s3 or file URL, such as s3://nasa-irsa-spherex",
            metavar="URL",
            default_text=IRSA_ARCHIVE_URL,
        ),
        PlainValidator(_check_archive_url),
    ] = field(default_factory=lambda: os.environ.get("SPXDASK_ARCHIVE_URL") or IRSA_ARCHIVE_URL)
    archive_endpoint: Annotated[
        str | None,
        option(
            "S3 server of the bucket in archive_url; null is AWS for the public bucket, and for "
            "another what s3fs finds, such as AWS_ENDPOINT_URL",
            group=ARCHIVE,
            rule="an http or https URL, or null",
            metavar="URL",
        ),
        PlainValidator(_check_endpoint),
    ] = None
    outage_patience: Annotated[
        float,
        option(
            "longest wait for an archive that does not answer, after which the run ends and can "
            "be resumed",
            unit="s",
            group=ARCHIVE,
            ge=0,
            le=30 * 86400,
        ),
    ] = 12 * 3600.0
    calibration: Annotated[
        str,
        option(
            "where calibration products come from: 'archive', its newest; 'frame', nothing but "
            "what is in the frames; or a path or URL of a tree of products",
            group=CALIBRATION,
            rule="archive, frame, or a path or URL of a tree of products",
            metavar="WHERE",
        ),
        PlainValidator(_check_calibration),
    ] = "archive"
    calibration_pins: Annotated[
        tuple[tuple[str, tuple[str, ...]], ...],
        option(
            "products to use in place of the newest, such as {epsf: cal-epsf-v1-2026-191}",
            group=CALIBRATION,
            rule="a mapping of families of products to tokens",
            metavar="FAMILY=TOKEN",
            nargs="+",
        ),
        PlainValidator(_check_pins),
    ] = ()
    contaminants_path: Annotated[
        str | None,
        option(
            "a second catalogue, whose sources take part in the solution for PSF fluxes and get "
            "no rows",
            group=CALIBRATION,
            rule=_PATH_RULE,
            flag="contaminants",
            metavar="FILE",
        ),
        PlainValidator(lambda value: None if value is None else _check_path(value)),
    ] = None
    photometry: Annotated[
        PhotometryConfig,
        option(
            "how a source is measured",
            group=PHOTOMETRY,
            rule="a PhotometryConfig or a mapping of its options",
        ),
        BeforeValidator(_as_photometry),
    ] = PhotometryConfig()

    def __post_init__(self) -> None:
        if self.catalog_path is None and self.target is None:
            raise ConfigError("missing option: catalog_path (or target)", option="catalog_path")
        if self.catalog_path is not None and self.target is not None:
            raise ConfigError(
                "catalog_path and target exclude each other: leave one of them out", option="target"
            )
        if self.lightcurve_format == "hats" and "://" in self.output_dir.removeprefix("file://"):
            raise ConfigError(
                "lightcurve_format hats needs an output_dir on disk: choose parquet, and write the "
                "catalogue with spxdask.open_run(...).to_hats(...)",
                option="lightcurve_format",
                value=self.lightcurve_format,
            )
        if missing := list_missing(vars(self)):
            raise ConfigError(
                f"missing option: {', '.join(missing)} (center_ra, center_dec and radius are given "
                "together, or none of them for the sky about the sources)",
                option=missing[0],
            )
        if self.region != "circle" and self.coverage_mode == "full":
            raise ConfigError(
                option="coverage_mode",
                value=self.coverage_mode,
                rule="any where center_ra, center_dec and radius give no circle",
            )

    @property
    def region(self) -> Literal["circle", "target", "catalogue"]:
        """What the field is: the circle that is given, or what the source or sources cover."""
        if self.radius is not None:
            return "circle"
        return "catalogue" if self.target is None else "target"

    @property
    def fetches_empty_frames(self) -> bool:
        """Whether frames of the field on which no source can lie are fetched and measured, too."""
        return self.region == "circle" and self.keep_images

    def _repr_html_(self) -> str:
        defaults = {info.name: info.default for info in list_options(type(self))}
        chosen = {name: value for name, value in self.to_dict().items() if name in defaults}
        rows = [(n, v) for n, v in chosen.items() if n == "catalog_path" or v != defaults[n]]
        return format_html_table("BatchConfig, where it differs from the defaults", rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as YAML holds them, such that `from_dict` makes the same of them.

        Returns
        -------
        dict
            Of plain numbers, texts, lists and mappings; a dollar sign in a path is ``$$``.

        Raises
        ------
        ConfigError
            If the catalogue is an object.
        """
        if not isinstance(self.catalog_path, str | None):
            raise ConfigError(
                f"catalog_path is {self.catalog_path!r}, which YAML cannot hold: make a file of it",
                option="catalog_path",
            )
        found = {
            name: value.replace("$", "$$") if isinstance(value, LiteralPath) else value
            for name, value in super().to_dict().items()
        }
        pins = {family: [*tokens] for family, tokens in self.calibration_pins}
        return found | {"calibration_pins": pins}

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a configuration from a YAML file.

        Parameters
        ----------
        path : path
            The file, or its URL.

        Returns
        -------
        BatchConfig

        Raises
        ------
        ConfigError
            If it cannot be read, or an option is wrong; the message names the file.
        """
        return load_yaml(cls, path)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the configuration as YAML; also write it to a file if one is given.

        Parameters
        ----------
        path : path, optional
            The file, which is replaced if it exists.

        Returns
        -------
        str
            Without comments; see `template` for a file with them.
        """
        return to_yaml(self, path)


def expand_path(path: str | os.PathLike[str], option: str = "output_dir") -> str:
    """Return a path as a configuration has it that this path is given to.

    Parameters
    ----------
    path : path
        May hold ``~`` and ``$VAR``.
    option : str
        Name of the option that it is for.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        If it is no path, or holds a variable that is not set.
    """
    try:
        return _check_path(path)
    except ValueError as error:
        rule = str(error).replace("{rule}", _PATH_RULE)
        raise ConfigError(option=option, value=path, rule=rule) from None


def list_missing(values: Mapping[str, Any]) -> list[str]:
    """Return which options of a circle are missing where others are given.

    Parameters
    ----------
    values : mapping
        Options by name.

    Returns
    -------
    list of str
        Empty for a whole circle, and for none.
    """
    circle = ("center_ra", "center_dec", "radius")
    missing = [name for name in circle if values.get(name) is None]
    return missing if len(missing) < len(circle) else []


# Names of options that differ on the command line, and their names everywhere else.
SHORT_NAMES = {
    info.flag.removeprefix("--"): info.name
    for info in list_options(BatchConfig)
    if info.flag != "--" + info.name.replace("_", "-")
}


@contextmanager
def name_file(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Name, in a ConfigError that is raised in the block, the file that the option came from.

    Parameters
    ----------
    path : path or None
        None leaves errors as they are.

    Yields
    ------
    None
    """
    try:
        yield
    except ConfigError as error:
        if path is not None and error.path is None:
            error.path = os.fspath(path)
        raise


def load_yaml(model: type[T], path: str | os.PathLike[str]) -> T:
    """Read options of a class from a YAML file.

    Parameters
    ----------
    model : type
        `BatchConfig` or `PhotometryConfig`.
    path : path
        The file, or its URL.

    Returns
    -------
    BatchConfig or PhotometryConfig

    Raises
    ------
    ConfigError
        If it cannot be read, or an option is wrong; the message names the file.
    """
    values = read_options(path)
    with name_file(path):
        return model.from_dict(values)


def to_yaml(options: CheckedOptions, path: str | os.PathLike[str] | None = None) -> str:
    """Return options as YAML; also write them to a file if one is given.

    Parameters
    ----------
    options : BatchConfig or PhotometryConfig
        The options.
    path : path, optional
        The file, which is replaced if it exists.

    Returns
    -------
    str
    """
    text = dump_yaml(options.to_dict())
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def dump_yaml(value: Any, *, in_one_line: bool = False) -> str:
    """Return plain values as YAML.

    Parameters
    ----------
    value : object
        Numbers, texts, lists, and mappings whose keys are texts.
    in_one_line : bool
        Whether lists and mappings stand in brackets.

    Returns
    -------
    str
        Mappings in their order.
    """
    if in_one_line or not isinstance(value, dict) or not value:
        return _dump(value, in_one_line)
    # The writer is slow, and most options are the same each time that they are written.
    return "".join(_dump_entry(json.dumps(entry)) for entry in value.items())


@functools.lru_cache(1024)
def _dump_entry(entry: str) -> str:
    """Return an entry of a mapping as YAML, of its name and value as JSON."""
    name, value = json.loads(entry)
    return _dump({name: value}, in_one_line=False)


def _dump(value: Any, in_one_line: bool) -> str:
    """Return plain values as YAML, as ruamel.yaml writes them."""
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = in_one_line
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    # Long lines are not broken, because spaces at the end of a line would be lost.
    writer.width = 1_000_000
    stream = StringIO()
    writer.dump(value, stream)
    text = stream.getvalue()
    if re.search("[\x85\u2028\u2029]", text):
        # Some readers interpret these characters as line breaks, unless they are escaped.
        writer.allow_unicode = False
        stream = StringIO()
        writer.dump(value, stream)
        text = stream.getvalue()
    return text


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of options: YAML 1.2, where 1e3 is a number, and 12:30 and no are texts.

    Parameters
    ----------
    path : path
        The file, or its URL.

    Returns
    -------
    dict
        Empty for an empty file.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is not a mapping of options; it has the `path`.
    """
    # It is imported here because ``spxdask --help`` reads no file.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from spxdask.storage import read_file

    try:
        values = YAML(typ="safe", pure=True).load(read_file(path).decode())
    except OSError as error:
        raise ConfigError(error.strerror or str(error), path=path) from error
    except RecursionError:
        raise ConfigError("lists or mappings within each other without end", path=path) from None
    except YAMLError as error:
        raise ConfigError(_explain(error), path=path) from error
    # What ruamel.yaml lets through for a date such as 2026-02-31 and a tag such as !!bool maybe.
    except (AttributeError, LookupError, StoreError, TypeError, ValueError) as error:
        reason = f"unknown value {error}" if isinstance(error, LookupError) else str(error)
        raise ConfigError(reason, path=path) from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError("a mapping of options is needed", path=path)
    return values or {}


def _explain(error: Any) -> str:
    """Return the message of an error of ruamel.yaml as one sentence with the line number."""
    problem = " ".join((getattr(error, "problem", None) or str(error)).split())
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    duplicate = re.match(r'found duplicate key "(.*?)" with value', problem)
    if duplicate:
        problem = f"{duplicate[1]} is given more than once"
    elif problem == "found unhashable key":
        problem = "a list or mapping cannot be the name of an option"
    return place + problem


def template() -> str:
    """Return a YAML file of every option with its default, each with a comment.

    Returns
    -------
    str
        Each with its default; catalog_path has none.
    """
    head = (
        "A spxdask run. It needs catalog_path (or target); center_ra, center_dec and radius\n"
        "# restrict it to a circle on the sky."
    )
    return "\n".join([f"# {head}", *_template_lines(BatchConfig, ""), ""])


def _template_lines(model: type[CheckedOptions], indent: str) -> Iterator[str]:
    group = ""
    for info in list_options(model):
        yield ""
        if info.group != group:
            group = info.group
            yield from (f"{indent}# --- {group} ---", "")
        yield from textwrap.wrap(
            info.description_with_unit,
            88,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
        )
        if info.nested is None and info.default is None:
            yield f"{indent}{info.name}:"
        elif info.nested is not None:
            yield f"{indent}{info.name}:"
            yield from _template_lines(info.nested, indent + "  ")
        else:
            yield f"{indent}{info.name}: {_as_text(info.default)}"


def _as_text(value: Any) -> str:
    """Return a value as it stands in YAML after its name."""
    listed = list(value) if isinstance(value, tuple) else value
    return dump_yaml([listed], in_one_line=True).strip()[1:-1]


def option_rows(model: type[CheckedOptions]) -> list[tuple[str, str, str]]:
    """Return the rows of a table of options, for the documentation.

    Parameters
    ----------
    model : type
        `BatchConfig` or `PhotometryConfig`.

    Returns
    -------
    list of (str, str, str)
        Name, default as YAML has it (``required`` where there is none), and description with
        its unit in brackets. They do not depend on the environment. Options that stand below
        another, as those of the photometry, are not among them.
    """
    return [
        (
            info.name,
            "required" if info.required else info.default_text or _as_text(info.default),
            info.description_with_unit,
        )
        for info in list_options(model)
        if info.nested is None
    ]
