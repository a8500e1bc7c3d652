"""On a GPU the host must not wait for the device. There is none here, but the meta device has no values at all: what
would have to look at one fails on it.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aapo_fast as af
from aapo_fast import transfer
from aapo_fast.objectives import REINFORCE
from aapo_fast.ops.linear_policy import autograd, chunked, runs, sizes
from aapo_fast.ops.linear_policy.statistics import Transform

N, H, V, B = 200, 32, 1003, 9
META = torch.device("meta")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Which the meta device does not know."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def operands(dtype=torch.float32, device="meta"):
    hidden = torch.randn(N, H, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, device=device, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,), device=device)


def sequences(device="cpu"):
    index = torch.arange(N) % B
    advantages = torch.linspace(-1, 1, B) * (torch.arange(B) % 3 > 0)  # every third sequence has none
    return advantages.to(device), index.to(device)


def on_the_host():
    advantages, index = sequences()
    return {
        "AAPO": af.AAPO(advantages, index, N),
        "AAPO, divisor on the device": af.AAPO(advantages, index, torch.full((), 9.0, device="meta")),
        "REINFORCE": REINFORCE(advantages, index, N, torch.randn(N)),
        "GRPO": af.GRPO(advantages, index, N, torch.randn(N)),
        "GRPO, old on the device": af.GRPO(advantages, index, N, torch.randn(N, device="meta")),
        "SFT": af.SFT(N, (torch.arange(N) % 2).float()),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", on_the_host())
def test_weights_known_on_the_host_are_dropped_without_waiting(name, dtype):
    hidden, weight, targets = operands(dtype)
    out = af.linear_policy_loss(hidden, weight, targets, on_the_host()[name], temperature=0.7)
    out.loss.backward()
    assert out.loss.device == META and out.logps.shape == (N,)
    assert hidden.grad.shape == (N, H) and weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_are_visited_without_waiting(dtype):
    hidden, weight, targets = operands(dtype)
    options = {"temperature": torch.ones(N, device="meta"), "softcap": 30.0}
    inner = af.AAPO(*sequences("meta"), N)
    for objective in (inner, af.Regularized(inner, N, 0.01, 1e-4), lambda tokens: -tokens.logps):
        af.linear_policy_loss(hidden, weight, targets, objective, all_logps=True, **options).loss.backward()
    res = af.linear_logprobs(hidden, weight, targets, **options)
    (res.logps * res.entropy).sum().backward()


def test_weights_on_the_device_are_looked_at(monkeypatch):
    """The price of dropping rows; and that this device would tell. No CUDA graph holds that."""
    hidden, weight, targets = operands()
    asked = []
    monkeypatch.setattr(autograd, "check_not_captured", lambda device, why: asked.append(why))
    with pytest.raises(NotImplementedError, match="nonzero"):
        af.linear_policy_loss(hidden, weight, targets, af.AAPO(*sequences("meta"), N))
    assert len(asked) == 1 and "all_logps=True" in asked[0]


def test_what_waits_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    transfer.check_not_captured(META, "nothing")
    with pytest.raises(RuntimeError, match="^cannot be captured in a CUDA graph: it waits; do not$"):
        transfer.check_not_captured(torch.device("cuda"), "it waits; do not")
    for name in ("policy_loss", "logprobs", "logprobs_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.aapo_fast, name).default.tags


def test_rows_known_on_the_host_are_those_with_a_weight():
    advantages, index = sequences()
    _, _, targets = operands(device="cpu")
    call = chunked.Call(Transform(1.0), V, None, None, 0, "torch", True, None)
    mask = af.AAPO(advantages, index, N).active()
    rows = autograd.rows_to_visit(targets, mask, call)
    assert torch.equal(rows, (advantages[index] != 0).nonzero().squeeze(1)) and len(rows) < N
    there = autograd.rows_to_visit(targets.to("meta"), mask, call)
    assert there.shape == rows.shape and there.device == META
    assert autograd.rows_to_visit(targets.to("meta"), torch.ones(N, dtype=torch.bool), call) is None


def test_an_objective_follows_its_rows():
    advantages, index = sequences()
    inner = af.AAPO(advantages, index, torch.tensor(9.0))
    objective = af.Regularized(inner, N, 0.01)
    there = autograd.objective_on_device(objective, META)
    assert there.objective.advantages.device == there.objective.sequence_index.device == META
    assert there.objective.num_tokens is inner.num_tokens and there.entropy_bonus == 0.01
    assert objective.objective is inner and inner.advantages is advantages  # which stay where they are
    assert autograd.objective_on_device(objective, torch.device("cpu")) is objective


class Masked:
    """No dataclass: its mask is on the CPU whatever happens."""

    def active(self):
        return torch.arange(N) % 3 > 0

    def __call__(self, tokens):
        return -tokens.logps


@dataclass
class State:
    """No objective; leads back to the one that holds it."""

    owner: object
    values: torch.Tensor


@dataclass
class Stateful:
    weights: torch.Tensor
    scale: float
    table: torch.Tensor
    cache: object = field(init=False, repr=False)
    state: object = None

    def active(self):
        return self.weights != 0

    def __call__(self, tokens):
        return -self.weights[tokens.rows] * tokens.logps * self.scale


def stateful():
    """With a field that is not set, one that is no vector, one that leads back to it, and an attribute beside them."""
    made = Stateful(torch.ones(N), 2.0, torch.ones(3, 4))
    made.state, made.beside = State(made, torch.ones(N)), 7
    return made


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("make", [Masked, stateful])
def test_objectives_of_users_own_kinds(make, implementation):
    hidden, weight, targets = operands()
    out = af.linear_policy_loss(hidden, weight, targets, make(), implementation=implementation)
    out.loss.backward()
    assert hidden.grad.shape == (N, H)


def test_a_copy_of_an_objective_holds_all_that_it_held():
    made = stateful()
    there = autograd.objective_on_device(made, META)
    assert there.weights.device == META and made.weights.device.type == "cpu"
    assert there.table is made.table and there.state is made.state and (there.scale, there.beside) == (2.0, 7)
    assert not hasattr(there, "cache")


@dataclass
class Table:
    values: torch.Tensor

    def __call__(self, tokens):
        return self.values[tokens.rows] * tokens.logps


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_an_objective_on_a_third_device_is_refused(implementation):
    hidden, weight, targets = operands(device="cpu")
    objective = Table(torch.ones(N, device="meta"))
    with pytest.raises(ValueError, match=r"Table\.values is on meta, targets is on cpu; move them together"):
        af.linear_policy_loss(hidden, weight, targets, objective, implementation=implementation)
    on_meta = af.AAPO(*sequences("meta"), N)
    with pytest.raises(ValueError, match=r"AAPO\.advantages is on meta, targets is on cpu; move them together"):
        af.linear_policy_loss(hidden, weight, targets, on_meta, implementation=implementation)
    index = sequences("meta")[1]
    with pytest.raises(ValueError, match="advantages is on cpu, sequence_index is on meta; put them on one device"):
        af.AAPO(torch.ones(B), index, N)


class Looks(TorchDispatchMode):
    """Operators for which a host would wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if boolean or unsized or name.startswith(self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backward", ["exact", "sparse"])
@pytest.mark.parametrize("kind", ["AAPO", "GRPO"])
def test_triton_kernels_look_at_nothing_but_counts(backward, kind, monkeypatch):
    """One count of sparse entries a panel, by the one function that waits for no more than it has to. (What reads
    values without an operator, ``tolist`` of a tensor on the CPU, is not seen.)
    """
    from aapo_fast.ops.linear_policy import sparse_triton

    monkeypatch.setattr(sizes, "CHUNK_ROWS", 80)
    read, reads = sparse_triton._read_later, []
    monkeypatch.setattr(sparse_triton, "_read_later", lambda numbers: reads.append(1) or read(numbers))
    hidden, weight, targets = operands(device="cpu")
    hidden = (hidden * 3).detach()
    objective = on_the_host()[kind]
    threshold, asked = None if backward == "exact" else 2**-6, []
    monkeypatch.setattr(chunked, "check_not_captured", lambda device, why: asked.append(why))
    call = chunked.Call(Transform(1.0), V, None, threshold, 0, "triton", False, None)
    rows = torch.arange(N)
    with Looks() as looks, torch.no_grad():
        work = chunked.Pass(hidden, weight.detach(), None, targets, rows, call, (True, True, False))
        runs.policy_loss(work, objective, objective.active())
    assert looks.found == []
    assert len(reads) == (3 if backward == "sparse" else 0)
    assert len(asked) == (backward == "sparse")  # no CUDA graph holds that
