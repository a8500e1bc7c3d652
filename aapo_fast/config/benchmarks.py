"""Benchmarks by name: what ``benchmarks.toml`` puts in the place of a config's data, rewards and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aapo_fast.config.build import ConfigError, read_toml

PRESETS = Path(__file__).with_name("benchmarks.toml")
COMMON = "all"


def benchmark_names() -> list[str]:
    """Of every benchmark there is."""
    return [name for name in read_toml(PRESETS) if name != COMMON]


def apply_benchmark(tree: Mapping[str, Any], wanted: str) -> dict[str, Any]:
    """A config's tables with those of a benchmark: its [data] and [[rewards]] whole, of [rollout] and [eval] what it
    names.

    Args:
        tree: the config's.
        wanted: ``NAME``, or ``NAME=SOURCE`` to read it from a copy, in the form of data.source.

    Raises:
        ConfigError: there is no such benchmark.
    """
    name, _, source = wanted.partition("=")
    presets = read_toml(PRESETS)
    common = presets.pop(COMMON)
    if name not in presets:
        raise ConfigError(f"--benchmarks {name!r} is not known; known are {', '.join(presets)}")
    data = {**common["data"], **presets[name]["data"]}
    if source:
        data["source"] = source
    rollout = {**tree.get("rollout", {}), **common["rollout"]}
    evaluation = {**tree.get("eval", {}), **common["eval"]}
    return {**tree, "data": data, "rewards": common["rewards"], "rollout": rollout, "eval": evaluation}
