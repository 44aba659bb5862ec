"""Options that check themselves, and those of the photometry.

An option is an annotated field of a frozen pydantic dataclass. The annotation holds its
type, its limits, what it means, its unit and how the command line takes it; the checks, the
docstring, the template, the flags and the tables in the documentation are made from that.
What pydantic finds wrong becomes a `ConfigError` here, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, ErrorDetails, PydanticUndefined

from spxdask.errors import ConfigError
from spxdask.science.flags import FLAG_BITS, FLAGS, PSF_BAD_FLAGS, find_bit

__all__ = [
    "CheckedOptions",
    "OptionInfo",
    "PhotometryConfig",
    "check_options",
    "checked_options",
    "list_options",
    "option",
]

# Strict, so that true is not 1 and "3" is not 3; numpy's numbers become Python's before.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, validate_default=True, extra="forbid")

T = TypeVar("T")


def option(
    description: str,
    *,
    unit: str = "",
    group: str = "",
    rule: str = "",
    flag: str = "",
    metavar: str | tuple[str, ...] = "",
    nargs: int | str | None = None,
    default_text: str = "",
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
) -> Any:
    """Describe an option, within the annotation of its field.

    Parameters
    ----------
    description : str
        What it does. "null for ..." is what an option means that is not given.
    unit : str
        Of its value.
    group : str
        Heading under which the command line and the template show it.
    rule : str
        What its value must be, in words that follow "must be"; made from type and limits if
        it is left out.
    flag : str
        The flag of the command line without its dashes, if that is not the name.
    metavar : str or tuple of str
        What stands for the value in the help of the command line; made from the type if it
        is left out.
    nargs : int or str, optional
        How many values the flag takes, for `argparse`.
    default_text : str
        The default in the documentation, if the environment can change it.
    gt, ge, le : float, optional
        Limits of its value: >, >= and <=.

    Returns
    -------
    pydantic.fields.FieldInfo
    """
    extra: dict[str, Any] = {
        "unit": unit,
        "group": group,
        "rule": rule,
        "flag": flag,
        "metavar": metavar,
        "nargs": nargs,
        "default_text": default_text,
    }
    return Field(description=description, json_schema_extra=extra, gt=gt, ge=ge, le=le)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """What there is to know of an option.

    Attributes
    ----------
    name : str
    description : str
    unit, group, flag, metavar, nargs, default_text
        As given to `option`; `flag` is complete, such as ``--max-images``.
    annotation : type
        Of its value, where that is not None.
    rule : str
        What its value must be, such as ``a number > 0 and <= 90``.
    limits : str
        The part of the rule that a number of the right type can break, such as
        ``> 0 and <= 90``.
    required : bool
    """

    name: str
    description: str
    unit: str
    group: str
    flag: str
    metavar: str | tuple[str, ...]
    nargs: int | str | None
    default_text: str
    annotation: Any
    rule: str
    limits: str
    required: bool
    make_default: Callable[[], Any]

    @property
    def default(self) -> Any:
        """The default, None for an option that is required; the environment may change it."""
        return None if self.required else self.make_default()

    @property
    def description_with_unit(self) -> str:
        """The description, followed by the unit in brackets."""
        return f"{self.description} [{self.unit}]" if self.unit else self.description

    @property
    def nested(self) -> type[CheckedOptions] | None:
        """The class of the options below this one, None for a plain value."""
        is_class = isinstance(self.annotation, type)
        return self.annotation if is_class and issubclass(self.annotation, CheckedOptions) else None


def list_options(model: type) -> tuple[OptionInfo, ...]:
    """Return what there is to know of each option of a class, in their order.

    Parameters
    ----------
    model : type
        A class made by `checked_options`.

    Returns
    -------
    tuple of OptionInfo
    """
    found: dict[str, FieldInfo] = model.__pydantic_fields__  # type: ignore[attr-defined]
    return tuple(_info(name, field) for name, field in found.items())


def _info(name: str, field: FieldInfo) -> OptionInfo:
    extra: dict[str, Any] = field.json_schema_extra  # type: ignore[assignment]
    limits = " and ".join(_limits(field.metadata))
    annotation = _without_none(field.annotation)
    return OptionInfo(
        name=name,
        description=field.description or "",
        unit=extra["unit"],
        group=extra["group"],
        flag="--" + (extra["flag"] or name.replace("_", "-")),
        metavar=extra["metavar"] or _metavar(annotation),
        nargs=extra["nargs"],
        default_text=extra["default_text"],
        annotation=annotation,
        rule=extra["rule"] or " ".join(filter(None, (_kind(annotation), limits))),
        limits=limits,
        required=field.is_required(),
        make_default=functools.partial(field.get_default, call_default_factory=True),
    )


def _without_none(annotation: Any) -> Any:
    """Return the type of an option that may be None as one that may not."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else annotation


