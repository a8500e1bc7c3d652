"""What a run says of itself: the record of a step, evaluations, kept samples, the summary."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from aapo_fast.advantages import aapo_advantages
from aapo_fast.trainer.evaluate import Evaluation, evaluate
from aapo_fast.trainer.records import EVALUATIONS, METRICS, MODEL, NONFINITE, SAMPLES
from aapo_fast.trainer.setup import Run
from aapo_fast.trainer.step import StepResult
from aapo_fast.types import Group


@dataclass(frozen=True)
class Step:
    """Everything one step has brought forth.

    Attributes:
        number: 1, 2, ...
        groups: samples with their rewards.
        reference: (B,) rewards that the samples were set against, or None.
        advantages: (B,) augmented advantages.
        failures: what kept completions from a reward.
        result: of the optimizer.
        learning_rate: that was used.
        staleness: updates that the oldest sample's weights had not seen; 0 is on policy.
        seconds: by phase.
    """

    number: int
    groups: Sequence[Group]
    reference: Sequence[float] | None
    advantages: torch.Tensor
    failures: Sequence[str]
    result: StepResult
    learning_rate: float
    staleness: int
    seconds: dict[str, float]


def report_step(run: Run, step: Step) -> None:
    """Write the step's record and a few of its samples (all of them, apart, if its gradient was not finite), and print
    its line.
    """
    record = _record(step, run.engine.metrics(), _peak_memory_bytes(run.policy.device))
    run.folder.append(METRICS, record)
    for line in _samples(step, run.config.run.samples_kept):
        run.folder.append(SAMPLES, line)
    if not step.result.finite:
        for line, tokens in zip(_samples(step), _tokens(step), strict=True):
            run.folder.append(NONFINITE, line | tokens)
    run.display.step(record, run.config.train.steps)
    if step.result.ran_out_of_memory:
        run.display.note(
            f"step {step.number} did not fit into the GPU's memory and was done in smaller microbatches; the run goes "
            f"on with train.max_microbatch_tokens={step.result.microbatch_tokens}"
        )


def evaluate_held_out(run: Run, step: int) -> Evaluation | None:
    """Accuracy on the held-out problems, written down and printed; None if there are none."""
    if not run.problems.held_out:
        return None
    start = time.perf_counter()
    with run.display.progress("evaluating") as update:
        result = evaluate(run.engine, run.scorer, run.problems.held_out, run.config.eval, run.sampling, update)
    seconds = time.perf_counter() - start
    sampled = "" if math.isnan(result.sampled) else f", sampled {result.sampled:.2f}"
    run.display.note(
        f"held-out accuracy after {step} steps: greedy {result.greedy:.2f}{sampled} "
        f"({len(run.problems.held_out)} problems, {seconds:.1f} s)"
    )
    run.folder.append(
        EVALUATIONS,
        {
            "step": step,
            "greedy_accuracy": result.greedy,
            "sampled_accuracy": result.sampled,
            "failures": result.failures,
            "seconds": seconds,
            "completions": [
                {"prompt": problem.prompt, "completion": sample.text}
                for problem, sample in zip(run.problems.held_out[:8], result.samples, strict=False)
            ],
        },
    )
    return result


@dataclass
class Totals:
    """What has happened so far.

    Attributes:
        steps, updates: done; an update is a step that moved the weights.
        step_seconds, reference_seconds: spent on steps, and on reference rewards before the first.
        nonfinite_steps, nonfinite_in_a_row: that were skipped.
        earlier_seconds: of the processes that this one resumes.
        started: this process's clock at its start.
    """

    steps: int = 0
    updates: int = 0
    step_seconds: float = 0.0
    reference_seconds: float = 0.0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def wall_seconds(self) -> float:
        """Of the run so far, in however many processes."""
        return self.earlier_seconds + time.perf_counter() - self.started


def summarise(run: Run, before: Evaluation | None, after: Evaluation | None, totals: Totals) -> dict[str, Any]:
    """The content of summary.json."""
    steps = totals.steps
    evaluated = after is not None or not run.problems.held_out  # not where the last step was interrupted
    return {
        "status": "finished" if steps == run.config.train.steps and evaluated else "interrupted",
        "accuracy_before": before.greedy if before else None,
        "accuracy_after": after.greedy if after else None,
        "sampled_accuracy_before": before.sampled if before else None,
        "sampled_accuracy_after": after.sampled if after else None,
        "held_out_problems": len(run.problems.held_out),
        "steps": steps,
        "nonfinite_steps": totals.nonfinite_steps,
        "wall_seconds": totals.wall_seconds,
        # Reference rewards are part of what a step costs, also when they were drawn ahead of the first one.
        "seconds_per_step": (totals.step_seconds + totals.reference_seconds) / steps if steps else None,
        "reference_seconds": totals.reference_seconds,
        "seed": run.config.run.seed,
        "packed": run.policy.packed,
        "folder": str(run.folder.path),
        "model": str(run.folder.path / MODEL),
    }


def _record(step: Step, engine: Mapping[str, float], peak_memory_bytes: int) -> dict[str, Any]:
    samples = [s for group in step.groups for s in group.samples]
    rewards = torch.tensor([r for group in step.groups for r in group.rewards])
    relative = aapo_advantages(rewards, None, len(step.groups[0].samples)).view(len(step.groups), -1)
    advantages = step.advantages[~rewards.isnan()]
    tokens = sum(len(s.token_ids) for s in samples)
    scored_tokens = sum(len(s.token_ids) for s, r in zip(samples, rewards.tolist(), strict=True) if not math.isnan(r))
    result = step.result
    generating = engine.get("generation_seconds", 0.0)
    return {
        "step": step.number,
        "reward": _mean(rewards.tolist()),
        "reference_reward": None if step.reference is None else _mean(step.reference),
        "zero_weight_token_share": 1.0 - result.trained_tokens / scored_tokens if scored_tokens else 1.0,
        "zero_advantage_group_share": (relative == 0).all(1).float().mean().item(),
        "advantage_mean": advantages.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "entropy": result.entropy,
        "rollout_entropy": -sum(sum(s.logprobs) for s in samples) / tokens,
        "completion_length": tokens / len(samples),
        "truncated_share": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "saved_token_share": result.saved_token_share,
        "waiting_share": result.waiting_share,
        "microbatch_tokens": result.microbatch_tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": step.learning_rate,
        "staleness": step.staleness,
        "updated": result.updated,
        "finite": result.finite,
        **{f"rollout_{name}": value for name, value in asdict(result.mismatch).items()},
        **{f"engine_{name}": value for name, value in engine.items()},
        "reward_failures": len(step.failures),
        "seconds": step.seconds,
        "tokens_per_second": tokens / sum(step.seconds.values()),
        # None where nothing was drawn: the rollouts of a resumed step may be those of its checkpoint.
        "generation_tokens_per_second": engine["generation_tokens"] / generating if generating else None,
        "peak_memory_bytes": peak_memory_bytes,
    }


def _samples(step: Step, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The first sample of every group, then the second, ...; ``count`` in all, or all."""
    size = len(step.groups[0].samples)
    for place, index in _places(step)[:count]:
        group = step.groups[place]
        sample = group.samples[index]
        yield {
            "step": step.number,
            "prompt": group.problem.prompt,
            "completion": sample.text,
            "reward": group.rewards[index],
            "advantage": step.advantages[place * size + index].item(),
            "finish_reason": sample.finish_reason,
            "weight_version": sample.weight_version,
        }


def _tokens(step: Step) -> Iterator[dict[str, Any]]:
    """What a gradient can be computed from again, in the order of ``_samples``."""
    for place, index in _places(step):
        sample = step.groups[place].samples[index]
        yield {
            "row": step.groups[place].problem.row,
            "prompt_ids": sample.prompt_ids,
            "token_ids": sample.token_ids,
            "logprobs": sample.logprobs,
        }


def _places(step: Step) -> list[tuple[int, int]]:
    return [(group, index) for index in range(len(step.groups[0].samples)) for group in range(len(step.groups))]


def _mean(values: Sequence[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return statistics.fmean(present) if present else math.nan


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
