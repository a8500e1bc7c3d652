"""What can be measured: heads of real models, row distributions, dtypes. No torch here: the command line reads it.

Letters: N rows (tokens), H hidden, V vocabulary.
"""

from __future__ import annotations

import difflib
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
    "model-like": "rows of 1.66 nats on average, what a real model's own samples have",
    "peaked": "one token nearly certain, p > 0.999 in nearly every row",
    "flat": "nearly uniform rows",
}

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """One problem to measure everything on.

    Attributes:
        head: the head.
        rows: N, how many tokens.
        dtype: of hidden states and weight.
        distribution: one of ``DISTRIBUTIONS``.
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
        UserError: a name is unknown or a shape is no shape.
    """
    check_names("--dtype", dtypes, DTYPES)
    check_names("--distribution", distributions, DISTRIBUTIONS)
    pairs = [pair for text in shapes for pair in _parse_shape(text, rows)]
    return list(
        dict.fromkeys(
            Case(head, n, dtype, distribution)
            for head, n in pairs
            for dtype in dtypes
            for distribution in distributions
        )
    )


def check_names(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that is not known, and suggest the nearest."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (is it {near[0]}?)" if near else ""
            raise UserError(f"{option} {name!r} is unknown{hint}; use one of {', '.join(known)}")


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
