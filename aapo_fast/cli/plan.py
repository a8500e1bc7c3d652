"""`aapo-fast doctor --plan CONFIG`: what a run will take, against what a GPU has."""

from __future__ import annotations

from dataclasses import replace

from aapo_fast.config import Config
from aapo_fast.trainer import plan
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.plan import GPU, Part, Shape
from aapo_fast.types import UserError

RESERVED_BYTES = 2**30
"""Left for the CUDA context, the allocator's gaps and workspaces; assumed."""


def show_plan(config: Config, device: str, memory_gib: float | None) -> int:
    """Print the plan; 1 if it does not fit.

    Args:
        device: of ``plan.GPUS``.
        memory_gib: of another device, whose rates are taken to be those of ``device``.
    """
    if device not in plan.GPUS:
        known = ", ".join(plan.GPUS)
        raise UserError(f"--gpu {device!r} is not known; known are {known}; for another, leave it out: --memory-gib X")
    if memory_gib is not None and memory_gib <= 0:
        raise UserError(f"--memory-gib {memory_gib:g} must be above 0")
    gpu = plan.GPUS[device]
    if memory_gib is not None:
        gpu = GPU(f"{memory_gib:g} GiB", memory_gib * 2**30, gpu.bf16_flops, gpu.fp32_flops, gpu.bandwidth)
    shape = plan.read_shape(config)
    parts, times = plan.memory(config, shape, gpu), plan.seconds(config, shape, gpu)
    display = Display()
    display.note(f"{config.model.path}: {shape.parameters:,} parameters, {shape.trained:,} of them trained")
    rows = [_row(part, f"{part.amount / 2**30:.2f}") for part in parts]
    display.table("memory", ("", "GiB", "when", "", "how"), rows, numbers=(1,))
    needed, there = plan.peak(parts), gpu.memory_bytes - RESERVED_BYTES
    largest = max((part for part in parts if part.phase != "host"), key=lambda part: part.amount)
    display.note(
        f"at most {needed / 2**30:.1f} GiB at once of {there / 2**30:.1f} ({gpu.name}, less 1 for CUDA); "
        f"most of it: {largest.name}"
    )
    rows = [_row(part, f"{part.amount:.1f}") for part in times]
    display.table("a step at most", ("", "s", "when", "", "how"), rows, numbers=(1,))
    if needed <= there:
        return 0
    display.note(f"it does not fit: {_remedy(config, shape, parts, there)}")
    return 1


def _row(part: Part, amount: str) -> list[str]:
    return [part.name, amount, part.phase, part.kind, part.formula]


def _remedy(config: Config, shape: Shape, parts: list[Part], there: float) -> str:
    """What to change first: of what can be had for a setting, the largest."""
    here = [p for p in parts if p.phase != "host"]
    fixed = {p.name: p.amount for p in here if p.name in ("weights", "gradients", "AdamW moments")}
    if sum(fixed.values()) > there:
        if config.lora.rank:
            return "the frozen weights alone are too much for one device; take a smaller model"
        names = "weights and gradients" if config.train.offload_optimizer else "weights, gradients and moments"
        remedy = f"{names} alone are too much for one device; train an adapter: --lora.rank 32"
        fits = sum(fixed.values()) - fixed.get("AdamW moments", 0.0) <= there
        return remedy + (", or put the moments on the host: --train.offload_optimizer true" if fits else "")
    largest = max((p for p in here if p.name not in fixed), key=lambda p: p.amount)
    if largest.name == "activations":
        tokens = config.data.max_prompt_tokens + config.rollout.max_tokens
        if config.train.max_microbatch_tokens > tokens:
            return f"--train.max_microbatch_tokens {tokens} holds one completion at a time"
        if config.model.activation_checkpointing != "full":
            fewer = replace(config, model=replace(config.model, activation_checkpointing="full"))
            kept = plan.activation_bytes(fewer, shape)
            return f"--model.activation_checkpointing full: activations would take {kept / 2**30:.1f} GiB"
        return "shorter completions, or --lora.rank 32"
    return {
        "vLLM": "lower --vllm.gpu_memory_utilization, or give servers GPUs of their own: --rollout.engine vllm_server "
        "--vllm.transfer auto",
        "KV cache": "lower --rollout.max_batch_size",
        "next-token logits": "lower --rollout.max_batch_size",
        "frozen reference": "--reference.mode cached needs no copy of the weights",
    }.get(largest.name, "--lora.rank 32 trains far fewer weights")
