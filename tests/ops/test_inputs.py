"""What users bring: autocast, checkpointing, tied and frozen weights, many rows, objectives of their own."""

import numpy as np
import pytest
import torch
from op_support import FirstHalf, objectives, problem, relative, run, sequences
from torch import nn
from torch.utils.checkpoint import checkpoint

import aapo_fast as af
from aapo_fast.ops import dispatch
from aapo_fast.ops.linear_policy import autograd, products, sparse

IMPLEMENTATIONS = [c.name for c in dispatch.survey(torch.device("cpu")) if c.available and c.name != "reference"]


def test_a_new_objective_in_ten_lines():
    """Kimi-style squared log-ratio, written by a user: no operator knows it, and its gradient is right."""

    class SquaredLogRatio:
        def __init__(self, rewards, old_logps, tau):
            self.rewards, self.old_logps, self.tau = rewards, old_logps, tau

        def __call__(self, tokens):
            gap = self.rewards[tokens.rows] - self.tau * (tokens.logps - self.old_logps[tokens.rows])
            return gap.square() / len(self.rewards)

    inputs = problem(33, 8, 101)
    g = torch.Generator().manual_seed(0)
    objective = SquaredLogRatio(*torch.randn(2, 33, generator=g, dtype=torch.float64), tau=0.4)
    _, truth = run("reference", inputs, objective)
    _, ours = run("torch", inputs, objective)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, truth, strict=True))


def test_importance_weights_are_constants_and_truncated():
    """REINFORCE's gradient with rollout log-probabilities: each row of AAPO's, times its truncated ratio."""
    inputs = problem(40, 8, 41)
    advantages, index = sequences(40)
    out, (plain, _) = run("torch", inputs, af.AAPO(advantages, index, 40.0))
    gap = torch.linspace(-1, 1.5, 40, dtype=torch.float64)
    rollout = out.logps.nan_to_num() - gap
    objective = af.REINFORCE(advantages, index, 40.0, rollout_logps=rollout, max_ratio=2.0)
    _, (weighted, _) = run("torch", inputs, objective)
    assert relative(weighted, plain * gap.exp().clamp(max=2.0)[:, None]) < 1e-12
    _, (same, _) = run("torch", inputs, af.AAPO(advantages, index, 40.0, rollout_logps=rollout))
    assert torch.equal(same, weighted)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    inputs = problem(40, 8, 41)
    advantages, index = sequences(40)
    out, (plain, _) = run("torch", inputs, af.AAPO(advantages, index, 40.0))
    gap = torch.linspace(-2, 2.5, 40, dtype=torch.float64)
    objective = af.CISPO(advantages, index, 40.0, old_logps=out.logps - gap, clip_low=0.8, clip_high=3.0)
    _, (grad, _) = run("torch", inputs, objective)
    assert relative(grad, plain * gap.exp().clamp(0.2, 4.0)[:, None]) < 1e-12


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_autocast_casts_operands_and_keeps_gradients_whole(backward):
    """As bf16 copies would compute it; the gradient of the fp32 parameter is not rounded to bf16 on the way."""
    hidden, weight, targets, _ = problem(40, 16, 257, dtype=torch.float32)
    objective = objectives(40)["aapo"]
    copies = (hidden.detach().bfloat16(), weight.detach().bfloat16())
    wide = (*(t.float().requires_grad_() for t in copies), targets, None)
    options = {"backward": backward, "sparsity_threshold": 2**-6}
    truth, true_grads = run("torch", wide, objective, **options)
    with torch.autocast("cpu", torch.bfloat16):
        ours, grads = run("torch", (hidden, weight, targets, None), objective, **options)
        res = af.linear_logprobs(hidden, weight, targets)
    assert relative(ours.loss, truth.loss) < 1e-6
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert grad.dtype == torch.float32 and relative(grad, true_grad) < 1e-6
    live = ~truth.logps.isnan()
    assert relative(res.logps[live], truth.logps[live]) < 1e-6
    res.logps.sum().backward()  # outside the context, as people do
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("head_inside", [True, False])
def test_activation_checkpointing(reentrant, head_inside):
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(8, 8), nn.GELU()).double(), nn.Linear(8, 31, bias=False).double()
    x, targets = torch.randn(20, 8, dtype=torch.float64, requires_grad=True), torch.randint(31, (20,))

    def whole(x):
        return af.linear_policy_loss(body(x), head.weight, targets, af.SFT(20.0)).loss

    whole(x).backward()
    truth = [p.grad.clone() for p in (*body.parameters(), head.weight, x)]
    for p in (*body.parameters(), head.weight, x):
        p.grad = None
    if head_inside:
        checkpoint(whole, x, use_reentrant=reentrant).backward()
    else:
        hidden = checkpoint(body, x, use_reentrant=reentrant)
        af.linear_policy_loss(hidden, head.weight, targets, af.SFT(20.0)).loss.backward()
    for p, grad in zip((*body.parameters(), head.weight, x), truth, strict=True):
        assert relative(p.grad, grad) < 1e-14


