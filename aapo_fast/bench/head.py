"""``aapo-fast bench head``: one case after another, every method in turn, into one JSON file."""

from __future__ import annotations

import time
from pathlib import Path

from aapo_fast.bench import clock, machine, results
from aapo_fast.bench.progress import Reporter
from aapo_fast.bench.shapes import Case
from aapo_fast.bench.work import DeviceBrokenError, Settings, Work


def measure(wanted: list[Case], settings: Settings, output: Path | None = None) -> results.Result:
    """All cases, as far as the time goes. The file is written anew after each, so that a killed run leaves its rows."""
    deadline = clock.Deadline(settings.minutes)
    result = results.Result(
        kind="head",
        command=settings.command,
        machine=machine.describe(*machine.PEER_PACKAGES),
        settings={k: getattr(settings, k) for k in ("rounds", "warmup", "seed", "minutes")},
        notes=settings.notes,
    )
    steps = 1 + 2 * len(settings.methods) + settings.warmup + settings.rounds
    seconds_per_flop = 0.0
    with Reporter(steps * len(wanted)) as report:
        for number, case in enumerate(wanted):
            if result.broken_by or deadline.seconds_left < seconds_per_flop * case.product_flops:
                result.left_out.append(case.label)
                continue
            start = time.monotonic()
            report.done = number * steps
            work = Work(case, settings, deadline, report)
            result.cases.append(work.result)
            try:
                work.measure()
            except DeviceBrokenError as error:
                result.broken_by = str(error)
            took = (time.monotonic() - start) / case.product_flops
            # The least of all: the first case also compiles kernels and loads libraries.
            seconds_per_flop = min(seconds_per_flop or took, took)
            report.line(f"done: {case.label}")
            if output is not None:
                results.save(result, output)
    if output is not None:
        results.save(result, output)
    return result
