"""Progress of long stages: every stage takes a `Reporter` and tells it what it does, never prints itself.

What comes in: stage names, totals and advances. What goes out: a bar on a terminal, plain lines elsewhere, or nothing.
Where a stage starts or gets on, an interruption that was swallowed is raised again, see `interruptions`.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Protocol, final

from schelix_scale.interruptions import heed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Stage(Protocol):
    """A stage that is under way."""

    def advance(self, n: int = 1) -> None:
        """Say that ``n`` more units are done; safe to call from any thread."""


class Reporter(ABC):
    """Where progress and messages go."""

    @abstractmethod
    def stage(self, name: str, total: int | None = None, unit: str = "cells") -> AbstractContextManager[Stage]:
        """Return a context that lasts as long as the stage; ``total`` units, None when it is not known."""

    @abstractmethod
    def say(self, message: str) -> None:
        """Tell the user something."""

    @abstractmethod
    def warn(self, message: str) -> None:
        """Tell the user something that may need action."""


@final
class QuietReporter(Reporter):
    """Shows nothing and keeps the messages, warnings with ``warning:`` before them, in ``messages``."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Iterator[Stage]:
        """Show nothing."""
        heed()
        yield _Silent()

    def say(self, message: str) -> None:
        """Keep the message."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Keep the message."""
        self.messages.append(f"warning: {message}")


@final
class RichReporter(Reporter):
    """Shows a progress bar on a terminal, and otherwise a line at the start and the end of each stage.

    Parameters
    ----------
    file
        Where to write; standard error by default, so that results can be piped.
    interval
        Off a terminal, the least number of seconds between two lines of the same stage.
    clock
        Returns seconds; replaced in tests.
    """

    def __init__(
        self, file: IO[str] | None = None, interval: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console

        self._console = Console(file=file or sys.stderr, soft_wrap=True)
        self._interval = interval
        self._clock = clock
        self._progress: Progress | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Iterator[Stage]:
        """Show the stage while the context lasts."""
        heed()
        started = self._clock()
        if not self._console.is_terminal:
            self._line(f"{name}: started" + (f" ({total:,} {unit})" if total is not None else ""))
        try:
            if self._console.is_terminal:
                with self._bar(name, total, unit) as bar:
                    yield bar
            else:
                yield _Lines(self._line, name, total, unit, self._interval, self._clock)
        except BaseException:
            self._line(f"{name}: stopped after {duration(self._clock() - started)}")
            raise
        self._line(f"{name}: done in {duration(self._clock() - started)}")

    def say(self, message: str) -> None:
        """Write the message, above the bar if there is one."""
        self._line(message)

    def warn(self, message: str) -> None:
        """Write the message, above the bar if there is one, in yellow on a terminal."""
        self._line(f"warning: {message}", style="yellow")

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False)

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[Stage]:
        """Show a bar; stages inside stages are bars of the same display."""
        outermost = self._progress is None
        if self._progress is None:
            self._progress = _progress_display(self._console)
            self._progress.start()
        progress = self._progress
        task = progress.add_task(name, total=total, unit=unit)
        try:
            yield _Bar(lambda n: progress.advance(task, n))
        finally:
            progress.refresh()
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None


@final
class _Silent:
    def advance(self, n: int = 1) -> None:
        """Ignore the advance."""
        heed()


@final
class _Bar:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def advance(self, n: int = 1) -> None:
        """Move the bar."""
        heed()
        self._advance(n)


@final
class _Lines:
    """Writes a line when the last one is long enough ago."""

    def __init__(
        self,
        write: Callable[[str], None],
        name: str,
        total: int | None,
        unit: str,
        interval: float,
        clock: Callable[[], float],
    ) -> None:
        self._write, self._name, self._total, self._unit = write, name, total, unit
        self._interval, self._clock = interval, clock
        self._started = self._last = clock()
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        """Count, and write a line at most every ``interval`` seconds."""
        heed()
        with self._lock:
            self._done += n
            now = self._clock()
            if now - self._last < self._interval:
                return
            self._last = now
            self._write(self._describe(now - self._started))

    def _describe(self, elapsed: float) -> str:
        rate = self._done / elapsed if elapsed else 0.0
        speed = f"{rate:,.0f} {self._unit}/s, {duration(elapsed)}"
        if not self._total:
            return f"{self._name}: {self._done:,} {self._unit}, {speed}"
        left = f", about {duration((self._total - self._done) / rate)} left" if rate else ""
        share = f"{self._done / self._total:.0%}, {self._done:,} of {self._total:,} {self._unit}"
        return f"{self._name}: {share}, {speed}{left}"


def _progress_display(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class _Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            of = f"/{task.total:,.0f}" if task.total is not None else ""
            speed = f"  {task.speed:,.0f}/s" if task.speed else ""
            return Text(f"{task.completed:,.0f}{of} {task.fields['unit']}{speed}")

    left = TimeRemainingColumn()
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), _Count()]
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), left, console=console, transient=True)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 0.4 s, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d} min"
