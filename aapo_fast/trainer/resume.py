"""Whether a run goes on with what is in its folder: which checkpoint it takes, and what may have changed since.

The same command can be given again and again (a batch system that requeues a job does): it begins the run, goes on with
it, or says that it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aapo_fast.config import Config, ConfigError, flatten
from aapo_fast.config.build import build
from aapo_fast.data.tasks import Problems
from aapo_fast.trainer.checkpoint import Checkpoint, CheckpointError, clear_unfinished, read, steps_written
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.trainer.records import CHECKPOINTS, CONFIG, SUMMARY, holds_a_run
from aapo_fast.types import UserError

UNSAID = frozenset({"run.folder", "run.overwrite", "run.resume"})
"""Keys that say how a run begins, and nothing of the run."""

MAY_CHANGE = UNSAID | frozenset({
    # how it is shown, and kept
    "run.tensorboard", "run.samples_kept", "eval.every",
    "checkpoint.every", "checkpoint.keep", "checkpoint.background",
    # guards, which decide only whether it goes on
    "train.max_nonfinite_steps", "scoring.max_failure_share", "scoring.time_limit_seconds", "vllm.max_logprob_gap",
    # where it is computed, and in what portions: other roundings, the same run
    "model.device", "model.attention", "model.activation_checkpointing", "model.compile", "model.liger",
    "model.vocabulary_parallel",
    "reference.cache", "rollout.max_batch_size", "train.max_microbatch_tokens", "train.offload_optimizer",
    "vllm.max_model_len", "vllm.gpu_memory_utilization", "vllm.cpu_kv_cache_gib", "vllm.tensor_parallel_size",
    "vllm.enforce_eager",
    "vllm.servers", "vllm.num_servers", "vllm.time_limit_seconds", "vllm.weights_folder", "vllm.address",
    "vllm.transfer",
})  # fmt: skip
"""Keys in which a run may differ from the one it resumes. Every other, a new one too, makes it another run."""


def finished_summary(config: Config) -> dict[str, Any] | None:
    """What the run in the folder came to, if it is to be resumed and is finished.

    Raises:
        UserError: it is another run.
    """
    if not config.run.resume or not _is_the_same_run(config):
        return None
    try:
        summary = json.loads((Path(config.run.folder) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "finished" else None


def find_checkpoint(config: Config, note: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint in the folder that can be used; None if the run begins.

    Args:
        config: of the run. Without ``run.resume`` it begins.
        note: told what was found, what was not used and why.

    Raises:
        UserError: the folder holds another run, or none of its checkpoints can be used.
    """
    folder = Path(config.run.folder)
    if not config.run.resume:
        return None
    refused = []
    clear_unfinished(folder / CHECKPOINTS)
    for step, path in steps_written(folder / CHECKPOINTS) if _is_the_same_run(config) else ():
        try:
            found = read(path)
            before = _config(found.state["config"], path)
            if changes := _decisive_changes(before, config):
                raise CheckpointError(f"{path} is of another run: {_told(changes)}")
        except CheckpointError as refusal:
            note(f"not resumed: {refusal}")
            refused.append(str(refusal))
            continue
        if changes := {k: v for k, v in _changes(before, config).items() if k not in UNSAID}:
            note(f"with other settings than before: {_told(changes)}")
        note(f"resuming after step {step} of {config.train.steps} from {path}")
        return found
    if refused:
        raise CheckpointError(
            f"no checkpoint in {folder / CHECKPOINTS} can be used: {'; '.join(refused)}; to begin anew, leave out "
            "--resume and give --run.overwrite true"
        )
    note(f"no checkpoint in {folder / CHECKPOINTS}: beginning with step 1")
    return None


def repeats(config: Config) -> bool:
    """Whether the folder's config is of this run, which is to be resumed: without a checkpoint it begins anew, and the
    model, saved at an error, stays until there is another.
    """
    path = Path(config.run.folder) / CONFIG
    try:
        before = _config(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError, CheckpointError):
        return False
    return config.run.resume and not _decisive_changes(before, config)


def identify(model: str, problems: Problems, rewards: str) -> dict[str, str]:
    """Digests of what the config only names, by the key that names it.

    Of the problems' columns the answer alone counts: others may read differently in the next process (sets do).

    Args:
        model: of the first weights (``Policy.fingerprint``).
        rewards: of the reward functions (``Scorer.version``).
    """
    digest = hashlib.sha256()
    for problem in (*problems.train, *problems.held_out):
        content = [problem.prompt, problem.prompt_ids, str(problem.columns.get("answer"))]
        digest.update(json.dumps(content).encode())
    return {"model.path": model, "data.source": digest.hexdigest(), "rewards": rewards}


def check_identity(found: Checkpoint, identity: Mapping[str, str]) -> None:
    """Raises UserError if model, data or reward functions have changed under the same names."""
    changed = [key for key, digest in found.state["identity"].items() if identity[key] != digest]
    if changed:
        raise UserError(
            f"{found.path} is of another run: what {' and '.join(changed)} stands for has changed since it began; put "
            "it back, or begin another run in another run.folder"
        )


def check_same_on_all(ranks: Ranks, identity: Mapping[str, str]) -> None:
    """Raises UserError if model, data or reward functions are not the same on every rank, which may be on machines with
    disks of their own.
    """
    first, *others = ranks.each(lambda: identity)
    for rank, other in enumerate(others, start=1):
        if changed := [key for key in first if other[key] != first[key]]:
            raise UserError(
                f"rank {rank} has other contents for {' and '.join(changed)} than rank 0; put the same files on every "
                "machine"
            )


def _is_the_same_run(config: Config) -> bool:
    """Whether the folder's config is that of this run; False where there is nothing, or what may be replaced.

    Raises:
        UserError: the folder holds another run, which may not be replaced.
    """
    folder = Path(config.run.folder)
    if not holds_a_run(folder):
        return False
    path = folder / CONFIG
    try:
        before = _config(json.loads(path.read_text(encoding="utf-8")), path)
        changes = _told(_decisive_changes(before, config))
    except (OSError, ValueError, CheckpointError) as error:
        if any(steps_written(folder / CHECKPOINTS)):  # which say for themselves what they are of
            return True
        changes = f"its {CONFIG} cannot be read: {error}"
    if changes and not config.run.overwrite:
        raise UserError(f"run.folder={str(folder)!r} holds another run: {changes}; set it back, or name another folder")
    return not changes


def _config(tree: dict[str, Any], path: Path) -> Config:
    try:
        return build(Config, tree)  # unchecked: what is refused today may have run then
    except ConfigError as error:  # an option that is no more
        raise CheckpointError(f"{path} was written by another version of aapo-fast: {error}") from error


def _changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both."""
    old, new = flatten(before), flatten(now)
    return {key: (old.get(key), new.get(key)) for key in old | new if _as_json(old.get(key)) != _as_json(new.get(key))}


def _as_json(value: Any) -> str:
    """As it is written down: TOML knows dates, JSON does not."""
    return json.dumps(value, sort_keys=True, default=str)


def _decisive_changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    return {key: values for key, values in _changes(before, now).items() if key not in MAY_CHANGE}


def _told(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changes.items())