def _limits(metadata: Iterable[Any]) -> Iterable[str]:
    for limit in metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("le", "<=")):
            if hasattr(limit, name):
                yield f"{sign} {getattr(limit, name)}"


def _kind(annotation: Any) -> str:
    """Return a description of the values that a type allows."""
    if get_origin(annotation) is Literal:
        *most, last = get_args(annotation)
        return f"{', '.join(most)} or {last}"
    return {float: "a number", int: "an integer", bool: "true or false"}.get(annotation, "a text")


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    return "X" if annotation is float else "N"


def _type_name(annotation: Any) -> str:
    """Return a type as numpydoc writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ", ".join(map(repr, arguments)) + "}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"tuple of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"tuple[{', '.join(map(_type_name, arguments))}]"
    return "None" if annotation is type(None) else annotation.__name__


def as_native(value: Any) -> Any:
    """Convert numpy scalars and arrays to Python objects, and lists to tuples.

    Parameters
    ----------
    value : object
        Any value of an option.

    Returns
    -------
    object
        Anything else, a Quantity with a unit and a structured array are returned unchanged.
    """
    # A Quantity has no list without its unit, and a structured array none without its names.
    has_names = getattr(getattr(value, "dtype", None), "names", None) is not None
    if hasattr(value, "tolist") and not hasattr(value, "unit") and not has_names:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(v.tolist() if hasattr(v, "tolist") else v for v in value)
    if isinstance(value, set | frozenset):
        return {v.tolist() if hasattr(v, "tolist") else v for v in value}
    return value


@pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckedOptions:
    """What classes of options have in common: checks and dictionaries."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_native(cls, value: Any) -> Any:
        return as_native(value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from a mapping, such as a parsed YAML file.

        Parameters
        ----------
        values : mapping
            Options by name.

        Returns
        -------
        CheckedOptions
            Of this class.

        Raises
        ------
        ConfigError
            If a key is unknown, a required one is missing, or a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} needs a mapping of options, got {values!r}")
        _refuse_unknown(cls, values)
        missing = [o.name for o in list_options(cls) if o.required and o.name not in values]
        if missing:
            raise ConfigError(f"missing option: {', '.join(missing)}", option=missing[0])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as YAML holds them.

        Returns
        -------
        dict
            Of plain numbers, texts, lists and mappings.
        """
        return _without_tuples(dataclasses.asdict(self))


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(v) for key, v in value.items()}
    return [_without_tuples(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def checked_options(cls: type[T]) -> type[T]:
    """Make a class of described fields a frozen, keyword-only dataclass that checks itself.

    Parameters
    ----------
    cls : type
        A subclass of `CheckedOptions`. Its docstring gets a section of parameters.

    Returns
    -------
    type
        Its objects raise `ConfigError` where pydantic's would raise a ValidationError, and
        TypeError for arguments that are unknown or missing, as functions do.
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _translate(made, values, error.errors(include_url=False)) from None

    made.__init__ = __init__
    # Without what the annotations hold besides the types.
    annotations = get_type_hints(made)
    made.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=annotations[name],
                default=_signature_default(field),
            )
            for name, field in made.__pydantic_fields__.items()
        ]
    )
    made.__doc__ = _with_parameters(inspect.cleandoc(made.__doc__ or ""), made)
    return made


