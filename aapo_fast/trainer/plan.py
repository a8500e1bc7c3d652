"""What a config will take of each device: bytes of each part of the trainer. Nothing is loaded or computed.

Three kinds of lines: ``arithmetic`` is exact, and tests compare it with the tensors of a real run; ``setting`` is what
the config itself reserves; ``estimate`` is a formula with assumptions that its text names. Of several devices, one a
rank, it is the first one's, whose shards are the largest. Shapes: plan_shape.py; seconds: plan_time.py.

Letters: P parameters, P' trained ones, N devices, T tokens of a microbatch, L layers, H hidden, I width of the gated
MLP, A heads x head size, K key-value heads x head size, V vocabulary, E embedding and head, D sequences generated at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from aapo_fast.config import Config
from aapo_fast.ops.linear_policy.buffers import Layout, sizes_of
from aapo_fast.ops.linear_policy.sizes import gpu_budget
from aapo_fast.trainer.plan_shape import GPU, Part, Phase, Shape

FP32 = 4


def memory(config: Config, shape: Shape, gpu: GPU, devices: int = 1) -> list[Part]:
    """Bytes by part, of each of the devices that train."""
    return [
        *_weights(config, shape, devices),
        *_training(config, shape, devices),
        *_rollout(config, shape, gpu, devices),
    ]


def peak(parts: list[Part]) -> float:
    """Bytes of what is always on the device, and of the largest phase."""
    return max(sum(part.amount for part in there) for there in by_phase(parts))


def by_phase(parts: list[Part]) -> list[list[Part]]:
    """What is on the device in each phase."""
    phases: tuple[Phase, ...] = ("start", "rollout", "training")
    return [[part for part in parts if part.phase in ("always", phase)] for phase in phases]


def _weights(config: Config, s: Shape, devices: int) -> Iterator[Part]:
    """Weights, gradients and AdamW's two moments, all in float32, as the trainer has them (``models.load``,
    ``torch.optim.AdamW(fused=True)``, which also keeps a float32 step count a tensor; ``trainer.offload``;
    ``trainer.sharded``, which has the whole weights beside the shards that are trained).
    """
    trained, share = s.shard(devices, trained=True), "" if devices == 1 else " / N"
    yield Part("weights", FP32 * s.parameters, "arithmetic", "always", "4 P" + (", whole on each" if share else ""))
    if devices > 1:
        formula = "4 P / N, rows rounded up"
        yield Part("shards of the weights", FP32 * s.shard(devices), "arithmetic", "always", formula)
        formula = "4 P, until it is cut into shards"
        yield Part("another copy", FP32 * s.parameters, "arithmetic", "start", formula)
    yield Part("gradients", FP32 * trained, "arithmetic", "training", f"4 P'{share}")
    moments = FP32 * (2 * trained + s.tensors)
    if config.train.offload_optimizer:
        formula = f"8 P'{share} + 4 a tensor in moments, 8 P'{share} in pinned copies of weights and gradients"
        yield Part("optimizer on the host", moments + 2 * FP32 * trained, "arithmetic", "host", formula)
    else:
        yield Part("AdamW moments", moments, "arithmetic", "always", f"8 P'{share} + 4 a tensor; from step 1")
    if config.reference.mode == "online" and not config.lora.rank and config.rollout.engine == "hf":
        yield Part("frozen reference", FP32 * s.parameters, "arithmetic", "always", "4 P, a copy on the device")


def _training(config: Config, s: Shape, devices: int) -> Iterator[Part]:
    rows, pieces = config.train.max_microbatch_tokens, config.model.vocabulary_parallel
    formula = "L T (26H + 10A + 4K + 8I) + 2 P" if in_bfloat16(config) else "4 L T (6H + 4A + 2K + 4I) + masks"
    if config.model.activation_checkpointing != "none":
        formula = f"{config.model.activation_checkpointing} activation checkpointing"
    yield Part("activations", activation_bytes(config, s), "estimate", "training", formula)
    if devices > 1:
        formula = "4 a number in three layers" + ("" if pieces else ", and in embedding, last norm and head")
        yield Part("gathered weights", gathered_bytes(s, pieces), "estimate", "training", formula)
    wanted = s.vocab * s.hidden if not config.lora.rank else 0
    gradients, formula = FP32 * (wanted + 2 * rows * s.hidden), "4 V H (full) + 8 T H"
    if pieces:  # of the tokens of all ranks, by this rank's rows
        rows, s = devices * rows, replace(s, vocab=-(-s.vocab // devices))
        wanted = s.vocab * s.hidden if not config.lora.rank else 0
        gradients, formula = FP32 * (wanted + 3 * rows * s.hidden), "4 V H / N (full) + 12 N T H"
    sparse = config.loss.backward == "sparse"
    half = in_bfloat16(config)
    buffers = head_buffer_bytes(rows, s, on_gpu=True, half=half, sparse=sparse, pieces=pieces)
    how = "panels of the N T rows, V / N wide" if pieces else "panels and a chunk of the T rows"
    yield Part("head: buffers", buffers, "arithmetic", "training", how)
    yield Part("head: gradients", gradients, "arithmetic", "training", formula)


def gathered_bytes(s: Shape, pieces: bool) -> float:
    """Of weights that FSDP2 has whole for a time: embedding, last norm and head from forward to backward, unless the
    first and the last are in ``pieces``; and in the backward pass a layer, the one that is fetched meanwhile, and the
    gradient of the one before.

    The gradient of embedding and head is whole only when the activations are gone, whose room it then takes.
    """
    return FP32 * (3 * s.layer + s.rest - (s.embeddings if pieces else 0))


def activation_bytes(config: Config, s: Shape) -> float:
    """What autograd keeps of a microbatch of T tokens.

    Of each layer and token, in float32: three hidden vectors a norm (its input, normalised, scaled), so 6H; queries,
    and attention's result as it leaves the kernel, without padding, and as the output layer reads it, 4A; gathered keys
    and values, 2K; of a gated MLP gate, its activation, up, and their product, 4I. In bfloat16 norms stay in float32,
    every product keeps a copy of its input (26H in bytes), and of each weight of the layers (2 P). The last norm
    adds 2H. Without flash attention: of each completion the mask, which kernels take in the precision of the products,
    a number a query, key and layer; and the distances, eight bytes a query and key.

    With activation checkpointing each layer keeps its input, selectively also what its products and its attention gave,
    and one layer at a time is there whole (Chen et al., arXiv 1604.06174).

    Counted from the code of Transformers' Llama and of ``models.attention``; the method is that of Korthikanti et al.,
    arXiv 2205.05198, section 4. Assumes a fused attention kernel and T / (prompt + completion) completions, each as
    long as it may be and with a prompt of its own.
    """
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_tokens
    tokens = max(config.train.max_microbatch_tokens, prompt + completion)
    half = in_bfloat16(config)
    if half:
        layer = 26 * s.hidden + 10 * s.attention + 4 * s.key_value + 8 * s.intermediate
    else:
        layer = FP32 * (6 * s.hidden + 4 * s.attention + 2 * s.key_value + 4 * s.intermediate)
    width = 2 if half else FP32
    product_results = width * (2 * s.attention + 2 * s.key_value + 2 * s.hidden + 2 * s.intermediate)
    kept = {
        "none": s.layers * layer,
        "selective": s.layers * (FP32 * s.hidden + product_results) + layer,
        "full": s.layers * FP32 * s.hidden + layer,
    }[config.model.activation_checkpointing]
    seen = max(1, tokens // (prompt + completion)) * completion * (prompt + completion)
    flash = half and config.model.attention != "sdpa"
    masks = 0 if flash else seen * (width * s.layers + 8)
    copies = 2 * (s.parameters - s.embeddings) if half else 0
    return tokens * (kept + FP32 * 2 * s.hidden) + masks + copies


def in_bfloat16(config: Config) -> bool:
    """Whether products are, on a GPU."""
    return config.model.precision != "float32"


def head_buffer_bytes(
    rows: int, s: Shape, on_gpu: bool, half: bool = False, sparse: bool = False, pieces: bool = False
) -> float:
    """Logits and gradient rows that exist at a time in the fused loss (``ops.linear_policy.buffers``).

    Args:
        rows, s: of the pass, and the shape by the rank's own columns.
        on_gpu, half, sparse: by Triton there; in bfloat16; with sparse rows.
        pieces: of a vocabulary that is cut up, which has one layout throughout.
    """
    width = 2 if half else FP32
    budget = gpu_budget(width * s.vocab * s.hidden) if on_gpu else 0
    narrow = torch.bfloat16 if half and on_gpu else torch.float32
    first = Layout.SPARSE if sparse and on_gpu and pieces else Layout.DENSE
    sizes = sizes_of(rows, s.vocab, s.hidden, torch.float32, narrow, budget, first)
    layouts = Layout if sparse and on_gpu and not pieces else (first,)
    return max(sizes[layout].num_bytes(FP32 * s.vocab, width * s.vocab) for layout in layouts)


def _rollout(config: Config, s: Shape, gpu: GPU, devices: int) -> Iterator[Part]:
    if elsewhere(config):
        return
    if config.rollout.engine != "hf":
        share, beside = config.vllm.gpu_memory_utilization, config.rollout.engine == "vllm_server"
        when = "a server beside the trainer" if beside else "asleep while training"
        formula = f"{share:g} of the device for weights and KV cache; {when}"
        yield Part("vLLM", share * gpu.memory_bytes, "setting", "always" if beside else "rollout", formula)
        if beside:
            yield _shared_with_server(config, s)
        return
    sequences, length = _sequences_at_once(config, devices), longest(config)
    cache = FP32 * 2 * s.layers * s.key_value * sequences * length
    yield Part("KV cache", cache, "arithmetic", "rollout", "8 L K a token of D sequences of full length")
    # draw_tokens: logits, divided by the temperature, shifted, exponentiated; below a top-p of 1 a sort and its order.
    wide = 16 if config.rollout.top_p == 1 else 32
    yield Part("next-token logits", wide * sequences * s.vocab, "estimate", "rollout", f"{wide} D V")
    if in_bfloat16(config):
        yield Part("weights in bfloat16", 2 * (s.parameters - s.embeddings), "estimate", "rollout", "2 P, for the call")


def _shared_with_server(config: Config, s: Shape) -> Part:
    """What ``rollout.vllm.transfer`` publishes, for the policy and for a reference that is drawn anew each step."""
    merged = s.parameters - (s.trained if config.lora.rank else 0)
    sent = merged - s.embeddings + 2 * s.vocab * s.hidden
    width = engine_width(config) * (2 if config.reference.mode == "online" else 1)
    return Part("copies for vLLM", width * sent, "arithmetic", "always", f"{width} P, a tied head counted again")


def serving(config: Config, s: Shape, gpu: GPU) -> list[Part]:
    """Bytes of each GPU of a vLLM server that has its own, of the trainer's kind: vLLM's share of it."""
    width, split = engine_width(config), config.vllm.tensor_parallel_size
    share, among = config.vllm.gpu_memory_utilization, "" if split == 1 else f" / {split}"
    weights = width * s.parameters / split
    left = share * gpu.memory_bytes - weights
    return [
        Part("weights", weights, "estimate", "always", f"{width} P{among}"),
        Part("KV cache", left, "setting", "always", f"what is left of {share:g} of it, and vLLM's activations"),
    ]


def served_at_once(config: Config, s: Shape, cache_bytes: float) -> int:
    """Completions of full length, with their prompts, for which a server's KV cache has room."""
    token = 2 * engine_width(config) * s.layers * s.key_value / config.vllm.tensor_parallel_size
    return int(max(0.0, cache_bytes) // (token * longest(config)))


def longest(config: Config) -> int:
    """Tokens of a prompt and a completion at most."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def elsewhere(config: Config) -> bool:
    """Whether rollouts are other devices' work."""
    return config.rollout.engine == "vllm_server" and config.vllm.transfer != "ipc"


def engine_width(config: Config) -> int:
    """Bytes of a number in vLLM on a GPU."""
    return FP32 if config.vllm.dtype == "float32" else 2


def _sequences_at_once(config: Config, devices: int) -> int:
    """Of one rank: prompts are dealt out whole."""
    prompts = -(-config.rollout.prompts_per_step // devices)
    return min(config.rollout.max_batch_size, prompts * config.rollout.group_size)
