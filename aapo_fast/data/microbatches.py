"""A step's samples cut into microbatches: filled to a token budget, and for several ranks of equal work besides.

Every microbatch of several ranks is a collective pass, in which all wait for the one that has most to compute. Tokens
alone do not say which that is: attention grows with the square of a completion's length. So work is counted, and the
cut made by MULTIFIT (Coffman, Garey and Johnson, SIAM J. Comput. 7, 1978): pieces go, the largest first, each into the
first microbatch that it fits into, under the smallest limit of work for which that succeeds.

Rows that are right-padded share nothing, and each takes as much as the longest of its microbatch. They go by length, so
that little is padding, and equal work is a matter of where the next microbatch begins.

Letters: P tokens of a prompt, C tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aapo_fast.data.packing import Weighted

RISE = 1.01
"""Each limit of work that is tried, of the one before it."""


@dataclass(frozen=True)
class Work:
    """What a batch takes, forward and backward, in any unit.

    Attributes:
        token: of a token in the layers.
        pair: of a query and a key that it sees, in all layers.
        target: of a predicted token, in the head.
        packed: whether a batch is one packed row with shared prompts, or rows that are padded.
    """

    token: float
    pair: float
    target: float
    packed: bool = True

    def of_prompt(self, weighted: Weighted) -> float:
        """Of its prompt, which completions share."""
        tokens = len(weighted.sample.prompt_ids)
        return self.token * tokens + self.pair * tokens * (tokens + 1) / 2

    def of_completion(self, weighted: Weighted) -> float:
        """Of the rest: C - 1 tokens, the last of which predicts nothing, that see the prompt and those before them."""
        prompt, targets = len(weighted.sample.prompt_ids), len(weighted.sample.token_ids)
        tokens = targets - 1
        return self.token * tokens + self.pair * tokens * (prompt + (tokens + 1) / 2) + self.target * targets

    def of_rows(self, rows: int, longest: int, targets: int) -> float:
        """Of rows padded to the tokens of the longest, the last of which predicts nothing; ``targets`` of all."""
        tokens = longest - 1
        return rows * (self.token * tokens + self.pair * tokens * (tokens + 1) / 2) + self.target * targets

    def of(self, samples: Sequence[Weighted]) -> float:
        """Of one batch."""
        if not self.packed:
            targets = sum(len(w.sample.token_ids) for w in samples)
            return self.of_rows(len(samples), max(map(_length, samples), default=1), targets)
        prompts = {w.sample.prompt_ids: self.of_prompt(w) for w in samples}
        return sum(prompts.values()) + sum(map(self.of_completion, samples))


UNCOUNTED = Work(0.0, 0.0, 0.0)


def microbatches(
    samples: Sequence[Weighted], max_tokens: int, work: Work = UNCOUNTED, max_work: float = math.inf
) -> Iterator[list[Weighted]]:
    """Cut a step into parts of at most ``max_tokens`` and ``max_work``, packed or padded as ``work`` says. Packed, the
    completions of one prompt stay together while they fit. A single sample may exceed either limit, and then travels
    alone.
    """
    if not work.packed:
        yield from _padded(samples, max_tokens, work, max_work)
        return
    ordered = sorted(samples, key=lambda w: w.sample.prompt_ids)  # stable: brings equal prompts together
    part: list[Weighted] = []
    tokens, done = 0, 0.0
    for weighted in ordered:
        prompt, completion = weighted.sample.prompt_ids, len(weighted.sample.token_ids)
        alone = completion + len(prompt), work.of_completion(weighted) + work.of_prompt(weighted)
        shared = bool(part) and part[-1].sample.prompt_ids == prompt
        more = (completion, work.of_completion(weighted)) if shared else alone
        if part and (tokens + more[0] > max_tokens or done + more[1] > max_work):
            yield part
            part, tokens, done, more = [], 0, 0.0, alone
        part.append(weighted)
        tokens, done = tokens + more[0], done + more[1]
    if part:
        yield part


def _padded(samples: Sequence[Weighted], max_tokens: int, work: Work, max_work: float) -> Iterator[list[Weighted]]:
    """The longest first, which the others are padded to."""
    part: list[Weighted] = []
    longest = targets = 0
    for weighted in sorted(samples, key=_length, reverse=True):  # stable
        rows, more = len(part) + 1, len(weighted.sample.token_ids)
        if part and (rows * longest > max_tokens or work.of_rows(rows, longest, targets + more) > max_work):
            yield part
            part = []
        if not part:
            longest, targets = _length(weighted), 0
        part.append(weighted)
        targets += more
    if part:
        yield part


def _length(weighted: Weighted) -> int:
    return len(weighted.sample.prompt_ids) + len(weighted.sample.token_ids)


def rounds(samples: Sequence[Weighted], max_tokens: int, work: Work, ranks: int) -> list[list[list[Weighted]]]:
    """Microbatches for several ranks, one of each rank a round, the rounds with most work first; in the last some may
    be empty. One rank waits for nobody, and its own are only filled.

    Groups of completions are cut where they do not fit a microbatch whole. The same samples give the same cut on every
    rank.
    """
    filled = list(microbatches(samples, max_tokens, work))
    if ranks == 1 or not samples:
        return [[part] for part in filled]
    groups = _by_prompt(samples) if work.packed else [[weighted] for weighted in samples]

    def cut(max_work: float) -> list[list[Weighted]]:
        if work.packed:
            return _first_fit(groups, max_tokens, work, max_work)
        return list(microbatches(samples, max_tokens, work, max_work))

    count = -(-len(filled) // ranks) * ranks
    while len(cut(math.inf)) > count:  # hardly ever: filling cuts more groups
        count += ranks
    limit = sum(map(work.of, groups)) / count
    while len(parts := cut(limit)) > count:
        limit *= RISE
    # Beside a sample far over the budget, whose work raises the limit of all, it may be fewer rounds.
    parts = sorted(parts, key=work.of, reverse=True) + [[]] * (-len(parts) % ranks)
    return [parts[first : first + ranks] for first in range(0, len(parts), ranks)]


def _by_prompt(samples: Sequence[Weighted]) -> list[list[Weighted]]:
    """Completions of each prompt, the longest first."""
    groups: dict[tuple[int, ...], list[Weighted]] = {}
    for weighted in sorted(samples, key=lambda w: -len(w.sample.token_ids)):  # stable
        groups.setdefault(weighted.sample.prompt_ids, []).append(weighted)
    return list(groups.values())


def _first_fit(
    groups: Sequence[Sequence[Weighted]], max_tokens: int, work: Work, max_work: float
) -> list[list[Weighted]]:
    """Microbatches within both limits, from pieces of groups."""
    pieces = [piece for group in groups for piece in microbatches(group, max_tokens, work, max_work)]
    sized = [(work.of(piece), _tokens(piece), piece) for piece in pieces]
    parts: list[list[Weighted]] = []
    left: list[tuple[float, int]] = []
    for amount, tokens, piece in sorted(sized, key=lambda s: -s[0]):
        place = next((i for i, (a, t) in enumerate(left) if amount <= a and tokens <= t), len(parts))
        if place == len(parts):
            parts.append([])
            left.append((max_work, max_tokens))
        parts[place] += piece
        left[place] = left[place][0] - amount, left[place][1] - tokens
    return parts


def _tokens(piece: Sequence[Weighted]) -> int:
    """Of completions of one prompt."""
    return len(piece[0].sample.prompt_ids) + sum(len(w.sample.token_ids) for w in piece)


def waiting_share(cut: Sequence[Sequence[Sequence[Weighted]]], work: Work) -> float:
    """Share of the ranks' time in which they wait for the one with most work in each round; 0 for one rank."""
    amounts = [[work.of(part) for part in parts] for parts in cut]
    longest = sum(len(amount) * max(amount) for amount in amounts)
    return 1.0 - sum(map(sum, amounts)) / longest if longest else 0.0
