"""Memory that was freed goes back to the system; threads do not wait for each other longer than they must."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from schelix_scale.compute import TURN_SECONDS, short_turns
from schelix_scale.scheduling import run_tasks


def unset() -> dict[str, str]:
    """Return the environment without what glibc is told in it, which wins."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}


CODE = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from schelix_scale.compute import keep_memory_low, release_memory
keep_memory_low()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def work(seed):  # blocks of growing size, freed out of order, as sparse blocks of cells are
    kept = []
    for size in (3, 6, 9, 12, 15, 18, 21, 24, 27, 30):
        blocks = [np.ones(size << 17) for _ in range(4)]
        kept.append(np.ones(1 << 10))
        del blocks
    return kept
before = resident()
with ThreadPoolExecutor(4) as pool:
    kept = list(pool.map(work, range(8)))
release_memory()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm is Linux")
def test_freed_blocks_do_not_stay() -> None:
    """Without `keep_memory_low` and `release_memory`, glibc keeps 384 MB of this."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=unset())
    assert int(done.stdout) < 8 << 20


STEPS = """
import resource
import torch
from schelix_scale.compute import keep_memory_low, torch_at_work
keep_memory_low()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 << 18) + torch.ones(4 << 18)  # three times 4 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
with torch_at_work(1):
    faults()
    print(faults())
    held = resident()
print(held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm is Linux")
def test_steps_of_a_training_use_the_same_memory_again() -> None:
    """Ten steps of 3,072 pages each need hardly any new page; afterwards all of it is given back."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=unset())
    usual, again, given_back = map(int, done.stdout.split())
    assert usual > 30_000, "what is counted is seen where nothing is used again"
    assert again < 1_000
    assert given_back > 8 << 20


def test_turns_are_short_while_any_thread_asks_for_it() -> None:
    usual, inside, left = sys.getswitchinterval(), threading.Event(), threading.Event()

    def first() -> None:
        with short_turns():
            inside.set()
            assert left.wait(60)
        assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS)  # the other thread is still at it

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert inside.wait(60)
        with short_turns(), short_turns():
            assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS)
            left.set()
            running.result()
    assert sys.getswitchinterval() == usual


def test_tasks_on_threads_take_short_turns() -> None:
    usual, found = sys.getswitchinterval(), []

    def task(part: int) -> int:
        found.append(sys.getswitchinterval())
        if part == 2:
            raise ValueError("fails")
        return 1

    run_tasks(task, range(2), 2)
    with pytest.raises(ValueError, match="fails"):
        run_tasks(task, [2], 2)
    assert found == pytest.approx([TURN_SECONDS] * 3)
    assert sys.getswitchinterval() == usual
