"""Everything a run needs, built from its config in the order in which mistakes are cheapest to report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from aapo_fast.config import Config, ConfigError, to_dict
from aapo_fast.data.tasks import HUB, Problems, load_problems, order
from aapo_fast.models.flash import broken_packages
from aapo_fast.models.liger import broken_package
from aapo_fast.models.load import cache_folder, max_positions, model_source
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.rollout.reference import ReferenceCache
from aapo_fast.trainer.background import Background
from aapo_fast.trainer.checkpoint import Checkpoint
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.engine import engine_version, make_engine
from aapo_fast.trainer.policy import Policy, resolve_device
from aapo_fast.trainer.ranks import ONE, Ranks
from aapo_fast.trainer.records import RunFolder, only_process, replaced_in
from aapo_fast.trainer.resume import check_identity, check_same_on_all, find_checkpoint, identify, repeats
from aapo_fast.trainer.shared import SharedCache, share_cache, share_engine, share_folder, share_policy, share_scorer
from aapo_fast.trainer.step import make_optimizer
from aapo_fast.types import DataError, Problem, RolloutEngine, SamplingParams


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        ranks: that this run has; what follows is as if there were one, unless it says otherwise.
        schedule: the problems of each step.
        identity: digests of what the config only names (``trainer.resume``).
        resumed: the checkpoint that it goes on from, or None.
        background: writes checkpoints beside the training.
    """

    config: Config
    ranks: Ranks
    display: Display
    folder: RunFolder
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    problems: Problems
    schedule: list[list[Problem]]
    sampling: SamplingParams
    optimizer: torch.optim.Optimizer
    cache: ReferenceCache | SharedCache | None
    identity: dict[str, str]
    resumed: Checkpoint | None
    background: Background


@contextmanager
def prepare(config: Config, display: Display, ranks: Ranks = ONE) -> Iterator[Run]:
    """Load and check everything; on leaving, end the reward process and close the cache.

    Raises:
        UserError: what cannot be used, in one line.
    """
    check_offload(config)
    check_folder(config)
    torch.manual_seed(config.run.seed)
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(only_process(Path(config.run.folder), display.note)))
        background = Background()
        stack.callback(background.finish)
        resumed = ranks.on_first(lambda: find_checkpoint(config, display.note))
        folder = share_folder(ranks, Path(config.run.folder), lambda: open_folder(config, resumed))
        stack.callback(folder.close)
        # Its process starts while the model loads.
        scorer = stack.enter_context(share_scorer(ranks, config.rewards, config.scoring))
        display.note(f"loading {config.model.path}")
        ranks.one_a_machine(lambda: model_source(config.model.path))  # converted once, if it must be
        policy = Policy.from_config(config.model, config.rollout.temperature, config.loss, config.lora)
        if config.lora.rank:
            trained, every = policy.num_parameters()
            display.note(f"LoRA of rank {config.lora.rank}: {trained:,} of {every:,} parameters are trained")
        if policy.device.type == "cuda":
            display.note(policy.how_computed())
            for what in passed_over(config):
                display.note(what)
        if not policy.packed:
            display.note(
                f"{type(policy.model).__name__}: batches are padded, one row a completion, and prompts are not shared; "
                f"{policy.why_padded}"
            )
        problems = load_problems(config.data, policy.tokenizer, config.run.seed)
        both = [*problems.train, *problems.held_out]
        check_lengths(both, max_positions(policy.model), config.rollout.max_tokens)
        schedule = make_schedule(config, problems.train)
        if (draws := sum(map(len, schedule))) > (few := len(problems.train)):
            display.note(f"{few} training problems for {draws} draws: gone through {draws / few:.3g} times, reshuffled")
        with display.progress("checking answers") as progress:
            scorer.check([*problems.held_out, *problems.train], progress)
        identity = identify(policy.fingerprint(), problems, scorer.version())
        check_same_on_all(ranks, identity)
        if resumed is not None:
            check_identity(resumed, identity)
        sampling = sampling_params(config)
        cache = None
        if config.reference.mode == "cached":
            cache = share_cache(ranks, lambda: open_cache(config, policy, identity, sampling))
            stack.callback(cache.close)
            cache.this_run_only.update(resumed.state["reference"] if resumed else {})
        engine = share_engine(ranks, config.rollout.engine, lambda: make_engine(config, policy, folder.path, display))
        stack.callback(engine.close)
        shared = share_policy(ranks, policy, config.model.vocabulary_parallel)
        optimizer = make_optimizer(shared, config.train)
        folder.begin(to_dict(config), keep_model=repeats(config))  # now that nothing is amiss
        yield Run(
            config=config,
            ranks=ranks,
            display=display,
            folder=folder,
            policy=shared,
            engine=engine,
            scorer=scorer,
            problems=problems,
            schedule=schedule,
            sampling=sampling,
            optimizer=optimizer,
            cache=cache,
            identity=identity,
            resumed=resumed,
            background=background,
        )


