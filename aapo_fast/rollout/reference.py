"""Rewards of the frozen reference policy, kept in an SQLite file.

The reference never changes, so its rewards are the same random variables all run long: K completions a problem are
drawn and scored once, and looked up ever after, in this run and in the next. A row is keyed by everything that decides
it: model, prompt tokens, sampling, seed, and reward functions with the row they were given.

Rewards are kept only where all K of a problem came about. Each problem is committed by itself: a kill at any moment
loses at most the problems in flight.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from aapo_fast.types import Problem, SamplingParams, UserError

Draw = Callable[[Sequence[Problem], Sequence[int]], list[list[float]]]
"""(problems, seeds) -> K rewards each; NaN is a missing reward."""

FORMAT_VERSION = 1

TRIES_TO_LEAVE_LOG = 50
"""Of a tenth of a second each."""


class ReferenceCache:
    """K reference rewards a problem.

    Args:
        path: the SQLite file; made if it is not there.
        model: digest of the frozen weights.
        reward_version: digest of the reward functions (``Scorer.version``).
        sampling: how reference completions are drawn.
        samples: K.
        seed: the run's seed.

    Attributes:
        this_run_only: by key, the rewards of problems of which one failed. A run that is resumed takes them with it.

    Raises:
        UserError: the file is not such a cache, or cannot be written.
    """

    def __init__(
        self, path: Path, *, model: str, reward_version: str, sampling: SamplingParams, samples: int, seed: int
    ) -> None:
        self.samples = samples
        self._path = path
        # A failed reward may have been a busy machine or a bug since mended: not for the next run.
        self.this_run_only: dict[str, list[float]] = {}
        self._seed = seed
        self._common = json.dumps([model, reward_version, asdict(sampling), samples, seed])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
            _leave_write_ahead_log(self._db)
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT_VERSION):
                raise UserError(f"reference.cache={path} has format {found}, want {FORMAT_VERSION}; name another file")
            self._db.execute("CREATE TABLE IF NOT EXISTS rewards (key TEXT PRIMARY KEY, rewards TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"reference.cache={path} cannot be used: {error}; name another file") from error

    def close(self) -> None:
        self._db.close()

    def seed_of(self, problem: Problem) -> int:
        """The seed of a problem's reference samples; the same wherever in whichever run the problem comes up."""
        digest = hashlib.sha256(json.dumps([self._seed, list(problem.prompt_ids)]).encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def missing(self, problems: Sequence[Problem]) -> list[Problem]:
        """Those not yet in the cache, each once."""
        once = {id(p): p for p in problems}.values()  # of a whole run's draws: a key takes a digest
        by_key = {self._key(p): p for p in once}
        return [p for key, p in by_key.items() if self._get(key) is None]

    def rewards(self, problem: Problem) -> list[float]:
        """K rewards, NaN where one is missing.

        Raises:
            KeyError: the problem was never drawn.
        """
        rewards = self._get(self._key(problem))
        if rewards is None:
            raise KeyError(f"no reference rewards of {problem.row}")
        return rewards

    def rewards_of(self, problems: Sequence[Problem]) -> list[list[float]]:
        """As ``rewards``, of each."""
        return [self.rewards(problem) for problem in problems]

    def fill(self, problems: Sequence[Problem], draw: Draw) -> None:
        """Draw, score and keep what is missing. ``draw`` may be called with a few problems at a time."""
        todo = self.missing(problems)
        if not todo:
            return
        for problem, rewards in zip(todo, draw(todo, [self.seed_of(p) for p in todo]), strict=True):
            if len(rewards) != self.samples:
                raise ValueError(f"{len(rewards)} reference rewards for {problem.row}, want {self.samples}")
            if any(math.isnan(r) for r in rewards):
                self.this_run_only[self._key(problem)] = rewards
            else:
                self._execute("INSERT OR REPLACE INTO rewards VALUES (?, ?)", self._key(problem), json.dumps(rewards))

    def _get(self, key: str) -> list[float] | None:
        if key in self.this_run_only:
            return self.this_run_only[key]
        row = self._execute("SELECT rewards FROM rewards WHERE key = ?", key).fetchone()
        return None if row is None else json.loads(row[0])

    def _execute(self, statement: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:  # a full disk, a lock held for longer than our patience
            raise UserError(
                f"reference.cache={self._path} failed: {error}; look at its disk, or name another file"
            ) from error

    def _key(self, problem: Problem) -> str:
        content = json.dumps([self._common, list(problem.prompt_ids), problem.prompt, repr(dict(problem.columns))])
        return hashlib.sha256(content.encode()).hexdigest()


def _leave_write_ahead_log(db: sqlite3.Connection) -> None:
    """Its shared memory does not reach the other machines of a network disk. A file of an earlier version has one, and
    keeps it while another process has it open: that cannot be waited for, and does no harm on one machine.
    """
    for _ in range(TRIES_TO_LEAVE_LOG):
        try:
            db.execute("PRAGMA journal_mode=DELETE")
            return
        except sqlite3.OperationalError:  # SQLite's own time limit does not count here
            time.sleep(0.1)
