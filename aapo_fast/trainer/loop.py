"""The AAPO loop, top to bottom: sample, score, compare with the frozen reference, update; evaluate before and after."""

from __future__ import annotations

import math
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from aapo_fast.advantages import aapo_advantages
from aapo_fast.config import Config
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import save_model
from aapo_fast.rollout.reference import pair
from aapo_fast.trainer.curve import plot_run
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.evaluate import Evaluation, evaluate
from aapo_fast.trainer.records import EVALUATIONS, METRICS, MODEL, SAMPLES, SUMMARY, Clock
from aapo_fast.trainer.setup import Run, prepare, rollout_seed
from aapo_fast.trainer.step import StepResult, learning_rate, optimizer_step
from aapo_fast.types import Group, Problem, UserError, Weights

REFERENCE_FILL_PROBLEMS = 16
"""Problems whose reference rewards are committed together; what a kill can lose."""


def train(config: Config, display: Display | None = None) -> dict[str, Any]:
    """Run AAPO as configured.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        UserError: bad input, too many failing rewards, too many non-finite steps in a row. What was measured until
            then is in the run's folder, and the model as it then was is saved.
    """
    display = display or Display()
    start = time.perf_counter()
    with prepare(config, display) as run, _stop_on_interrupt(display) as stop:
        reference_seconds = _ahead_of_the_first_step(run)
        before = _evaluate(run, step=0)
        progress = _Progress()
        try:
            with display.progress("training") as update:
                for step in range(config.train.steps):
                    if stop.is_set():
                        break
                    _train_step(run, step, progress)
                    update(step + 1, config.train.steps)
                    if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.train.steps:
                        _evaluate(run, step=step + 1)
        except UserError:
            save_model(run.policy.model, run.policy.tokenizer, run.folder.path / MODEL)
            raise
        interrupted = stop.is_set()
        after = None if interrupted else _evaluate(run, step=progress.steps)
        save_model(run.policy.model, run.policy.tokenizer, run.folder.path / MODEL)
        summary = _summary(run, before, after, progress, reference_seconds, time.perf_counter() - start)
        run.folder.write(SUMMARY, summary)
        if progress.steps:
            plot_run(run.folder.path)
        if before is not None and after is not None:
            shown = slice(0, 4)
            columns = {"before": before.samples[shown], "after": after.samples[shown]}
            display.completions("Held-out problems, greedy", run.problems.held_out[shown], columns)
        return summary


@dataclass
class _Progress:
    """What has happened so far."""

    steps: int = 0
    updates: int = 0
    step_seconds: float = 0.0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0


def _train_step(run: Run, step: int, progress: _Progress) -> None:
    config, clock = run.config, Clock()
    problems = run.schedule[step]
    with clock.phase("rollout"):
        groups = _rollout(run, problems, step, "policy")
    with clock.phase("reward"):
        failures = _score(run, groups)
    _refuse_too_many_failures(run, groups, failures, step)
    with clock.phase("reference"):
        reference = _reference_rewards(run, problems, step)

    rewards = torch.tensor([r for group in groups for r in group.rewards])
    size = config.rollout.group_size
    advantages = aapo_advantages(
        rewards,
        None if reference is None else torch.tensor(reference),
        size,
        config.advantage.delta_low,
        config.advantage.delta_high,
        config.advantage.scale_rewards,
    )
    samples = [sample for group in groups for sample in group.samples]
    # A completion without a reward takes no part in the step: not in the statistics, not in the denominator.
    scored = [
        Weighted(sample, advantage)
        for sample, advantage, reward in zip(samples, advantages.tolist(), rewards.tolist(), strict=True)
        if not math.isnan(reward)
    ]
    lr = learning_rate(step, config.train)
    with clock.phase("train"):
        result = optimizer_step(run.policy, run.optimizer, scored, config.train, lr)
        if result.updated:
            progress.updates += 1
            run.engine.sync_weights(progress.updates)
    progress.steps += 1
    progress.step_seconds += sum(clock.seconds.values())
    record = _record(run, step, groups, scored, reference, result, failures, lr, clock)
    run.folder.append(METRICS, record)
    _keep_samples(run, step, groups, advantages.tolist())
    run.display.step(record, config.train.steps)
    _refuse_nonfinite_in_a_row(run, result, progress)


