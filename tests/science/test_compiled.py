"""Compiled code is compiled once, however many processes start at the same time."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import simulated

from spxdask.science.compiled import compiled, prepare_cache
from spxdask.simulate.frames import make_planes, write_frame

SLOW_TO_COMPILE = (
    """
from spxdask.science.compiled import compiled

@compiled
def polynomial(x):
    total = 0.0
"""
    + "".join(f"    total += {k} * x ** {k}\n" for k in range(120))
    + "    return total\n"
)


def start(folder):
    code = "import polynomial as p; print(p.polynomial(1.0)); "
    code += "print(sum(p.polynomial.dispatcher.stats.cache_misses.values()))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "NUMBA_CACHE_DIR": str(folder / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_neighbours_do_not_compile_the_same(tmp_path):
    (tmp_path / "polynomial.py").write_text(SLOW_TO_COMPILE)
    processes = [start(tmp_path) for _ in range(2)]
    answers = [process.communicate()[0].split() for process in processes]
    assert [value for value, _ in answers] == ["7140.0"] * 2
    assert sorted(misses for _, misses in answers) == ["0", "1"]


def test_a_compiled_function_is_the_function():
    @compiled
    def double(x):
        """Return twice x."""
        return 2 * x

    assert (double(2), double(2.5), double.__doc__) == (4, 5.0, "Return twice x.")
    assert double.dispatcher.nopython_signatures


CALLED = """
from spxdask.science.compiled import compiled_helper, compiled_inline

@compiled_helper
def add(x):
    return x + 1

@compiled_inline
def scale(x):
    return x * 10
"""

CALLER = """
from called import add, scale
from spxdask.science.compiled import compiled

@compiled
def compute(x):
    return scale(add(x))
"""


@pytest.mark.slow
def test_cached_code_is_not_older_than_the_functions_that_it_calls(tmp_path):
    """Numba compares the file of the compiled function only."""
    (tmp_path / "called.py").write_text(CALLED)
    (tmp_path / "caller.py").write_text(CALLER)

    def compute() -> list[str]:
        code = "from caller import compute; print(compute(1))\n"
        code += "print(sum(compute.dispatcher.stats.cache_hits.values()))"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return out.stdout.split()

    assert [compute(), compute()] == [["20", "0"], ["20", "1"]]
    (tmp_path / "called.py").write_text(CALLED.replace("x + 1", "x + 2"))
    assert compute() == ["30", "0"]
    (tmp_path / "called.py").write_text(CALLED.replace("x * 10", "x * 70"))
    assert compute() == ["140", "0"]


# Machines without a place for the cache


ADD = """
import logging, sys
from spxdask.science.compiled import compiled, prepare_cache

@compiled
def add(x):
    return x + 1

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if sys.argv[1:] == ["client"]:
        environment = prepare_cache()
    else:
        environment = {}
    print([add(1), add(1.5), sum(add.dispatcher.stats.cache_hits.values()), environment])
