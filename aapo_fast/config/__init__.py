"""Configuration: read from TOML with dotted overrides, and checked before anything heavy is imported.

What is wrong is one line that names the key, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aapo_fast.config.benchmarks import apply_benchmark, benchmark_names
from aapo_fast.config.build import ConfigError, build, override, read_toml, type_name
from aapo_fast.config.checks import check
from aapo_fast.config.layers import (
    AdvantageConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ScoringConfig,
    TrainConfig,
    VLLMConfig,
)

__all__ = [
    "ConfigError",
    "RunConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "DataConfig",
    "RewardConfig",
    "ScoringConfig",
    "RolloutConfig",
    "VLLMConfig",
    "ReferenceConfig",
    "AdvantageConfig",
    "TrainConfig",
    "EvalConfig",
    "CheckpointConfig",
    "Config",
    "benchmark_names",
    "describe",
    "flatten",
    "load",
    "parse",
    "to_dict",
]


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = (), benchmark: str = "") -> Config:
    """Read a TOML file, put a benchmark's data, rewards and sampling in the place of its own (``NAME`` or
    ``NAME=SOURCE``, see ``config.benchmarks``), apply dotted overrides (``("train.steps", "20")``), check everything.

    Raises:
        ConfigError: one line that names the file or key, the value, and what would be right.
    """
    tree = read_toml(Path(path))
    if benchmark:
        tree = apply_benchmark(tree, benchmark)
    for key, text in overrides:
        override(tree, key, text)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Config:
    """A checked ``Config`` from nested tables; see ``load``."""
    config = build(Config, tree)
    check(config)
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
            yield key, type_name(hints[f.name]), repr(getattr(defaults, f.name)), f.metadata["help"]


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted key; the entries of [[rewards]] are counted from 0."""
    flat: dict[str, Any] = {}
    for layer, values in to_dict(config).items():
        for index, entry in enumerate(values) if isinstance(values, list) else [("", values)]:
            flat |= {f"{layer}.{index}.{k}" if index != "" else f"{layer}.{k}": v for k, v in entry.items()}
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Nested tables that ``parse`` takes back."""
    return dataclasses.asdict(config)
