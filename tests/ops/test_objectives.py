"""Objectives as users build them: in any dtype, subclassed, wrapped, far from the policy that sampled."""

import dataclasses

import pytest
import support
import torch
from op_support import FirstHalf, problem, relative, run, sequences
from torch._dynamo.testing import CompileCounter

import aapo_fast as af
from aapo_fast.objectives import Tokens
from aapo_fast.ops import dispatch
from aapo_fast.ops.linear_policy import runs

IMPLEMENTATIONS = [c.name for c in dispatch.survey(torch.device("cpu")) if c.available and c.name != "reference"]
KINDS = {"AAPO": af.AAPO, "GRPO": af.GRPO, "SFT": lambda a, i, n: af.SFT(n, a[i])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_weights_are_divided_in_fp32(dtype, kind):
    """By 10^8 tokens they would otherwise all be zero in fp16, and off by 10^-3 in bf16."""
    advantages, index = sequences(12)
    narrow = advantages.to(dtype)
    for implementation in ("torch", "reference"):
        inputs = problem(12, 8, 50, dtype=torch.float32)
        out, grads = run(implementation, inputs, KINDS[kind](narrow, index, 1e8))
        truth, true_grads = run(implementation, inputs, KINDS[kind](narrow.float(), index, 1e8))
        assert relative(out.loss, truth.loss) < 1e-6 and truth.loss != 0
        assert all(relative(a, b) < 1e-6 for a, b in zip(grads, true_grads, strict=True))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_in_the_dtype_of_the_pass(implementation, kind):
    """Whatever the advantages are in; a graph has been promised it."""
    advantages, index = sequences(12)
    hidden, weight, targets, _ = problem(12, 8, 50, dtype=torch.float32)
    objective = KINDS[kind](advantages, index, 12.0)
    out = af.linear_policy_loss(hidden, weight, targets, objective, implementation=implementation)
    assert out.loss.dtype == out.logps.dtype == torch.float32


@support.needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_advantages_of_another_dtype_in_inductor(dtype):
    """Which would read a loss of one dtype as another, and make any number of it."""
    advantages, index = sequences(12)
    hidden, weight, targets, _ = problem(12, 8, 50, dtype=torch.float32)

    def step(advantages):
        out = af.linear_policy_loss(hidden, weight, targets, af.AAPO(advantages, index, 12.0))
        return out.loss * 3 + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)(advantages.to(dtype))
    assert compiled.item() == pytest.approx(step(advantages.to(dtype)).item(), rel=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_rows_that_an_objective_leaves_out_are_left_out_when_it_is_regularized(implementation):
    inputs = problem(12, 8, 50)
    out, grads = run(implementation, inputs, FirstHalf())
    wrapped, others = run(implementation, inputs, af.Regularized(FirstHalf(), 1.0))
    assert relative(wrapped.loss, out.loss) < 1e-14 and not wrapped.logps.isnan().any()
    assert all(relative(a, b) < 1e-13 for a, b in zip(others, grads, strict=True))
    entropy, _ = run(implementation, inputs, af.Regularized(FirstHalf(), 12.0, entropy_bonus=0.5))
    assert relative(entropy.loss, out.loss - 0.5 * entropy.entropy.mean()) < 1e-13  # which all rows have


def test_dual_clip_bounds_what_a_bad_token_loses():
    """By hand: ratios of a half, one, two and five, on an advantage of -2 and of 2, between 0.8 and 1.28, up to 3."""
    ratios = torch.tensor([0.5, 1.0, 2.0, 5.0]).repeat(2)
    logps = ratios.log().requires_grad_()
    tokens = Tokens(logps, torch.zeros(8), torch.arange(8), torch.zeros(8))
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    objective = af.GRPO(torch.tensor([-2.0, 2.0]), index, 1.0, torch.zeros(8), clip_high=0.28, dual_clip=3)
    losses = objective(tokens)
    assert torch.allclose(losses, torch.tensor([1.6, 2.0, 4.0, 6.0, -1.0, -2.0, -2.56, -2.56]))
    losses.sum().backward()
    assert torch.allclose(logps.grad, torch.tensor([0.0, 2.0, 4.0, 0.0, -1.0, -2.0, 0.0, 0.0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_kl_penalty_is_the_divergence_from_the_reference_and_its_gradient(implementation):
    """In rows with a target, whether or not they have an advantage; what is no number in others does not matter."""
    hidden, weight, targets, _ = problem(12, 8, 50, dtype=torch.float32)
    targets[::5] = -100
    reference = torch.linspace(-9, 0, 12)
    reference[3], reference[::5] = -2000.0, torch.nan
    objective = af.Regularized(af.SFT(7.0, torch.arange(12.0) % 2), 7.0, kl_penalty=0.3, reference_logps=reference)
    out, grads = run(implementation, (hidden, weight, targets, None), objective)

    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    rows = (targets >= 0).nonzero().squeeze(1)
    logps = (x @ w.t()).log_softmax(1)[rows, targets[rows]]
    ratio = reference[rows].double().exp() / logps.exp()
    divergence = ratio - 1 - (reference[rows].double() - logps)
    loss = (0.3 * divergence - (rows % 2) * logps).sum() / 7
    true = torch.autograd.grad(loss, (x, w))
    assert (divergence >= 0).all() and relative(out.loss.double(), loss) < 1e-6
    assert all(relative(a.double(), b) < 2e-6 for a, b in zip(grads, true, strict=True))


def test_the_estimate_of_the_divergence_is_unbiased():
    """Summed over all tokens by their probability it is sum_v p_v log(p_v / q_v)."""
    policy, other = (torch.randn(30, generator=torch.Generator().manual_seed(s)).log_softmax(0) for s in (1, 2))
    objective = af.Regularized(af.SFT(1.0, torch.zeros(30)), 1.0, kl_penalty=1.0, reference_logps=other)
    rows = torch.arange(30)
    estimates = objective(Tokens(policy, torch.zeros(30), rows, torch.zeros(30)))
    assert (policy.exp() * estimates).sum().item() == pytest.approx(
        (policy.exp() * (policy - other)).sum().item(), rel=1e-5
    )


def test_a_distant_reference_leaves_the_gradient_finite():
    reference = torch.zeros(4)
    objective = af.Regularized(af.SFT(1.0), 1.0, kl_penalty=1.0, reference_logps=reference)
    logps = torch.tensor([-500.0, -90.0, -1.0, 0.0], requires_grad=True)
    objective(Tokens(logps, torch.zeros(4), torch.arange(4), torch.zeros(4))).sum().backward()
    assert logps.grad.isfinite().all() and (logps.grad <= 0).all()  # up to the reference, or not at all


class EverySecondToken(af.AAPO):
    """Another loss than the one that its class says is linear in the advantages, by a method that it calls."""

    def _advantage(self, tokens):
        return super()._advantage(tokens) * (tokens.rows % 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_subclass_may_have_other_advantages(implementation):
    advantages, index = sequences(12)
    objective = EverySecondToken(advantages.float(), index, 12.0)
    inputs = problem(12, 8, 50, dtype=torch.float32)
    out, grads = run(implementation, inputs, objective)
    truth, true_grads = run("reference", inputs, objective)
    assert relative(out.loss, truth.loss) < 1e-6
    assert all(relative(a, b) < 2e-6 for a, b in zip(grads, true_grads, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class AnotherBound(af.AAPO):
    """With another default, and no other loss."""

    max_ratio: float = 5.0


def test_a_subclass_with_another_default_is_linear_still():
    objective = AnotherBound(torch.ones(4), torch.arange(12) // 3, 12.0)
    assert runs._linear_weights(objective) is not None
    assert runs._linear_weights(EverySecondToken(torch.ones(4), torch.arange(12) // 3, 12.0)) is None


def test_a_regularized_objective_says_what_is_wrong_with_its_rows():
    class Half(FirstHalf):
        def active(self):
            return [True] * 12

    with pytest.raises(ValueError, match=r"active\(\) gave a list; give an \(N,\) bool tensor"):
        run("torch", problem(12, 8, 50), af.Regularized(Half(), 12.0))


def test_numbers_of_sequences_that_change_do_not_recompile_elsewhere_either():
    """Where the host cannot look at indices; the meta device stands for a GPU."""
    counter = CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counter, fullgraph=True)
    def rows(advantages, index):
        return af.AAPO(advantages, index, 12.0).active()

    for number in (4, 5, 6, 9, 12, 17):
        rows(torch.ones(number, device="meta"), torch.zeros(12, dtype=torch.int64, device="meta"))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", [af.GRPO, af.CISPO, af.REINFORCE])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_beyond_fp32_poisons_nothing(kind, sign):
    """exp(logp - old) is infinite from 88.7 on: a clipped token has no gradient, and not 0 * inf."""
    advantages, index = sign * torch.tensor([1.0, 0.5, 0.3, 2.0]), torch.arange(12) // 3
    inputs = problem(12, 8, 50, dtype=torch.float32)
    old = af.linear_logprobs(*inputs[:3]).logps.detach() - 0.05
    old[5] = -200.0
    out, grads = run("torch", inputs, kind(advantages, index, 12.0, old))
    assert out.loss.isfinite() and all(g.isfinite().all() and g.norm() > 0 for g in grads)
    if kind is af.GRPO and sign > 0:
        assert grads[0][5].norm() == 0


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_advantages_of_tokens_are_advantages_of_sequences_of_one(implementation):
    """As a critic or turns have them: what the docstrings say of that."""
    g = torch.Generator().manual_seed(0)
    each = torch.randn(12, generator=g, dtype=torch.float64)
    inputs = problem(12, 8, 50)
    out, grads = run(implementation, inputs, af.AAPO(each, torch.arange(12), 12.0))
    truth, true_grads = run("reference", inputs, lambda tokens: -each[tokens.rows] * tokens.logps / 12)
    assert relative(out.loss, truth.loss) < 1e-13
    assert all(relative(a, b) < 1e-13 for a, b in zip(grads, true_grads, strict=True))


def test_a_sequence_out_of_range_is_not_silent_in_a_graph():
    """A negative index would count from the end in the loss, and be nobody's in the gradient."""
    hidden, weight, targets, _ = problem(12, 8, 50)
    index = torch.arange(12) // 3
    index[5] = -1

    def step(index):
        objective = af.Regularized(af.AAPO(torch.ones(4), index, 12.0), 12.0)
        return af.linear_policy_loss(hidden, weight, targets, objective).loss

    with pytest.raises(ValueError, match=r"sequence_index spans -1..3"):
        step(index)
    with pytest.raises(ValueError, match=r"sequence_index spans -1..3"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(index)


def test_a_device_without_float64_is_refused_in_words():
    mps = torch.device("mps")
    with pytest.raises(RuntimeError, match="no implementation runs on mps: .*torch: MPS devices have no float64"):
        dispatch.resolve("auto", mps)
    with pytest.raises(RuntimeError, match="'torch' is not available on mps: MPS devices have no float64; move"):
        dispatch.resolve("torch", mps)