def test_tied_weight_gets_both_gradients():
    torch.manual_seed(0)
    table = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(31, (2, 20))
    grads = {}
    for implementation in ("reference", "torch"):
        table.grad = None
        hidden = torch.tanh(table[ids])
        af.linear_policy_loss(hidden, table, targets, af.SFT(20.0), implementation=implementation).loss.backward()
        grads[implementation] = table.grad
    assert relative(grads["torch"], grads["reference"]) < 1e-13


def test_gradients_accumulate_over_calls():
    hidden, weight, targets, _ = problem(20, 8, 31)
    for _ in range(3):
        (af.linear_policy_loss(hidden, weight, targets, af.SFT(20.0)).loss / 3).backward()
    accumulated = weight.grad.clone()
    weight.grad = None
    af.linear_policy_loss(hidden, weight, targets, af.SFT(20.0)).loss.backward()
    assert relative(accumulated, weight.grad) < 1e-14


@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_more_rows_than_a_launch_grid_once_allowed(backward, monkeypatch):
    """65,537 rows: every row's own gradient, against the same rows in four calls."""
    inputs = problem(65_537, 4, 7)
    hidden, weight, targets, _ = inputs
    advantages, index = sequences(65_537, b=97)
    _, (dx, dw) = run("torch", inputs, af.AAPO(advantages, index, 65_537.0))
    if backward == "sparse":
        monkeypatch.setattr(sparse, "DENSE_SHARE", 10.0)  # seven columns are always "too full"
        options = {"backward": backward, "sparsity_threshold": 2**-4}
        _, (_, sampled) = run("torch", inputs, af.AAPO(advantages, index, 65_537.0), **options)
        assert 1e-6 < relative(sampled, dw) < 0.1
        return
    summed = torch.zeros_like(dw)
    for rows in torch.arange(65_537).chunk(4):
        part = (hidden.detach()[rows].requires_grad_(), weight, targets[rows], None)
        _, (dx_part, dw_part) = run("torch", part, af.AAPO(advantages, index[rows], 65_537.0))
        assert relative(dx[rows], dx_part) < 1e-12
        summed += dw_part
    assert relative(dw, summed) < 1e-12


