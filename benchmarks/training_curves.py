"""Does training differ with sparse gradient rows? The quickstart's curves with either, over seeds, and their picture.

    python benchmarks/training_curves.py [--seeds 0 1 2] [--output benchmarks/results/cpu/training_curves.json]
                                         [--picture docs/training-curves.svg]

Runs that the output already holds are not run again, so that what was interrupted goes on; with all of them there it
only draws. What else is typed (``--train.steps 2``) goes to the quickstart.
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

from aapo_fast.bench import machine, plots
from aapo_fast.trainer.records import EVALUATIONS, METRICS, read_lines

COLOURS = {"exact": "tab:blue", "sparse": "tab:orange"}
SMOOTHED = 5
"""Steps that a point of the reward's curve is the mean of."""


def run(backward: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Train; rewards step by step, and the held-out accuracy at each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--loss.backward", backward, "--run.seed", str(seed), "--run.folder", f"{folder}/run", *more]
        settings += ["--reference.cache", f"{folder}/reference.sqlite"]
        subprocess.run([sys.executable, "-m", "aapo_fast.cli", "quickstart", *settings], check=True, stdout=sys.stderr)
        steps = read_lines(Path(folder, "run", METRICS))
        evaluated = Path(folder, "run", EVALUATIONS)
        evaluations = read_lines(evaluated) if evaluated.exists() else []
    return {
        "backward": backward,
        "seed": seed,
        "options": more,
        "reward": [record["reward"] for record in steps],
        "entropy": [record["entropy"] for record in steps],
        "evaluated_at": [record["step"] for record in evaluations],
        "greedy_accuracy": [record["greedy_accuracy"] for record in evaluations],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind of gradient rows: the accuracy at the end of each run, and the mean reward of its last quarter."""
    found = {}
    for backward in COLOURS:
        own = [r for r in runs if r["backward"] == backward]
        late = [statistics.fmean(r["reward"][-max(1, len(r["reward"]) // 4) :]) for r in own]
        found[backward] = {
            "seeds": [r["seed"] for r in own],
            "accuracy": [r["greedy_accuracy"][-1] if r["greedy_accuracy"] else None for r in own],
            "late_reward": [round(value, 4) for value in late],
        }
    return found


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Reward and accuracy against the step, a line a run."""
    figure, (reward, accuracy) = plots.pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    labelled = set()
    for r in runs:
        name = None if r["backward"] in labelled else f"{r['backward']} gradient rows, a line a seed"
        labelled.add(r["backward"])
        smooth = [statistics.mean(r["reward"][max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(r["reward"]))]
        style = {"color": COLOURS[r["backward"]], "alpha": 0.8, "linewidth": 1.2}
        reward.plot(range(1, len(smooth) + 1), smooth, label=name, **style)
        accuracy.plot(r["evaluated_at"], r["greedy_accuracy"], "o-", markersize=3, **style)
    reward.set(title=f"Reward in training (mean of {SMOOTHED} steps)", xlabel="step", ylim=(0, 1))
    accuracy.set(title="Held-out accuracy, greedy", xlabel="step", ylim=(0, 1))
    reward.legend(fontsize="small", loc="lower right")
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/training_curves.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/training-curves.svg"))
    arguments, more = parser.parse_known_args()
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/training_curves.py", *sys.argv[1:]])}
    result |= {"machine": machine.describe("transformers"), "runs": []}
    if arguments.output.exists():
        result["runs"] = json.loads(arguments.output.read_text())["runs"]
    if any(r["options"] != more for r in result["runs"]):
        parser.error(
            f"{arguments.output} holds runs with other options than {shlex.join(more) or 'none'}; name another"
        )
    done = {(r["backward"], r["seed"]) for r in result["runs"]}
    wanted = [(b, seed) for seed in arguments.seeds for b in COLOURS if (b, seed) not in done]
    for number, (backward, seed) in enumerate(wanted, 1):
        print(f"{backward}, seed {seed}: run {number} of {len(wanted)}", file=sys.stderr, flush=True)
        result["runs"].append(run(backward, seed, more))
        result["summary"] = summary(result["runs"])
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(summary(result["runs"]), indent=2))
    draw(result["runs"], arguments.picture)


if __name__ == "__main__":
    main()
