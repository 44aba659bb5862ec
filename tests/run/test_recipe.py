"""Recipes: what makes a table stale, and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from spxdask import PhotometryConfig
from spxdask.run.recipe import STEPS, Recipe, RecipeInputs, StepDefinition
from spxdask.run.recipe import make_recipe as make_recipe_of_inputs

DEFAULT = PhotometryConfig()


def make_recipe(photometry: PhotometryConfig, steps=STEPS, **inputs) -> Recipe:
    return make_recipe_of_inputs(RecipeInputs(photometry=photometry, **inputs), steps)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"fwhm_multiplier": 3.0}, "aperture"),
        ({"aperture_method": "fixed"}, "aperture"),
        ({"pixel_scale_fallback": 6.15}, "aperture"),
        ({"window_size": 40}, "background"),
        ({"min_usable_pixels": 20}, "background"),
        ({"bg_sigma_clip_sigma": 2.5}, "background"),
        ({"bg_sigma_clip_maxiters": 5}, "background"),
        ({"background_method": "annulus"}, "background"),
        ({"bad_flags": [0, 1]}, "zodi"),
        ({"subtract_zodi": False}, "zodi"),
        ({"zodi_scale_min": 0.1}, "zodi"),
        ({"zodi_scale_max": 2.0}, "zodi"),
        ({"max_outer_radius": 30.0}, "selection"),
        ({"aperture_diameter": 60.0}, "selection"),
        ({"psf": "bilinear"}, "psf"),
        ({"psf_bad_flags": [0]}, "psf"),
    ],
)
def test_an_option_that_is_read_changes_its_step(options, step):
    now, then = make_recipe(replace(DEFAULT, **options)), make_recipe(DEFAULT)
    assert now.digest != then.digest
    assert now.steps[step] != then.steps[step]
    [name] = options
    named = [line for line in now.compare(then) if line.startswith(f"{step}: ")]
    assert any(name in line for line in named) or step == "selection"


@pytest.mark.parametrize(
    "options",
    [
        {"annulus_inner_offset": 2.0},
        {"min_annulus_area": 20.0},
        {"max_annulus_attempts": 7},
        {"annulus_expansion_step": 1.0},
        # The window decides how far a source must be from the edges.
        {"max_outer_radius": 6.0},
        {"aperture_diameter": 4.0},
        {"window_size": (50, 50)},
    ],
)
def test_an_option_that_is_not_read_changes_nothing(options):
    assert make_recipe(replace(DEFAULT, **options)) == make_recipe(DEFAULT)


def test_annulus_options_count_for_an_annulus():
    annulus = replace(DEFAULT, background_method="annulus")
    for options in ({"annulus_inner_offset": 2.0}, {"max_outer_radius": 6.0}):
        assert make_recipe(replace(annulus, **options)) != make_recipe(annulus)
    # The background does not read the window any more; how far a source must be from the edges
    # still depends on it.
    changed = make_recipe(replace(annulus, window_size=40))
    assert changed.steps["background"] == make_recipe(annulus).steps["background"]


def test_a_difference_names_step_option_and_values():
    now, then = make_recipe(replace(DEFAULT, fwhm_multiplier=3.0)), make_recipe(DEFAULT)
    assert now.compare(then) == ["aperture: fwhm_multiplier was 2.5, is 3.0"]
    assert now.compare(now) == []
    without = make_recipe(replace(DEFAULT, subtract_zodi=False))
    assert "zodi: subtract_zodi was True, is False" in without.compare(then)
    assert Recipe({}).compare(then)[0] == "aperture: not done now"
    assert then.compare(Recipe({}))[0] == "aperture: not done then"


def test_a_recipe_survives_the_ledger():
    recipe = make_recipe(replace(DEFAULT, window_size=(30, 40)))
    assert Recipe(json.loads(json.dumps(recipe.steps))) == recipe
    assert Recipe(json.loads(json.dumps(recipe.steps))).digest == recipe.digest


def later_step(value: str) -> StepDefinition:
    return StepDefinition(
        name="later", version=1, read_options=lambda _: {"how": value}, neutral={"how": "none"}
    )


def test_a_new_option_with_its_neutral_value_leaves_old_tables_valid():
    assert make_recipe(DEFAULT, (*STEPS, later_step("none"))) == make_recipe(DEFAULT)
    changed = make_recipe(DEFAULT, (*STEPS, later_step("fast")))
    assert changed != make_recipe(DEFAULT)
    assert changed.compare(make_recipe(DEFAULT)) == ["later: not done then"]


def test_without_psf_its_options_and_product_change_nothing():
    without = replace(DEFAULT, psf="none")
    assert "psf" not in make_recipe(without).steps
    assert make_recipe(replace(without, psf_bad_flags=[0])) == make_recipe(without)
    products = {"epsf": ("cal-epsf-v1-2026-001", "0" * 32)}
    same = make_recipe(without, products=products, contaminants="abc")
    assert same == make_recipe(without)


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("solid_angle_pixel_map", "solid_angle"),
        ("spectral_wcs", "wavelength"),
        ("l3_flux_corrections", "flux_scale"),
        ("epsf", "psf"),
    ],
)
def test_a_recipe_names_the_product_of_a_step(family, step):
    token = f"cal-{family}-v1-2026-001"
    without = make_recipe(DEFAULT)
    first, second = (make_recipe(DEFAULT, products={family: (token, c * 32)}) for c in "01")
    assert first.steps[step]["product"] == [token, "0" * 32]
    assert "product" not in without.steps.get(step, {})
    assert len({recipe.digest for recipe in (without, first, second)}) == 3
    # No other step is another one.
    steps = without.steps.keys() | first.steps.keys()
    assert {s for s in steps if without.steps.get(s) != first.steps.get(s)} == {step}
    [line] = second.compare(first)
    assert line == f"{step}: product was ['{token}', '{'0' * 32}'], is ['{token}', '{'1' * 32}']"


def test_contaminants_change_psf_fluxes():
    one, other = (make_recipe(DEFAULT, contaminants=name) for name in ("abc", "def"))
    assert one.compare(other) == ["psf: contaminants was def, is abc"]
    assert make_recipe(DEFAULT).compare(one) == ["psf: contaminants was abc"]


def test_a_new_option_of_an_old_step_with_its_neutral_value_changes_nothing():
    [aperture] = [step for step in STEPS if step.name == "aperture"]
    longer = replace(
        aperture,
        read_options=lambda photometry: aperture.read_options(photometry) | {"shape": "circle"},
        neutral={"shape": "circle"},
    )
    steps = tuple(longer if step is aperture else step for step in STEPS)
    assert make_recipe(DEFAULT, steps) == make_recipe(DEFAULT)


def test_a_new_version_of_a_step_makes_all_tables_stale():
    steps = tuple(replace(step, version=step.version + (step.name == "zodi")) for step in STEPS)
    assert make_recipe(DEFAULT, steps).compare(make_recipe(DEFAULT)) == [
        "zodi: version was 1, is 2"
    ]


@pytest.mark.parametrize("module", ["spxdask.run.plan", "spxdask.run.recipe"])
def test_the_plan_needs_no_dask_network_or_disk(module):
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert not {"dask", "distributed", "fsspec", "aiohttp", "requests", "pyvo"} & loaded