def test_padding_of_the_vocabulary_has_neither_probability_nor_gradient():
    """Phantom columns of zero weight would each count as exp(0)."""
    hidden, weight, targets, bias = problem(20, 8, 31, bias=True)
    padded = (hidden, torch.cat([weight.detach(), torch.zeros(5, 8)]).requires_grad_(), targets,
              torch.cat([bias.detach(), torch.full((5,), 7.0)]).requires_grad_())  # fmt: skip
    truth, (dx, dw, db) = run("torch", (hidden, weight, targets, bias), af.SFT(20.0))
    for backward in ("exact", "sparse"):
        ours, (pdx, pdw, pdb) = run("torch", padded, af.SFT(20.0), vocab_size=31, backward=backward)
        assert relative(ours.logps, truth.logps) < 1e-14
        assert pdw[31:].norm() == 0 == pdb[31:].norm()
        if backward == "exact":
            assert relative(pdx, dx) < 1e-13 and relative(pdw[:31], dw) < 1e-13 and relative(pdb[:31], db) < 1e-13


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vocab_size": 0}, "vocab_size=0; weight has 10 rows"),
        ({"vocab_size": 11}, "vocab_size=11; weight has 10 rows"),
        ({"vocab_size": 3}, r"targets\[1\] is 4, outside \[0, 3\)"),
        ({"logit_scale": 0.0}, "logit_scale=0.0; give a positive"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, r"temperature\[1\] is 0.0"),
        ({"temperature": torch.tensor([1.0, 1.0, torch.nan, 1.0])}, r"temperature\[2\] is nan"),
        ({"temperature": torch.ones(4, requires_grad=True)}, "gets none here; detach it"),
    ],
)
@pytest.mark.parametrize("function", [af.linear_policy_loss, af.linear_logprobs])
def test_refusals(function, options, match):
    objective = (af.SFT(4.0),) if function is af.linear_policy_loss else ()
    with pytest.raises(ValueError, match=match):
        function(torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 4, 1, 2]), *objective, **options)


@pytest.fixture
def no_row_is_dropped(monkeypatch):
    """What a GPU does with all_logps: rows without a target are visited and masked."""
    monkeypatch.setattr(autograd, "rows_to_visit", lambda *_: None)


@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_old_log_probabilities_that_nobody_has_do_not_poison_the_gradient(backward, no_row_is_dropped):
    hidden, weight, targets, _ = problem(12, 8, 17)
    targets[[0, 7]] = -100
    advantages, index = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.arange(12) // 3
    old = af.linear_policy_loss(hidden, weight, targets, af.AAPO(advantages, index, 12), all_logps=True).logps
    assert old.isnan().sum() == 2
    for objective in (
        af.GRPO(advantages, index, 12, old),
        af.CISPO(advantages, index, 12, old),
        af.REINFORCE(advantages, index, 12, old),
    ):
        options = {"all_logps": True, "backward": backward, "sparsity_threshold": 2**-6}
        out, grads = run("torch", (hidden, weight, targets, None), objective, **options)
        assert out.loss.isfinite() and all(g.isfinite().all() and g.norm() > 0 for g in grads)


def test_rows_that_are_not_active_have_no_loss_even_if_they_are_visited():
    inputs = problem(12, 8, 17)
    for implementation in ("torch", "reference"):
        dropped, grads = run(implementation, inputs, FirstHalf())
        visited, others = run(implementation, inputs, FirstHalf(), all_logps=True)
        assert relative(visited.loss, dropped.loss) < 1e-14 and not visited.logps.isnan().any()
        assert all(relative(a, b) < 1e-13 for a, b in zip(others, grads, strict=True))


@pytest.mark.parametrize("backward", ["exact", "sparse"])
@pytest.mark.parametrize("implementation", ["torch", "auto"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_not_hidden(poison, implementation, backward):
    """A gradient scaler and a clipped norm must see it."""
    hidden, weight, targets, _ = problem(12, 8, 17, dtype=torch.float32)
    with torch.no_grad():
        hidden[1, 2] = poison
    out, (dx, dw) = run(implementation, (hidden, weight, targets, None), af.SFT(12.0), backward=backward)
    assert not out.loss.isfinite() and not dx.isfinite().all() and not dw.isfinite().all()


@pytest.mark.parametrize("lead", [0.0, 40.0, 60.0])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "triton"])  # which is a GPU's
def test_gradient_rows_hold_no_subnormal_numbers(implementation, lead, monkeypatch):
    """Products of them take a processor a hundred times as long, and a confident model's dust would be full of them."""
    seen = []

    def looked_at(self, d, out):
        seen.append(d.abs())
        return into(self, d, out)

    into = products.Products.hidden_gradient
    monkeypatch.setattr(products.Products, "hidden_gradient", looked_at)
    hidden, weight, targets, _ = problem(40, 16, 5003, dtype=torch.float32, scale=8.0)
    with torch.no_grad():
        if lead:  # the token that is nearly certain is the target
            targets[:] = (hidden @ weight.t()).argmax(1)
            hidden += lead * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    _, (dx, dw) = run(implementation, (hidden, weight, targets, None), af.SFT(1e5))
    z = hidden.detach().double() @ weight.detach().double().t()
    assert ((z - z.logsumexp(1, keepdim=True)) < -90).double().mean() > 0.1  # a subnormal probability
    d = torch.cat(seen)
    assert len(d) == 40 and ((d > 0) & (d < 2.0**-126)).sum() == 0 and (d == 0).double().mean() > 0.1
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    _, truth = run("reference", (*wide, targets, None), af.SFT(1e5))
    assert relative(dx, truth[0]) < 2e-5 and relative(dw, truth[1]) < 2e-5


