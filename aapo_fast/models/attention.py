"""Attention over packed rows, through Transformers' attention interface.

The model is loaded with the attention named ``NAME``. A call that brings ``packing=`` (a packed training batch) runs
the problems of the batch, by flash attention where the packing has it; any other call (generation, with its KV cache)
is Transformers' own SDPA, or the same sums written out where the model caps its attention scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aapo_fast.models.flash import Flash, Scores
from aapo_fast.types import Ragged, Segments

NAME = "aapo_fast_packed"


class UnpackableError(ValueError):
    """What a model's attention does would be lost in packed batches."""


@dataclass(frozen=True, eq=False)
class Packing:
    """The attention problems of a packed batch, and what computes ragged ones. One object, which compiled layers hand
    on unopened: they are the same code however many problems there are (a tuple's length they would insist on).
    """

    problems: tuple[Segments, ...] | Ragged
    flash: Flash | None


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """(1, heads, T, D) queries and (1, kv_heads, T, D) keys and values to (1, T, heads, D)."""
    if packing is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unseen_window(module, sliding_window)
    groups = query.shape[1] // key.shape[1]
    if packing is None:  # no SDPA kernel caps its scores
        seen = _causal(query, key) if attention_mask is None else attention_mask
        return _attend(query, key, value, seen, scaling, dropout, softcap, groups).transpose(1, 2), None
    rows_q, rows_k, rows_v = (t[0].transpose(0, 1) for t in (query, key, value))
    problems = packing.problems
    if isinstance(problems, Ragged):
        assert packing.flash is not None
        rows_q, rows_k, rows_v = (_autocast(t) for t in (rows_q, rows_k, rows_v))
        seen_k, seen_v = rows_k.index_select(0, problems.key_index), rows_v.index_select(0, problems.key_index)
        return packing.flash(rows_q, seen_k, seen_v, problems, Scores(scaling, sliding_window, softcap))[None], None
    results, places = [], []
    for segments in problems:
        q = _gather(rows_q, segments.query_index)
        k = _gather(rows_k, segments.key_index)
        v = _gather(rows_v, segments.key_index)
        seen = segments.distance >= 0
        if sliding_window is not None:
            seen = seen & (segments.distance < sliding_window)
        result = _attend(q, k, v, seen[:, None], scaling, dropout, softcap, groups)
        results.append(result.transpose(1, 2).flatten(0, 1).index_select(0, segments.query_rows))
        places.append(segments.out_index)
    # In the dtype of the results: under autocast queries come in float32 from RoPE, and leave SDPA in 16 bits.
    found = torch.cat(results)
    out = found.new_zeros(query.shape[2], *found.shape[1:])
    return out.index_copy(0, torch.cat(places), found)[None], None


def _refuse_unseen_window(module: torch.nn.Module, sliding_window: int | None) -> None:
    """A model may keep its window in the mask alone, which packed batches replace: then better no packing at all."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[module.layer_idx]
    else:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kind = "sliding_attention" if windowed else "full_attention"
    if kind == "chunked_attention" or (kind == "sliding_attention" and sliding_window is None):
        raise UnpackableError(f"{type(module).__name__} keeps a {kind} window that packed batches cannot honour")


def _autocast(t: Tensor) -> Tensor:
    """As SDPA takes it under autocast; kernels that autocast does not know want it done for them. RoPE and norms of
    queries and keys leave them in float32.
    """
    kind = t.device.type
    return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """(T, heads, D) rows at (S, L) positions to (S, heads, L, D)."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """(1, 1, Q, K): the mask that Transformers leaves out where SDPA has a flag for it; the last Q of K tokens ask."""
    ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return ones.tril(key.shape[2] - query.shape[2])[None, None]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    groups: int,
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
        )
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(dtype) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    # The lowest finite number, not -inf: a padding row that sees nothing must not become NaN.
    weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
