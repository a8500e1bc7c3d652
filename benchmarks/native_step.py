"""What the native row kernels save of the quickstart's training step, paired.

    python benchmarks/native_step.py [--processes 3] [--rounds 6] [--output benchmarks/results/cpu/native_step.json]

In each child process the optimizer step on one and the same batch of the quickstart takes turns between row kernels in
PyTorch and in C++, with exact and with sparse gradient rows, forwards and backwards through the four, at learning rate
zero, so that every step does the same work. Rollouts are drawn once a process, and timed for the share. The loss within
the step, which is all that row kernels change, is timed besides: with exact rows the rest of a step varies by more than
they save.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aapo_fast import cli, config

WAYS = {
    f"{backward}, {implementation}": {"backward": backward, "implementation": implementation}
    for backward in ("exact", "sparse")
    for implementation in ("torch", "native")
}
LOSS = ": the loss alone"


def child(rounds: int) -> None:
    """Print the seconds of each kind of step, and of a rollout, as one line of JSON."""
    from aapo_fast.data.packing import Weighted
    from aapo_fast.trainer import policy, sampling, setup
    from aapo_fast.trainer.display import Display
    from aapo_fast.trainer.step import optimizer_step

    in_loss, real_loss = [0.0], policy.linear_policy_loss

    def timed_loss(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = real_loss(*given, **named)
        in_loss[0] += time.perf_counter() - start
        return result

    policy.linear_policy_loss = timed_loss
    with tempfile.TemporaryDirectory() as folder:
        settings = config.load(cli.QUICKSTART, [("run.folder", f"{folder}/run"), ("reference.mode", "none")])
        with setup.prepare(settings, Display(quiet=True)) as run:
            start = time.perf_counter()
            groups = sampling.rollout(run, run.schedule[0], 1)
            seconds: dict[str, list[float]] = {"rollout": [time.perf_counter() - start]}
            # Every completion counts: how many have an advantage differs from step to step.
            samples = [Weighted(sample, 0.5) for group in groups for sample in group.samples]
            for number in range(rounds + 1):
                for name, changes in list(WAYS.items())[:: 1 if number % 2 else -1]:
                    run.policy.how = dataclasses.replace(run.policy.how, **changes)
                    in_loss[0], start = 0.0, time.perf_counter()
                    optimizer_step(run.policy, run.optimizer, samples, settings.train, lr=0.0)
                    if number:  # the first round makes the optimizer's state
                        seconds.setdefault(name, []).append(time.perf_counter() - start)
                        seconds.setdefault(f"{name}{LOSS}", []).append(in_loss[0])
    print(json.dumps(seconds))


def measure(processes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by kernels."""
    found: dict[str, list[float]] = {}
    for number in range(processes):
        command = [sys.executable, __file__, "--child", "--rounds", str(rounds)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, seconds in json.loads(out.splitlines()[-1]).items():
            found.setdefault(name, []).extend(seconds)
        medians = {name: f"{statistics.median(s):.2f} s" for name, s in found.items()}
        print(f"process {number + 1} of {processes}: {medians}", file=sys.stderr, flush=True)
    return found


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of seconds; and of native rows the paired ratios to PyTorch's, with the range of their middle half."""
    result: dict[str, Any] = {"rollout_seconds": statistics.median(seconds["rollout"])}
    for backward in ("exact", "sparse"):
        for part in ("", LOSS):
            before, after = (seconds[f"{backward}, {rows}{part}"] for rows in ("torch", "native"))
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            result[f"{backward}{part}"] = {
                "torch_seconds": statistics.median(before),
                "native_seconds": statistics.median(after),
                "ratio": statistics.median(ratios),
                "middle_half": statistics.quantiles(ratios, n=4)[::2],
                "quicker_in": f"{sum(r < 1 for r in ratios)} of {len(ratios)}",
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3, help="default 3")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of steps in each process (default 6)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2: the range of fewer pairs says nothing")
    if arguments.child:
        child(arguments.rounds)
        return
    found = measure(arguments.processes, arguments.rounds)
    from aapo_fast.bench import machine

    command = shlex.join(["python", "benchmarks/native_step.py", *sys.argv[1:]])
    result = {
        "machine": machine.describe("transformers"),
        "command": command,
        "seconds": found,
        "summary": summary(found),
    }
    print(json.dumps(result["summary"], indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