def _signature_default(field: FieldInfo) -> Any:
    if field.is_required():
        return inspect.Parameter.empty
    # The environment may decide which it is, or it has many parts.
    is_plain = field.default is not PydanticUndefined and not isinstance(
        field.default, CheckedOptions
    )
    return field.default if is_plain else ...


def _with_parameters(docstring: str, model: type) -> str:
    """Describe every option in a docstring, before what is raised."""
    annotations = get_type_hints(model)
    lines = ["Parameters", "----------"]
    for info in list_options(model):
        default = ""
        if info.default_text:
            default = ", optional"
        elif info.nested is not None:
            default = f", default {info.nested.__name__}()"
        elif not info.required:
            default = f", default {info.default!r}"
        text = info.description_with_unit.replace("null for", "None for")
        lines.append(f"{info.name} : {_type_name(annotations[info.name])}{default}")
        text = text[0].upper() + text[1:] + "."
        lines += textwrap.wrap(text, 88, initial_indent="    ", subsequent_indent="    ")
    head, raises, rest = docstring.partition("Raises\n")
    return head + "\n".join(lines) + "\n\n" + raises + rest


def check_options(model: type, values: Mapping[str, Any]) -> None:
    """Check some options of a configuration, each by itself.

    Parameters
    ----------
    model : type
        A class made by `checked_options`.
    values : mapping
        Some of its options.

    Raises
    ------
    ConfigError
        If a name is unknown, or a value is not allowed whatever the other options are.
    """
    _refuse_unknown(model, values)
    plain = dict(values)
    for info in list_options(model):
        below = values.get(info.name)
        if info.nested is not None and isinstance(below, Mapping):
            try:
                check_options(info.nested, below)
            except ConfigError as error:
                raise _within(info.name, error) from None
            del plain[info.name]
    try:
        # __init__ would do the same; this object is only used within this method.
        model.__pydantic_validator__.validate_python(  # type: ignore[attr-defined]
            ArgsKwargs((), plain), self_instance=object.__new__(model)
        )
    except ValidationError as error:
        # Those of other options are of what is missing, or of options together.
        details = error.errors(include_url=False)
        wrong = [detail for detail in details if detail["loc"] and detail["loc"][0] in plain]
        if wrong:
            raise _translate(model, values, wrong) from None


def _refuse_unknown(model: type, names: Iterable[Any]) -> None:
    """Raise ConfigError for a name that is no option, with the one that may be meant."""
    known = {info.name for info in list_options(model)}
    for name in names:
        if name not in known:
            raise ConfigError(_unknown(model, name), option=str(name))


def _unknown(model: type, name: Any) -> str:
    options = list_options(model)
    known = [info.name for info in options]
    meant = [info.name for info in options if info.flag == f"--{name}"]
    meant += difflib.get_close_matches(str(name), known, n=1)
    for info in options:
        if info.nested is not None and name in {below.name for below in list_options(info.nested)}:
            return f"unknown option {name!r}: it belongs under {info.name}"
    hint = f"did you mean {meant[0]}?" if meant else f"known options are {', '.join(known)}"
    return f"unknown option {name!r}: {hint}"


def _within(group: str, error: ConfigError) -> ConfigError:
    """Return an error of an option as one of that option within a group."""
    option = f"{group}.{error.option}"
    if error.rule is None:
        return ConfigError(f"{group}: {error.reason}", option=option, path=error.path)
    return ConfigError(option=option, value=error.value, rule=error.rule, path=error.path)


