"""What can be measured: heads of real models, row distributions, dtypes. No torch here: the command line reads it.

Letters: N rows (tokens), H hidden, V vocabulary.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aapo_fast.types import UserError


@dataclass(frozen=True)
class Head:
    """An output head: hidden size, vocabulary, and the final soft-cap of models that have one."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


HEADS = {
    head.name: head
    for head in (
        Head("smollm2-135m", 576, 49152),
        Head("qwen2.5-0.5b", 896, 151936),
        Head("qwen2.5-1.5b", 1536, 151936),
        Head("qwen2.5-7b", 3584, 152064),
        Head("qwen3-8b", 4096, 151936),
        Head("llama-3-8b", 4096, 128256),
        Head("gemma-2-2b", 2304, 256000, softcap=30.0),
    )
}

DISTRIBUTIONS = {
    "model-like": "rows of 1.66 nats on average; a number is others: --distribution 1.66 3 5",
    "peaked": "one token nearly certain, p > 0.999 in nearly every row",
    "flat": "nearly uniform rows",
}

MODEL_ENTROPY = 1.66
"""Mean entropy in nats of 1,298 tokens that SmolLM2-135M sampled. At other prompts its samples have 2.0 to 2.9, those
of the model that the quickstart has trained 0.1 to 0.5 (docs/LOG.md, docs/accuracy.md)."""

NATS = " nats"

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """One problem to measure everything on.

    Attributes:
        head: the head.
        rows: N, how many tokens.
        dtype: of hidden states and weight.
        distribution: one of ``DISTRIBUTIONS``, or "3 nats": rows like "model-like" of that mean entropy.
    """

    head: Head
    rows: int
    dtype: str
    distribution: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.head.hidden, self.head.vocab

    @property
    def product_flops(self) -> float:
        """Floating-point operations of one matrix product, G."""
        return 2.0 * self.rows * self.head.hidden * self.head.vocab

    @property
    def label(self) -> str:
        return f"{self.head.name} {self.shape}, {self.dtype}, {self.distribution}"


def cases(
    shapes: Sequence[str], rows: Sequence[int], dtypes: Sequence[str], distributions: Sequence[str]
) -> list[Case]:
    """Every combination, in the order given; ``N,H,V`` brings its own rows, a head's name takes all of ``rows``.

    Raises:
        UserError: a name is unknown, a shape is no shape, or an entropy is beyond what a vocabulary can have.
    """
    check_names("--dtype", dtypes, DTYPES)
    distributions = [_parse_distribution(text) for text in distributions]
    pairs = [pair for text in shapes for pair in _parse_shape(text, rows)]
    for (head, _), text in itertools.product(pairs, distributions):
        _check_entropy(text, head)
    return list(
        dict.fromkeys(
            Case(head, n, dtype, distribution)
            for head, n in pairs
            for dtype in dtypes
            for distribution in distributions
        )
    )


def entropy_of(distribution: str) -> float | None:
    """Mean entropy in nats of rows whose logits are Gaussian; None for other rows."""
    if distribution == "model-like":
        return MODEL_ENTROPY
    return float(distribution.removesuffix(NATS)) if distribution.endswith(NATS) else None


def check_names(option: str, given: Iterable[str], known: Iterable[str], more: str = "") -> None:
    """Refuse the first name that is not known, and suggest the nearest."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (is it {near[0]}?)" if near else ""
            raise UserError(f"{option} {name!r} is unknown{hint}; use one of {', '.join(known)}{more}")


def _parse_distribution(text: str) -> str:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return f"{float(text):g}{NATS}"
    check_names("--distribution", [text], DISTRIBUTIONS, "; or a mean entropy in nats")
    return text


def _check_entropy(distribution: str, head: Head) -> None:
    """``inputs`` gives soft-capped rows a few tokens that stand out, and can make no others."""
    nats = entropy_of(distribution)
    most = 0.95 * math.log(head.vocab) if head.softcap is None else 2.5
    if nats is not None and distribution != "model-like" and not 0.1 <= nats <= most:
        raise UserError(f"--distribution {nats:g}: rows of {head.name} are made with 0.1 to {most:.1f} nats")


def _parse_shape(text: str, rows: Sequence[int]) -> list[tuple[Head, int]]:
    if text in HEADS:
        return [(HEADS[text], n) for n in rows]
    if "," not in text:
        check_names("--shape", [text], [*HEADS, "N,H,V"])
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text):
        raise UserError(f"--shape {text!r}: give N,H,V as three positive integers, for example 1024,576,49152")
    n, hidden, vocab = map(int, text.split(","))
    if vocab < 2:
        raise UserError(f"--shape {text!r}: a vocabulary needs at least two tokens")
    known = (h for h in HEADS.values() if (h.hidden, h.vocab, h.softcap) == (hidden, vocab, None))
    return [(next(known, Head(f"H{hidden}-V{vocab}", hidden, vocab)), n)]
