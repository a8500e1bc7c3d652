"""What a person sees while something takes its time: a bar where rich is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError:
    Console = None  # type: ignore[assignment, misc]

SECONDS_BETWEEN_LINES = 5.0


class Reporter:
    """Counts steps on stderr. ``with Reporter(total) as report: report("what comes next")``."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._last = 0.0
        self._start = time.monotonic()
        self._bar = None
        if Console is not None and Console(stderr=True).is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str) -> None:
        """One more step, ``what``, begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=self.done)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.line(what)
        self.done += 1

    def line(self, what: str) -> None:
        """A line that stays, above the bar where there is one."""
        self._last = time.monotonic()
        text = f"[{self._last - self._start:6.1f} s] {self.done}/{self.total} {what}"
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
