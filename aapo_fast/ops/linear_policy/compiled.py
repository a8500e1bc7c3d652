"""The pass under ``torch.compile``: custom operators with fake implementations, so that nothing breaks the graph.

A graph holds tensors, numbers and strings, no Python objects. An objective that is a dataclass of such things travels
as its class's name and its fields; any other callable stays outside, on the vectors of ``aapo_fast::logprobs``, at the
price of a fourth matrix product.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aapo_fast.objectives import Objective, Tokens, active_rows
from aapo_fast.ops.linear_policy import autograd, checks
from aapo_fast.ops.linear_policy.call import Call
from aapo_fast.ops.linear_policy.statistics import SparseProduct, Transform, compute_dtype

Vectors = tuple[Tensor, Tensor, Tensor]

MAY_WAIT = torch.Tag.cudagraph_unsafe
"""The host may read counts, and has numbers of its own: ``mode="reduce-overhead"`` captures what is around them."""


def policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, objective: Objective, call: Call
) -> Vectors:
    """As ``autograd.policy_loss``, traceable."""
    tensors: list[Tensor] = []
    described = _describe(objective, tensors)
    if described is None:
        logps, entropy, logsumexp = logprobs(hidden, weight, bias, targets, call)
        live, visited = _live_and_visited(targets, objective, call)
        rows = torch.arange(targets.numel(), device=targets.device)
        # Through `where`, a row without a loss sends back zero even if the objective makes NaN of it.
        kept = [values.where(live, values.detach()) for values in (logps, entropy, logsumexp)]
        loss = objective(Tokens(kept[0], kept[1], rows, kept[2])).where(live, 0.0).sum()
        return loss, logps.detach().where(visited, math.nan), entropy.detach().where(visited, math.nan)
    options, row_temperature = _options(call)
    wanted = autograd.grads_wanted(hidden, weight, bias)
    loss, logps, entropy, *_ = _policy_loss(
        hidden, weight, bias, targets, row_temperature, options, call.seed, described, tensors, wanted
    )
    return loss, logps.detach(), entropy.detach()


def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call) -> Vectors:
    """As ``autograd.logprobs``, traceable."""
    options, row_temperature = _options(call)
    return _logprobs(hidden, weight, bias, targets, row_temperature, options, call.seed)


def _live_and_visited(targets: Tensor, objective: Objective, call: Call) -> tuple[Tensor, Tensor]:
    """(N,) bool: rows that have a loss, and rows whose log-probability is given."""
    has_target, mask = targets != autograd.IGNORE_INDEX, active_rows(objective)
    live = has_target if mask is None else has_target & mask.to(targets.device)
    return live, live if call.drop_rows else has_target


# --- what a graph can hold -------------------------------------------------------------------------------------------


def _options(call: Call) -> tuple[str, Tensor | None]:
    """Everything of a call that stays the same from step to step, as text; and the temperature where it is a tensor."""
    if call.shard is not None:
        raise ValueError("vocabulary_shard cannot be traced; put torch.compiler.disable round the function that calls")
    temperature = call.transform.temperature
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    number = "1.0" if isinstance(temperature, Tensor) else f"{temperature!r}"
    softcap = "null" if call.transform.softcap is None else f"{call.transform.softcap!r}"
    threshold = "null" if call.threshold is None else f"{call.threshold!r}"
    autocast = "null" if call.autocast is None else f'"{call.autocast}"'
    drop_rows = "true" if call.drop_rows else "false"
    text = (
        f'{{"temperature": {number}, "softcap": {softcap}, "scale": {call.transform.scale!r}, '
        f'"vocab_size": {call.vocab_size}, "threshold": {threshold}, "implementation": "{call.implementation}", '
        f'"drop_rows": {drop_rows}, "autocast": {autocast}}}'
    )
    return text, row_temperature


def _call(options: str, row_temperature: Tensor | None, seed: int) -> Call:
    o = json.loads(options)
    temperature = o["temperature"] if row_temperature is None else row_temperature
    autocast = None if o["autocast"] is None else getattr(torch, o["autocast"].removeprefix("torch."))
    transform = Transform(temperature, o["softcap"], o["scale"])
    return Call(transform, o["vocab_size"], None, o["threshold"], seed, o["implementation"], o["drop_rows"], autocast)


def _describe(objective: Any, tensors: list[Tensor]) -> str | None:
    """JSON of an objective whose tensors are appended to the list; None if it is no importable dataclass.

    Numbers become tensors too: as numbers they would be constants of the graph, and ``num_tokens`` changes every step.
    """
    kind = type(objective)
    if not dataclasses.is_dataclass(objective) or "<locals>" in kind.__qualname__:
        return None
    # Ours carry nothing but their fields; torch 2.11 cannot look into a frozen one that was made in the graph.
    ours = kind.__module__ == "aapo_fast.objectives"
    if not ours and (not hasattr(objective, "__dict__") or len(vars(objective)) != len(dataclasses.fields(objective))):
        return None
    fields = []
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, Tensor):
            text = f'{{"tensor": {len(tensors)}}}'
            tensors.append(value)
        elif value is None:
            text = "null"
        elif isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, (int, float)):
            text = f'{{"number": {len(tensors)}}}'
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            tensors.append(torch.ones((), dtype=dtype) * value)
        else:
            nested = _describe(value, tensors)
            if nested is None:
                return None
            text = nested
        fields.append(f'"{field.name}": {text}')
    return f'{{"class": "{kind.__module__}:{kind.__qualname__}", "fields": {{{", ".join(fields)}}}}}'


def _rebuild(described: Any, tensors: Sequence[Tensor]) -> Any:
    if described is None or isinstance(described, bool):
        return described
    if "tensor" in described:
        return tensors[described["tensor"]]
    if "number" in described:
        return tensors[described["number"]].item()
    module, _, name = described["class"].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    # Not through its constructor: that has run, and what it did to the fields is in them.
    rebuilt = object.__new__(found)
    for field, value in described["fields"].items():
        object.__setattr__(rebuilt, field, _rebuild(value, tensors))
    if found.__module__ == "aapo_fast.objectives":  # theirs only checks, and could not see any values in the graph
        rebuilt.__post_init__()
    return rebuilt


def _autograd_within_an_operator() -> Any:
    """The tape, for the objective: inside an operator dispatch goes below autograd, and all would be constant."""
    tape = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    excluded = torch._C._dispatch_tls_local_exclude_set() - tape
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("aapo_fast::policy_loss", mutates_args=(), tags=MAY_WAIT)
def _policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    options: str,
    seed: int,
    objective: str,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probabilities, entropies, and the gradients of hidden, weight and bias (empty where not wanted)."""
    call = _call(options, row_temperature, seed)
    checks.check_targets(targets, call.vocab_size)
    with _autograd_within_an_operator():
        loss, logps, entropy, gradients, rows = autograd.run_policy_loss(
            (hidden, weight, bias), targets, _rebuild(json.loads(objective), tensors), call, wanted
        )
    one, dtype, by = loss.new_ones(()), loss.dtype, call.implementation
    made = [autograd.scaled(g, one, dtype, by) if isinstance(g, SparseProduct) else g for g in gradients]
    d_hidden, d_weight, d_bias = (logps.new_empty(0) if g is None else g for g in made)
    if gradients.hidden is not None:
        d_hidden = autograd.scattered(d_hidden, rows, targets.numel(), 0.0)
    return loss, logps, entropy, d_hidden, d_weight, d_bias


