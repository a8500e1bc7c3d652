"""Reward functions: the ones that are built in, and loading one by import path.

A reward function has TRL's form and is called with one completion at a time, so that what fails, fails alone:

    def my_reward(completions: list[str], prompts: list[str], **columns: list) -> list[float]

``columns`` are the columns of the data set, each a list of one. A bare number is as good as a list of one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aapo_fast.config import RewardConfig

RewardFunction = Callable[..., Any]

LARGEST_REWARD = 3.4028234663852886e38
"""Of the float32 numbers that advantages are computed from; beyond, a reward would be infinite there."""


class RewardError(Exception):
    """A reward function gave no usable value; the text says what it gave."""


def load(config: RewardConfig) -> RewardFunction:
    """The function that [[rewards]] names. Raises whatever its import raises."""
    if config.function == "format":
        return _format(config.pattern)
    if config.function in _PACKAGES:
        importlib.import_module(_PACKAGES[config.function])  # now: no completion's time limit is for importing ...
    if config.function in ("math_verify", "cosine"):
        _math_verify(["1"], [""], answer=["1"])  # ... or for compiling math-verify's expressions
    if config.function == "cosine":
        return _cosine(**config.options)
    if config.function in _BUILTIN:
        return _BUILTIN[config.function]
    module, name = config.function.split(":")
    return getattr(importlib.import_module(module), name)


def call(
    function: RewardFunction, config: RewardConfig, prompt: str, completion: str, columns: Mapping[str, Any]
) -> float:
    """The reward of one completion.

    Raises:
        RewardError: not one number came back that is finite in float32.
        Exception: whatever the function raises.
    """
    if config.extract:
        match = re.search(config.extract, completion, re.DOTALL)
        completion = "" if match is None else (match[match.re.groups and 1] or "")
    lists = {key: [value] for key, value in columns.items() if key not in ("completions", "prompts")}
    result = function(completions=[completion], prompts=[prompt], **lists)
    try:
        values = list(result)
    except TypeError:
        values = [result]
    if len(values) != 1:
        raise RewardError(f"returned {len(values)} values for one completion")
    try:
        value = math.nan if isinstance(values[0], (str, bytes)) else float(values[0])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(f"returned {reprlib.repr(values[0])}, no finite number")
    if abs(value) > LARGEST_REWARD:
        raise RewardError(f"returned {value}, no finite number in float32")
    return value


def source_digest(config: RewardConfig) -> str:
    """What the function's code is, as far as that can be told without running it: a digest of its module's file, or the
    version of the package behind a built-in function.
    """
    if config.function in _PACKAGES:
        try:
            return version(_PACKAGES[config.function])
        except PackageNotFoundError:
            return ""
    if config.function == "format":
        return ""
    try:
        spec = importlib.util.find_spec(config.function.split(":")[0])
    except (ImportError, ValueError):
        return ""
    origin = None if spec is None else spec.origin
    if origin is None or not Path(origin).is_file():
        return ""
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest()


def check_answer(config: RewardConfig, columns: Mapping[str, Any]) -> str | None:
    """What is wrong with the right answer of a data row, for this reward; None when it can be used."""
    if config.function in ("math_verify", "cosine") and not _parse_gold(str(columns["answer"])):
        return f"answer {columns['answer']!r} cannot be parsed by math_verify"
    if config.function == "reasoning_gym" and "source_dataset" not in (columns.get("metadata") or {}):
        return "there is no metadata.source_dataset; the reward reasoning_gym scores rows of a reasoning_gym source"
    return None


# --- built in --------------------------------------------------------------------------------------------------------


def _reasoning_gym(completions: list[str], prompts: list[str], **columns: list[Any]) -> list[float]:
    """The task's own scorer: 1 for the right answer, the task's partial credit, or 0."""
    import reasoning_gym

    entry = {key: values[0] for key, values in columns.items()}
    score = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
    return [score(completion, entry) for completion in completions]


def _math_verify(completions: list[str], prompts: list[str], **columns: list[Any]) -> list[float]:
    """1 if math-verify finds the completion's final answer equal to the gold answer, else 0.

    What is in a box goes before every other form of a final answer, as in the graders of open-r1 and open-rs. Numbers
    in e-notation are numbers; by itself math-verify takes the e of 4.5e33 for Euler's.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = _parse_gold(str(columns["answer"][0]))
    forms = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    # No time limit of its own: ours ends the whole process, which a hanging simplification cannot ignore.
    return [
        float(verify(gold, parse(text, extraction_config=forms, parsing_timeout=None), timeout_seconds=None))
        for text in map(_in_powers_of_ten, completions)
    ]


@cache
def _parse_gold(gold: str) -> Any:
    from math_verify import parse

    # Bare LaTeX is only read as such between dollars; without, "\frac{1}{2}" would be read as the number 2.
    text = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    return parse(_in_powers_of_ten(text), parsing_timeout=None)


def _in_powers_of_ten(text: str) -> str:
    return re.sub(r"(\d)[eE]([+-]?\d+)\b", r"\1 \\times 10^{\2}", text)


def _format(pattern: str) -> RewardFunction:
    """1 if the whole completion matches the regular expression, else 0."""
    expression = re.compile(pattern, re.DOTALL)

    def matches(completions: list[str], **_: Any) -> list[float]:
        return [float(expression.fullmatch(completion) is not None) for completion in completions]

    return matches


def _cosine(max_length: float, correct: list[float], wrong: list[float]) -> RewardFunction:
    """The length-scaled reward of Yeo et al., arXiv 2502.03373. Of a completion of n characters, n <= L = max_length:

        r_L + (r_0 - r_L) (1 + cos(pi n / L)) / 2

    with (r_0, r_L) = ``correct`` if ``_math_verify`` finds it right, else ``wrong``. The paper counts tokens; open-r1's
    ``get_cosine_scaled_reward`` counts characters, as here, for a reward function sees text. Beyond L the reward stays
    at r_L (there it would rise again with the cosine).
    """

    def scaled(completions: list[str], prompts: list[str], **columns: list[Any]) -> list[float]:
        verdicts = _math_verify(completions, prompts, **columns)
        rewards = []
        for completion, verdict in zip(completions, verdicts, strict=True):
            at_zero, at_end = correct if verdict else wrong
            progress = min(1.0, len(completion) / max_length)
            rewards.append(at_end + (at_zero - at_end) * 0.5 * (1.0 + math.cos(math.pi * progress)))
        return rewards

    return scaled


_BUILTIN: dict[str, RewardFunction] = {"reasoning_gym": _reasoning_gym, "math_verify": _math_verify}

_PACKAGES = {"reasoning_gym": "reasoning_gym", "math_verify": "math_verify", "cosine": "math_verify"}
"""What the built-in functions are computed by."""
