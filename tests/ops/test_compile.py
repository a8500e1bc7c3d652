"""Under ``torch.compile``: no graph break, the same bits, no recompilation from step to step, proper operators."""

import dataclasses

import pytest
import support
import torch
from op_support import objectives, problem, relative, variant_problem
from torch._dynamo.testing import CompileCounterWithBackend

import aapo_fast as af


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def gradients(function, inputs, *arguments):
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:2]]
    bias = None if inputs[3] is None else inputs[3].detach().clone().requires_grad_()
    loss, *rest = function(*leaves, inputs[2], bias, *arguments)
    loss.backward()
    return [loss.detach(), *rest, *(t.grad for t in [*leaves, bias] if t is not None)]


@pytest.mark.parametrize("name", list(objectives(4)))
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_any_objective_in_one_graph(name, variant):
    inputs, options = variant_problem(variant, 30, 8, 101)
    objective = objectives(30)[name]

    def step(hidden, weight, targets, bias):
        out = af.linear_policy_loss(hidden * 1.5, weight, targets, objective, bias=bias, **options)
        return 2 * out.loss, out.logps, out.entropy

    eager = gradients(step, inputs)
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), inputs)
    for ours, truth in zip(compiled, eager, strict=True):
        assert torch.equal(ours.isnan(), truth.isnan())
        assert relative(ours.nan_to_num(), truth.nan_to_num()) < 1e-12 or truth.norm() == 0 == ours.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=support.needs_compiler)])
def test_token_counts_and_seeds_that_change_do_not_recompile(backend):
    """Inductor lowers everything but our operators to C++: this is the backend that people use."""
    inputs = problem(20, 8, 101, dtype=torch.float32)
    advantages, index = torch.tensor([1.0, 0.0, -2.0]), torch.arange(20) % 3

    def step(hidden, weight, targets, bias, num_tokens, seed):
        objective = af.AAPO(advantages, index, num_tokens)
        options = {"backward": "sparse", "sparsity_threshold": 2**-6, "seed": seed}
        return (af.linear_policy_loss(hidden * 1.5, weight, targets, objective, **options).loss,)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for num_tokens, seed in ((20, 0), (21, 1), (25, 7), (900, 123456789)):
        ours, truth = (gradients(f, inputs, num_tokens, seed) for f in (compiled, step))
        assert all(relative(a, b) < 1e-6 for a, b in zip(ours, truth, strict=True))
    assert counter.frame_count <= 2  # once with the numbers as constants, once for all others


@dataclasses.dataclass
class Peculiar:
    """A user's dataclass with everything that a careless copy gets wrong."""

    scale: torch.Tensor
    times: int
    negate: bool
    made: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        self.scale = self.scale / 2
        self.made = 3.0

    def __call__(self, tokens):
        sign = -1.0 if self.negate is True else 1.0
        return sum((sign * self.scale * self.made * tokens.logps for _ in range(self.times)), 0 * tokens.logps)


@dataclasses.dataclass
class WithMore:
    """Carries an attribute that is no field."""

    weight: float

    def __call__(self, tokens):
        return self.weight * self.more * tokens.logps


class FasterAAPO(af.AAPO):
    """A subclass of a frozen dataclass, which is no dataclass itself and may carry what it likes."""

    factor = 1.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.factor = 5.0

    def __call__(self, tokens):
        return self.factor * super().__call__(tokens)


@dataclasses.dataclass(frozen=True)
class Cached:
    """Frozen, and keeps more than its fields all the same."""

    scale: float

    def __post_init__(self):
        object.__setattr__(self, "_scaled", 3.0 * self.scale)

    def __call__(self, tokens):
        return self._scaled * tokens.logps


class Callback:
    """No dataclass; makes NaN in rows that it declares inactive."""

    def active(self):
        return torch.arange(12) % 3 > 0

    def __call__(self, tokens):
        old = torch.where(self.active(), 0.0, torch.nan)
        return -(tokens.logps - old[tokens.rows]).exp()


