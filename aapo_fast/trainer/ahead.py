"""The rollouts of each step: drawn when it begins, or while the step before trains (``rollout.max_staleness`` = 1).

    staleness 0    draw 1, train 1, sync, draw 2, train 2, sync, ...           every sample of the present weights
    staleness 1    draw 1, train 1 and draw 2, sync, train 2 and draw 3, ...   samples of the weights one sync ago

A sync waits for what is being drawn, so a completion is never of two weights.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from aapo_fast.trainer.sampling import rollout
from aapo_fast.trainer.setup import Run
from aapo_fast.types import Group


class Rollouts:
    """The groups of each step, in order."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next: Future[list[Group]] | None = None

    def take(self, number: int) -> list[Group]:
        """Those of step ``number``; what went wrong while they were drawn is raised here."""
        drawn, self._next = self._next, None
        return self._draw(number) if drawn is None else drawn.result()

    def start(self, number: int) -> None:
        """Begin to draw those of step ``number``, if drawing ahead is wanted and there is such a step."""
        if not self._run.config.rollout.max_staleness or number > len(self._run.schedule):
            return
        future: Future[list[Group]] = Future()

        def draw() -> None:
            try:
                future.set_result(self._draw(number))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a run that ends with an error or an interrupt does not wait for what it will not use.
        threading.Thread(target=draw, daemon=True).start()
        self._next = future

    def wait(self) -> None:
        """Until nothing is being drawn."""
        if self._next is not None:
            wait([self._next])

    def drawn(self) -> list[Group] | None:
        """Those of the next step, where they were drawn ahead; ``take`` still has them. None if that failed, too: it is
        ``take`` that says so.
        """
        done = self._next is not None and self._next.done() and self._next.exception() is None
        return self._next.result() if self._next is not None and done else None

    def put_back(self, groups: list[Group]) -> None:
        """As if they had just been drawn ahead."""
        self._next = Future()
        self._next.set_result(groups)

    def _draw(self, number: int) -> list[Group]:
        return rollout(self._run, self._run.schedule[number - 1], number)
