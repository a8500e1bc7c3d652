"""`aapo-fast doctor --plan CONFIG`: what a run will take of each of its devices, against what a GPU has."""

from __future__ import annotations

from dataclasses import replace

from aapo_fast.config import Config, ConfigError
from aapo_fast.trainer import plan
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.plan_shape import GPU, GPUS, Part, Shape, read_shape
from aapo_fast.trainer.plan_time import seconds
from aapo_fast.trainer.ranks import check_ranks, rows_a_rank
from aapo_fast.types import UserError

RESERVED_BYTES = 2**30
"""Left for the CUDA context, the allocator's gaps and workspaces; and as much for NCCL's buffers. Assumed."""

STATE = ("weights", "shards of the weights", "gradients", "AdamW moments")
"""What a device holds of the model whatever the batch is."""


def show_plan(config: Config, device: str, memory_gib: float | None, devices: int) -> int:
    """Print the plan; 1 if it does not fit.

    Args:
        device: of ``GPUS``.
        memory_gib: of another device, whose rates are taken to be those of ``device``.
        devices: that train together, a rank on each.

    Raises:
        UserError: there is no such device, or so many cannot run this config.
    """
    gpu = _gpu(device, memory_gib)
    shape = read_shape(config)
    _check_devices(config, shape, devices)
    parts, times = plan.memory(config, shape, gpu, devices), seconds(config, shape, gpu, devices)
    display, several = Display(), devices > 1
    display.note(f"{config.model.path}: {shape.parameters:,} parameters, {shape.trained:,} of them trained")
    if several:
        display.note(
            f"N = {devices} devices, a rank on each (FSDP2); figures are of the first rank, whose shards are the "
            "largest; tokens are shared evenly and no rank waits"
        )
    rows = [_row(part, f"{part.amount / 2**30:.2f}") for part in parts]
    display.table("memory of each device" if several else "memory", ("", "GiB", "when", "", "how"), rows, numbers=(1,))
    reserved, owner = (2, "CUDA and NCCL") if several else (1, "CUDA")
    needed, there = plan.peak(parts), gpu.memory_bytes - reserved * RESERVED_BYTES
    fullest = max(plan.by_phase(parts), key=lambda found: sum(part.amount for part in found))
    largest = max(fullest, key=lambda part: part.amount)
    display.note(
        f"at most {needed / 2**30:.1f} GiB at once of {there / 2**30:.1f} ({gpu.name}, less {reserved} for {owner}); "
        f"most of it: {largest.name}"
    )
    rows = [_row(part, f"{part.amount:.1f}") for part in times]
    display.table("a step at most", ("", "s", "when", "", "how"), rows, numbers=(1,))
    served = not plan.elsewhere(config) or _show_server(display, config, shape, gpu)
    if needed > there:
        display.note(f"it does not fit: {_remedy(config, shape, gpu, parts, there, devices)}")
    return 0 if served and needed <= there else 1


def _gpu(device: str, memory_gib: float | None) -> GPU:
    if device not in GPUS:
        known = ", ".join(GPUS)
        raise UserError(f"--gpu {device!r} is not known; known are {known}; for another, leave it out: --memory-gib X")
    if memory_gib is None:
        return GPUS[device]
    if memory_gib <= 0:
        raise UserError(f"--memory-gib {memory_gib:g} must be above 0")
    return replace(GPUS[device], name=f"{memory_gib:g} GiB", memory_bytes=memory_gib * 2**30)


def _check_devices(config: Config, shape: Shape, devices: int) -> None:
    """Raises UserError for what so many devices cannot do, as the run would."""
    if devices < 1:
        raise UserError(f"--devices {devices} must be at least 1")
    if devices == 1 and config.model.vocabulary_parallel:
        raise ConfigError("model.vocabulary_parallel=true is for several devices: give --devices 8, or leave it out")
    check_ranks(config, devices)
    if config.model.vocabulary_parallel:
        rows_a_rank(shape.vocab, devices)


def _show_server(display: Display, config: Config, shape: Shape, gpu: GPU) -> bool:
    """What a vLLM server takes of each of its own devices; whether it fits."""
    parts = plan.serving(config, shape, gpu)
    rows = [_row(part, f"{part.amount / 2**30:.2f}") for part in parts]
    split = config.vllm.tensor_parallel_size
    title = f"memory of each of a vLLM server's {split} devices" if split > 1 else "memory of a vLLM server's device"
    display.table(title, ("", "GiB", "when", "", "how"), rows, numbers=(1,))
    room = plan.served_at_once(config, shape, parts[-1].amount)
    if room:
        display.note(
            f"a server ({gpu.name}, as the trainer's) has room for {room:,} completions of full length at once; it is "
            f"asked for up to {config.rollout.max_batch_size:,} (rollout.max_batch_size), and the rest wait"
        )
    else:
        display.note(
            f"a server does not fit: raise --vllm.tensor_parallel_size (now {split}) or "
            f"--vllm.gpu_memory_utilization (now {config.vllm.gpu_memory_utilization:g})"
        )
    return room > 0


def _row(part: Part, amount: str) -> list[str]:
    return [part.name, amount, part.phase, part.kind, part.formula]


def _state(config: Config, shape: Shape, gpu: GPU, devices: int) -> float:
    """Bytes that each of so many devices holds of the model."""
    return sum(p.amount for p in plan.memory(config, shape, gpu, devices) if p.name in STATE)


def _remedy(config: Config, shape: Shape, gpu: GPU, parts: list[Part], there: float, devices: int) -> str:
    """What to change first: of what can be had for a setting, the largest."""
    state = {p.name: p.amount for p in parts if p.name in STATE}
    if sum(state.values()) > there:
        return _less_state(config, shape, gpu, state, there, devices)
    overfull = [found for found in plan.by_phase(parts) if sum(part.amount for part in found) > there]
    largest = max((p for found in overfull for p in found if p.name not in STATE), key=lambda p: p.amount)
    if largest.name == "activations":
        if config.train.max_microbatch_tokens > (tokens := plan.longest(config)):
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
        "another copy": "the model is there twice at the start; take a smaller one, or devices with more memory",
        "gathered weights": "--model.vocabulary_parallel true keeps embedding and head sharded",
    }.get(largest.name, "--lora.rank 32 trains far fewer weights")


def _less_state(config: Config, shape: Shape, gpu: GPU, state: dict[str, float], there: float, devices: int) -> str:
    """Where the model alone is too much."""
    frozen = "frozen " if config.lora.rank else ""
    if state["weights"] > there:
        return f"the {frozen}weights alone, which a device has whole, are too much for it; take a smaller model"
    remedies = [] if config.lora.rank else ["train an adapter: --lora.rank 32"]
    if sum(state.values()) - state.get("AdamW moments", 0.0) <= there:
        remedies.append("put the moments on the host: --train.offload_optimizer true")
    more = next((n for n in (2, 4, 8, 16, 32, 64) if n > devices and _state(config, shape, gpu, n) <= there), None)
    if more:
        remedies.append(f"share them: --devices {more}")
    names = "weights and gradients" if config.train.offload_optimizer else "weights, gradients and moments"
    return f"{names} alone are too much for one device; {', or '.join(remedies) or 'take a smaller model'}"
