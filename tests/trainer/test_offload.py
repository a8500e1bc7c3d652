"""AdamW in the host's memory: here the device is the CPU too, and nothing may come out otherwise."""

import dataclasses
import math

import pytest
import ranks_support
import support
import torch
from policy_support import make_samples
from ranks_support import Raised, on_ranks, results
from resume_support import crash, make_tree, run, weights
from torch import distributed as dist

from aapo_fast import config
from aapo_fast.config import TrainConfig
from aapo_fast.models import attention
from aapo_fast.models.lora import add_adapter
from aapo_fast.trainer import setup
from aapo_fast.trainer.offload import OffloadedAdamW
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.step import make_optimizer, optimizer_step
from aapo_fast.types import UserError

PLAIN = TrainConfig(weight_decay=0.1, learning_rate=1e-2)
OFFLOADED = dataclasses.replace(PLAIN, offload_optimizer=True)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Where a run refuses it."""
    monkeypatch.setattr(setup, "check_offload", lambda config: None)


def make_policy(family="llama", lora=0):
    model = support.tiny(family)
    model.set_attn_implementation(attention.NAME)
    torch.manual_seed(0)
    return Policy(add_adapter(model, lora, 32.0, ["all-linear"]) if lora else model, support.tokenizer(), 1.0)


def trained(settings, family="llama", lora=0, steps=4):
    """Weights after some steps, of which one has a gradient that is not finite; and the optimizer."""
    policy = make_policy(family, lora)
    optimizer = make_optimizer(policy, settings)
    for number in range(steps):
        samples = make_samples(number)
        if number == 1:
            samples[0] = dataclasses.replace(samples[0], advantage=math.nan)
        result = optimizer_step(policy, optimizer, samples, settings, 1e-2 / (number + 1))
        assert result.updated == (number != 1)
        assert all(p.grad is None for p in policy.model.parameters())
    return list(policy.model.parameters()), optimizer


@pytest.mark.parametrize(("family", "lora"), [("llama", 0), ("llama tied", 0), ("phi, biased head", 0), ("llama", 2)])
def test_weights_and_moments_are_those_of_plain_adamw_bit_for_bit(family, lora):
    truth, plain = trained(PLAIN, family, lora)
    found, offloaded = trained(OFFLOADED, family, lora)
    assert type(plain) is torch.optim.AdamW and isinstance(offloaded, OffloadedAdamW)
    start = list(make_policy(family, lora).model.parameters())
    assert sum(not torch.equal(a, b) for a, b in zip(truth, start, strict=True)) == len(plain.state)
    assert all(torch.equal(a, b) for a, b in zip(truth, found, strict=True))
    one, other = plain.state_dict(), offloaded.state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert all(torch.equal(tensor, other["state"][index][key]) for key, tensor in state.items())


def test_a_parameter_without_a_gradient_stays():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OffloadedAdamW([{"params": [("used", used), ("unused", unused)]}], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        used.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(used, torch.ones(3)) and torch.equal(unused, torch.ones(3)) and len(optimizer.state) == 1


def test_its_memory_is_its_own():
    """What is on the device is the caller's; nothing of the optimizer shares it, or it would be there still."""
    policy = make_policy()
    optimizer = make_optimizer(policy, OFFLOADED)
    optimizer_step(policy, optimizer, make_samples(), OFFLOADED, 1e-2)
    theirs = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    ours += [t for state in optimizer.state.values() for t in state.values()]
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in ours)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.usefixtures("on_a_cpu")
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit_and_with_the_other_optimizer(
    tmp_path, tiny_model, monkeypatch, weights_alone, before
):
    tree = make_tree(tmp_path, tiny_model, train__offload_optimizer=before)
    crash(tree, monkeypatch)
    after = {**tree, "train": tree["train"] | {"offload_optimizer": True}}
    _, said = run(after, run={"resume": True})
    assert "resuming after step 4" in said
    assert ("train.offload_optimizer was False and is True" in said) != before
    assert weights(tmp_path) == weights_alone


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_shards_are_moved_as_by_plain_adamw_bit_for_bit():
    policy, steps = {"family": "llama tied", "dtype": "float32"}, [make_samples(seed) for seed in range(3)]
    truth, _ = results(2, ranks_support.trained, steps, policy)
    found = results(2, ranks_support.trained, steps, policy, True)
    assert all(torch.equal(ours, truth[0]) for ours, _ in found)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_go_on_from_their_checkpoint_bit_for_bit(tmp_path, tiny_model):
    """Of shards in the memories of two hosts."""
    for name, dies_at in (("alone", 0), ("killed", 6)):
        (tmp_path / name).mkdir()
        tree = make_tree(tmp_path / name, tiny_model, train__offload_optimizer=True)
        died = on_ranks(2, ranks_support.train, tree, dies_at)
        assert dies_at == 0 or died == [Raised(("KeyboardInterrupt", ""))] * 2
    _, said = results(2, ranks_support.train, {**tree, "run": tree["run"] | {"resume": True}})[0]
    assert "resuming after step 4" in said
    assert weights(tmp_path / "killed") == weights(tmp_path / "alone")


def test_on_a_cpu_it_is_refused(tmp_path, tiny_model):
    tree = make_tree(tmp_path, tiny_model, train__offload_optimizer=True)
    with pytest.raises(UserError, match="train.offload_optimizer=true: the model is on the CPU"):
        setup.check_offload(config.parse(tree))
    with pytest.raises(UserError, match="leave it out"):
        run(tree)
    assert not (tmp_path / "run").exists()


def test_a_host_without_memory_is_told_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch, "empty_like", fails)
    with pytest.raises(
        UserError, match="CUDA error: out of memory; the host needs 16 bytes a trained parameter"
    ) as error:
        OffloadedAdamW([{"params": [("w", torch.nn.Parameter(torch.ones(2)))]}], lr=0.1)
    assert "\n" not in str(error.value)
