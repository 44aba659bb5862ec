"""What the output folder accepts: names of files, and files at all."""

from __future__ import annotations

import errno
import os

import numpy as np
import pyarrow as pa
import pytest

from spxdask.errors import RunFolderError
from spxdask.run.folder import RunFolder
from spxdask.science.catalogue import Catalogue


def make_catalogue(*ids: str) -> Catalogue:
    numbers = np.arange(len(ids), dtype=float)
    return Catalogue.from_arrays(pa.array(ids, pa.large_string()), numbers, numbers)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "out")
    for each in (folder.images, folder.per_image, folder.lightcurves, folder.state):
        each.make()
    return folder


@pytest.fixture
def tried(monkeypatch):
    """The characters that lightcurves/ was asked about; it refuses quotation marks and colons."""
    tried = []

    def find(self, characters):
        tried.append(characters)
        return "".join(c for c in characters if c in '":')

    monkeypatch.setattr("spxdask.storage.LocalStore.find_refused_characters", find)
    return tried


def test_the_characters_of_ids_are_tried_and_recorded(folder, tried, caplog):
    assert folder.find_refused_characters(make_catalogue("a b", 'x"y', "é/%")) == '"'
    assert tried == [' "é']
    assert str(folder.lightcurves) in caplog.text
    # Another catalogue: what was refused stays so, and a file keeps its name.
    assert RunFolder(folder.path).find_refused_characters(make_catalogue("a:b", 'x"y')) == '":'
    assert tried[1:] == [":"]
    assert RunFolder(folder.path).find_refused_characters(make_catalogue("abc")) == '":'


def test_without_a_catalogue_all_punctuation_is_tried(folder, tried):
    assert folder.find_refused_characters(None) == '":'
    assert set('"*:<>?| ') <= set(tried[0])


def test_plain_ids_leave_no_record(folder, tried):
    assert folder.find_refused_characters(make_catalogue("s1", "A.b-c_d")) == ""
    assert folder.state.list_names() == set()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_one_sentence(folder, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    folder.require_writable(folder.images, folder.lightcurves)
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(RunFolderError) as raised:
        folder.require_writable(folder.images)
    reason = (
        f"cannot be written to ({os.strerror(code)}): change its permissions, or choose another"
    )
    assert str(raised.value) == f"{folder.images}: {reason} output_dir"
