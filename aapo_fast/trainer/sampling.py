"""Drawing and scoring: the policy's groups of each step, and the rewards of the frozen reference."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from aapo_fast.advantages import pair_references
from aapo_fast.data.packing import Weighted
from aapo_fast.trainer.engine import max_logprob_gap
from aapo_fast.trainer.mismatch import Mismatch
from aapo_fast.trainer.setup import Run, rollout_seed
from aapo_fast.types import Group, Problem, UserError, Weights

VERIFY_PROBLEMS = 4

REFERENCE_FILL_PROBLEMS = 16
"""Problems whose reference rewards are committed together; what a kill can lose."""


def rollout(run: Run, problems: Sequence[Problem], step: int) -> list[Group]:
    """G completions of each problem, not yet scored; with an online reference its own of each problem after them.

    Both in one call: an engine that can draws them in the same batches. Seeds depend on run, step and place in it.
    """
    every: list[Problem] = [*problems]
    weights: list[Weights] = ["policy"] * len(problems)
    places = list(range(len(problems)))
    if run.config.reference.mode == "online":
        every += problems
        weights += ["reference"] * len(problems)
        # From seeds of its own: with the policy's it would repeat the policy's samples at first.
        places += [1_000_000 + i for i in places]
    drawn = run.engine.generate(
        [p.prompt_ids for p in every],
        n=run.config.rollout.group_size,
        sampling=run.sampling,
        seeds=[rollout_seed(run.config.run.seed, step, place) for place in places],
        weights=weights,
    )
    return [Group(problem, samples) for problem, samples in zip(every, drawn, strict=True)]


def score(run: Run, groups: Sequence[Group], where: str) -> list[str]:
    """Fill in the rewards, NaN where one is missing; returns what failed.

    Args:
        where: for the message: "step 3".

    Raises:
        UserError: a larger share failed than [scoring] allows.
    """
    failures = []
    results = iter(run.scorer.score_all([(group.problem, s.text) for group in groups for s in group.samples]))
    for group in groups:
        for _ in group.samples:
            result = next(results)
            group.rewards.append(result.reward)
            if result.failure is not None:
                failures.append(f"{group.problem.row}: {result.failure}")
    for failure in failures[:3]:
        run.display.note(f"no reward: {failure}")
    total = sum(len(group.samples) for group in groups)
    limit = run.config.scoring.max_failure_share
    if len(failures) > limit * total:
        raise UserError(
            f"{where}: {len(failures)} of {total} completions have no reward, over "
            f"scoring.max_failure_share={limit:g}; the first: {failures[0]}"
        )
    return failures


def verify_engine(run: Run, problems: Sequence[Problem], step: int) -> None:
    """Draw a few completions, and compare the engine's log-probabilities with those of the policy as it is.

    They are of the whole distribution, whatever ``rollout.top_p``: those of a nucleus are not the policy's.

    Raises:
        UserError: they are further apart than ``vllm.max_logprob_gap``.
    """
    limit = max_logprob_gap(run.config, run.policy.device)
    if math.isinf(limit):
        return
    few = problems[:VERIFY_PROBLEMS]
    seeds = [rollout_seed(run.config.run.seed, step, 3_000_000 + i) for i in range(len(few))]
    sampling = replace(run.sampling, top_p=1.0)
    drawn = run.engine.generate([p.prompt_ids for p in few], n=1, sampling=sampling, seeds=seeds)
    batch = run.policy.batch([Weighted(sample, 0.0) for samples in drawn for sample in samples])
    Mismatch.of([run.policy.logps(batch)], [batch.rollout_logps]).check(limit)


# --- the frozen reference -------------------------------------------------------------------------------------------


def before_the_first_step(run: Run, stop: threading.Event) -> float:
    """While the policy still is the reference: fill the cache with the problems of the whole run, or keep a copy of the
    weights. Returns the seconds it took. Once ``stop`` is set, what is left to draw is left to the next run.
    """
    start = time.perf_counter()
    verify_engine(run, run.schedule[0], 0)  # before rewards of its samples are kept for other runs too
    if run.config.reference.mode == "online":
        run.engine.keep_reference()
    if run.cache is not None:
        todo = run.cache.missing([p for problems in run.schedule for p in problems])
        samples = run.config.reference.samples
        if todo:
            run.display.note(f"reference: {samples} completions of {len(todo)} problems, drawn once and kept")
        with run.display.progress("reference") as update:
            for first in range(0, len(todo), REFERENCE_FILL_PROBLEMS):
                if stop.is_set():
                    break
                run.cache.fill(todo[first : first + REFERENCE_FILL_PROBLEMS], lambda p, s: _draw(run, p, s))
                update(min(first + REFERENCE_FILL_PROBLEMS, len(todo)), len(todo))
    return time.perf_counter() - start


def _draw(run: Run, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[float]]:
    drawn = run.engine.generate(
        [p.prompt_ids for p in problems],
        n=run.config.reference.samples,
        sampling=run.sampling,
        seeds=seeds,
        weights="reference",
    )
    groups = [Group(problem, samples) for problem, samples in zip(problems, drawn, strict=True)]
    score(run, groups, "the reference")
    return [group.rewards for group in groups]


def reference_rewards(run: Run, problems: Sequence[Problem], groups: Sequence[Group], step: int) -> list[float] | None:
    """(B,) what each sample's reward is set against; None without reference. ``groups``: the reference's, if online."""
    if run.config.reference.mode == "none":
        return None
    if run.cache is None:
        score(run, groups, f"the reference at step {step}")
        drawn = [group.rewards for group in groups]
    else:
        drawn = run.cache.rewards_of(problems)
    size, pairing = run.config.rollout.group_size, run.config.reference.pairing
    return [reward for rewards in drawn for reward in pair_references(rewards, size, pairing)]
