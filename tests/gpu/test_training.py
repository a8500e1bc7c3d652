"""The training forward and backward on a GPU: flash attention, Liger's kernels and recomputed layers against SDPA."""

import gc
import importlib.util

import pytest
import support
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from policy_support import make_samples, relative

from aapo_fast.config import TrainConfig
from aapo_fast.data.packing import Weighted
from aapo_fast.models import attention, flash
from aapo_fast.models.liger import use_liger
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.step import make_optimizer, optimizer_step
from aapo_fast.types import UserError

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def many_samples(prompts):
    """Of 256 tokens each, with weights of their own and no two alike."""
    starts = [[2 + i % 40] * 32 + [2 + i // 40] * 32 for i in range(prompts)]
    return [Weighted(support.sample(start, [3] * 192), 1.0 - i / 512) for i, start in enumerate(starts)]


def gradient(precision, kernel=None, family="llama", change=lambda model: None, samples=None):
    model = support.tiny(family).to(GPU)
    model.set_attn_implementation(attention.NAME)
    change(model)
    policy = Policy(model, support.tokenizer(), 0.9, precision=precision, flash=kernel)
    assert policy.packed
    policy.loss(policy.batch(samples or make_samples()), 50).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


def found(name):
    try:
        return flash.find_flash(name, GPU, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(flash.KERNELS))
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral, sliding window"])
def test_flash_attention_is_as_near_the_truth_as_sdpa(name, family):
    kernel = found(name)
    truth = gradient(torch.float32, family=family)
    sdpa = relative(gradient(torch.bfloat16, family=family), truth)
    assert relative(gradient(torch.bfloat16, kernel, family), truth) < 1.3 * sdpa


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2, both soft-caps"])
def test_ligers_kernels_compute_the_same(family):
    plain = gradient(torch.float32, family=family)
    patched = gradient(torch.float32, family=family, change=lambda model: assert_true(use_liger(model)))
    assert relative(patched, plain) < 1e-4


def assert_true(value):
    assert value


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradient_from_less_memory(kind):
    """Of 2^14 tokens, whose activations are most of what there is."""
    kernel, samples = found("varlen"), many_samples(64)

    def measured(kind):
        gc.collect()  # what went before is in cycles
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = gradient(
            torch.bfloat16, kernel, change=lambda model: recompute_layers(model.model, kind), samples=samples
        )
        return relative(made, truth), torch.cuda.max_memory_allocated() - before

    # Not with each other: the kernel's backward pass adds in any order, and its 16 bits are never the same twice.
    truth = gradient(torch.float32, samples=samples)
    measured("none")  # the first one also gets the workspaces of cuBLAS, which stay
    plain, recomputed = measured("none"), measured(kind)
    assert recomputed[0] <= 1.1 * plain[0] and recomputed[1] < 0.9 * plain[1]


def test_an_offloaded_optimizer_moves_the_weights_as_adamw_does_and_leaves_its_memory_free():
    def trained(offload):
        """The way of the weights, bytes on the device after it that the model does not have, and the optimizer."""
        model = support.tiny().to(GPU)
        model.set_attn_implementation(attention.NAME)
        policy, config = Policy(model, support.tokenizer(), 1.0), TrainConfig(offload_optimizer=offload)
        start = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
        gc.collect()  # models of other tests are in cycles
        before = torch.cuda.memory_allocated()
        optimizer = make_optimizer(policy, config)
        for seed in range(3):
            assert optimizer_step(policy, optimizer, make_samples(seed), config, 1e-2).updated
        more = torch.cuda.memory_allocated() - before
        return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu() - start, more, optimizer

    plain, taken, _ = trained(False)
    moved, more, optimizer = trained(True)
    assert relative(moved, plain) < 1e-3  # two orders of summation; see test_ranks.py
    assert taken - more >= 8 * plain.numel()
    assert all(p.is_pinned() for group in optimizer.param_groups for p in group["params"])


def test_a_step_that_fills_the_gpu_is_done_in_smaller_microbatches():
    """2^16 tokens: activations take far more than the workspaces of cuBLAS, which no microbatch makes smaller."""
    model = support.tiny().to(GPU)
    model.set_attn_implementation(attention.NAME)
    policy = Policy(model, support.tokenizer(), 1.0)
    config = TrainConfig(max_microbatch_tokens=2**16)
    samples, optimizer = many_samples(256), make_optimizer(policy, config)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    whole = optimizer_step(policy, optimizer, samples, config, 0.0)
    assert whole.microbatch_tokens == 2**16
    passing = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    # Reserved, for that is what the limit counts: a segment with one lasting tensor in it stays whole.
    limit = torch.cuda.memory_reserved() + passing // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        cut = optimizer_step(policy, optimizer, samples, config, 0.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cut.ran_out_of_memory and cut.microbatch_tokens < 2**16
    assert cut.loss == pytest.approx(whole.loss, rel=1e-4) and cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)