def test_an_objective_may_write_on_what_it_is_given():
    inputs = problem(12, 8, 17)

    def scribbler(tokens):
        losses = -tokens.logps - 0.3 * tokens.entropy
        with torch.no_grad():
            tokens.entropy.mul_(0)
            tokens.rows.add_(1)
        return losses

    ours, grads = run("torch", inputs, scribbler)
    truth, true_grads = run("torch", inputs, lambda tokens: -tokens.logps - 0.3 * tokens.entropy)
    assert torch.equal(ours.entropy, truth.entropy) and torch.equal(grads[0], true_grads[0])


@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_second_derivatives_are_refused(function):
    hidden, weight, targets, _ = problem(6, 8, 17)
    if function == "loss":
        value = af.linear_policy_loss(hidden, weight, targets, af.SFT(6.0)).loss
    else:
        value = af.linear_logprobs(hidden, weight, targets).logps.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_temperatures_of_rows_without_target_do_not_matter():
    hidden, weight, targets, _ = problem(8, 8, 17)
    targets[3] = -100
    temperature = torch.full((8,), 0.7, dtype=torch.float64)
    truth, _ = run("torch", (hidden, weight, targets, None), af.SFT(8.0), temperature=temperature.clone())
    temperature[3] = 0.0
    ours, _ = run("torch", (hidden, weight, targets, None), af.SFT(8.0), temperature=temperature)
    assert torch.equal(ours.loss, truth.loss)


def test_numpy_numbers_are_numbers():
    hidden, weight, targets, _ = problem(8, 8, 17)
    plain = af.linear_policy_loss(hidden, weight, targets, af.SFT(8), temperature=0.5, vocab_size=17, seed=3).loss
    options = {"temperature": np.float32(0.5), "vocab_size": np.int64(17), "seed": np.int64(3)}
    assert af.linear_policy_loss(hidden, weight, targets, af.SFT(np.int64(8)), **options).loss == plain


