"""The learning curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from aapo_fast.trainer.records import CURVE, EVALUATIONS, METRICS, read_lines
from aapo_fast.types import UserError


def plot_run(folder: Path) -> Path:
    """Draw reward, held-out accuracy, entropy and gradient norm, and seconds by phase; returns the PNG's path.

    Raises:
        UserError: there is no run in ``folder``, or it has no step yet.
    """
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} holds no run: there is no {METRICS}")
    steps = read_lines(folder / METRICS)
    evaluations = read_lines(folder / EVALUATIONS) if (folder / EVALUATIONS).is_file() else []
    if not steps:
        raise UserError(f"{folder}/{METRICS} has no step yet; nothing to draw")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((reward, signal), (health, seconds)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    x = [record["step"] for record in steps]

    reward.plot(x, _column(steps, "reward"), color="tab:blue", label="reward (sampled, training)")
    if any(record.get("reference_reward") is not None for record in steps):
        reward.plot(x, _column(steps, "reference_reward"), color="tab:gray", label="reward of the frozen reference")
    if evaluations:
        at = [e["step"] for e in evaluations]
        reward.plot(at, _column(evaluations, "greedy_accuracy"), "o-", color="tab:red", label="held-out, greedy")
        if any(e.get("sampled_accuracy") is not None for e in evaluations):
            sampled = _column(evaluations, "sampled_accuracy")
            reward.plot(at, sampled, "o--", color="tab:orange", label="held-out, sampled")
    reward.set(title="Reward and accuracy", xlabel="step")
    if not -math.inf < reward.dataLim.ymin < 0:  # else from below the lowest; infinite where nothing was measured
        reward.set_ylim(bottom=-0.02)
    reward.legend(fontsize="small")

    signal.plot(x, _column(steps, "zero_weight_token_share"), label="tokens of zero weight")
    signal.plot(x, _column(steps, "zero_advantage_group_share"), label="groups with equal rewards")
    signal.plot(x, _column(steps, "truncated_share"), label="completions cut off")
    signal.set(title="Shares", xlabel="step", ylim=(-0.02, 1.02))
    signal.legend(fontsize="small")

    health.plot(x, _column(steps, "entropy"), color="tab:green", label="entropy [nats]")
    health.set(title="Entropy and gradient norm", xlabel="step")
    norm = health.twinx()
    norm.plot(x, _column(steps, "grad_norm"), color="tab:purple", alpha=0.6, label="gradient norm")
    health.legend(loc="upper left", fontsize="small")
    norm.legend(loc="upper right", fontsize="small")

    phases = list(steps[0]["seconds"])
    seconds.stackplot(x, [[s["seconds"].get(phase) or 0.0 for s in steps] for phase in phases], labels=phases)
    seconds.set(title="Seconds a step", xlabel="step")
    seconds.legend(fontsize="small")

    path = folder / CURVE
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return path


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [float("nan") if record.get(key) is None else record[key] for record in records]
