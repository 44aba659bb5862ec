"""How frames are measured: named steps, each with a version and its options.

A table is valid for as long as it was made by the recipe in force. So a recipe holds all
that the rows of a table depend on besides the frame and the catalogue, and nothing else:
options that the chosen method does not read are not in it, and an option that was added
later is left out while it has the value that stands for the earlier behaviour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spxdask.science.families import EPSF, FLUX_CORRECTION, SOLID_ANGLE, SPECTRAL_WCS

if TYPE_CHECKING:
    from spxdask.science.options import PhotometryConfig

__all__ = ["FEW_ROWS_VERSION", "STEPS", "Recipe", "RecipeInputs", "StepDefinition", "make_recipe"]

# Version of the zodiacal fit to few rows of a frame, raised whenever its numbers change. It is no
# part of the recipe, which is the same for frames that are measured on all of their rows.
# 2: bands that are the same for all sources, each block of them weighted by what it stands for.
# 3: the scale counts only if its error is small for all sources; else more bands, or all rows.
FEW_ROWS_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class RecipeInputs:
    """What a recipe is made of.

    Attributes
    ----------
    photometry : PhotometryConfig
        How a source is measured.
    products : mapping of str to (str, str)
        Token and checksum of each calibration product of a frame, by family.
    contaminants : str or None
        Fingerprint of the sources that take part in the solution without being measured.
    """

    photometry: PhotometryConfig
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    contaminants: str | None = None

    def describe(self, family: str) -> dict[str, Any]:
        """Return the option that stands for a product; none where the frame's own is used.

        Parameters
        ----------
        family : str
            Of the product.

        Returns
        -------
        dict of str to list
        """
        return {"product": list(self.products[family])} if family in self.products else {}


@dataclass(frozen=True, kw_only=True)
class StepDefinition:
    """One step of a measurement.

    Attributes
    ----------
    name : str
        Such as ``background``.
    version : int
        Raised whenever the numbers that the step gives change, or the columns it fills.
    read_options : callable
        Takes the inputs, returns the options that the step depends on by name; None if the
        step is not done.
    neutral : mapping
        Values of options, by name, with which the step does what it did before these options
        existed. An option with its neutral value is not part of a recipe, and a step whose
        options are all neutral is not either.
    """

    name: str
    version: int
    read_options: Callable[[RecipeInputs], dict[str, Any] | None]
    neutral: Mapping[str, Any] = field(default_factory=dict)


def _read_frame(inputs: RecipeInputs) -> dict[str, Any]:
    """Reading a frame has no options; the step is there for its version."""
    return {}


def _read_selection(inputs: RecipeInputs) -> dict[str, Any]:
    from spxdask.science.photometry import margin

    return {"margin": margin(inputs.photometry)}


def _read_zodi(inputs: RecipeInputs) -> dict[str, Any]:
    photometry = inputs.photometry
    if not photometry.subtract_zodi:
        return {"subtract_zodi": False}
    names = ("subtract_zodi", "zodi_scale_min", "zodi_scale_max", "bad_flags")
    return {name: getattr(photometry, name) for name in names}


def _read_background(inputs: RecipeInputs) -> dict[str, Any]:
    photometry = inputs.photometry
    names = [
        "background_method",
        "bad_flags",
        "min_usable_pixels",
        "bg_sigma_clip_sigma",
        "bg_sigma_clip_maxiters",
    ]
    if photometry.background_method == "annulus":
        names += [
            "annulus_inner_offset",
            "min_annulus_area",
            "max_outer_radius",
            "max_annulus_attempts",
            "annulus_expansion_step",
        ]
    options = {name: getattr(photometry, name) for name in names}
    if photometry.background_method == "window":
        # One number and a pair of it are the same window.
        options["window_size"] = photometry.window_shape
    return options


def _read_aperture(inputs: RecipeInputs) -> dict[str, Any]:
    photometry = inputs.photometry
    size = "fwhm_multiplier" if photometry.aperture_method == "fwhm" else "aperture_diameter"
    names = ("aperture_method", size, "pixel_scale_fallback")
    return {name: getattr(photometry, name) for name in names}


def _read_solid_angle(inputs: RecipeInputs) -> dict[str, Any]:
    return inputs.describe(SOLID_ANGLE)


def _read_wavelength(inputs: RecipeInputs) -> dict[str, Any] | None:
    return inputs.describe(SPECTRAL_WCS) or None


def _read_flux_scale(inputs: RecipeInputs) -> dict[str, Any] | None:
    return inputs.describe(FLUX_CORRECTION) or None


def _read_psf(inputs: RecipeInputs) -> dict[str, Any] | None:
    photometry = inputs.photometry
    if photometry.psf == "none":
        return None
    options = {name: getattr(photometry, name) for name in ("psf", "psf_bad_flags", "bad_flags")}
    contaminants = {"contaminants": inputs.contaminants} if inputs.contaminants else {}
    return options | inputs.describe(EPSF) | contaminants


STEPS = (
    StepDefinition(name="frame", version=1, read_options=_read_frame),
    StepDefinition(name="selection", version=1, read_options=_read_selection),
    StepDefinition(name="zodi", version=1, read_options=_read_zodi),
    StepDefinition(name="background", version=1, read_options=_read_background),
    # 2: the scale of the pixels is that of the local solid angle at the centre.
    StepDefinition(name="aperture", version=2, read_options=_read_aperture),
    StepDefinition(name="solid_angle", version=1, read_options=_read_solid_angle),
    StepDefinition(name="wavelength", version=1, read_options=_read_wavelength),
    StepDefinition(name="flux_scale", version=1, read_options=_read_flux_scale),
    # 2: sources that cannot be told apart have no neighbour_flux.
    StepDefinition(name="psf", version=2, read_options=_read_psf),
)


@dataclass(frozen=True)
class Recipe:
    """The steps of a measurement.

    Attributes
    ----------
    steps : dict of str to dict
        Version and options of each step by its name, as JSON has them: numbers, texts, lists.
    """

    steps: dict[str, dict[str, Any]]

    @cached_property
    def digest(self) -> str:
        """Hash that identifies the recipe, 32 hexadecimal digits."""
        text = json.dumps(self.steps, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def compare(self, other: Recipe) -> list[str]:
        """Describe in what this recipe differs from an earlier one.

        Parameters
        ----------
        other : Recipe
            The earlier one.

        Returns
        -------
        list of str
            A sentence part for each option that differs, such as ``"aperture:
            fwhm_multiplier was 2.5, is 3.0"``; empty for equal recipes.
        """
        found = []
        for name in sorted(self.steps.keys() | other.steps.keys()):
            now, then = self.steps.get(name), other.steps.get(name)
            if now is None or then is None:
                found.append(f"{name}: {'not done now' if now is None else 'not done then'}")
                continue
            changed = [o for o in sorted(now.keys() & then.keys()) if now[o] != then[o]]
            found += [
                f"{name}: {option} was {then[option]}, is {now[option]}" for option in changed
            ]
            # Where the method is another, so are the options that it reads.
            only_one_has = [] if changed else sorted(now.keys() ^ then.keys())
            found += [
                f"{name}: {option} {'is' if option in now else 'was'} "
                f"{now.get(option, then.get(option))}"
                for option in only_one_has
            ]
        return found


def make_recipe(inputs: RecipeInputs, definitions: tuple[StepDefinition, ...] = STEPS) -> Recipe:
    """Return the recipe that options and calibration products stand for.

    Parameters
    ----------
    inputs : RecipeInputs
        How a source is measured, and with what.
    definitions : tuple of StepDefinition, optional
        The steps that there are.

    Returns
    -------
    Recipe
        Equal for options that give the same rows.
    """
    steps = {}
    for definition in definitions:
        read = definition.read_options(inputs)
        if read is None:
            continue
        neutral = definition.neutral
        options = {k: v for k, v in read.items() if k not in neutral or v != neutral[k]}
        if options or not read:
            steps[definition.name] = {"version": definition.version} | options
    # As they come back from the ledger: lists, not tuples.
    return Recipe(json.loads(json.dumps(steps)))
