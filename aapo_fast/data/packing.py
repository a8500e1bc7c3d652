"""Microbatches to tensors, on the CPU: packed without padding and with shared prompts, or right-padded for models that
need it.

Packed, the tokens of a batch lie in one row. Completions of the same prompt share its tokens: the prompt is computed
once and each completion sees the prompt and itself. The last token of a completion predicts nothing and is left out.

    row:       p p p p | a a a | b b | q q q | c c c c
    sees:      causal  | p, a  | p, b| causal| q, c

Letters: T tokens of the packed row, B sequences, L longest sequence, S segments, Q queries, K keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aapo_fast.types import Batch, Ragged, Sample, Segments

Pair = tuple[list[int], list[int]]
"""Queries and keys of one attention problem, as positions in the packed row."""


@dataclass(frozen=True)
class Weighted:
    """A sample and its advantage."""

    sample: Sample
    advantage: float


def pack(samples: Sequence[Weighted], ragged: bool = False) -> Batch:
    """One packed row in which completions of the same prompt share its tokens; ``ragged`` for flash attention."""
    ids: list[int] = []
    positions: list[int] = []
    hidden_index: list[int] = []
    targets: list[int] = []
    sequence_index: list[int] = []
    rollout_logps: list[float] = []
    prompts: dict[tuple[int, ...], range] = {}
    problems: list[Pair] = []

    def append(tokens: Sequence[int], first_position: int) -> range:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        return range(start, len(ids))

    for index, weighted in enumerate(samples):
        prompt, completion = weighted.sample.prompt_ids, weighted.sample.token_ids
        if prompt not in prompts:
            prompts[prompt] = append(prompt, 0)
            problems.append((list(prompts[prompt]), list(prompts[prompt])))
        inputs = append(completion[:-1], len(prompt))
        if inputs:
            problems.append((list(inputs), [*prompts[prompt], *inputs]))
        hidden_index += [prompts[prompt][-1], *inputs]
        targets += completion
        sequence_index += [index] * len(completion)
        rollout_logps += weighted.sample.logprobs or [math.nan] * len(weighted.sample.token_ids)

    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        packing=_ragged(problems) if ragged else _in_buckets(problems, positions),
        hidden_index=torch.tensor(hidden_index),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequence_index),
        rollout_logps=torch.tensor(rollout_logps, dtype=torch.float32),
        advantages=torch.tensor([w.advantage for w in samples], dtype=torch.float32),
    )


def _ragged(problems: Sequence[Pair]) -> Ragged:
    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    queries, keys = [len(q) for q, _ in problems], [len(k) for _, k in problems]
    index = torch.tensor([i for _, seen in problems for i in seen])
    return Ragged(index, starts(queries), starts(keys), max(queries), max(keys))


def _in_buckets(problems: Sequence[Pair], positions: Sequence[int]) -> tuple[Segments, ...]:
    prompts = [pair for pair in problems if len(pair[0]) == len(pair[1])]
    completions = [pair for pair in problems if len(pair[0]) < len(pair[1])]
    buckets = [*_buckets(prompts), *_buckets(completions)]
    return tuple(_segments(bucket, positions) for bucket in buckets)


def _buckets(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Cut attention problems into groups of similar size, so that padding them to one shape at most doubles the scores:
    one long completion must not make a hundred short ones as long.
    """
    bucket: list[Pair] = []
    real = most_queries = most_keys = 0
    for queries, keys in sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0])), reverse=True):
        most_queries, most_keys = max(most_queries, len(queries)), max(most_keys, len(keys))
        real += len(queries) * len(keys)
        if bucket and (len(bucket) + 1) * most_queries * most_keys > 2 * real:
            yield bucket
            bucket, real, most_queries, most_keys = [], len(queries) * len(keys), len(queries), len(keys)
        bucket.append((queries, keys))
    if bucket:
        yield bucket


def _segments(pairs: Sequence[Pair], positions: Sequence[int]) -> Segments:
    """Pad the queries and keys of several attention problems to one shape."""
    most_queries = max(len(q) for q, _ in pairs)
    most_keys = max(len(k) for _, k in pairs)
    query = torch.tensor([q + [q[0]] * (most_queries - len(q)) for q, _ in pairs])
    key = torch.tensor([k + [k[0]] * (most_keys - len(k)) for _, k in pairs])
    where = torch.tensor(positions)
    distance = where[query][:, :, None] - where[key][:, None, :]
    real_key = torch.arange(most_keys) < torch.tensor([len(k) for _, k in pairs])[:, None]
    distance.masked_fill_(~real_key[:, None, :], -1)
    real_query = torch.arange(most_queries) < torch.tensor([len(q) for q, _ in pairs])[:, None]
    rows = real_query.flatten().nonzero().squeeze(1)
    return Segments(query, key, distance, rows, query.flatten()[rows])


def pad(samples: Sequence[Weighted], pad_token_id: int) -> Batch:
    """One right-padded row a sample, for models whose attention we cannot steer."""
    inputs = [[*w.sample.prompt_ids, *w.sample.token_ids[:-1]] for w in samples]
    length = max(len(row) for row in inputs)
    hidden_index: list[int] = []
    targets: list[int] = []
    sequence_index: list[int] = []
    rollout_logps: list[float] = []
    for index, weighted in enumerate(samples):
        first = index * length + len(weighted.sample.prompt_ids) - 1
        count = len(weighted.sample.token_ids)
        hidden_index += range(first, first + count)
        targets += weighted.sample.token_ids
        sequence_index += [index] * count
        rollout_logps += weighted.sample.logprobs or [math.nan] * len(weighted.sample.token_ids)
    return Batch(
        input_ids=torch.tensor([row + [pad_token_id] * (length - len(row)) for row in inputs]),
        position_ids=torch.arange(length).expand(len(inputs), length),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in inputs]),
        packing=None,
        hidden_index=torch.tensor(hidden_index),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequence_index),
        rollout_logps=torch.tensor(rollout_logps, dtype=torch.float32),
        advantages=torch.tensor([w.advantage for w in samples], dtype=torch.float32),
    )