def _rollout(run: Run, problems: Sequence[Problem], step: int, weights: Weights) -> list[Group]:
    # The reference draws from seeds of its own: with the policy's it would repeat the policy's samples at step 0.
    offset = 0 if weights == "policy" else 1_000_000
    drawn = run.engine.generate(
        [p.prompt_ids for p in problems],
        n=run.config.rollout.group_size,
        sampling=run.sampling,
        seeds=[rollout_seed(run.config.run.seed, step, offset + i) for i in range(len(problems))],
        weights=weights,
    )
    return [Group(problem, samples) for problem, samples in zip(problems, drawn, strict=True)]


def _score(run: Run, groups: Sequence[Group]) -> list[str]:
    """Fill in the rewards; returns what failed."""
    failures = []
    for group in groups:
        for sample in group.samples:
            score = run.scorer.score(group.problem, sample.text)
            group.rewards.append(score.reward)
            if score.failure is not None:
                failures.append(f"{group.problem.row}: {score.failure}")
    return failures


# --- the frozen reference --------------------------------------------------------------------------------------------


def _ahead_of_the_first_step(run: Run) -> float:
    """While the policy still is the reference: fill the cache with the problems of the whole run, or keep a copy of the
    weights. Returns the seconds it took.
    """
    start = time.perf_counter()
    if run.config.reference.mode == "online":
        run.engine.keep_reference()
    if run.cache is not None:
        todo = run.cache.missing([p for problems in run.schedule for p in problems])
        samples = run.config.reference.samples
        if todo:
            run.display.note(f"reference: {samples} completions of {len(todo)} problems, drawn once and kept")
        with run.display.progress("reference") as update:
            for first in range(0, len(todo), REFERENCE_FILL_PROBLEMS):
                run.cache.fill(todo[first : first + REFERENCE_FILL_PROBLEMS], lambda p, s: _draw_reference(run, p, s))
                update(min(first + REFERENCE_FILL_PROBLEMS, len(todo)), len(todo))
    return time.perf_counter() - start


def _draw_reference(run: Run, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[float]]:
    drawn = run.engine.generate(
        [p.prompt_ids for p in problems],
        n=run.config.reference.samples,
        sampling=run.sampling,
        seeds=seeds,
        weights="reference",
    )
    groups = [Group(problem, samples) for problem, samples in zip(problems, drawn, strict=True)]
    _refuse_too_many_failures(run, groups, _score(run, groups), step=None)
    return [group.rewards for group in groups]


def _reference_rewards(run: Run, problems: Sequence[Problem], step: int) -> list[float] | None:
    """(B,) what each sample's reward is set against; None without reference."""
    if run.config.reference.mode == "none":
        return None
    if run.cache is None:
        groups = _rollout(run, problems, step, "reference")
        _refuse_too_many_failures(run, groups, _score(run, groups), step)
        drawn = [group.rewards for group in groups]
    else:
        drawn = [run.cache.rewards(problem) or [] for problem in problems]
    size, pairing = run.config.rollout.group_size, run.config.reference.pairing
    return [reward for rewards in drawn for reward in pair(rewards, size, pairing)]


# --- guards ----------------------------------------------------------------------------------------------------------


def _refuse_too_many_failures(run: Run, groups: Sequence[Group], failures: list[str], step: int | None) -> None:
    total = sum(len(group.samples) for group in groups)
    limit = run.config.scoring.max_failure_share
    for failure in failures[:3]:
        run.display.note(f"no reward: {failure}")
    if len(failures) > limit * total:
        where = "the reference" if step is None else f"step {step + 1}"
        raise UserError(
            f"{where}: {len(failures)} of {total} completions have no reward, over "
            f"scoring.max_failure_share={limit:g}; the first: {failures[0]}"
        )


