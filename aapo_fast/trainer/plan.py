"""What a config will take: bytes of each part of the trainer, and a rough step time. Nothing is loaded or computed.

Three kinds of lines: ``arithmetic`` is exact, and tests compare it with the tensors of a real run; ``setting`` is what
the config itself reserves; ``estimate`` is a formula with assumptions that its text names.

Letters: P parameters, P' trained ones, T tokens of a microbatch, L layers, H hidden, I width of the gated MLP, A heads
x head size, K key-value heads x head size, V vocabulary, G completions a problem, D sequences generated at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from aapo_fast.config import Config
from aapo_fast.models.load import load_shape
from aapo_fast.models.lora import add_adapter
from aapo_fast.ops.linear_policy.sizes import buffer_rows, gpu_budget

FP32 = 4
Kind = Literal["arithmetic", "setting", "estimate"]
Phase = Literal["always", "rollout", "training", "host"]

TRAIN_EFFICIENCY = 0.5
"""Assumed share of the nominal rate that a step's matrix products reach; an H200's were 0.28 to 0.56, the larger the
model (docs/scaling.md).
"""
DECODE_EFFICIENCY = 0.5
"""Assumed share of the memory bandwidth that generation reaches; not measured here."""
HOST_BANDWIDTH, HOST_LINK = 100e9, 25e9
"""Assumed bytes a second of the host's memory, and between it and the device (PCIe 4, 16 lanes, pinned)."""


@dataclass(frozen=True)
class GPU:
    """Nominal figures of a device, dense (without sparsity).

    Attributes:
        memory_bytes: of the device.
        bf16_flops, fp32_flops: a second, of matrix products.
        bandwidth: bytes a second.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80e9, 312e12, 19.5e12, 2.04e12),  # NVIDIA A100 datasheet, 80 GB SXM
        GPU("h100", 80e9, 989e12, 67e12, 3.35e12),  # NVIDIA H100 datasheet, SXM
        GPU("h200", 141e9, 989e12, 67e12, 4.8e12),  # NVIDIA H200 datasheet, SXM
    )
}


@dataclass(frozen=True)
class Shape:
    """What the model's config.json decides, and the adapter.

    Attributes:
        parameters, trained: P, P'; tied ones once.
        embeddings: those of P in the input embedding and the head.
        tensors: trained ones, counted.
        layers, hidden, intermediate, attention, key_value, vocab: L, H, I, A, K, V.
    """

    parameters: int
    trained: int
    embeddings: int
    tensors: int
    layers: int
    hidden: int
    intermediate: int
    attention: int
    key_value: int
    vocab: int


@dataclass(frozen=True)
class Part:
    """One line of the plan: bytes, or seconds."""

    name: str
    amount: float
    kind: Kind
    phase: Phase
    formula: str


def read_shape(config: Config) -> Shape:
    """Of the model that [model] names with the adapter of [lora], from its config.json.

    Raises:
        UserError: there is none.
    """
    model: Any = load_shape(config.model.path)
    plain = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if config.lora.rank:
        model = add_adapter(model, config.lora.rank, config.lora.alpha, config.lora.target_modules)
    trained = [p for p in model.parameters() if p.requires_grad]
    head_size = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        embeddings=head.numel() + (0 if embedding is head else embedding.numel()),
        tensors=len(trained),
        layers=plain.num_hidden_layers,
        hidden=plain.hidden_size,
        intermediate=plain.intermediate_size,
        attention=plain.num_attention_heads * head_size,
        key_value=(getattr(plain, "num_key_value_heads", None) or plain.num_attention_heads) * head_size,
        vocab=head.shape[0],
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(config: Config, shape: Shape, gpu: GPU) -> list[Part]:
    """Bytes by part."""
    return [*_weights(config, shape), *_training(config, shape), *_rollout(config, shape, gpu)]


def peak(parts: list[Part]) -> float:
    """Bytes of what is always on the device, and of the larger phase."""
    by_phase = {phase: sum(p.amount for p in parts if p.phase == phase) for phase in ("always", "rollout", "training")}
    return by_phase["always"] + max(by_phase["rollout"], by_phase["training"])


def _weights(config: Config, s: Shape) -> Iterator[Part]:
    """Weights, gradients and AdamW's two moments, all in float32, as the trainer has them (``models.load``,
    ``torch.optim.AdamW(fused=True)``, which also keeps a float32 step count a tensor; ``trainer.offload``).
    """
    yield Part("weights", FP32 * s.parameters, "arithmetic", "always", "4 P")
    yield Part("gradients", FP32 * s.trained, "arithmetic", "training", "4 P'")
    moments = FP32 * (2 * s.trained + s.tensors)
    if config.train.offload_optimizer:
        formula = "8 P' + 4 a tensor in moments, 8 P' in pinned copies of weights and gradients"
        yield Part("optimizer on the host", moments + 2 * FP32 * s.trained, "arithmetic", "host", formula)
    else:
        yield Part("AdamW moments", moments, "arithmetic", "always", "8 P' + 4 a tensor; from step 1")
    if config.reference.mode == "online" and not config.lora.rank and config.rollout.engine == "hf":
        yield Part("frozen reference", FP32 * s.parameters, "arithmetic", "always", "4 P, a copy on the device")


def _training(config: Config, s: Shape) -> Iterator[Part]:
    rows = config.train.max_microbatch_tokens
    formula = "L T (26H + 10A + 4K + 8I) + 2 P" if in_bfloat16(config) else "4 L T (6H + 4A + 2K + 4I) + masks"
    if config.model.activation_checkpointing != "none":
        formula = f"{config.model.activation_checkpointing} activation checkpointing"
    yield Part("activations", activation_bytes(config, s), "estimate", "training", formula)
    logits = head_buffer_bytes(rows, s, on_gpu=True)
    yield Part("head: logits", logits, "arithmetic", "training", "4 C V, chunks of C rows of T")
    wanted = s.vocab * s.hidden if not config.lora.rank else 0
    yield Part(
        "head: gradients", FP32 * (wanted + 2 * rows * s.hidden), "arithmetic", "training", "4 V H (full) + 8 T H"
    )


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


def head_buffer_bytes(rows: int, s: Shape, on_gpu: bool) -> float:
    """Logits of one chunk of the fused loss, whose gradient rows take their place (``sizes.buffer_rows``)."""
    budget = gpu_budget(FP32 * s.vocab * s.hidden) if on_gpu else 0
    chunk, _ = buffer_rows(rows, s.vocab, torch.float32, torch.float32, budget)
    return FP32 * chunk * s.vocab


def _rollout(config: Config, s: Shape, gpu: GPU) -> Iterator[Part]:
    if _elsewhere(config):
        return
    if config.rollout.engine != "hf":
        share, beside = config.vllm.gpu_memory_utilization, config.rollout.engine == "vllm_server"
        when = "a server beside the trainer" if beside else "asleep while training"
        formula = f"{share:g} of the device for weights and KV cache; {when}"
        yield Part("vLLM", share * gpu.memory_bytes, "setting", "always" if beside else "rollout", formula)
        if beside:
            yield _shared_with_server(config, s)
        return
    sequences, length = _sequences_at_once(config), config.data.max_prompt_tokens + config.rollout.max_tokens
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
    width = _engine_width(config) * (2 if config.reference.mode == "online" else 1)
    return Part("copies for vLLM", width * sent, "arithmetic", "always", f"{width} P, a tied head counted again")


def _elsewhere(config: Config) -> bool:
    """Whether rollouts are other devices' work."""
    return config.rollout.engine == "vllm_server" and config.vllm.transfer != "ipc"