def _translate(
    model: type, values: Mapping[str, Any], details: list[ErrorDetails]
) -> ConfigError | TypeError:
    """Make the first of pydantic's errors a sentence about an option."""
    for detail in details:
        if detail["type"] == "unexpected_keyword_argument":
            return TypeError(_unknown(model, detail["loc"][0]))
    missing = [str(detail["loc"][0]) for detail in details if detail["type"] == "missing"]
    required = [info.name for info in list_options(model) if info.required]
    if any(name in required and name not in values for name in missing):
        return TypeError(f"missing option: {', '.join(n for n in missing if n not in values)}")
    first = details[0]
    cause = first.get("ctx", {}).get("error")
    if not first["loc"] and isinstance(cause, ConfigError):
        return cause
    [info] = (info for info in list_options(model) if info.name == first["loc"][0])
    if isinstance(cause, ConfigError):
        return _within(info.name, cause)
    rule = info.rule
    if first["type"] in ("greater_than", "greater_than_equal", "less_than_equal"):
        rule = info.limits or rule
    elif cause is not None:
        # The message of an option's own validator is more precise than its rule.
        rule = str(cause).replace("{rule}", info.rule)
    value = values.get(info.name, first["input"])
    if hasattr(value, "tolist") and not hasattr(value, "unit"):
        value = value.tolist()
    return ConfigError(option=info.name, value=value, rule=rule)


def _as_bits(flags: Any) -> Any:
    """Make names and bits of flags sorted bits, without those that come twice."""
    if not isinstance(flags, tuple | set | frozenset):
        return flags
    bits = set()
    for flag in flags:
        if isinstance(flag, str) and flag.strip().upper() not in FLAG_BITS:
            near = difflib.get_close_matches(flag.strip().upper(), FLAG_BITS, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"{{rule}} ({flag!r} is not a flag{hint})")
        # Python takes True for 1; pydantic refuses it, as all that is not an integer.
        if type(flag) not in (int, str):
            return (flag,)
        bits.add(find_bit(flag) if isinstance(flag, str) else flag)
    return tuple(sorted(bits))


APERTURE, PSF, BACKGROUND, ZODI, PIXELS = (
    f"photometry: {topic}"
    for topic in ("aperture", "PSF", "background", "zodiacal light", "pixels")
)
WindowSide = Annotated[int, Field(ge=3, le=500)]
FlagBit = Annotated[int, Field(ge=0, le=31)]


