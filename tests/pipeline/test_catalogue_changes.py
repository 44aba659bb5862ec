"""When the catalogue changes, exactly the frames with changed sources are measured again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simulated
from outputs import output_of, read_files, read_per_image

from spxdask import BatchConfig, BatchPipeline, PhotometryConfig
from spxdask.run.plan import table_name
from spxdask.run.summary import RunSummary
from spxdask.simulate.archive import SimulatedArchive

# Distance in deg between the first two frames and the third.
APART = 1.0


@dataclass(frozen=True)
class TwoFields:
    """A finished run over two frames that nearly coincide, and a third a degree north of them.

    `sources_on` holds the ids measured on each frame, `far` sources near no frame that the
    catalogue of the run does not have.
    """

    output: Path
    run: Callable[..., RunSummary]
    catalogue: pd.DataFrame
    far: pd.DataFrame
    tables: list[str]
    sources_on: list[set[str]]


@pytest.fixture(scope="module")
def two_fields(tmp_path_factory, client) -> Iterator[TwoFields]:
    folder = tmp_path_factory.mktemp("two_fields")
    ra, dec = simulated.CENTER
    sky = simulated.make_sky(
        ra, dec + APART / 2, 0.75, n_sources=250, min_separation_arcsec=70, seed=3
    )
    exposures = [simulated.exposure(number) for number in range(2)]
    exposures.append(simulated.exposure(2, dec=dec + APART))
    frames = simulated.simulate(folder, exposures, sky)
    rng = np.random.default_rng(4)
    # Some lie at the antipode of the frames, others in their zones of declination.
    far_ra = np.concatenate([rng.uniform(80, 100, 20), rng.uniform(300, 320, 20)])
    far_dec = np.concatenate([rng.uniform(-70, -60, 20), rng.uniform(66, 68, 20)])
    far = pd.DataFrame({"targetid": [f"far{i}" for i in range(40)], "ra": far_ra, "dec": far_dec})
    near = pd.DataFrame(
        {"targetid": [f"s{i}" for i in range(len(sky))], "ra": sky.ra, "dec": sky.dec}
    )
    catalogue = pd.concat([far[:10], near, far[10:30]], ignore_index=True)
    with SimulatedArchive([f.archived for f in frames]) as archive:

        def run(table, output, **options):
            path = output.parent / f"{output.name}.csv"
            table.to_csv(path, index=False)
            defaults = simulated.run_options(path, archive, output)
            defaults |= {"center_dec": dec + APART / 2, "radius": APART / 2 + 0.1}
            config = BatchConfig(**(defaults | {"num_buckets": 2} | options))
            return BatchPipeline(config, client=client).run_all()

        assert run(catalogue, folder / "base").stages["extract"].done == 3
        rows = read_per_image(folder / "base" / "per_image")
        names = [exposure.filename for exposure in exposures]
        sources_on = [set(rows.loc[rows["filename"] == name, "target_id"]) for name in names]
        assert not sources_on[2] & (sources_on[0] | sources_on[1])
        tables = [table_name(name, "csv") for name in names]
        yield TwoFields(folder / "base", run, catalogue, far[30:], tables, sources_on)


def move_first(table, ids):
    table.loc[table["targetid"] == min(ids), "ra"] += 1e-9
    return table


def swap_two(table, ids):
    two = table.index[table["targetid"].isin(ids)][:2]
    table.loc[two] = table.loc[two[::-1]].to_numpy()
    return table


def drop(table, ids):
    return table[~table["targetid"].isin(ids)]


def sort_north_first(table):
    north = table["dec"] > simulated.CENTER[1] + APART / 2
    return pd.concat([table[north], table[~north]])


FAR_IDS = {f"far{i}" for i in range(40)}
# What is done to the catalogue, and which frames are measured again; None means all.
CHANGES = {
    "nothing": (lambda table, far, on: table, []),
    "far added": (lambda table, far, on: pd.concat([far, table, far.assign(targetid=far.ra)]), []),
    "far removed": (lambda table, far, on: drop(table, FAR_IDS), []),
    "far moved": (lambda table, far, on: move_first(table, FAR_IDS), []),
    "far swapped": (lambda table, far, on: swap_two(table, FAR_IDS), []),
    "fields swapped": (lambda table, far, on: table.sort_values("dec", kind="stable"), None),
    "one field first": (lambda table, far, on: sort_north_first(table), []),
    "near removed": (lambda table, far, on: drop(table, {min(on[2])}), [2]),
    "near renamed": (lambda table, far, on: table.replace({"targetid": {min(on[2]): "new"}}), [2]),
    "near moved": (lambda table, far, on: move_first(table, on[2]), [2]),
    "near swapped": (lambda table, far, on: swap_two(table, on[2]), [2]),
    "near both": (lambda table, far, on: move_first(table, on[0] & on[1]), [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "near added", "options"])
def test_only_frames_with_changed_sources_are_measured_again(two_fields, tmp_path, change):
    run, catalogue, on = two_fields.run, two_fields.catalogue, two_fields.sources_on
    shutil.copytree(two_fields.output, tmp_path / "grown")
    options, again = {}, [2]
    table = catalogue.copy()
    if change == "options":
        options["photometry"], again = PhotometryConfig(fwhm_multiplier=2.4), [0, 1, 2]
    elif change == "near added":
        run(drop(catalogue, {min(on[2])}), tmp_path / "grown")
    else:
        make, again = CHANGES[change]
        table = make(table, two_fields.far, on)
    again = [0, 1, 2] if again is None else again
    per_image = tmp_path / "grown" / "per_image"
    before = {name: (per_image / name).stat().st_mtime_ns for name in two_fields.tables}
    extracted = run(table, tmp_path / "grown", **options).stages["extract"]
    assert (extracted.done, extracted.reused) == (len(again), 3 - len(again))
    for i, name in enumerate(two_fields.tables):
        assert ((per_image / name).stat().st_mtime_ns == before[name]) == (i not in again), i
    expected = two_fields.output
    # Sources far from all frames are in no file, as "far added" shows.
    if change not in ("nothing", "far removed", "far moved", "far swapped"):
        expected = tmp_path / "fresh"
        fresh = run(table, expected, **options).stages["extract"]
        assert (fresh.done, fresh.rows) == (3, extracted.rows)
    for folder in ("per_image", "lightcurves"):
        assert read_files(tmp_path / "grown" / folder) == read_files(expected / folder)


def test_edited_catalogue_is_read_again(make_config, client):
    config = make_config(bands=["D1"])
    pipeline = BatchPipeline(config, client=client)
    before = pipeline.run_all()
    kept = read_per_image(output_of(pipeline).per_image)[:2]
    simulated.write_catalogue(config.catalog_path, kept["target_id"], kept["ra"], kept["dec"])
    after = pipeline.run_all()
    assert (after.n_sources, after.n_measured) == (2, 2)
    assert after.stages["aggregate"].removed == before.n_measured - 2
