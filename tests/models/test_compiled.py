"""Layers under torch.compile: the same gradient, by code that is made once, whatever batches come."""

import copy
import functools
import random

import pytest
import ranks_support
import support
import torch
from policy_support import make_samples, relative
from ranks_support import on_ranks, results
from torch import distributed as dist
from torch._dynamo.utils import counters

from aapo_fast import config
from aapo_fast.data.packing import Weighted
from aapo_fast.models import attention, compiled
from aapo_fast.models.compiled import compile_layers
from aapo_fast.models.lora import add_adapter
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.trainer.policy import Policy
from aapo_fast.types import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Everything but code in C++, which takes longest and changes nothing about when layers are compiled."""
    made = functools.cache(lambda forward: torch.compile(forward, dynamic=True, backend="aot_eager"))
    monkeypatch.setattr(compiled, "_compile", made)


def make_model(family, lora=0):
    model = support.tiny(family)
    model.set_attn_implementation(attention.NAME)
    if lora:
        torch.manual_seed(0)
        model = add_adapter(model, lora, 32.0, ["all-linear"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at zero, A would have no gradient
                torch.nn.init.normal_(parameter.data, std=0.1)
    return model


def batches():
    """From one completion up: other numbers of tokens, prompts, attention problems and buckets of them."""
    rng = random.Random(0)
    yield make_samples()
    yield [Weighted(support.sample([1, 2], [3, 4, 5]), 1.0)]
    for groups in (1, 3, 7, 12):
        for _ in range(2):
            yield [
                Weighted(support.sample([group] * size, [5] * rng.choice([1, 2, 3, 9, 40])), rng.uniform(-1, 1))
                for group, size in enumerate(rng.choices(range(2, 20), k=groups), start=1)
                for _ in range(rng.randrange(1, 5))
            ]


def gradient(policy, samples):
    policy.model.zero_grad()
    policy.loss(policy.batch(samples), 50).loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("family", "lora", "kind", "precision"),
    [
        ("llama", 0, "none", "float32"),
        ("gemma2, both soft-caps", 0, "full", "float32"),
        ("qwen3", 2, "full", "bfloat16"),
    ],
)
@support.needs_compiler
@pytest.mark.usefixtures("traced")
def test_the_gradient_is_the_same_and_nothing_is_compiled_after_the_first_batch(family, lora, kind, precision):
    dtype = getattr(torch, precision)
    truth = Policy(make_model(family, lora), support.tokenizer(), 1.0, precision=dtype)
    model = make_model(family, lora)
    decoder = model.get_base_model().model if lora else model.model
    compile_layers(decoder, CPU)
    recompute_layers(decoder, kind)
    policy = Policy(model, support.tokenizer(), 1.0, precision=dtype)
    assert not counters["frames"] and list(model.state_dict()) == list(truth.model.state_dict())
    numbers = set()
    for place, samples in enumerate(batches()):
        with torch._dynamo.config.patch(error_on_recompile=place > 0):
            found = gradient(policy, samples)
        assert relative(found, gradient(truth, samples)) < (1e-6 if precision == "float32" else 1e-2)
        numbers.add(counters["frames"]["ok"])
        assert len({len(policy.batch(s).packing) for s in batches()}) > 3
    assert len(numbers) == 1 and numbers.pop() <= 9


@pytest.mark.timeout(300)
@support.needs_compiler
def test_the_gradient_is_the_same_by_inductors_own_code():
    """The backend that a run has: layers become C++, forward and backward."""
    model = make_model("llama")
    compile_layers(model.model, CPU)
    found = gradient(Policy(model, support.tokenizer(), 1.0), make_samples())
    assert counters["frames"]["ok"] and counters["inductor"]
    assert relative(found, gradient(Policy(make_model("llama"), support.tokenizer(), 1.0), make_samples())) < 1e-6


@support.needs_compiler
@pytest.mark.usefixtures("traced")
def test_generation_is_left_alone():
    model = make_model("llama")
    compile_layers(model.model, CPU)
    with torch.no_grad():
        out = model(torch.tensor([[3, 4, 5]]), use_cache=True)
        more = model(torch.tensor([[6]]), past_key_values=out.past_key_values, use_cache=True)
        whole = model(torch.tensor([[3, 4, 5, 6]]))
    assert torch.allclose(more.logits[0, -1], whole.logits[0, -1], atol=1e-5) and not counters["frames"]


@support.needs_compiler
@pytest.mark.usefixtures("traced")
def test_a_copy_computes_with_its_own_weights_by_the_same_code():
    model = make_model("llama")
    compile_layers(model.model, CPU)
    policy, twin = (Policy(m, support.tokenizer(), 1.0) for m in (model, copy.deepcopy(model)))
    before = gradient(twin, make_samples())
    made = counters["frames"]["ok"]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.5)
    assert relative(gradient(policy, make_samples()), before) > 0.1
    assert torch.equal(gradient(twin, make_samples()), before)
    assert counters["frames"]["ok"] == made


@support.needs_compiler
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_the_gradient_of_two_ranks():
    samples = make_samples()
    [(truth, *_)] = results(1, ranks_support.gradient, samples, [0], 20, {"dtype": "float32"})
    policy = {"dtype": "float32", "compiled": True}
    for found, *_ in on_ranks(2, ranks_support.gradient, samples, [0], 20, policy, limit_seconds=250):
        assert relative(found, truth) < 1e-5


def test_what_is_refused(monkeypatch):
    with pytest.raises(UserError, match="model.compile=true: Linear has no list of layers"):
        compile_layers(torch.nn.Linear(2, 2), CPU)
    with pytest.raises(UserError, match="activation_checkpointing='selective' cannot look into layers that model.comp"):
        config.parse({"model": {"compile": True, "activation_checkpointing": "selective"}})
    monkeypatch.setenv("CXX", "no-such-compiler")
    # Its own patch: monkeypatch takes this configuration for a class, and leaves it without the entry.
    no_compiler = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with (
        no_compiler,
        pytest.raises(UserError, match=r"model.compile=true needs a C\+\+ compiler, which is not installed"),
    ):
        compile_layers(support.tiny().model, CPU)