@checked_options
class PhotometryConfig(CheckedOptions):
    """How a source is measured. Pixels are 6.15 arcsec.

    Raises
    ------
    ConfigError
        If a value is not allowed; the message names the option, the rule and the value.
    """

    aperture_method: Annotated[
        Literal["fwhm", "fixed"],
        option(
            "'fwhm' scales the aperture with each frame's PSF, 'fixed' keeps it", group=APERTURE
        ),
    ] = "fwhm"
    aperture_diameter: Annotated[
        float,
        option("diameter of the fixed aperture", unit="pixels", group=APERTURE, gt=0, le=200),
    ] = 3.0
    fwhm_multiplier: Annotated[
        float,
        option("diameter of the fwhm aperture", unit="PSF FWHM", group=APERTURE, gt=0, le=50),
    ] = 2.5
    psf: Annotated[
        Literal["nearest", "bilinear", "none"],
        option(
            "the PSF at a source: that of the 'nearest' zone of the detector, or 'bilinear' "
            "between four; 'none' measures no total fluxes, and leaves out their columns",
            group=PSF,
        ),
    ] = "nearest"
    psf_bad_flags: Annotated[
        tuple[FlagBit, ...],
        option(
            "flags that make a pixel unusable for PSF photometry",
            group=PSF,
            rule="a list of flags, by name or by bit from 0 to 31",
            metavar="FLAG",
            nargs="*",
        ),
        BeforeValidator(_as_bits),
    ] = tuple(sorted(FLAG_BITS[name] for name in PSF_BAD_FLAGS))
    background_method: Annotated[
        Literal["window", "annulus"],
        option(
            "'window' takes the local background from a rectangle about the source, 'annulus' "
            "from a ring about the aperture",
            group=BACKGROUND,
        ),
    ] = "window"
    window_size: Annotated[
        WindowSide | tuple[WindowSide, WindowSide],
        option(
            "size of the background window; one number, or height and width",
            unit="pixels",
            group=BACKGROUND,
            rule="an integer from 3 to 500 (pixels), or a pair of them: height, width",
            metavar="N",
            nargs="+",
        ),
    ] = 50
    min_usable_pixels: Annotated[
        int,
        option(
            "least number of usable pixels; with fewer, pixels flagged SOURCE count as usable",
            group=BACKGROUND,
            ge=1,
        ),
    ] = 10
    bg_sigma_clip_sigma: Annotated[
        float,
        option(
            "background clipping limit", unit="standard deviations", group=BACKGROUND, gt=0, le=1000
        ),
    ] = 3.0
    bg_sigma_clip_maxiters: Annotated[
        int, option("background clipping rounds, at most", group=BACKGROUND, ge=0, le=1000)
    ] = 3
    annulus_inner_offset: Annotated[
        float,
        option("gap between aperture and annulus", unit="pixels", group=BACKGROUND, ge=0, le=200),
    ] = 1.414
    min_annulus_area: Annotated[
        float,
        option("area of the first annulus", unit="pixels", group=BACKGROUND, gt=0, le=1_000_000),
    ] = 10.0
    max_outer_radius: Annotated[
        float,
        option(
            "the annulus grows no farther than this", unit="pixels", group=BACKGROUND, gt=0, le=500
        ),
    ] = 5.0
    max_annulus_attempts: Annotated[
        int,
        option(
            "times the annulus is grown before pixels flagged SOURCE count as usable",
            group=BACKGROUND,
            ge=0,
            le=1000,
        ),
    ] = 5
    annulus_expansion_step: Annotated[
        float,
        option(
            "growth of the outer radius each time", unit="pixels", group=BACKGROUND, gt=0, le=100
        ),
    ] = 0.5
    subtract_zodi: Annotated[
        bool, option("fit and subtract the zodiacal light model", group=ZODI)
    ] = True
    zodi_scale_min: Annotated[
        float,
        option(
            "a fitted zodiacal scale must be above this, or 1 is used",
            group=ZODI,
            ge=-1_000_000,
            le=1_000_000,
        ),
    ] = 0.0
    zodi_scale_max: Annotated[
        float,
        option(
            "a fitted zodiacal scale must not be above this, or 1 is used",
            group=ZODI,
            ge=-1_000_000,
            le=1_000_000,
        ),
    ] = 10.0
    bad_flags: Annotated[
        tuple[FlagBit, ...],
        option(
            "flags, by bit or by name such as HOT, that make a pixel unusable for background and "
            "zodiacal fit",
            group=PIXELS,
            rule="a list of flags, by name or by bit from 0 to 31",
            metavar="FLAG",
            nargs="*",
        ),
        BeforeValidator(_as_bits),
    ] = tuple(flag.bit for flag in FLAGS if flag.bad)
    pixel_scale_fallback: Annotated[
        float,
        option(
            "used, with a warning, when a header has no usable scale",
            unit="arcsec",
            group=PIXELS,
            gt=0,
            le=1000,
        ),
    ] = 6.2

    def __post_init__(self) -> None:
        if not self.zodi_scale_min < self.zodi_scale_max:
            raise ConfigError(
                option="zodi_scale_max",
                value=self.zodi_scale_max,
                rule=f"> zodi_scale_min, which is {self.zodi_scale_min!r}",
            )
        radius = self.aperture_diameter / 2
        height, width = self.window_shape
        if self.aperture_method == "fixed" and self.background_method == "annulus":
            inner = radius + self.annulus_inner_offset
            if inner >= self.max_outer_radius:
                raise ConfigError(
                    option="max_outer_radius",
                    value=self.max_outer_radius,
                    rule=f"> aperture_diameter / 2 + annulus_inner_offset, which is {inner!r}",
                )
        elif self.aperture_method == "fixed":
            # 0.707 is half of a pixel's diagonal.
            room = height * width - math.pi * (radius + 0.707) ** 2
            if room < self.min_usable_pixels:
                raise ConfigError(
                    option="window_size",
                    value=self.window_size,
                    rule=(
                        f"large enough for min_usable_pixels, {self.min_usable_pixels}, outside "
                        "the aperture"
                    ),
                )

    @property
    def window_shape(self) -> tuple[int, int]:
        """Height and width of the background window, pixels."""
        size = self.window_size
        return size if isinstance(size, tuple) else (size, size)