def _engine_width(config: Config) -> int:
    """Bytes of a number in vLLM on a GPU."""
    return FP32 if config.vllm.dtype == "float32" else 2


def _sequences_at_once(config: Config) -> int:
    return min(config.rollout.max_batch_size, config.rollout.prompts_per_step * config.rollout.group_size)


# --- time ------------------------------------------------------------------------------------------------------------


def seconds(config: Config, shape: Shape, gpu: GPU) -> list[Part]:
    """Of one step at most: completions as long as they may be, all with a weight."""
    completions = config.rollout.prompts_per_step * config.rollout.group_size
    length = config.data.max_prompt_tokens + config.rollout.max_tokens
    tokens = config.rollout.prompts_per_step * config.data.max_prompt_tokens + completions * config.rollout.max_tokens
    times = 2 if config.reference.mode == "online" else 1
    parts = []
    if not _elsewhere(config):
        parts.append(_generation(config, shape, gpu, completions * times, length))
    flops = train_flops(config, shape, tokens, length)
    rate, kind = (gpu.bf16_flops, "bfloat16") if in_bfloat16(config) else (gpu.fp32_flops, "float32")
    again = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[config.model.activation_checkpointing]
    formula = f"{again * flops:.3g} FLOP at {TRAIN_EFFICIENCY:g} of {rate / 1e12:g} TFLOP/s ({kind})"
    parts.append(Part("train", again * flops / (rate * TRAIN_EFFICIENCY), "estimate", "training", formula))
    if config.train.offload_optimizer:
        parts.append(_host_step(shape))
    return parts


def _host_step(s: Shape) -> Part:
    """Gradients down, weights up, and between the two AdamW, which reads four numbers a parameter and writes three."""
    copies, arithmetic = 2 * FP32 * s.trained / HOST_LINK, 7 * FP32 * s.trained / HOST_BANDWIDTH
    formula = f"8 P' at {HOST_LINK / 1e9:g} GB/s and 28 P' at {HOST_BANDWIDTH / 1e9:g}, one after the other"
    return Part("optimizer", copies + arithmetic, "estimate", "host", formula)


def train_flops(config: Config, s: Shape, tokens: int, length: int) -> float:
    """Of forward and backward: 6 a token and parameter of the layers, 4 where the weights are frozen (Kaplan et
    al., arXiv 2001.08361, section 2.1), 6 A a token, layer and key before it for the causal half of attention, and the
    head's 6 N H V (exact; 4 where it is frozen; a third with sparse rows). T counts a prompt once.
    """
    matrices = (4 if config.lora.rank else 6) * (s.parameters - s.embeddings) * tokens
    attention = 6 * s.attention * s.layers * length * tokens
    dense = 4 if config.lora.rank else 6  # an adapter leaves the head as it is
    head = (2 if config.loss.backward == "sparse" else dense) * tokens * s.hidden * s.vocab
    return float(matrices + attention + head)


def _generation(config: Config, s: Shape, gpu: GPU, completions: int, length: int) -> Part:
    """A step of decoding reads all weights and the cache of the sequences so far (half of it on average): bound by the
    memory, as in Pope et al., arXiv 2211.05102, section 2.
    """
    width = _engine_width(config) if config.rollout.engine != "hf" else 2 if in_bfloat16(config) else FP32
    batches = -(-completions // config.rollout.max_batch_size)
    sequences = -(-completions // batches)
    read = width * (s.parameters + s.layers * s.key_value * sequences * length)
    amount = batches * config.rollout.max_tokens * read / (gpu.bandwidth * DECODE_EFFICIENCY)
    formula = f"{batches * config.rollout.max_tokens} decoding steps that read {read / 2**30:.1f} GiB each"
    return Part("rollout", amount, "estimate", "rollout", formula + f", at {DECODE_EFFICIENCY:g} of the bandwidth")
