"""What several ranks use as if there were one of it: rollout engine, scorer, reference cache, the run's folder, policy.

The functions give one rank the thing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aapo_fast.config import RewardConfig, ScoringConfig
from aapo_fast.rewards.scorer import Score, Scorer
from aapo_fast.rollout.reference import Draw, ReferenceCache
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.trainer.records import RunFolder
from aapo_fast.types import Problem, Progress, RolloutEngine, Sample, SamplingParams, Weights


def share_folder(ranks: Ranks, path: Path, make: Callable[[], RunFolder]) -> RunFolder:
    """The run's folder, which the first rank alone makes and writes."""
    return make() if ranks.first else UnwrittenFolder(path)


def share_scorer(ranks: Ranks, rewards: Sequence[RewardConfig], config: ScoringConfig) -> Scorer:
    """A scorer that scores a completion on one rank."""
    return Scorer(rewards, config) if ranks.world == 1 else SharedScorer(ranks, rewards, config)


def share_cache(ranks: Ranks, make: Callable[[], ReferenceCache]) -> ReferenceCache | SharedCache:
    """The reference cache, which the first rank alone opens."""
    return make() if ranks.world == 1 else SharedCache(ranks, make() if ranks.first else None)


def share_engine(ranks: Ranks, kind: str, make: Callable[[], RolloutEngine]) -> RolloutEngine:
    """A rollout engine of the ``kind`` of rollout.engine: "hf" on every rank, servers as clients of the first."""
    if ranks.world == 1:
        return make()
    on_every_rank = kind == "hf"
    return SharedEngine(ranks, make() if ranks.first or on_every_rank else None, on_every_rank)


def share_policy(ranks: Ranks, policy: Policy, vocabulary_parallel: bool = False) -> Policy:
    """The policy, trained by all ranks together; its embedding and head sharded where ``vocabulary_parallel``."""
    if ranks.world == 1:
        return policy
    from aapo_fast.trainer.sharded import ShardedPolicy  # whose imports take a second

    return ShardedPolicy(policy, ranks, vocabulary_parallel)


class SharedEngine:
    """A rollout engine whose samples every rank is given; see ``types.RolloutEngine``. Seeds belong to prompts, so the
    samples do not depend on who draws them.

    Args:
        ranks: all of which make the same calls.
        engine: this rank's, which draws its share of the prompts; None where the first rank's draws all (servers have
            batches of their own).
    """

    def __init__(self, ranks: Ranks, engine: RolloutEngine | None, on_every_rank: bool) -> None:
        self._ranks, self._engine, self._on_every_rank = ranks, engine, on_every_rank

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weights: Weights | Sequence[Weights] = "policy",
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        def draw(places: Sequence[int]) -> list[list[Sample]]:
            return self._own.generate(
                [prompts[i] for i in places],
                n=n,
                sampling=sampling,
                seeds=[seeds[i] for i in places],
                weights=weights if isinstance(weights, str) else [weights[i] for i in places],
                progress=progress,
            )

        places = range(len(prompts))
        return self._ranks.spread(places, draw) if self._on_every_rank else self._ranks.on_first(lambda: draw(places))

    def keep_reference(self) -> None:
        self._where_it_is(lambda own: own.keep_reference())

    def sync_weights(self, version: int) -> None:
        self._where_it_is(lambda own: own.sync_weights(version))

    def free_memory(self) -> None:
        self._where_it_is(lambda own: own.free_memory())

    def metrics(self) -> dict[str, float]:
        """Of this rank's engine."""
        return {} if self._engine is None else self._engine.metrics()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _own(self) -> RolloutEngine:
        assert self._engine is not None
        return self._engine

    def _where_it_is(self, work: Callable[[RolloutEngine], None]) -> None:
        where = self._ranks.each if self._on_every_rank else self._ranks.on_first
        where(lambda: work(self._own))


class SharedScorer(Scorer):
    """A worker process a rank, each with its share of the completions; every rank is given all scores."""

    def __init__(self, ranks: Ranks, rewards: Sequence[RewardConfig], config: ScoringConfig) -> None:
        self._ranks = ranks
        super().__init__(rewards, config)

    def score_all(self, completions: Sequence[tuple[Problem, str]]) -> list[Score]:
        return self._ranks.spread(completions, super().score_all)


class SharedCache:
    """The first rank's reference cache, which the others ask; ``missing``, ``rewards_of`` and ``fill`` are collective.

    Args:
        cache: None on every rank but the first.
    """

    def __init__(self, ranks: Ranks, cache: ReferenceCache | None) -> None:
        self._ranks, self._cache = ranks, cache

    @property
    def this_run_only(self) -> dict[str, list[float]]:
        return {} if self._cache is None else self._cache.this_run_only

    def missing(self, problems: Sequence[Problem]) -> list[Problem]:
        places = {id(problem): place for place, problem in enumerate(problems)}
        found = self._ranks.on_first(lambda: [places[id(p)] for p in self._own.missing(problems)])
        return [problems[place] for place in found]

    def fill(self, problems: Sequence[Problem], draw: Draw) -> None:
        todo = self.missing(problems)
        if not todo:
            return
        rewards = draw(todo, self._ranks.on_first(lambda: [self._own.seed_of(p) for p in todo]))
        drawn = {id(problem): of_problem for problem, of_problem in zip(todo, rewards, strict=True)}
        # Another run may have filled in some of them meanwhile.
        self._ranks.on_first(lambda: self._own.fill(todo, lambda left, _: [drawn[id(p)] for p in left]))

    def rewards_of(self, problems: Sequence[Problem]) -> list[list[float]]:
        return self._ranks.on_first(lambda: self._own.rewards_of(problems))

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    @property
    def _own(self) -> ReferenceCache:
        assert self._cache is not None
        return self._cache


class UnwrittenFolder(RunFolder):
    """The run's folder on the ranks that leave it to the first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, config: Mapping[str, Any], keep_model: bool = False) -> None:
        pass

    def close(self) -> None:
        pass

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        pass

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}

    def cut(self, sizes: Mapping[str, int]) -> list[str]:
        return []
