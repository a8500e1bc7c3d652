"""A model on a set of problems: greedy accuracy and pass@k, every completion kept as it comes.

An evaluation is two passes over the problems, greedy and sampled, a batch of completions at a time. Each batch is
scored and written before the next is drawn, a line a problem; started again, an evaluation draws what is missing.

Letters: n sampled completions a problem.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from aapo_fast.config import Config
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.trainer.estimators import Estimate, bootstrap, pass_at_k, reported_k
from aapo_fast.trainer.records import read_lines, without_nan
from aapo_fast.trainer.setup import sampling_params
from aapo_fast.types import Problem, Progress, RolloutEngine, Sample, UserError

Pass = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Scored:
    """One completion.

    Attributes:
        text: without special tokens.
        value: of the first reward function; None where that failed.
        failure: what failed, or None.
        tokens: its length.
        finish_reason: "stop", or "length" where it was cut off.
    """

    text: str
    value: float | None
    failure: str | None
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Summary:
    """What an evaluation came to. A completion without a reward is left out and counted, never taken for a wrong one.

    Attributes:
        greedy: accuracy of the greedy completions.
        pass_at: pass@k by k; a problem with fewer than k scored completions is left out of it. Empty without sampling.
        truncated_share, mean_tokens: of the sampled completions; of the greedy ones without sampling.
        failures: completions without a reward, by what failed.
        completions: how many there are.
    """

    greedy: Estimate
    pass_at: dict[int, Estimate]
    truncated_share: float
    mean_tokens: float
    failures: dict[str, int]
    completions: int


class Benchmark:
    """A model on one set of problems, and the file of its completions.

    Args:
        problems: what is asked.
        config: [rollout] says how completions are drawn, [eval] how many and what is right.
        file: where completions are kept: made, or gone on with.

    Raises:
        UserError: the file cannot be written, or is of something else.
    """

    def __init__(self, problems: Sequence[Problem], config: Config, file: Path) -> None:
        self.problems, self.config, self.file = problems, config, file
        self.drawn: dict[Pass, dict[int, list[Scored]]] = {"greedy": {}, "sampled": {}}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _cut_to_whole_lines(file)
            for line in read_lines(file):
                self.drawn[line["pass"]][line["problem"]] = [Scored(**c) for c in line["completions"]]
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} holds no completions of an evaluation; move it away") from error

    def run(
        self, engine: RolloutEngine, scorer: Scorer, show: Callable[[str], AbstractContextManager[Progress]]
    ) -> Summary:
        """Draw and score what is missing. Problem i is always drawn from seed i.

        Args:
            show: a progress display with this title.

        Raises:
            UserError: the file cannot be written.
        """
        self._pass("greedy", engine, scorer, show)
        if self.config.eval.samples:
            self._pass("sampled", engine, scorer, show)
        return self.summary()

    def missing(self) -> int:
        """Problems that have not all of their completions."""
        passes: list[Pass] = ["greedy", "sampled"] if self.config.eval.samples else ["greedy"]
        return sum(any(i not in self.drawn[p] for p in passes) for i in range(len(self.problems)))

    def _pass(
        self,
        name: Pass,
        engine: RolloutEngine,
        scorer: Scorer,
        show: Callable[[str], AbstractContextManager[Progress]],
    ) -> None:
        n = 1 if name == "greedy" else self.config.eval.samples
        sampling = sampling_params(self.config)
        if name == "greedy":
            sampling = replace(sampling, temperature=0.0, top_p=1.0)
        done, total = self.drawn[name], len(self.problems)
        todo = [i for i in range(total) if i not in done]
        width = max(1, self.config.rollout.max_batch_size // n)
        with show(name) as progress:
            for start in range(0, len(todo), width):
                places = todo[start : start + width]
                prompts = [self.problems[i].prompt_ids for i in places]
                count = partial(_count_on, progress, len(done), total)
                samples = engine.generate(prompts, n=n, sampling=sampling, seeds=places, progress=count)
                for place, drawn in zip(places, samples, strict=True):
                    done[place] = [_scored(scorer, self.problems[place], sample) for sample in drawn]
                self._write(name, places)
                progress(len(done), total)

    def _write(self, name: Pass, places: Sequence[int]) -> None:
        lines = []
        for place in places:
            problem = self.problems[place]
            line = {
                "pass": name,
                "problem": place,
                "row": problem.row,
                "prompt": problem.prompt,
                "answer": problem.columns.get("answer"),
                "completions": [asdict(scored) for scored in self.drawn[name][place]],
            }
            lines.append(json.dumps(without_nan(line), ensure_ascii=False, default=str) + "\n")
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(
                f"{self.file} cannot be written: {error.strerror or error}; make room, and give the command again: "
                "what is in it is kept"
            ) from error

    def summary(self) -> Summary:
        """Of the completions that are there."""
        correct_at, n = self.config.eval.correct_at, self.config.eval.samples
        counts = {
            name: [_count(drawn[i], correct_at) for i in range(len(self.problems)) if i in drawn]
            for name, drawn in self.drawn.items()
        }
        greedy, sampled = ([c for drawn in self.drawn[p].values() for c in drawn] for p in ("greedy", "sampled"))
        longest = sampled or greedy
        return Summary(
            greedy=bootstrap([float(right) for scored, right in counts["greedy"] if scored]),
            pass_at={
                k: bootstrap([pass_at_k(scored, right, k) for scored, right in counts["sampled"] if scored >= k])
                for k in (reported_k(n) if n else [])
            },
            truncated_share=_mean([c.finish_reason == "length" for c in longest]),
            mean_tokens=_mean([c.tokens for c in longest]),
            failures=dict(Counter(c.failure for c in [*greedy, *sampled] if c.failure is not None).most_common()),
            completions=len(greedy) + len(sampled),
        )


def identify(problems: Sequence[Problem], config: Config, model: str, engine: str, rewards: str) -> str:
    """A digest of everything that decides the completions and their rewards; names the file that they are kept in.

    Args:
        model: digest of its weights and tokenizer (``Policy.fingerprint``).
        engine: what it adds (``engine.engine_version``).
        rewards: digest of the reward functions (``Scorer.version``).
    """
    asked = [[p.prompt_ids, str(p.columns.get("answer"))] for p in problems]
    content = [model, engine, rewards, asked, asdict(sampling_params(config)), config.eval.samples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def as_json(summary: Summary) -> dict[str, Any]:
    """Plain tables; NaN is null."""
    tree = asdict(summary)
    tree["pass_at"] = {str(k): estimate for k, estimate in tree["pass_at"].items()}
    found: dict[str, Any] = without_nan(tree)
    return found


def _scored(scorer: Scorer, problem: Problem, sample: Sample) -> Scored:
    score = scorer.score(problem, sample.text)
    value = None if math.isnan(score.values[0]) else score.values[0]
    return Scored(sample.text, value, score.failure, len(sample.token_ids), sample.finish_reason)


def _count_on(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _count(completions: Sequence[Scored], correct_at: float) -> tuple[int, int]:
    """Those that have a value, and those that are right."""
    values = [c.value for c in completions if c.value is not None]
    return len(values), sum(value >= correct_at for value in values)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _cut_to_whole_lines(file: Path) -> None:
    """A kill may have left half a line; what is appended must begin a new one."""
    with file.open("ab") as handle:
        pass
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as handle:
            handle.truncate(whole)