@pytest.mark.parametrize(
    "kind", ["dataclass", "attribute beside the fields", "inactive rows of NaN", "subclass of ours", "frozen with more"]
)
def test_objectives_of_users_in_one_graph(kind):
    inputs = problem(12, 8, 31)
    objective = Callback()
    if kind == "dataclass":
        objective = Peculiar(torch.tensor(0.3), 2, True)
    elif kind == "attribute beside the fields":
        objective = WithMore(0.3)
        objective.more = 5.0
    elif kind == "subclass of ours":
        objective = FasterAAPO(torch.randn(3), torch.arange(12) // 4, 12.0)
    elif kind == "frozen with more":
        objective = Cached(0.7)

    def step(hidden, weight, targets, bias):
        return af.linear_policy_loss(hidden * 1.5, weight, targets, objective).loss, torch.zeros(())

    eager = gradients(step, inputs)
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), inputs)
    for ours, truth in zip(compiled, eager, strict=True):
        assert truth.isfinite().all() and (relative(ours, truth) < 1e-6 or truth.norm() == 0 == ours.norm())


def test_temperature_and_softcap_that_change():
    hidden, weight, targets, _ = problem(12, 8, 31)

    def step(temperature, softcap):
        options = {"temperature": temperature, "softcap": softcap}
        return af.linear_policy_loss(hidden, weight, targets, af.SFT(12.0), **options).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for arguments in ((1.0, 5.0), (1.1, 5.0), (0.9, 6.0), (0.7, 7.5)):
        assert relative(compiled(*arguments), step(*arguments)) < 1e-14


@support.needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_and_strided_operands_in_inductor(dtype):
    """Inductor believes the fake implementation's dtypes and strides: a wrong one is memory corruption."""
    x, w = (torch.randn(8, n, dtype=dtype).t().requires_grad_() for n in (12, 31))
    targets = torch.arange(12)

    def step(hidden, weight):
        res = af.linear_logprobs(hidden, weight, targets)
        return af.linear_policy_loss(hidden, weight, targets, af.SFT(12.0)).loss + res.logps.sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x.grad = w.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, w)
        loss.backward()
        found.append((loss.detach(), x.grad.clone(), w.grad.clone()))
    assert all(a.dtype == b.dtype and relative(a, b) < 1e-6 for a, b in zip(*found, strict=True))


def test_logprobs_in_one_graph():
    inputs, options = variant_problem("everything", 30, 8, 101)
    inputs[2][4] = -100

    def step(hidden, weight, targets, bias):
        res = af.linear_logprobs(hidden, weight, targets, bias=bias, **options)
        return (res.logps.exp() * res.entropy + res.logsumexp).sum(), res.logps.detach()

    eager = gradients(step, inputs)
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), inputs)
    assert all(relative(a, b) < 1e-12 for a, b in zip(compiled, eager, strict=True))


def test_frozen_weight_in_a_graph():
    hidden, weight, targets, _ = problem(12, 8, 31)
    frozen = weight.detach()
    step = torch.compile(
        lambda h: af.linear_policy_loss(h, frozen, targets, af.SFT(12.0)).loss, backend="aot_eager", fullgraph=True
    )
    step(hidden).backward()
    truth = hidden.grad.clone()
    hidden.grad = None
    af.linear_policy_loss(hidden, frozen, targets, af.SFT(12.0)).loss.backward()
    assert relative(truth, hidden.grad) < 1e-14


def test_operators_are_proper_ones():
    """PyTorch's own check: schema, fake implementation, autograd registration."""
    hidden, weight, targets, bias = problem(9, 8, 31, bias=True)
    options = (
        '{"temperature": 0.7, "softcap": null, "scale": 1.0, "vocab_size": 31, "threshold": null, '
        '"implementation": "torch", "drop_rows": false, "autocast": null}'
    )
    call = (hidden, weight, bias, targets, None, options, 0)
    sft = '{"class": "aapo_fast.objectives:SFT", "fields": {"num_tokens": {"number": 0}, "weights": null}}'
    tensors = [torch.tensor(9.0, dtype=torch.float64)]
    torch.library.opcheck(torch.ops.aapo_fast.policy_loss.default, (*call, sft, tensors, [True, True, True]))
    torch.library.opcheck(torch.ops.aapo_fast.logprobs.default, call)


def test_bad_targets_are_not_silent_in_a_graph():
    hidden, weight, targets, _ = problem(9, 8, 31)
    targets[3] = 31
    step = torch.compile(
        lambda: af.linear_policy_loss(hidden, weight, targets, af.SFT(9.0)).loss, backend="aot_eager", fullgraph=True
    )
    with pytest.raises(ValueError, match=r"targets\[3\] is 31, outside \[0, 31\)"):
        step()
