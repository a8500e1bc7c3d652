"""The fused pass against the plain truth, in float64 and in the dtypes people use. Errors are relative."""

import math

import numpy as np
import pytest
import torch
from op_support import VARIANTS, objectives, problem, relative, run, sequences, variant_problem

import aapo_fast as af
from aapo_fast.ops.linear_policy import chunked, sizes

SHAPES = [(1, 8, 11), (37, 16, 101), (64, 24, 257)]


@pytest.mark.parametrize("name", list(objectives(4)))
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_in_float64(shape, variant, name, monkeypatch):
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 7 * 8 * shape[2])  # seven rows a chunk: several, and a remainder
    inputs, options = variant_problem(variant, *shape)
    objective = objectives(shape[0])[name]
    truth, true_grads = run("reference", inputs, objective, upstream=1.7, **options)
    ours, grads = run("torch", inputs, objective, upstream=1.7, **options)
    assert relative(ours.loss, truth.loss) < 1e-12
    assert torch.equal(ours.logps.isnan(), truth.logps.isnan())
    assert relative(ours.logps.nan_to_num(), truth.logps.nan_to_num()) < 1e-12
    assert relative(ours.entropy.nan_to_num(), truth.entropy.nan_to_num()) < 1e-12
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert relative(grad, true_grad) < 1e-12 or true_grad.norm() == 0 == grad.norm()


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat rows", "peaked rows"])
def test_error_against_float64_is_the_rounding_of_the_result(dtype, scale):
    """Same inputs in float64 are the truth; the bar for low precision is that truth rounded once to the dtype."""
    inputs = problem(96, 64, 997, dtype=dtype, scale=scale)
    advantages, index = sequences(96)
    objective = af.AAPO(advantages, index, 96.0)
    wide = [t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    truth, true_grads = run("reference", wide, objective)
    ours, grads = run("torch", inputs, objective)
    _, eager_grads = run("reference", inputs, objective)
    for grad, true_grad, eager in zip(grads, true_grads, eager_grads, strict=True):
        assert grad.dtype == dtype
        floor = relative(true_grad.to(dtype), true_grad)
        eager_error = relative(eager, true_grad)
        assert relative(grad, true_grad) <= 1.1 * max(floor, eager_error)
        if dtype != torch.float32:
            assert relative(grad, true_grad) <= 1.1 * floor
    live = ~truth.logps.isnan()
    assert relative(ours.logps[live], truth.logps[live]) < 2e-6
    assert ours.logps.dtype == torch.float32


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize(("dtype", "upstream"), [(torch.bfloat16, 1 / 3), (torch.float16, 65536.0)])
def test_the_upstream_scale_costs_no_rounding(dtype, upstream):
    """A loss over 200,000 tokens in fp16 lives by its loss scaler: unscaled, its gradient underflows."""
    inputs = problem(64, 16, 101, dtype=dtype)
    wide = [t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    _, true_grads = run("reference", wide, af.SFT(2e5), upstream=upstream)
    _, grads = run("torch", inputs, af.SFT(2e5), upstream=upstream)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert relative(grad, true_grad) <= 1.1 * relative(true_grad.to(dtype), true_grad)


def test_gradients_of_a_kept_graph_are_the_callers_own():
    """To be divided by their norm, say, before the graph is used again."""
    hidden, weight, targets, _ = problem(8, 8, 31, dtype=torch.float32)
    loss = af.linear_policy_loss(hidden, weight, targets, af.SFT(8.0)).loss
    [first] = torch.autograd.grad(loss, weight, retain_graph=True)
    truth = first.clone()
    first.div_(first.norm())
    [second] = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(second, truth)
    first.zero_()
    assert torch.equal(second, truth)
    loss.backward()
    assert torch.equal(weight.grad, truth)


def test_a_second_backward_gives_the_same_gradient_again():
    hidden, weight, targets, _ = problem(8, 8, 31)
    loss = af.linear_policy_loss(hidden, weight, targets, af.SFT(8.0)).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    weight.grad.mul_(3.0)
    loss.backward()
    assert relative(weight.grad, 4 * once) < 1e-14


@pytest.mark.parametrize("shift", [-200.0, 1000.0])
def test_shifted_logits(shift):
    hidden, weight, targets, _ = problem(20, 8, 50, dtype=torch.float32)
    bias = torch.full((50,), shift)
    plain = af.linear_policy_loss(hidden, weight, targets, af.SFT(20.0))
    moved = af.linear_policy_loss(hidden, weight, targets, af.SFT(20.0), bias=bias)
    # a logit near 1000 has an fp32 spacing of 6e-5, which is the error that any method inherits from its inputs
    assert torch.allclose(plain.logps, moved.logps, atol=3e-4, rtol=0)


def test_token_ruled_out_by_an_infinite_bias():
    hidden, weight, targets, bias = problem(9, 8, 21, bias=True)
    bias = bias.detach()
    bias[20] = -math.inf
    targets = targets.clamp(max=19)
    objective = objectives(9)["user's, of all three"]
    truth, true_grads = run("reference", (hidden, weight, targets, bias), objective)
    ours, grads = run("torch", (hidden, weight, targets, bias), objective)
    assert truth.entropy.isfinite().all()
    assert relative(ours.entropy, truth.entropy) < 1e-12
    for grad, true_grad in zip(grads[:2], true_grads[:2], strict=True):
        assert relative(grad, true_grad) < 1e-12


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logprobs_take_any_upstream_gradient(variant, monkeypatch):
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 7 * 8 * 101)
    inputs, options = variant_problem(variant, 37, 16, 101)
    inputs[2][5] = -100
    g = torch.Generator().manual_seed(9)
    upstream = torch.randn(3, 37, generator=g, dtype=torch.float64)
    grads = {}
    for implementation in ("reference", "torch"):
        hidden, weight, targets, bias = (t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None
                                         for t in inputs)  # fmt: skip
        extra = {} if bias is None else {"bias": bias}
        res = af.linear_logprobs(hidden, weight, targets, implementation=implementation, **extra, **options)
        assert res.logps[5] == 0 == res.entropy[5] == res.logsumexp[5]
        (res.logps @ upstream[0] + res.entropy @ upstream[1] + res.logsumexp @ upstream[2]).backward()
        grads[implementation] = [res.logps, res.entropy, res.logsumexp] + [
            t.grad for t in (hidden, weight, bias) if t is not None
        ]
    for ours, truth in zip(grads["torch"], grads["reference"], strict=True):
        assert relative(ours, truth) < 1e-12
    assert grads["torch"][3][5].norm() == 0


def test_gradients_by_finite_differences():
    hidden, weight, targets, bias = problem(6, 5, 9, bias=True)

    def both(hidden, weight, bias):
        res = af.linear_logprobs(hidden, weight, targets, bias=bias, softcap=4.0, temperature=0.8)
        return res.logps, res.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_rows_without_weight_cost_nothing_and_can_be_asked_for(monkeypatch):
    visited = []
    real = chunked.Products.logits
    monkeypatch.setattr(
        chunked.Products, "logits", lambda self, rows, out: visited.append(len(out)) or real(self, rows, out)
    )
    hidden, weight, targets, _ = problem(40, 8, 31)
    advantages, index = torch.tensor([0.0, 1.0, 0.0, -2.0]), torch.arange(40) % 4
    objective = af.AAPO(advantages, index, 40.0)
    out = af.linear_policy_loss(hidden, weight, targets, objective)
    assert sum(visited) == 20
    assert torch.equal(out.logps.isnan(), advantages[index] == 0)
    every = af.linear_policy_loss(hidden, weight, targets, objective, all_logps=True)
    assert sum(visited) == 60 and not every.logps.isnan().any()
    assert torch.equal(every.logps[index == 1], out.logps[index == 1])
    assert relative(every.loss, out.loss) < 1e-14


@pytest.mark.parametrize("rows", ["no rows", "no weight", "no target"])
def test_nothing_to_do_gives_zero_loss_and_zero_gradients(rows):
    n = 0 if rows == "no rows" else 6
    hidden, weight, targets, _ = problem(n, 8, 31)
    if rows == "no target":
        targets.fill_(-100)
    advantage = 0.0 if rows == "no weight" else 1.0
    out = af.linear_policy_loss(
        hidden, weight, targets, af.AAPO(torch.tensor([advantage]), torch.zeros(n, dtype=torch.int64), 5.0)
    )
    out.loss.backward()
    assert out.loss.item() == 0.0 and out.logps.shape == (n,)
    assert hidden.grad.shape == (n, 8) and hidden.grad.norm() == 0 == weight.grad.norm()


def test_chunk_size_and_row_order_do_not_matter(monkeypatch):
    inputs = problem(50, 16, 101)
    advantages, index = sequences(50)
    whole, grads = run("torch", inputs, af.AAPO(advantages, index, 50.0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 1)
    hidden, weight, targets, _ = inputs
    shuffled = (hidden.detach()[order].requires_grad_(), weight, targets[order], None)
    other, other_grads = run("torch", shuffled, af.AAPO(advantages, index[order], 50.0))
    assert relative(other.loss, whole.loss) < 1e-13
    assert relative(other_grads[0], grads[0][order]) < 1e-13
    assert relative(other_grads[1], grads[1]) < 1e-13


def test_any_cut_into_microbatches_gives_the_gradient_of_one_batch():
    hidden, weight, targets, _ = problem(48, 16, 101)
    advantages, index = sequences(48)
    _, (_, whole) = run("torch", (hidden, weight, targets, None), af.AAPO(advantages, index, 48.0))
    for cuts in ([48], [1, 47], [16, 16, 16], [5, 0, 20, 23]):
        weight.grad = None
        start = 0
        for size in cuts:
            part = slice(start, start + size)
            objective = af.AAPO(advantages, index[part], 48.0)
            af.linear_policy_loss(hidden[part], weight, targets[part], objective).loss.backward()
            start += size
        assert relative(weight.grad, whole) < 1e-13


def test_frozen_operands_get_no_gradient_and_no_work(monkeypatch):
    hidden, weight, targets, _ = problem(10, 8, 31)
    monkeypatch.setattr(chunked.Products, "weight_gradient", lambda *a: pytest.fail("dW of a frozen weight"))
    af.linear_policy_loss(hidden, weight.detach(), targets, af.SFT(10.0)).loss.backward()
    assert hidden.grad.norm() > 0
    monkeypatch.setattr(chunked.Products, "hidden_gradient", lambda *a: pytest.fail("dX of frozen states"))
    with torch.no_grad():
        assert not af.linear_policy_loss(hidden, weight, targets, af.SFT(10.0)).loss.requires_grad


def test_noncontiguous_hidden_and_mixed_dtypes():
    hidden, weight, targets, _ = problem(12, 8, 31, dtype=torch.float32)
    strided = torch.stack([hidden.detach()] * 2, dim=1)[:, 0].requires_grad_()
    assert not strided.is_contiguous()
    low = weight.detach().bfloat16().requires_grad_()
    out = af.linear_policy_loss(strided, low, targets, af.SFT(12.0))
    out.loss.backward()
    truth = af.linear_policy_loss(hidden, low.detach().float(), targets, af.SFT(12.0), implementation="reference")
    truth.loss.backward()
    assert relative(out.loss, truth.loss) < 1e-6 and relative(strided.grad, hidden.grad) < 1e-5
    assert low.grad.dtype == torch.bfloat16


class Active:
    """An objective with such an answer."""

    def __init__(self, answer):
        self.answer = answer

    def active(self):
        return self.answer

    def __call__(self, tokens):
        return -tokens.logps


def bad(match, error=ValueError, **changes):
    return pytest.param(changes, match, error, id=match[:40])


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        bad(r"hidden has shape \(4, 9\), weight has \(10, 8\)", hidden=torch.randn(4, 9)),
        bad(r"targets has shape \(3,\)", targets=torch.zeros(3, dtype=torch.int64)),
        bad("dtype torch.int32", targets=torch.zeros(4, dtype=torch.int32)),
        bad(r"targets\[2\] is 10, outside \[0, 10\)", targets=torch.tensor([0, 1, 10, 11])),
        bad(r"targets\[0\] is -1", targets=torch.tensor([-1, 1, 1, 1])),
        bad("weight has dtype torch.int64", weight=torch.ones(10, 8, dtype=torch.int64)),
        bad(r"bias has shape \(8,\)", bias=torch.randn(8)),
        bad("temperature=0", temperature=0.0),
        bad("temperature=nan", temperature=math.nan),
        bad("softcap=-1", softcap=-1.0),
        bad("implementation='cuda' is unknown", implementation="cuda"),
        bad("weight is on meta", weight=torch.randn(10, 8, device="meta")),
        bad("hidden is a list; give a torch.Tensor", hidden=[[0.0] * 8] * 4),
        bad("hidden is a ndarray; give a torch.Tensor", hidden=np.zeros((4, 8), dtype=np.float32)),
        bad("weight is a Linear; give its weight", weight=torch.nn.Linear(8, 10)),
        bad("targets is a NoneType; give a torch.Tensor", targets=None),
        bad("bias is a list; give a torch.Tensor", bias=[0.0] * 10),
        bad("softcap='30'; give a positive, finite number, or None", softcap="30"),
        bad("softcap is a tensor, which would get no gradient here", softcap=torch.tensor(30.0)),
        bad("logit_scale=None; give a positive, finite number", logit_scale=None),
        bad("logit_scale is a tensor, which would get no gradient", logit_scale=torch.nn.Parameter(torch.ones(()))),
        bad("sparsity_threshold=None must lie in", sparsity_threshold=None),
        bad("sparsity_threshold=5e-324 must lie in .* not below 1e-30", sparsity_threshold=5e-324),
        bad("vocabulary_shard is a int; give a VocabularyShard", vocabulary_shard=3),
        bad(r"active\(\) gave torch.int64; give", objective=Active(torch.full((4,), 2))),
        bad(r"active\(\) gave a list; give", objective=Active([True] * 4)),
        bad("one loss a row", objective=lambda tokens: tokens.logps.sum()),
        bad("objective covers", objective=af.AAPO(torch.ones(1), torch.zeros(5, dtype=torch.int64), 4.0)),
    ],
)
def test_refusals(changes, match, error):
    args = {"hidden": torch.randn(4, 8), "weight": torch.randn(10, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    args |= {"objective": af.SFT(4.0)} | changes
    with pytest.raises(error, match=match):
        af.linear_policy_loss(**args)


def test_objectives_refuse_what_does_not_fit():
    index = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_tokens=0"):
        af.SFT(0)
    with pytest.raises(ValueError, match=r"spans 0..3 but advantages has 2 sequences"):
        af.AAPO(torch.ones(2), torch.arange(4), 4.0)
    with pytest.raises(ValueError, match=r"advantages has shape \(2, 2\)"):
        af.AAPO(torch.ones(2, 2), index, 4.0)
    with pytest.raises(ValueError, match=r"old_logps has shape \(3,\)"):
        af.GRPO(torch.ones(1), index, 4.0, old_logps=torch.zeros(3))
    with pytest.raises(ValueError, match="clip_low=1.5"):
        af.GRPO(torch.ones(1), index, 4.0, clip_low=1.5)


def test_grpo_on_policy_has_the_gradient_of_aapo():
    inputs = problem(30, 8, 41)
    advantages, index = sequences(30)
    _, aapo = run("torch", inputs, af.AAPO(advantages, index, 30.0))
    _, grpo = run("torch", inputs, af.GRPO(advantages, index, 30.0))
    for a, b in zip(aapo, grpo, strict=True):
        assert relative(a, b) < 1e-13


def test_grpo_takes_old_log_probabilities_with_the_gaps_that_an_earlier_call_left():
    hidden, weight, targets, _ = problem(12, 8, 41)
    advantages, index = torch.tensor([0.0, 1.0]), torch.arange(12) % 2
    old = af.linear_policy_loss(hidden, weight, targets, af.AAPO(advantages, index, 12.0)).logps
    assert old.isnan().sum() == 6
    objective = af.GRPO(advantages, index, 12.0, old_logps=old)
    sparse = af.linear_policy_loss(hidden, weight, targets, objective)
    every = af.linear_policy_loss(hidden, weight, targets, objective, all_logps=True)
    every.loss.backward()
    assert relative(every.loss, sparse.loss) < 1e-14 and hidden.grad.isfinite().all()


def test_a_clipped_token_has_no_gradient():
    hidden, weight, targets, _ = problem(1, 8, 41)
    logp = af.linear_logprobs(hidden, weight, targets).logps.detach()
    for advantage, old, moves in ((1.0, logp - 1, False), (1.0, logp + 1, True), (-1.0, logp + 1, False)):
        hidden.grad = None
        objective = af.GRPO(torch.tensor([advantage]), torch.zeros(1, dtype=torch.int64), 1.0, old_logps=old)
        af.linear_policy_loss(hidden, weight, targets, objective).loss.backward()
        assert (hidden.grad.norm() > 0) == moves