def passed_over(config: Config) -> list[str]:
    """Optional packages that would be used on a GPU, were they not broken."""
    found = broken_packages() if config.model.attention == "auto" else []
    if config.model.liger == "auto" and not config.model.compile and (what := broken_package()):
        found.append(what)
    return found


def check_lengths(problems: Sequence[Problem], limit: float, max_tokens: int) -> None:
    """Raises DataError if the longest prompt and a completion are more tokens than the model has positions."""
    longest = max(problems, key=lambda problem: len(problem.prompt_ids))
    if len(longest.prompt_ids) + max_tokens > limit:
        raise DataError(
            f"{longest.row} makes a prompt of {len(longest.prompt_ids)} tokens: with rollout.max_tokens={max_tokens} "
            f"that is beyond the model's {limit} positions; lower rollout.max_tokens, or leave out such rows"
        )


def check_folder(config: Config) -> None:
    """Raises ConfigError where the run would replace in its folder what it is made from, or has none."""
    if not config.run.folder:
        raise ConfigError("run.folder is empty; name a folder, which the run makes")
    try:
        folder = Path(config.run.folder).resolve()
        replaced = [path.resolve() for path in replaced_in(folder)]
    except (OSError, ValueError, RuntimeError) as error:  # links in a circle, a name that no system takes
        raise ConfigError(f"run.folder={config.run.folder!r} cannot be a folder: {error}; name another") from error
    for key, value in (("model.path", config.model.path), ("data.source", config.data.source.removeprefix(HUB))):
        try:
            source = Path(value).resolve()
        except (OSError, ValueError, RuntimeError):  # no path: what loads it has the words
            continue
        if os.path.exists(source) and (source == folder or any(source.is_relative_to(path) for path in replaced)):
            raise ConfigError(
                f"run.folder={config.run.folder!r}: the run would replace {key}={value!r} in it; name another folder"
            )


def check_offload(config: Config) -> None:
    """Raises ConfigError where there is no device to make room on."""
    if config.train.offload_optimizer and resolve_device(config.model.device).type == "cpu":
        raise ConfigError(
            "train.offload_optimizer=true: the model is on the CPU, in whose memory the optimizer is; leave it out"
        )


def open_folder(config: Config, resumed: Checkpoint | None) -> RunFolder:
    """The run's folder, as it is until the run begins."""
    return RunFolder(
        Path(config.run.folder),
        overwrite=config.run.overwrite or config.run.resume,
        tensorboard=config.run.tensorboard,
        resumed_step=resumed.step if resumed else None,
    )


def sampling_params(config: Config) -> SamplingParams:
    """[rollout] as the engine takes it."""
    rollout = config.rollout
    return SamplingParams(rollout.temperature, rollout.top_p, rollout.max_tokens, tuple(rollout.stop))


def make_schedule(config: Config, train: list[Problem]) -> list[list[Problem]]:
    """The problems of every step, decided before the first: so the reference can be drawn ahead of it."""
    width = config.rollout.prompts_per_step
    if len(train) < width:
        raise ConfigError(f"rollout.prompts_per_step={width} exceeds the {len(train)} training problems")
    drawn = order(len(train), config.train.steps * width, config.run.seed)
    return [[train[i] for i in drawn[s * width : (s + 1) * width]] for s in range(config.train.steps)]


def open_cache(config: Config, policy: Policy, identity: dict[str, str], sampling: SamplingParams) -> ReferenceCache:
    """The reference cache of this model, sampling, seed and rewards."""
    return ReferenceCache(
        Path(config.reference.cache) if config.reference.cache else cache_folder() / "reference.sqlite",
        model=identity["model.path"] + engine_version(config, policy.device),
        reward_version=identity["rewards"],
        sampling=sampling,
        samples=config.reference.samples,
        seed=config.run.seed,
    )


def rollout_seed(run_seed: int, step: int, index: int) -> int:
    """The seed of problem ``index`` of a step; unrelated to that of any other."""
    digest = hashlib.sha256(f"{run_seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
