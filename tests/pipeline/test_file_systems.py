"""Output folders on file systems that refuse files, or names that ids would give them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from outputs import output_of, read_files

from spxdask import BatchPipeline
from spxdask.cli import main
from spxdask.errors import RunFolderError
from spxdask.stages.light_curves import light_curve_name

REFUSED = '"*:<>?|'


def has_refused_character(path: str | os.PathLike) -> bool:
    return bool(set(Path(path).name) & set(REFUSED))


@pytest.fixture
def refuse(monkeypatch) -> Callable[[Callable[[str], bool], int], None]:
    """Return a function that lets the system refuse to create files in this process."""
    open_file = os.open

    def refuse(is_refused, code):
        def open_some(path, flags, *mode, **how):
            if flags & os.O_CREAT and is_refused(os.fspath(path)):
                raise OSError(code, os.strerror(code), path)
            return open_file(path, flags, *mode, **how)

        monkeypatch.setattr(os, "open", open_some)

    return refuse


def test_refused_characters_are_encoded_in_names_alone(
    finished, make_config, client, refuse, fail_in_workers
):
    refuse(has_refused_character, errno.EINVAL)
    fail_in_workers(
        "spxdask.storage.local",
        "_write_small",
        lambda call, path, *_: has_refused_character(path),
        OSError(errno.EINVAL, "Invalid argument"),
    )
    pipeline = BatchPipeline(make_config(), client=client)
    summary = pipeline.run_all()
    assert (summary.failed, summary.n_measured) == ({}, finished.summary.n_measured)
    curves = read_files(output_of(pipeline).lightcurves)
    assert not any(map(has_refused_character, curves))
    ids = pipeline.catalogue.target_id.to_pylist()
    expected = read_files(output_of(finished).lightcurves)
    measured = [i for i in ids if light_curve_name(i) in expected]
    assert len(measured) == len(expected)
    assert {i for i in ids if has_refused_character(i)} & set(measured)
    for target in measured:
        assert curves[light_curve_name(target, REFUSED)] == expected[light_curve_name(target)]
    # Names are kept, though another machine may see the folder through another file system.
    fail_in_workers.stop()
    refuse(lambda path: False, 0)
    again = BatchPipeline(make_config(), client=client).run_all()
    assert again.stages["aggregate"].reused == summary.n_measured
    assert read_files(output_of(pipeline).lightcurves) == curves


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", ["images", "per_image", "lightcurves"])
def test_a_folder_that_cannot_be_written_to_stops_a_run_at_its_start(
    make_config, client, archive, refuse, name, code
):
    pipeline = BatchPipeline(make_config(), client=client)
    folder = output_of(pipeline).path / name
    refuse(lambda path: Path(path).parent == folder, code)
    n_requests = len(archive.requests)
    with pytest.raises(RunFolderError, match=f"{name}: cannot be written to .{os.strerror(code)}"):
        pipeline.run_all()
    assert [request.path for request in archive.requests[n_requests:]] == ["/TAP/sync"]


def test_a_folder_that_need_not_be_written_to_may_refuse_it(
    finished, make_config, client, refuse, tmp_path
):
    pipeline = BatchPipeline(make_config(), client=client)
    pipeline.run_query()
    pipeline.run_download()
    images = output_of(pipeline).images
    refuse(lambda path: Path(path).parent == images, errno.EROFS)
    # All frames are there.
    assert not pipeline.run_all().failed


def test_the_command_line_says_so_in_one_line(make_config, client, refuse, capsys):
    config = make_config()
    images = Path(config.output_dir) / "images"
    refuse(lambda path: Path(path).parent == images, errno.EROFS)
    config.to_yaml(images.parents[1] / "run.yaml")
    run = ["run", "--config", str(images.parents[1] / "run.yaml")]
    assert main([*run, "--scheduler", client.scheduler.address]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "http://" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"spxdask: {images}: cannot be written to (Read-only file system)")
