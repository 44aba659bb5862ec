"""``spxdask plot``: a picture of one source of a run."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from made_run import make_points, make_rows, make_run

from spxdask.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_rows(make_points(np.random.default_rng(1), 30, np.ones_like))
    make_run(tmp_path / "out", {"star 1": rows, "a/b": rows})
    return tmp_path


@pytest.mark.slow
def test_pictures_are_named_after_the_source_or_as_asked_for(folder, capsys):
    assert main(["plot", "star 1", "--output", "out"]) == 0
    assert capsys.readouterr().out == "star 1.png\n"
    assert main(["plot", "a/b", "--output", "out"]) == 0
    name = capsys.readouterr().out.strip()
    assert (folder / name).parent == folder
    assert main(["plot", "star 1", "--output", "out", "--light-curve", "-o", "curve.pdf"]) == 0
    assert (folder / "curve.pdf").read_bytes().startswith(b"%PDF")
    spectrum = (folder / "star 1.png").read_bytes()
    assert spectrum.startswith(b"\x89PNG")
    assert main(["plot", "star 1", "--output", "out", "--light-curve"]) == 0
    assert (folder / "star 1-light-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "star 1.png").read_bytes() == spectrum


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["star 2", "--output", "out"],
            "out: did you mean 'star 1'?",
        ),
        (["star 1", "--output", "none"], "there is no such folder"),
        (["star 1"], "there is no such folder"),
        (["star 1", "--output", "out", "-o", "x.docx"], "docx"),
        (["star 1", "--output", "out", "-o", "none/x.png"], "No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(folder, capsys, arguments, sentence):
    assert main(["plot", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert not [path for path in folder.iterdir() if path.name != "out"]


def test_without_matplotlib_the_line_for_pip_is_said(folder, capsys, monkeypatch):
    for module in ("matplotlib.pyplot", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "star 1", "--output", "out"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'spxdask[plot]'" in err
    assert err.count("\n") == 1
    assert main(["demo", "--output", "demo"]) == 2
    assert "pip install 'spxdask[plot]'" in capsys.readouterr().err
    assert not (folder / "demo").exists()
