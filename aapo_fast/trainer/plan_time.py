"""How long a step of a config will take, roughly: assumed shares of what devices and links are said to do.

Letters as in plan.py.
"""

from __future__ import annotations

from aapo_fast.config import Config
from aapo_fast.trainer.plan import FP32, elsewhere, engine_width, in_bfloat16, longest
from aapo_fast.trainer.plan_shape import GPU, Part, Shape

TRAIN_EFFICIENCY = 0.5
"""Assumed share of the nominal rate that a step's matrix products reach; an H200's were 0.28 to 0.56, the larger the
model (docs/scaling.md).
"""
DECODE_EFFICIENCY = 0.5
"""Assumed share of the memory bandwidth that generation reaches; not measured here."""
HOST_BANDWIDTH, HOST_LINK = 100e9, 25e9
"""Assumed bytes a second of the host's memory, and between it and the device (PCIe 4, 16 lanes, pinned)."""
LINK_EFFICIENCY = 0.5
"""Assumed share of a link's nominal rate that gathers and reductions reach; not measured here."""
MACHINE, NETWORK = 8, 50e9
"""Assumed GPUs of a machine, and bytes a second of each to and from other machines (400 Gb/s)."""


def seconds(config: Config, shape: Shape, gpu: GPU, devices: int = 1) -> list[Part]:
    """Of one step at most: completions as long as they may be, all with a weight. Devices share the work evenly, and
    none waits for another.
    """
    completions, length = config.rollout.prompts_per_step * config.rollout.group_size, longest(config)
    tokens = config.rollout.prompts_per_step * config.data.max_prompt_tokens + completions * config.rollout.max_tokens
    times = 2 if config.reference.mode == "online" else 1
    parts = []
    if not elsewhere(config):
        drawn = -(-config.rollout.prompts_per_step // devices) * config.rollout.group_size * times
        parts.append(_generation(config, shape, gpu, drawn, length))
    flops = train_flops(config, shape, tokens, length) / devices
    rate, kind = (gpu.bf16_flops, "bfloat16") if in_bfloat16(config) else (gpu.fp32_flops, "float32")
    again = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[config.model.activation_checkpointing]
    formula = f"{again * flops:.3g} FLOP at {TRAIN_EFFICIENCY:g} of {rate / 1e12:g} TFLOP/s ({kind})"
    parts.append(Part("train", again * flops / (rate * TRAIN_EFFICIENCY), "estimate", "training", formula))
    if devices > 1:
        parts.append(_collectives(config, shape, gpu, tokens, devices))
    if config.train.offload_optimizer:
        parts.append(_host_step(shape, devices))
    return parts


def _collectives(config: Config, s: Shape, gpu: GPU, tokens: int, devices: int) -> Part:
    """FSDP2's, each of which moves (N - 1) / N of what it gathers or reduces: of a microbatch the layers' weights twice
    and their gradient, those of embedding and head once, or sharded what docs/scaling.md says; of a step the weights
    that were trained. PyTorch overlaps most of it with arithmetic.
    """
    rounds = -(-tokens // (devices * config.train.max_microbatch_tokens))
    in_layers = s.parameters - s.rest
    trained_rest = 0 if config.lora.rank else s.rest
    numbers = 2 * in_layers + (s.trained - trained_rest) + s.rest + trained_rest
    if config.model.vocabulary_parallel:
        at_ends = s.embeddings * (1 if config.lora.rank else 2)
        numbers += 4 * devices * config.train.max_microbatch_tokens * s.hidden - at_ends
    moved = FP32 * (rounds * numbers + s.trained) * (devices - 1) / devices
    rate, link = (gpu.link, "NVLink") if devices <= MACHINE else (NETWORK, f"a GPU's network, machines of {MACHINE}")
    formula = (
        f"{moved / 2**30:.3g} GiB, microbatches a rank: {rounds}, at {LINK_EFFICIENCY:g} of {rate / 1e9:g} GB/s "
        f"({link}); as far as it can, while it trains"
    )
    return Part("gather, reduce", moved / (rate * LINK_EFFICIENCY), "estimate", "training", formula)


def _host_step(s: Shape, devices: int) -> Part:
    """Gradients down, weights up, and between the two AdamW, which reads four numbers a parameter and writes three. The
    devices of a machine have links of their own and one memory.
    """
    shard = s.shard(devices, trained=True)
    together = min(devices, MACHINE)
    copies, arithmetic = 2 * FP32 * shard / HOST_LINK, 7 * FP32 * shard * together / HOST_BANDWIDTH
    share = "" if devices == 1 else " / N"
    formula = (
        f"8 P'{share} at {HOST_LINK / 1e9:g} GB/s and 28 P'{share} at {HOST_BANDWIDTH / together / 1e9:g}, "
        "one after the other"
    )
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
    width = engine_width(config) if config.rollout.engine != "hf" else 2 if in_bfloat16(config) else FP32
    batches = -(-completions // config.rollout.max_batch_size)
    sequences = -(-completions // batches)
    read = width * (s.parameters + s.layers * s.key_value * sequences * length)
    amount = batches * config.rollout.max_tokens * read / (gpu.bandwidth * DECODE_EFFICIENCY)
    formula = f"{batches * config.rollout.max_tokens} decoding steps that read {read / 2**30:.1f} GiB each"
    return Part("rollout", amount, "estimate", "rollout", formula + f", at {DECODE_EFFICIENCY:g} of the bandwidth")