@_policy_loss.register_fake
def _(hidden, weight, bias, targets, row_temperature, options, seed, objective, tensors, wanted):
    vector = torch.empty_like(targets, dtype=compute_dtype(hidden, weight, bias))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = (vector.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
    return vector.new_empty(()), vector, torch.empty_like(vector), *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.wanted = inputs[-1]
    ctx.num_tensors = len(inputs[-2])


def _hand_out(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    found = [
        (gradient * d_loss).to(dtype) if want else None
        for gradient, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *found, None, None, None, None, None, [None] * ctx.num_tensors, None


_policy_loss.register_autograd(_hand_out, setup_context=_keep_gradients)


@torch.library.custom_op("aapo_fast::logprobs", mutates_args=(), tags=MAY_WAIT)
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    options: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-sum-exps."""
    call = _call(options, row_temperature, seed)
    checks.check_targets(targets, call.vocab_size)
    return autograd.run_statistics((hidden, weight, bias), targets, call)


@_logprobs.register_fake
def _(hidden, weight, bias, targets, row_temperature, options, seed):
    vector = torch.empty_like(targets, dtype=compute_dtype(hidden, weight, bias))
    return vector, torch.empty_like(vector), torch.empty_like(vector)


@torch.library.custom_op("aapo_fast::logprobs_backward", mutates_args=(), tags=MAY_WAIT)
def _logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    options: str,
    seed: int,
    d_logps: Tensor,
    d_entropy: Tensor,
    d_logsumexp: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not wanted)."""
    gradients = autograd.run_gradients(
        (hidden, weight, bias),
        targets,
        _call(options, row_temperature, seed),
        wanted,
        (d_logps, d_entropy, d_logsumexp),
    )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


@_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, row_temperature, options, seed, d_logps, d_entropy, d_logsumexp, wanted):
    operands = (hidden, weight, bias)
    return tuple(
        t.new_empty(t.shape) if want else hidden.new_empty(0) for t, want in zip(operands, wanted, strict=True)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, options, seed = inputs
    ctx.save_for_backward(*tensors)
    ctx.options, ctx.seed = options, seed


def _recompute(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [bool(want) for want in ctx.needs_input_grad[:3]]
    found = _logprobs_backward(*ctx.saved_tensors, ctx.options, ctx.seed, *upstream, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None, None


_logprobs.register_autograd(_recompute, setup_context=_keep_inputs)
