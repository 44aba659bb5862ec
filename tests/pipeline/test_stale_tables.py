"""Tables of other options, catalogues, queries or frames are measured again, never mixed."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import simulated
from astropy.io import fits
from outputs import output_of, read_files, read_per_image

from spxdask import BatchPipeline, PhotometryConfig
from spxdask.errors import RunFolderError
from spxdask.simulate.archive import SimulatedArchive


def test_tables_of_other_options_or_catalogues_are_never_mixed(make_config, client):
    first = BatchPipeline(make_config(), client=client)
    first.run_all()
    old = read_files(output_of(first).lightcurves)

    fixed = make_config(photometry=PhotometryConfig(aperture_method="fixed"))
    second = BatchPipeline(fixed, client=client)
    with pytest.raises(
        RunFolderError, match=r"6 per-image tables are stale.*aperture_method was fwhm, is fixed"
    ):
        second.run_aggregate()
    assert read_files(output_of(first).lightcurves) == old
    assert second.run_extract().done == 6
    second.run_aggregate()
    assert set(read_per_image(output_of(second).per_image)["aperture_radius"]) == {1.5}

    rows = read_per_image(output_of(second).per_image)
    few = rows["target_id"].unique()[:3]
    positions = rows.drop_duplicates("target_id").set_index("target_id").loc[few]
    simulated.write_catalogue(fixed.catalog_path, few, positions["ra"], positions["dec"])
    third = BatchPipeline(fixed, client=client)
    summary = third.run_all()
    assert summary.stages["extract"].done == 6
    assert summary.n_sources == summary.n_measured == 3
    # The light curves of sources that left the catalogue are removed.
    assert len(list(output_of(third).lightcurves.iterdir())) == 3


def test_frame_that_fails_does_not_hold_up_new_options(make_config, client):
    first = BatchPipeline(make_config(), client=client)
    rows = first.run_all().stages["extract"].rows
    broken = next(output_of(first).images.iterdir())
    data = bytearray(broken.read_bytes())
    data[:2880] = bytes(2880)
    broken.write_bytes(data)
    fixed = make_config(photometry=PhotometryConfig(aperture_method="fixed"))
    second = BatchPipeline(fixed, client=client)
    summary = second.run_all()
    assert list(summary.failed) == [broken.name]
    assert 0 < summary.stages["aggregate"].rows < rows
    # The next run fetches it again.
    assert BatchPipeline(fixed, client=client).run_all().stages["aggregate"].rows == rows


def test_changed_table_is_measured_again(make_config, client):
    pipeline = BatchPipeline(make_config(), client=client)
    pipeline.run_all()
    before = read_files(output_of(pipeline).lightcurves)
    table = max(output_of(pipeline).per_image.iterdir(), key=lambda path: path.stat().st_size)
    content = table.read_bytes()
    table.write_bytes(content[:1000])
    changed = f"{table.name} .it has 1000 bytes, {len(content)} were written"
    with pytest.raises(RunFolderError, match=changed):
        pipeline.run_aggregate()
    assert pipeline.run_all().stages["extract"].done == 1
    assert read_files(output_of(pipeline).lightcurves) == before


@pytest.mark.parametrize("how", ["csv", "parquet"])
def test_light_curves_stay_when_no_frame_is_measured(make_config, client, how):
    pipeline = BatchPipeline(make_config(bands=["D1"], lightcurve_format=how), client=client)
    assert pipeline.run_all().n_measured > 0
    curves = read_files(output_of(pipeline).lightcurves)
    # Of the frames of another query none is measured yet.
    other = BatchPipeline(make_config(bands=["D6"], lightcurve_format=how), client=client)
    other.run_query()
    with pytest.raises(RunFolderError, match="no frame of the query is measured"):
        other.run_aggregate()
    assert read_files(output_of(other).lightcurves) == curves


def test_stage_refuses_the_frames_of_another_query(make_config, client):
    BatchPipeline(make_config(bands=["D3"]), client=client).run_query()
    other = BatchPipeline(make_config(bands=["D4"]), client=client)
    with pytest.raises(RunFolderError, match=r"found with bands \['D3'\], the configuration has"):
        other.run_download()


@pytest.mark.parametrize("keep", [True, False])
def test_frame_that_the_archive_replaced_is_measured_again(
    make_config, client, survey, tmp_path, keep
):
    frames = survey.archived[:2]
    with SimulatedArchive(frames) as archive:
        config = make_config(
            keep_images=keep, tap_url=archive.tap_url, archive_url=archive.archive_url
        )
        pipeline = BatchPipeline(config, client=client)
        pipeline.run_all()
    tables = read_files(output_of(pipeline).per_image)
    original = survey.frames[0].path
    # The archive has the same frame with one more extension under the same name.
    more = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.zeros((4, 4)), name="MORE")]).writeto(more)
    replaced = tmp_path / original.name
    replaced.write_bytes(original.read_bytes() + more.getvalue()[2880:])
    frames = [replace(frames[0], path=replaced), frames[1]]
    with SimulatedArchive(frames) as archive:
        config = replace(config, tap_url=archive.tap_url, archive_url=archive.archive_url)
        again = BatchPipeline(config, client=client)
        summary = again.run_all()
    assert (summary.stages["extract"].done, summary.stages["extract"].reused) == (1, 1)
    assert read_files(output_of(pipeline).per_image) == tables
