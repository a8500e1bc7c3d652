"""Triton's kernels by their values, against float64: variants of the logits, objectives, exact and sparse rows; and
sparse and dense blocks beside each other.

Few sizes: each combination of flags is a compilation of its own. Needs what test_loss.py needs.

A gradient is mostly its targets' own entries, which no row kernel writes. So rows here are peaked, at other tokens than
their targets, and dW is looked at once more where nobody's target is.
"""

from dataclasses import replace

import accuracy
import pytest
import torch
from op_support import VARIANTS, objectives, relative, run, variant_problem

import aapo_fast as af
from aapo_fast.ops.linear_policy import buffers

pytest.importorskip("triton", reason="Triton is not installed")
from aapo_fast.ops.linear_policy import rows_triton, sparse_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
N, H, V = 160, 64, 12_007
EVERYTHING = "user's, of all three"
LOGITS = [(variant, torch.float32) for variant in VARIANTS] + [(v, torch.bfloat16) for v in ("plain", "everything")]
CASES = [(*logits, name) for logits in LOGITS for name in ("aapo", EVERYTHING)]
CASES += [("plain", torch.float32, name) for name in ("entropy bonus", "z-loss")]


def problem(variant, dtype):
    """Operands of a variant on the device, and its options there."""
    inputs, options = variant_problem(variant, N, H, V, dtype=dtype, scale=5 / H**0.5)
    inputs = [t if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in inputs]
    return inputs, {k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in options.items()}


def wide(inputs):
    return [t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_() for t in inputs]


def how(backward):
    """At this threshold a sample is nearly the whole row."""
    return {"backward": backward, "sparsity_threshold": 2.0**-20, "seed": 5}


def agree(grads, true_grads, targets, backward, dtype):
    """bf16: gradient rows, and what comes out, are rounded to it. Under a soft-cap all entries are small, so that even
    this sample leaves out a few hundredths of what no target has.
    """
    most = 6e-3 if dtype == torch.bfloat16 else 2e-3 if backward == "sparse" else 1e-5
    others = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill(0, targets.clamp(min=0), False)
    for grad, true in zip(grads, true_grads, strict=True):
        assert relative(grad, true) < most
    assert relative(grads[1][others], true_grads[1][others]) < max(most, 0.1 if backward == "sparse" else 0.0)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("backward", ["exact", "sparse"])
@pytest.mark.parametrize(("variant", "dtype", "name"), CASES, ids=str)
def test_the_loss(variant, dtype, name, backward, roads):
    inputs, options = problem(variant, dtype)
    objective = objectives(N)[name]
    truth, true_grads = run("reference", wide(inputs), objective, upstream=1.7, **options)
    ours, grads = run("triton", inputs, objective, upstream=1.7, **options, **how(backward))
    assert set(roads) == {"sparse" if backward == "sparse" else "dense"}
    for a, b in ((ours.loss, truth.loss), (ours.logps, truth.logps), (ours.entropy, truth.entropy)):
        assert torch.equal(a.isnan(), b.isnan()) and relative(a.nan_to_num(), b.nan_to_num()) < 2e-5
    agree(grads, true_grads, inputs[2], backward, dtype)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("backward", ["exact", "sparse"])
@pytest.mark.parametrize(("variant", "dtype"), LOGITS, ids=str)
def test_any_upstream_gradient(variant, dtype, backward, roads):
    inputs, options = problem(variant, dtype)
    inputs[2][::7] = -100
    upstream = torch.randn(3, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(DEVICE)
    found = []
    for operands, more in ((wide(inputs), {"implementation": "reference"}), (inputs, how(backward))):
        hidden, weight, targets, bias = operands
        res = af.linear_logprobs(hidden, weight, targets, bias=bias, **({"implementation": "triton"} | options | more))
        values = torch.stack([res.logps, res.entropy, res.logsumexp])
        (values * upstream.to(values)).sum().backward()
        found.append((values, [t.grad for t in (hidden, weight, bias) if t is not None]))
    (true, true_grads), (values, grads) = found
    assert set(roads) == {"sparse" if backward == "sparse" else "dense"}
    assert relative(values, true) < 2e-5
    agree(grads, true_grads, inputs[2], backward, dtype)


PANEL, CHUNK = 512, 2048
BLOCKS = "sssd ddss sdsd"
"""Sparse and dense ones. The first says what is to come. Dense ones among sparse ones have their place in their own
panel, when the panel after them is there already; others, beside each other in a chunk. After two together some are
dense without a look."""


@pytest.mark.parametrize("between_tries", [0, 2, 7])
@pytest.mark.parametrize("linear", [True, False], ids=["weights known", "from statistics"])
def test_sparse_and_dense_blocks_in_flight(linear, between_tries, roads, monkeypatch):
    """Of rows with entropies of 4 nats and of 0.7: of the first a third of all entries are kept, of the others a
    hundredth. Each block is looked at by itself, for one that is lost is little of the whole.
    """
    kinds = BLOCKS.replace(" ", "")
    n = PANEL * len(kinds) - 100
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 0.1)
    monkeypatch.setattr(rows_triton.TritonRows, "blocks_between_tries", between_tries)
    monkeypatch.setattr(buffers, "buffer_rows", lambda *_: (CHUNK, PANEL))
    monkeypatch.setattr(buffers, "sparse_panel_rows", lambda *_: PANEL)
    data = accuracy.make("model-like", n, H, V, torch.bfloat16, DEVICE)
    blocks = [slice(start, start + PANEL) for start in range(0, n, PANEL)]
    factor = torch.ones(n, device=DEVICE)
    for rows, kind in zip(blocks, kinds, strict=True):
        factor[rows] = 3.0 if kind == "s" else 1.0
    # Rewards that leave no sequence without a weight: its rows would be no test of theirs, and sparse.
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE).repeat(3)
    data = replace(data, hidden=(data.hidden * factor[:, None]).bfloat16(), rewards=rewards)
    hidden, weight = (t.detach().clone().requires_grad_() for t in (data.hidden, data.weight))
    objective, true = data.objective(), accuracy.truth(data)
    af.linear_policy_loss(
        hidden, weight, data.targets, objective if linear else lambda tokens: objective(tokens),
        temperature=data.temperature, implementation="triton", all_logps=True, **how("sparse"),
    ).loss.backward()  # fmt: skip
    unseen = roads["dense"] - kinds.count("d")
    assert roads["sparse"] >= 3 and (unseen > 0) == (between_tries > 0)
    for rows in blocks:
        assert relative(hidden.grad[rows], true["dX"][rows]) < 1e-2, rows
    assert relative(weight.grad, true["dW"]) < 1e-2
