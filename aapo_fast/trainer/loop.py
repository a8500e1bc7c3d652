"""The AAPO loop, top to bottom: sample, score, compare with the frozen reference, update; evaluate before and after."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aapo_fast.advantages import aapo_advantages
from aapo_fast.config import Config
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import save_model
from aapo_fast.trainer.ahead import Rollouts
from aapo_fast.trainer.curve import plot_run
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.engine import max_logprob_gap, samples_are_compared
from aapo_fast.trainer.evaluate import Evaluation
from aapo_fast.trainer.ranks import ONE, AnyRank, Ranks
from aapo_fast.trainer.records import MODEL, NONFINITE, SUMMARY, Clock
from aapo_fast.trainer.report import Step, Totals, evaluate_held_out, report_step, summarise
from aapo_fast.trainer.resume import finished_summary
from aapo_fast.trainer.sampling import before_the_first_step, reference_rewards, score, verify_engine
from aapo_fast.trainer.setup import Run, prepare, rollout_seed
from aapo_fast.trainer.state import restore, save
from aapo_fast.trainer.step import learning_rate, optimizer_step
from aapo_fast.types import UserError


def train(config: Config, display: Display | None = None, ranks: Ranks = ONE) -> dict[str, Any]:
    """Run AAPO as configured.

    Args:
        display: where to say how it goes; of several ranks, those after the first want a quiet one.
        ranks: that train together, each of which calls this (``trainer.ranks``).

    Returns:
        The summary that is also written to summary.json.

    Raises:
        UserError: bad input, too many failing rewards, too many non-finite steps in a row. What was measured until
            then is in the run's folder, and the model as it then was is saved.
    """
    display, totals = display or Display(), Totals()
    finished = ranks.on_first(lambda: finished_summary(config))
    if finished is not None:
        display.note(f"{config.run.folder} holds the finished run: {finished['steps']} steps, nothing left to resume")
        return finished
    with prepare(config, display, ranks) as run, _stop_on_interrupt(display) as asked:
        stop = AnyRank(asked, ranks)
        rollouts = Rollouts(run)
        # Of a run that is resumed, too: the policy is not what it was then before its checkpoint is loaded.
        reference_seconds = before_the_first_step(run, stop)
        if run.resumed is not None:
            before = restore(run, run.resumed, totals, rollouts)
        else:
            before = None if stop.is_set() else evaluate_held_out(run, step=0)
        totals.reference_seconds += reference_seconds
        saved = totals.steps
        try:
            for number in _steps(run, totals, rollouts, stop):
                if _save_checkpoint(run, totals, rollouts, before, stop):
                    saved = number
            if stop.is_set() and totals.steps > saved:  # it was asked for after the look at the last step's end
                _save_checkpoint(run, totals, rollouts, before, stop)
            run.background.finish()
        except Exception:  # whatever it was, the weights so far are worth keeping
            try:
                _save(run, totals)
            except Exception as error:  # a full disk, say; what came first is what is told
                display.note(f"the model after step {totals.steps} could not be saved: {error}")
            raise
        _save(run, totals)
        after = None if stop.is_set() else evaluate_held_out(run, step=totals.steps)
        summary = summarise(run, before, after, totals)
        run.folder.write(SUMMARY, summary)
        if totals.steps and ranks.first:
            _plot(run)
        if before is not None and after is not None:
            shown = run.problems.held_out[:4]
            columns = {"before": before.samples, "after": after.samples}
            display.completions("Held-out problems, greedy", shown, columns)
        return summary


def _save(run: Run, totals: Totals) -> None:
    if not totals.steps or not run.ranks.first:
        return
    path = run.folder.path / MODEL
    try:
        save_model(run.policy.model, run.policy.tokenizer, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; make room, and give the command again with --resume"
        ) from error


def _plot(run: Run) -> None:
    try:
        plot_run(run.folder.path)
    except UserError as error:  # everything else is there
        run.display.note(str(error))


def _steps(run: Run, totals: Totals, rollouts: Rollouts, stop: threading.Event) -> Iterator[int]:
    """Train, from the step after the last one done; yields after each, for what is to be saved."""
    steps, every = run.config.train.steps, run.config.eval.every
    with run.display.progress("training") as update:
        for number in range(totals.steps + 1, steps + 1):
            if stop.is_set():
                return
            # Of the step before: a checkpoint is written first, and a run that resumes from it evaluates then.
            if every and number > 1 and (number - 1) % every == 0:
                evaluate_held_out(run, number - 1)
            train_step(run, number, totals, rollouts)
            update(number, steps)
            yield number


def _save_checkpoint(
    run: Run, totals: Totals, rollouts: Rollouts, before: Evaluation | None, stop: threading.Event
) -> bool:
    """If one is due, or the run is to stop; whether it was written, or is being."""
    every, last = run.config.checkpoint.every, stop.is_set()
    due = every > 0 and totals.steps % every == 0
    wait = last or not run.config.checkpoint.background
    written = (due or last) and save(run, totals, rollouts, before, wait)
    if written and last:
        run.display.note(f"a checkpoint of step {totals.steps} is saved: --resume goes on from it")
    return written


def train_step(run: Run, number: int, totals: Totals, rollouts: Rollouts) -> None:
    """Step 1, 2, ... of AAPO.

    Raises:
        UserError: too many completions without a reward; too many non-finite steps in a row; samples that are not the
            policy's.
    """
    config, clock = run.config, Clock()
    problems = run.schedule[number - 1]

    with clock.phase("rollout"):
        drawn = rollouts.take(number)
        groups, of_reference = drawn[: len(problems)], drawn[len(problems) :]
    with clock.phase("reward"):
        failures = score(run, groups, f"step {number}")
    with clock.phase("reference"):
        reference = reference_rewards(run, problems, of_reference, number)

    rewards = torch.tensor([r for group in groups for r in group.rewards])
    advantages = aapo_advantages(
        rewards,
        None if reference is None else torch.tensor(reference),
        config.rollout.group_size,
        config.advantage.delta_low,
        config.advantage.delta_high,
        config.advantage.scale_rewards,
    )
    # A completion without a reward takes no part in the step: not in the statistics, not in the denominator.
    samples = (sample for group in groups for sample in group.samples)
    scored = [
        Weighted(sample, advantage)
        for sample, advantage, reward in zip(samples, advantages.tolist(), rewards.tolist(), strict=True)
        if not math.isnan(reward)
    ]
    lr = learning_rate(number - 1, config.train)
    staleness = max(totals.updates - sample.weight_version for group in groups for sample in group.samples)
    other = staleness > 0 or config.rollout.top_p < 1  # than the policy's, the log-probabilities of these samples
    with clock.phase("train"):
        rollouts.start(number + 1)
        run.engine.free_memory()
        result = optimizer_step(
            run.policy,
            run.optimizer,
            scored,
            config.train,
            lr,
            seed=rollout_seed(config.run.seed, number, 2_000_000),
            max_logprob_gap=math.inf if other else max_logprob_gap(config, run.policy.device),
        )
    totals.steps = number
    totals.updates += result.updated
    try:
        with clock.phase("sync"):
            rollouts.wait()
            if result.updated:
                run.engine.sync_weights(totals.updates)
                if not samples_are_compared(config):
                    verify_engine(run, problems, number)
    finally:  # what was learned is recorded, whatever became of the engine
        totals.step_seconds += sum(clock.seconds.values())
        report_step(run, Step(number, groups, reference, advantages, failures, result, lr, staleness, clock.seconds))
    _count_nonfinite(run, result.finite, totals)


def _count_nonfinite(run: Run, finite: bool, totals: Totals) -> None:
    totals.nonfinite_steps += not finite
    totals.nonfinite_in_a_row = 0 if finite else totals.nonfinite_in_a_row + 1
    limit = run.config.train.max_nonfinite_steps
    if totals.nonfinite_in_a_row >= limit:
        raise UserError(
            f"step {totals.steps}: loss or gradient was NaN or infinite {limit} steps in a row "
            f"(train.max_nonfinite_steps); their completions are in {run.folder.path / NONFINITE}; lower "
            "train.learning_rate, or train in float32"
        )


@contextmanager
def _stop_on_interrupt(display: Display) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks the loop to end after its step and save; a second Ctrl-C ends at once. SIGTERM
    comes twice where a batch system sends it to every process of a job and torchrun passes it on.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.set()
        display.note("interrupted: finishing what is under way, then saving; Ctrl-C once more to stop at once")

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
