"""Compiled code is compiled once, however many processes start at the same time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spxdask.science.compiled import compiled

SLOW_TO_COMPILE = (
    """
from spxdask.science.compiled import compiled

@compiled
def polynomial(x):
    total = 0.0
"""
    + "".join(f"    total += {k} * x ** {k}\n" for k in range(300))
    + "    return total\n"
)


def start(folder, *paths):
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
@pytest.mark.parametrize("locking", [True, False])
def test_neighbours_do_not_compile_the_same(tmp_path, locking):
    (tmp_path / "polynomial.py").write_text(SLOW_TO_COMPILE)
    if not locking:
        # A cache that cannot be written is no reason to stop.
        (tmp_path / "cache").touch()
    processes = [start(tmp_path) for _ in range(2)]
    answers = [process.communicate()[0].split() for process in processes]
    assert [value for value, _ in answers] == ["44850.0"] * 2
    if locking:
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
    assert [compute(), compute()] == [["30", "0"], ["30", "1"]]
    (tmp_path / "called.py").write_text(CALLED.replace("x * 10", "x * 70"))
    assert compute() == ["140", "0"]