def test_objectives_refuse_what_does_not_fit():
    index = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"AAPO: rollout_logps has shape \(3,\)"):
        af.AAPO(torch.ones(1), index, 4.0, rollout_logps=torch.zeros(3))
    with pytest.raises(ValueError, match="max_ratio=0.0; it must be a positive number"):
        af.REINFORCE(torch.ones(1), index, 4.0, max_ratio=0.0)
    with pytest.raises(ValueError, match="CISPO: clip_low=2"):
        af.CISPO(torch.ones(1), index, 4.0, clip_low=2)
    with pytest.raises(ValueError, match="Regularized: objective is a str"):
        af.Regularized("aapo", 4.0)
    with pytest.raises(ValueError, match=r"num_tokens has shape \(4,\); give one number"):
        af.SFT(torch.ones(4))
    with pytest.raises(ValueError, match="num_tokens=-3"):
        af.SFT(torch.tensor(-3.0))
    with pytest.raises(ValueError, match="num_tokens='12'"):
        af.SFT("12")
    with pytest.raises(ValueError, match="AAPO: advantages is a list"):
        af.AAPO([1.0], index, 4.0)
    with pytest.raises(ValueError, match="GRPO: old_logps is a list; give a torch.Tensor"):
        af.GRPO(torch.ones(1), index, 4.0, old_logps=[0.0] * 4)
    with pytest.raises(ValueError, match="SFT: weights is a list; give a torch.Tensor"):
        af.SFT(4.0, [1.0] * 4)
    with pytest.raises(ValueError, match="AAPO: max_ratio=None; it must be a positive number"):
        af.AAPO(torch.ones(1), index, 4.0, max_ratio=None)
    with pytest.raises(ValueError, match="GRPO: clip_low='0.2', clip_high=0.2"):
        af.GRPO(torch.ones(1), index, 4.0, clip_low="0.2")
    for bound in (1, "3", float("nan")):
        with pytest.raises(ValueError, match="GRPO: dual_clip=.*; give a ratio above one, or None"):
            af.GRPO(torch.ones(1), index, 4.0, dual_clip=bound)
    with pytest.raises(ValueError, match="Regularized: objective is the class SFT; give an objective"):
        af.Regularized(af.SFT, 4.0)
    with pytest.raises(ValueError, match=r"Regularized: kl_penalty=0.1 needs reference_logps, \(N,\)"):
        af.Regularized(af.SFT(4.0), 4.0, kl_penalty=0.1)
    for field, value in (("kl_penalty", "0.1"), ("kl_penalty", float("nan")), ("z_loss", "1"), ("entropy_bonus", None)):
        with pytest.raises(ValueError, match=f"Regularized: {field}={value!r}; give a finite number"):
            af.Regularized(af.SFT(4.0), 4.0, **{field: value}, reference_logps=torch.zeros(4))
    with pytest.raises(ValueError, match=r"Regularized: reference_logps is torch.int64; give log-probabilities"):
        af.Regularized(af.SFT(4.0), 4.0, kl_penalty=0.1, reference_logps=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="Regularized: reference_logps is a list; give a torch.Tensor"):
        af.Regularized(af.SFT(4.0), 4.0, kl_penalty=0.1, reference_logps=[0.0])
    with pytest.raises(
        ValueError, match=r"has shape \(3,\), the objective covers 4 rows; give one log-probability a row"
    ):
        af.Regularized(af.SFT(4.0, torch.ones(4)), 4.0, kl_penalty=0.1, reference_logps=torch.zeros(3))
    with pytest.raises(ValueError, match=r"has shape \(2, 3\); give one log-probability a row"):
        af.Regularized(af.SFT(4.0), 4.0, kl_penalty=0.1, reference_logps=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="VocabularyShard: start=-3"):
        af.VocabularyShard(None, -3, 17)
    hidden, weight, targets, _ = problem(4, 8, 17)
    long = af.AAPO(torch.ones(2), torch.arange(7) // 4, 4.0)
    for objective, match in (
        (af.Regularized(long, 4.0, 0.1), "objective covers 7 rows but targets has 4"),
        (af.AAPO, "objective is the class AAPO"),
        (None, "objective is None"),
    ):
        with pytest.raises(ValueError, match=match):
            af.linear_policy_loss(hidden, weight, targets, objective)
    with pytest.raises(ValueError, match="Regularized: num_tokens=0"):
        af.Regularized(af.SFT(4.0), 0)


class SquaredAAPO(af.AAPO):
    """Inherits a promise of being linear that it does not keep."""

    def __call__(self, tokens):
        return super().__call__(tokens) ** 2


class MaskedAAPO(af.AAPO):
    """Linear, and without a loss in every third row, whatever its sequence's weight."""

    def active(self):
        return torch.arange(self.sequence_index.numel()) % 3 > 0


@pytest.mark.parametrize("all_logps", [True, False])
@pytest.mark.parametrize("kind", [SquaredAAPO, MaskedAAPO])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_subclasses_of_linear_objectives(implementation, kind, all_logps):
    advantages, index = sequences(21)
    found = {}
    for name in ("reference", implementation):
        hidden, weight, targets, _ = problem(21, 8, 61, dtype=torch.float32)
        objective = kind(advantages.float(), index, 21.0)
        out = af.linear_policy_loss(hidden, weight, targets, objective, implementation=name, all_logps=all_logps)
        out.loss.backward()
        found[name] = out.loss.detach(), hidden.grad, weight.grad
    assert all(relative(a, b) < 2e-6 for a, b in zip(found[implementation], found["reference"], strict=True))
