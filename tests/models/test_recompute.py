"""Activation checkpointing and precision: the same gradient, from less memory or fewer bits."""

import copy

import pytest
import support
import torch
from policy_support import make_policy, make_samples, relative
from torch.utils._python_dispatch import TorchDispatchMode

from aapo_fast.models import attention
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.trainer.policy import Policy, resolve_precision
from aapo_fast.types import UserError

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Counted(TorchDispatchMode):
    """How often products and exponentials of gates are computed."""

    def __init__(self):
        super().__init__()
        self.products = self.gates = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in PRODUCTS
        self.gates += func is torch.ops.aten.silu.default
        return func(*args, **(kwargs or {}))


def step(kind, family="llama"):
    """Gradient, bytes that the tape holds on to outside of layers, and counts of a backward pass."""
    policy = make_policy(family, torch.float32)
    recompute_layers(policy.decoder, kind)
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy.loss(policy.batch(make_samples()), 50).loss
    with Counted() as counted:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()]), kept, counted


@pytest.mark.parametrize("family", ["llama", "gemma2, both soft-caps", "phi, biased head"])
def test_the_gradient_is_the_same_bit_for_bit(family):
    truth, *_ = step("none", family)
    for kind in ("selective", "full"):
        gradient, *_ = step(kind, family)
        assert torch.equal(gradient, truth)


def test_what_is_computed_again():
    _, kept, plain = step("none")
    _, kept_selective, selective = step("selective")
    _, kept_full, full = step("full")
    layers = support.SIZES["num_hidden_layers"]
    assert selective.products == plain.products and selective.gates == plain.gates + layers
    assert full.products == plain.products + 6 * layers  # nothing needs the result of a layer's seventh
    assert full.gates == plain.gates + layers
    assert max(kept_full, kept_selective) < kept / 4


def test_generation_is_left_alone_and_names_stay():
    policy = make_policy("llama", torch.float32)
    names = list(policy.model.state_dict())
    recompute_layers(policy.decoder, "full")
    assert list(policy.model.state_dict()) == names
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        out = policy.model(ids, use_cache=True)
        more = policy.model(torch.tensor([[6]]), past_key_values=out.past_key_values, use_cache=True)
        whole = policy.model(torch.tensor([[3, 4, 5, 6]]))
    assert torch.allclose(more.logits[0, -1], whole.logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_a_copy_computes_with_its_own_weights(kind):
    """A frozen reference is a copy of the policy; so is what FSDP cuts into shards."""
    model = support.tiny()
    recompute_layers(model.model, kind)
    twin = copy.deepcopy(model)

    def logits(of):
        return of(torch.tensor([[3, 4, 5]]), use_cache=False).logits

    before = logits(twin)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(twin), before) and not torch.allclose(logits(model), before)
    logits(twin).sum().backward()
    weights = (m.model.layers[0].mlp.up_proj.weight for m in (twin, model))
    assert [weight.grad is None for weight in weights] == [False, True]


def test_a_decoder_without_layers_is_refused():
    with pytest.raises(UserError, match="model.activation_checkpointing='full': Linear has no list of layers"):
        recompute_layers(torch.nn.Linear(2, 2), "full")


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_bfloat16_is_as_near_as_the_models_own_logits_are_and_weights_stay_float32(kind):
    """The yardstick is autocast round the whole model, logits and all."""
    model = support.tiny()
    model.set_attn_implementation(attention.NAME)
    truth = Policy(model, support.tokenizer(), 1.0)
    rounded = Policy(model, support.tokenizer(), 1.0, precision=torch.bfloat16)
    samples = make_samples()

    def gradient(loss_of):
        model.zero_grad()
        loss_of().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def own_logits():
        rows = [[*w.sample.prompt_ids, *w.sample.token_ids] for w in samples]
        with torch.autocast("cpu", torch.bfloat16):
            logits = [model(torch.tensor([row])).logits[0] for row in rows]
        losses = [
            w.advantage
            * torch.nn.functional.cross_entropy(z[-n - 1 : -1].float(), torch.tensor(row[-n:]), reduction="sum")
            for w, row, z in zip(samples, rows, logits, strict=True)
            for n in [len(w.sample.token_ids)]
        ]
        return sum(losses) / 50

    exact, theirs = gradient(lambda: truth.loss(truth.batch(samples), 50).loss), gradient(own_logits)
    recompute_layers(rounded.decoder, kind)
    ours = gradient(lambda: rounded.loss(rounded.batch(samples), 50).loss)
    assert 1e-4 < relative(ours, exact) < 1.1 * relative(theirs, exact)


def test_precision_by_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_precision("auto", d) for d in (cpu, cuda)] == [torch.float32, torch.bfloat16]
    assert resolve_precision("float32", cuda) == torch.float32 and resolve_precision("bfloat16", cpu) == torch.bfloat16
