"""Ranks that this process starts: what a user sees who stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import _terminate_process_handler

from schelix_scale.errors import ConfigError, TrainingError
from schelix_scale.progress import QuietReporter
from schelix_scale.training.launch import HANDLED, _heard, _signals_as_ever, launch


def take_over() -> None:
    """Set the handlers that torch sets when it starts ranks."""
    for number in HANDLED:
        signal.signal(number, _terminate_process_handler)


def test_ctrl_c_is_an_interrupt_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with _signals_as_ever():
        take_over()
    assert [signal.getsignal(number) for number in HANDLED] == before
    with pytest.raises(KeyboardInterrupt), _signals_as_ever():  # noqa: PT012
        take_over()
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_other_signals_do_what_they_did_before() -> None:
    """Here a handler of the caller is told; without one the process ends by the signal."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with pytest.raises(TrainingError, match="the ranks were ended, as SIGTERM asked"), _signals_as_ever():  # noqa: PT012
            take_over()
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]


def test_hangups_that_this_process_ignores_are_left_alone() -> None:
    """As hangups after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may be run after nohup themselves
    try:
        assert "SIGHUP" in _heard()["signals_to_handle"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert "SIGHUP" not in _heard()["signals_to_handle"]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_process_is_too_few() -> None:
    with pytest.raises(ConfigError, match="nproc = 0: at least one process is needed"):
        launch(0, [], QuietReporter())


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--mistyped", 2)])
def test_a_rank_ends_at_once_with_its_words_written(argument: str, code: int) -> None:
    """The interpreter does not take down what gloo's threads may still use; a process of its own it does."""
    program = "import atexit; atexit.register(print, 'taken down'); from schelix_scale.cli import main; main()"
    alone, rank = (
        subprocess.run(
            [sys.executable, "-c", program, argument],
            env=os.environ | {"WORLD_SIZE": world},
            capture_output=True,
            text=True,
            check=False,
        )
        for world in "12"
    )
    assert alone.returncode == rank.returncode == code
    assert alone.stderr == rank.stderr
    assert alone.stdout == rank.stdout + "taken down\n"
    assert "schelix" in rank.stdout + rank.stderr
