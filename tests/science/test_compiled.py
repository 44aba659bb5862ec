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
    environment = os.environ | {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
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
