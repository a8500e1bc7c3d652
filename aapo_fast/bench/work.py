"""One case: who can run, is each method right, how much memory does it take, how long.

What runs out of memory, breaks or cannot run here is a row that says so.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from aapo_fast.bench import check, clock, inputs, memory, results
from aapo_fast.bench.method import Method, Run, UnavailableError, obstacle
from aapo_fast.bench.progress import Reporter
from aapo_fast.bench.shapes import Case
from aapo_fast.ops import dispatch

TRUTH_FLOPS = {"cpu": 5e11, "cuda": 1e14}
"""Errors are measured at the largest power of two of rows whose three products in float64 stay below this."""

TIMED: tuple[results.Status, ...] = ("ok", "wrong gradient")
"""A wrong gradient is timed too, for the record; no table shows it."""


@dataclass
class Settings:
    """What is asked for.

    Attributes:
        methods: in the order of the table; floors and ours first, for they are the last to be left out.
        device: cpu or cuda.
        rounds, warmup: counted and uncounted rounds.
        seed: of the inputs.
        minutes: after which to end, or None.
        command: for the record.
        notes: lines for above every table.
    """

    methods: list[Method]
    device: torch.device
    rounds: int = 5
    warmup: int = 1
    seed: int = 0
    minutes: float | None = None
    command: str = ""
    notes: list[str] = field(default_factory=list)


def error_rows(case: Case, device: torch.device) -> int:
    """At how many rows the errors are measured."""
    affordable = TRUTH_FLOPS[device.type] / (3 * case.product_flops / case.rows)
    return min(case.rows, max(64, 1 << (max(1, int(affordable)).bit_length() - 1)))


def small_problem(case: Case, device: torch.device) -> inputs.Problem:
    """Of the same kind as the case, and tiny: to see which methods can do it."""
    n, h, v = memory.SMALL
    small = replace(case, head=replace(case.head, hidden=h, vocab=v), rows=n)
    return inputs.make_problem(small, device, sample_targets=False)


class DeviceBrokenError(Exception):
    """The CUDA context is lost; the text is the name of the method that did it."""


class Work:
    """One case on its way to a result."""

    def __init__(self, case: Case, settings: Settings, deadline: clock.Deadline, report: Reporter) -> None:
        self.case, self.settings, self.deadline, self.report = case, settings, deadline, report
        self.device = settings.device
        self.result = results.CaseResult(
            head=case.head.name,
            shape=list(case.shape),
            softcap=case.head.softcap,
            dtype=case.dtype,
            distribution=case.distribution,
            device=self.device.type,
            error_rows=error_rows(case, self.device),
            rows=[_row(method, self.device) for method in settings.methods],
        )
        self.rows = {row.method: row for row in self.result.rows}

    def measure(self) -> None:
        """Fill in the result.

        Raises:
            DeviceBrokenError: a method left the device unusable for this process.
        """
        self.look_who_can()
        if self.device.type == "cpu":
            self.measure_memory_in_children()
        try:
            self.check_gradients()
            _free()
            problem = self.make_problem(self.case.rows)
            self.result.inputs = inputs.describe(problem)
            runs = self.build(problem)
            if self.device.type == "cuda":
                self.measure_memory(runs, problem)
            self.measure_time(runs, problem)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            # The inputs or the truth themselves do not fit; no method can be blamed.
            for row in self.alive():
                row.stop("out of memory", "the inputs of this case do not fit beside the float64 truth")

    def look_who_can(self) -> None:
        self.step("who can run here")
        problem = small_problem(self.case, self.device)
        for method in self.settings.methods:
            reason = obstacle(method, problem)
            if reason:
                self.rows[method.name].stop("unavailable", reason)

    def measure_memory_in_children(self) -> None:
        for row in self.alive():
            self.step(f"memory: {row.title}")
            if self.out_of_time(row) or row.kind == "floor":
                continue
            with self.blame(row):
                row.extra_memory_bytes = memory.peak_on_cpu(self.case, row.method, self.settings.seed)

    def check_gradients(self) -> None:
        contenders = [m for m in self.settings.methods if m.kind != "floor" and self.rows[m.name].status == "ok"]
        problem = self.make_problem(self.result.error_rows)
        yardstick = check.make_yardstick(problem, contenders)
        for method in contenders:
            row = self.rows[method.name]
            self.step(f"errors: {method.title}")
            if self.out_of_time(row):
                continue
            with self.blame(row):
                row.errors = check.errors_of(method.build(problem), problem, yardstick.truth_for(method))
                wrong = check.complaint(method, row.errors, yardstick.naive, self.case.dtype)
                if wrong:
                    row.stop("wrong gradient", wrong)

    def build(self, problem: inputs.Problem) -> dict[str, Run]:
        """Runs of the methods that are still in."""
        runs = {}
        for method in self.settings.methods:
            if self.rows[method.name].status in TIMED:
                with self.blame(self.rows[method.name]):
                    runs[method.name] = method.build(problem)
        return runs

    def measure_memory(self, runs: dict[str, Run], problem: inputs.Problem) -> None:
        for name, run in runs.items():
            row = self.rows[name]
            self.step(f"memory: {row.title}")
            if self.out_of_time(row) or row.kind == "floor":
                continue
            with self.blame(row):
                clock.seconds_of(run, problem)
                row.extra_memory_bytes = memory.peak_on_cuda(run, problem)

    def measure_time(self, runs: dict[str, Run], problem: inputs.Problem) -> None:
        still_in = {name: run for name, run in runs.items() if self.rows[name].status in TIMED}
        rounds, warmup = self.settings.rounds, self.settings.warmup
        timing = clock.alternate(
            still_in, problem, rounds, warmup, self.deadline, lambda n: self.step(f"round {n} of {warmup + rounds}")
        )
        floor = timing.seconds.get("3G")
        for name, seconds in timing.seconds.items():
            self.rows[name].timing = clock.summary(seconds, floor)
            self.result.rounds = len(seconds)
        for name, error in timing.failures.items():
            self.failed(self.rows[name], error)

    def make_problem(self, rows: int) -> inputs.Problem:
        return inputs.make_problem(replace(self.case, rows=rows), self.device, self.settings.seed)

    def alive(self) -> list[results.Row]:
        return [row for row in self.result.rows if row.status == "ok"]

    def out_of_time(self, row: results.Row) -> bool:
        """Past the deadline peers are left out; floors and ours, if their case was begun, are finished."""
        if self.deadline.seconds_left < 0 and row.kind == "peer" and row.status == "ok":
            row.stop("left out", "no time left")
        return row.status == "left out"

    @contextmanager
    def blame(self, row: results.Row) -> Iterator[None]:
        """What goes wrong in here is the row's result."""
        try:
            yield
        except Exception as error:
            self.failed(row, error)

    def failed(self, row: results.Row, error: Exception) -> None:
        if isinstance(error, UnavailableError):
            row.stop("unavailable", str(error))
        elif memory.is_out_of_memory(error):
            row.stop("out of memory", results.first_line(error))
        else:
            row.stop("failed", results.first_line(error))
            self.see_that_the_device_lives(row)

    def see_that_the_device_lives(self, row: results.Row) -> None:
        """After an illegal access in a kernel every later call of this process fails; nobody else is to blame."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            for other in self.alive():
                if not other.timing:
                    other.stop("left out", f"{row.method} broke the device")
            raise DeviceBrokenError(row.method) from error

    def step(self, what: str) -> None:
        self.report(f"{self.case.label}: {what}")


def _row(method: Method, device: torch.device) -> results.Row:
    row = results.Row(method.name, method.title, method.kind, method.gemms, method.weighted)
    if method.kind == "ours":
        asked = method.name.partition(":")[2]
        row.implementation = asked or dispatch.resolve("auto", device)
    return row


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