def _refuse_nonfinite_in_a_row(run: Run, result: StepResult, progress: _Progress) -> None:
    progress.nonfinite_steps += not result.finite
    progress.nonfinite_in_a_row = 0 if result.finite else progress.nonfinite_in_a_row + 1
    limit = run.config.train.max_nonfinite_steps
    if progress.nonfinite_in_a_row >= limit:
        raise UserError(
            f"step {progress.steps}: loss or gradient was NaN or infinite {limit} steps in a row "
            "(train.max_nonfinite_steps); lower train.learning_rate, or train in float32"
        )


@contextmanager
def _stop_on_interrupt(display: Display) -> Iterator[threading.Event]:
    """The first Ctrl-C asks the loop to end after its step and save; the second ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        display.note("interrupted: finishing this step, then saving; once more to stop at once")

    earlier = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, earlier)


# --- what is written down --------------------------------------------------------------------------------------------


def _evaluate(run: Run, step: int) -> Evaluation | None:
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


def _record(
    run: Run,
    step: int,
    groups: Sequence[Group],
    scored: Sequence[Weighted],
    reference: list[float] | None,
    result: StepResult,
    failures: list[str],
    lr: float,
    clock: Clock,
) -> dict[str, Any]:
    samples = [s for group in groups for s in group.samples]
    rewards = torch.tensor([r for group in groups for r in group.rewards])
    relative = aapo_advantages(rewards, None, run.config.rollout.group_size).view(len(groups), -1)
    advantages = torch.tensor([w.advantage for w in scored])
    tokens = sum(len(s.token_ids) for s in samples)
    scored_tokens = sum(len(w.sample.token_ids) for w in scored)
    seconds = sum(clock.seconds.values())
    return {
        "step": step + 1,
        "reward": _mean(rewards.tolist()),
        "reference_reward": None if reference is None else _mean(reference),
        "zero_weight_token_share": 1.0 - result.trained_tokens / scored_tokens if scored_tokens else 1.0,
        "zero_advantage_group_share": (relative == 0).all(1).float().mean().item(),
        "advantage_mean": advantages.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "entropy": result.entropy,
        "rollout_entropy": -sum(sum(s.logprobs) for s in samples) / tokens,
        "completion_length": tokens / len(samples),
        "truncated_share": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": lr,
        "updated": result.updated,
        "finite": result.finite,
        "reward_failures": len(failures),
        "seconds": clock.seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": _peak_memory_bytes(run.policy.device),
    }


def _keep_samples(run: Run, step: int, groups: Sequence[Group], advantages: Sequence[float]) -> None:
    """The first samples of every group in turn, as many as [run] wants."""
    size = run.config.rollout.group_size
    for kept in range(min(run.config.run.samples_kept, size * len(groups))):
        index, group = kept // len(groups), kept % len(groups)
        sample = groups[group].samples[index]
        run.folder.append(
            SAMPLES,
            {
                "step": step + 1,
                "prompt": groups[group].problem.prompt,
                "completion": sample.text,
                "reward": groups[group].rewards[index],
                "advantage": advantages[group * size + index],
                "finish_reason": sample.finish_reason,
                "weight_version": sample.weight_version,
            },
        )


def _summary(
    run: Run,
    before: Evaluation | None,
    after: Evaluation | None,
    progress: _Progress,
    reference_seconds: float,
    wall_seconds: float,
) -> dict[str, Any]:
    steps = progress.steps
    return {
        "status": "finished" if steps == run.config.train.steps else "interrupted",
        "accuracy_before": before.greedy if before else None,
        "accuracy_after": after.greedy if after else None,
        "sampled_accuracy_before": before.sampled if before else None,
        "sampled_accuracy_after": after.sampled if after else None,
        "held_out_problems": len(run.problems.held_out),
        "steps": steps,
        "nonfinite_steps": progress.nonfinite_steps,
        "wall_seconds": wall_seconds,
        # Reference rewards are part of what a step costs, also when they were drawn ahead of the first one.
        "seconds_per_step": (progress.step_seconds + reference_seconds) / steps if steps else None,
        "reference_seconds": reference_seconds,
        "seed": run.config.run.seed,
        "packed": run.policy.packed,
        "folder": str(run.folder.path),
        "model": str(run.folder.path / MODEL),
    }


def _mean(values: Sequence[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return statistics.fmean(present) if present else math.nan


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
