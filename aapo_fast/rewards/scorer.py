"""Scores completions in a worker process, each within a time limit. A failure is a missing reward, never a zero."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe

from aapo_fast.config import RewardConfig, ScoringConfig
from aapo_fast.rewards.functions import LARGEST_REWARD
from aapo_fast.types import DataError, Problem, Progress, UserError

START_LIMIT_SECONDS = 120.0
REWARD_VERSION = 2
"""Part of the key under which rewards are cached; raise it when a built-in reward changes its values."""


@dataclass(frozen=True)
class Score:
    """The reward of one completion.

    Attributes:
        reward: weighted sum of all functions; NaN where one of them failed.
        values: each function's value; NaN where it failed.
        failure: what failed and how, or None.
    """

    reward: float
    values: tuple[float, ...]
    failure: str | None


class Scorer:
    """Runs the functions of [[rewards]] in a worker process, which is started here and restarted when it hangs or dies.

    Args:
        rewards: the functions and their weights.
        config: time limit.

    Raises:
        UserError: a function cannot be loaded.
    """

    def __init__(self, rewards: Sequence[RewardConfig], config: ScoringConfig) -> None:
        self.rewards = list(rewards)
        self.time_limit_seconds = config.time_limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._sources: list[str] | None = None
        self._start()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            with suppress(ProcessLookupError):
                # The whole session: a reward function may have started processes of its own.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._pipe = None

    def version(self) -> str:
        """A digest of what decides a reward; a key for caches of rewards.

        For a function of your own that is the source of its module (not of what the module imports), for the built-in
        ones the version of the package that scores. The worker says it, of what it has loaded: modules that it finds in
        the current folder a command's own process need not find.

        Raises:
            UserError: a function cannot be loaded.
        """
        if self._sources is None:
            self._wait_until_ready()
        content = json.dumps([REWARD_VERSION, [asdict(r) for r in self.rewards], self._sources], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self, problems: Sequence[Problem], progress: Progress | None = None) -> None:
        """Refuse problems whose right answer a reward function cannot use.

        Raises:
            DataError: names the first such row.
        """
        for done, problem in enumerate(problems):
            for index, reward in enumerate(self.rewards):
                if reward.function not in ("math_verify", "cosine", "reasoning_gym"):
                    continue
                wrong = self._ask("check", index, problem, "")
                if wrong is not None:
                    raise DataError(f"{problem.row}: {wrong}")
            if progress is not None:
                progress(done + 1, len(problems))

    def score(self, problem: Problem, completion: str) -> Score:
        """The reward of one completion of ``problem``."""
        values: list[float] = []
        failure = None
        for index, reward in enumerate(self.rewards):
            answer = self._ask("score", index, problem, completion)
            if isinstance(answer, float):
                values.append(answer)
            else:
                values.append(math.nan)
                failure = failure or f"reward {reward.function} {answer}"
        total = sum(reward.weight * value for reward, value in zip(self.rewards, values, strict=True))
        if abs(total) > LARGEST_REWARD:  # advantages are computed in float32
            failure, total = f"rewards of {total:g} in all are beyond float32", math.nan
        return Score(total, tuple(values), failure)

    def score_all(self, completions: Sequence[tuple[Problem, str]]) -> list[Score]:
        """One after the other."""
        return [self.score(problem, text) for problem, text in completions]

    def _ask(self, request: str, index: int, problem: Problem, completion: str) -> object:
        """The worker's answer; a string is what went wrong."""
        try:
            message = pickle.dumps((request, index, problem.prompt, completion, dict(problem.columns)))
        except Exception as error:  # pickling runs the code of whatever the row holds
            return f"cannot be given {problem.row}: {type(error).__name__}: {error}"
        answer, code = self._answer(message)
        # Batch systems send SIGTERM to every process of a job; it is the trainer's to handle.
        return self._answer(message)[0] if code == -signal.SIGTERM else answer

    def _answer(self, message: bytes) -> tuple[object, int | None]:
        """That of one try; and the worker's exit code, if it ended of it."""
        if self._process is None:
            self._start()
        self._wait_until_ready()
        assert self._pipe is not None and self._process is not None
        code = None
        try:
            self._pipe.send_bytes(message)
            if self._pipe.poll(self.time_limit_seconds):
                return self._pipe.recv(), None
            answer = f"took longer than scoring.time_limit_seconds={self.time_limit_seconds:g}"
        except (EOFError, OSError):
            code = self._process.wait()
            answer = f"ended its process (exit code {code})"
        self.close()
        return answer, code

    def _start(self) -> None:
        ours, theirs = Pipe()
        # A plain child, not multiprocessing's: that would import the user's main module again.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aapo_fast.rewards.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the trainer's to handle, also while the worker is starting
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        theirs.close()
        self._pipe = ours
        self._ready = False
        ours.send(self.rewards)

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        assert self._pipe is not None
        try:
            if not self._pipe.poll(START_LIMIT_SECONDS):
                raise UserError(f"the reward functions did not load within {START_LIMIT_SECONDS:g} s")
            said: list[str] | str = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError("the reward process ended while loading the reward functions; see its message") from error
        names = ", ".join(r.function for r in self.rewards)
        if isinstance(said, str):
            raise UserError(f"the reward functions ({names}) cannot be loaded: {said}")
        if self._sources not in (None, said):
            raise UserError(
                f"the reward functions ({names}) are not those that this run began with: their file was changed, and "
                "their process had to be started anew; put the file back and resume, or begin another run"
            )
        self._sources, self._ready = said, True
