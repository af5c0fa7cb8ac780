"""What a benchmark tells of the process that it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHILD = "import sys; sys.path.append(sys.argv[1]); from _machine import peak_mb; a = bytearray(%d); print(peak_mb())"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process' own peak")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    parent = (
        "import subprocess, sys\n"
        "held = b'1' * 400_000_000\n"
        "for child in sys.argv[2:]:\n"
        "    print(subprocess.check_output([sys.executable, '-c', child, sys.argv[1]], text=True))\n"
    )
    small, large = CHILD % 1, CHILD.replace("bytearray(%d)", "b'1' * 200_000_000")
    shown = subprocess.check_output([sys.executable, "-c", parent, BENCHMARKS, small, large], text=True)
    first, second = map(float, shown.split())
    assert first < 100
    assert 200 < second < 300
