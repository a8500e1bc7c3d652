"""What a person sees of a run: a line a step, a bar with the time left, and tables of completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from aapo_fast.types import Problem, Sample
from aapo_fast.types import Progress as ProgressCallback


class Display:
    """Prints to the terminal; bars only where it is one, so that logs stay readable."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )

    def note(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, markup=False)

    @contextmanager
    def progress(self, what: str) -> Iterator[ProgressCallback]:
        """A bar while something takes its time; called with (done, total)."""
        if not self._bars.live.is_started:
            self._bars.start()
        task = self._bars.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            self._bars.update(task, completed=done, total=total)

        try:
            yield update
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()

    def step(self, record: Mapping[str, Any], steps: int) -> None:
        """The line of one step."""
        reference = record["reference_reward"]
        against = "" if reference is None else f"  reference {reference:.2f}"
        seconds = sum(record["seconds"].values())
        self.note(
            f"step {record['step']:>{len(str(steps))}}/{steps}  reward {_number(record['reward'])}{against}"
            f"  entropy {_number(record['entropy'])}  length {record['completion_length']:.1f}"
            f"  zero-weight {record['zero_weight_token_share']:.0%}  grad {record['grad_norm']:.2f}"
            f"  {seconds:.1f} s" + ("" if record["finite"] else "  SKIPPED: non-finite gradient")
        )

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> None:
        """Plain cells under headings; ``numbers`` are the columns that go to the right."""
        table = Table(title=title, title_justify="left")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_escape(cell) for cell in row))
        self.console.print(table)

    def completions(self, title: str, problems: Sequence[Problem], columns: Mapping[str, Sequence[Sample]]) -> None:
        """Prompts beside completions, a column a moment in time."""
        table = Table(title=title, title_justify="left", show_lines=False)
        for heading in ("prompt", *columns, "answer"):
            table.add_column(heading, overflow="fold")
        for index, problem in enumerate(problems):
            cells = [problem.prompt, *(samples[index].text for samples in columns.values())]
            cells.append(str(problem.columns["answer"]))
            table.add_row(*(_escape(cell) for cell in cells))
        self.console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text.replace("\n", "\\n"))
