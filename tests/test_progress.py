"""Reporters: what is shown on a terminal, off a terminal, and kept quietly."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest

from schelix_scale.progress import QuietReporter, Reporter, RichReporter, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def test_off_a_terminal_a_stage_is_two_lines() -> None:
    file, clock = io.StringIO(), Clock()
    reporter = RichReporter(file, clock=clock)
    with reporter.stage("features", 68_579) as stage:
        for _ in range(100):
            clock.now += 0.25
            stage.advance(600)
    assert lines_of(file) == ["features: started (68,579 cells)", "features: done in 25.0 s"]


def test_off_a_terminal_a_long_stage_writes_a_line_every_30_s() -> None:
    file, clock = io.StringIO(), Clock()
    with RichReporter(file, clock=clock).stage("graph", 2000, "rows") as stage:
        for _ in range(200):  # 200 s: lines at 30, 60, ... 180
            clock.now += 1
            stage.advance(10)
    lines = lines_of(file)
    assert len(lines) == 2 + 6
    # after 30 s: 300 of 2000 rows, 10 a second, (2000 - 300) / 10 = 170 s left
    assert lines[1] == "graph: 15%, 300 of 2,000 rows, 10 rows/s, 30.0 s, about 2 min 50 s left"
    assert lines[-1] == "graph: done in 3 min 20 s"


def test_a_total_need_not_be_known() -> None:
    file, clock = io.StringIO(), Clock()
    with RichReporter(file, clock=clock).stage("sketch") as stage:
        clock.now += 40
        stage.advance(80)
    assert lines_of(file) == ["sketch: started", "sketch: 80 cells, 2 cells/s, 40.0 s", "sketch: done in 40.0 s"]


def test_messages_are_plain_text() -> None:
    file = io.StringIO()
    reporter = RichReporter(file)
    reporter.say("values look like [counts] in obs['x']; " + "long " * 60)
    reporter.warn("batch [b] has 3 cells")
    assert lines_of(file) == [
        "values look like [counts] in obs['x']; " + "long " * 60,
        "warning: batch [b] has 3 cells",
    ]


@pytest.mark.parametrize("reporter", [RichReporter(io.StringIO()), QuietReporter()])
def test_an_error_passes_through(reporter: Reporter) -> None:
    with pytest.raises(ZeroDivisionError, match="by hand"), reporter.stage("graph", 3):
        raise ZeroDivisionError("by hand")


def test_a_failed_stage_is_not_called_done() -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match="bad"), RichReporter(file, clock=Clock()).stage("graph", 3):
        raise ValueError("bad")
    assert lines_of(file)[-1] == "graph: stopped after 0.0 s"


def test_threads_may_advance_together() -> None:
    file, clock = io.StringIO(), Clock()
    with RichReporter(file, interval=1.0, clock=clock).stage("features", 8000) as stage:
        threads = [threading.Thread(target=lambda: [stage.advance() for _ in range(999)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clock.now += 2
        stage.advance(8)
    assert "100%, 8,000 of 8,000 cells" in lines_of(file)[1]


def test_quiet_keeps_messages(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = QuietReporter()
    with reporter.stage("graph", 10) as stage:
        stage.advance(10)
        reporter.say("a")
        reporter.warn("b")
    assert reporter.messages == ["a", "warning: b"]
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_messages_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this as a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    file = io.StringIO()
    reporter = RichReporter(file)
    with reporter.stage("diffusion [x]", 400, "rows") as outer:
        outer.advance(100)
        reporter.say("hello")
        with reporter.stage("inner", None) as inner:
            inner.advance(7)
        outer.advance(100)
    text = file.getvalue()
    for expected in ["diffusion [x]", "25%", "100/400 rows", "hello", "7 cells", "inner: done in", "200/400 rows"]:
        assert expected in text
    assert text.count("\n") > 2


def test_writes_to_standard_error_and_needs_rich_only_then() -> None:
    code = (
        "import sys\nfrom schelix_scale.progress import RichReporter\nassert 'rich' not in sys.modules\n"
        "with RichReporter().stage('graph', 5): pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith("graph: started (5 cells)\ngraph: done in ")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.7, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
