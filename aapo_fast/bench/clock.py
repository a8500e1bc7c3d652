"""Time: everything in turn, round after round, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Run

MOST_TOUCHED_BYTES = 4 * 2**30


class Deadline:
    """When the whole measurement has to be over; None is never."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()


def seconds_of(run: Run, problem: Problem) -> float:
    """One forward and backward, with device events on CUDA. Gradients of the run before are freed outside the time."""
    problem.clear_gradients()
    if not problem.hidden.is_cuda:
        _touch_free_memory(problem)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _touch_free_memory(problem: Problem) -> None:
    """Write once on as much memory as a method may ask for, and free it again.

    A virtual machine hands memory that is free for a while back to its host, and gets it back at a page fault each:
    whichever method came after the floors, which allocate nothing, took 1.5 s longer at V = 151,936 (docs/LOG.md).
    """
    logits = problem.num_rows * problem.weight.shape[0] * 4
    torch.zeros(min(logits + 2 * problem.weight.numel() * 4, MOST_TOUCHED_BYTES) // 4)


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted round, by method, and what broke on the way."""

    seconds: dict[str, list[float]]
    failures: dict[str, Exception]


def alternate(
    runs: Mapping[str, Run],
    problem: Problem,
    rounds: int,
    warmup: int,
    deadline: Deadline,
    progress: Callable[[int], None] = lambda _: None,
) -> Timing:
    """Time ``rounds`` rounds after ``warmup`` uncounted ones, each in an order of its own, so that nobody always comes
    after the same one. Past the deadline it stops, between rounds alone.

    A method that raises is out of the rounds from then on. At least one counted round is done.
    """
    timing = Timing({name: [] for name in runs}, {})
    order, shuffle = list(runs), random.Random(0).shuffle
    for number in range(warmup + rounds):
        longest = sum(max(times) for times in timing.seconds.values() if times)
        if number > warmup and deadline.seconds_left < longest:
            break
        shuffle(order)
        for name in order:
            if name in timing.failures:
                continue
            try:
                seconds = seconds_of(runs[name], problem)
            except Exception as error:
                # Without its frames, which would keep the method's tensors alive.
                timing.failures[name] = error.with_traceback(None)
                error.__context__ = error.__cause__ = None
                timing.seconds.pop(name)
                continue
            if number >= warmup:
                timing.seconds[name].append(seconds)
        progress(number + 1)
    problem.clear_gradients()
    return timing


def summary(seconds: Sequence[float], floor: Sequence[float] | None) -> dict[str, object]:
    """Median, spread and all times in milliseconds, and the median of the ratios to the floor of the same round."""
    result: dict[str, object] = {
        "milliseconds": statistics.median(seconds) * 1e3,
        "spread_milliseconds": [min(seconds) * 1e3, max(seconds) * 1e3],
        "times_milliseconds": [t * 1e3 for t in seconds],
    }
    if floor is not None:
        result["ratio_to_3G"] = statistics.median(t / f for t, f in zip(seconds, floor, strict=True))
    return result