"""

NO_HOME = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
WITHOUT_PLACE = {
    "read-only": NO_HOME,
    "unwritable cache dir": NO_HOME | {"NUMBA_CACHE_DIR": "/proc/none"},
    "locator": {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"},
    "unknown locator": {"NUMBA_CACHE_LOCATOR_CLASSES": "Nonsense"},
}


@pytest.fixture
def run_add(tmp_path):
    """Give a function that runs ADD where its folder cannot hold a cache."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "__pycache__").touch()
    (tmp_path / "code" / "add.py").write_text(ADD)

    def run(*arguments, prefix=(), **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        ended = subprocess.run(
            [*prefix, sys.executable, tmp_path / "code" / "add.py", *arguments],
            env=kept | {"TMPDIR": str(tmp_path / "tmp")} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return eval(ended.stdout), ended.stderr.splitlines()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("environment", WITHOUT_PLACE.values(), ids=WITHOUT_PLACE)
def test_without_a_place_for_the_cache_there_is_a_temporary_one(run_add, tmp_path, environment):
    (*values, _, handed), warnings = run_add("client", **environment)
    assert values == [2, 2.5]
    [warning] = warnings
    assert warning.startswith("WARNING compiled code cannot be cached in its place (")
    assert handed["NUMBA_CACHE_DIR"].startswith(str(tmp_path / "tmp"))
    # A worker of the run finds it, and so does one that was started by others.
    for more in (handed, {}) if environment == NO_HOME else ({},):
        (*values, hits, _), warnings = run_add(**(environment | more))
        assert (values, hits, warnings) == ([2, 2.5], 2, [])


@pytest.mark.slow
def test_without_any_place_each_process_compiles(run_add, tmp_path):
    # In place of both caches there is a file of somebody.
    (tmp_path / "tmp" / f"spxdask-numba-{os.getuid()}").touch()
    (tmp_path / "cache").touch()
    environment = NO_HOME | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    (*values, hits, handed), [warning] = run_add("client", **environment)
    assert (values, hits, handed) == ([2, 2.5], 0, {})
    assert "each process compiles for itself" in warning
    (*values, hits, _), warnings = run_add(**environment)
    assert (values, hits, warnings) == ([2, 2.5], 0, [])


@pytest.mark.slow
def test_a_disk_that_is_full_is_no_error(run_add, tmp_path):
    """With a limit on the length of files, writing the cache fails as on a full disk."""
    limited = ("prlimit", "--fsize=1000")
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    (*values, hits, _), warnings = run_add(prefix=limited, **cache)
    assert (values, hits, warnings) == ([2, 2.5], 0, [])
    (*values, _, handed), [warning] = run_add("client", prefix=limited, **cache)
    assert (values, handed) == ([2, 2.5], {})
    assert "File too large" in warning


@pytest.mark.slow
def test_damaged_files_of_the_cache_are_replaced(run_add, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run_add(**cache)
    for pattern in ("*.nbi", "*.nbc"):
        [index, *_] = (tmp_path / "cache").rglob(pattern)
        index.write_bytes(b"\x80garbage")
        assert run_add(**cache)[0][:2] == [2, 2.5]
        assert run_add(**cache)[0][2] == 2


def test_the_cache_of_this_process_needs_no_other_place(caplog):
    assert prepare_cache() == {}
    assert caplog.record_tuples == []


MEASURE = """
import sys
import numpy as np
from spxdask.science.level2.frame import open_frame
from spxdask.science.options import PhotometryConfig
from spxdask.science.photometry import measure

frame = open_frame(sys.argv[1])
x, y = np.meshgrid(np.arange(20.0, 100.0, 23.0), np.arange(20.0, 80.0, 23.0))
sky = frame.wcs.pixel_to_sky(x.ravel(), y.ravel())
measured = measure(frame, *sky, PhotometryConfig(window_size=25))
found = {name: np.asarray(values) for name, values in measured.columns.items()}
np.savez(sys.argv[2], **found)
"""


@pytest.mark.slow
def test_interpreted_functions_measure_the_same(tmp_path):
    # The flags of this release are compressed. Few pixels, as interpreted loops take long.
    exposure, window = simulated.exposure(0, release="qr3"), (960, 960, 120, 100)
    path = tmp_path / exposure.filename
    planes = make_planes(exposure, simulated.field_sky(), simulated.OPTIONS, window=window)
    write_frame(path, exposure, planes, window=window)
    found = []
    for name, environment in (("compiled", {}), ("plain", {"NUMBA_DISABLE_JIT": "1"})):
        out = tmp_path / f"{name}.npz"
        command = [sys.executable, "-W", "error", "-c", MEASURE, path, out]
        subprocess.run(command, env=os.environ | environment, check=True)
        found.append(dict(np.load(out)))
    compiled_columns, plain = found
    assert compiled_columns.keys() == plain.keys()
    assert len(plain["flux"]) > 5
    for name, values in plain.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, compiled_columns[name], rtol=1e-9, err_msg=name)
        else:
            assert values.tolist() == compiled_columns[name].tolist(), name
