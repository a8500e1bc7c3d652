"""What a plan is made of: nominal figures of devices, the numbers in a model, lines of bytes or seconds.

Letters as in plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from aapo_fast.config import Config
from aapo_fast.models.head import find_decoder, find_layers
from aapo_fast.models.load import load_shape
from aapo_fast.models.lora import add_adapter

Kind = Literal["arithmetic", "setting", "estimate"]
Phase = Literal["always", "start", "rollout", "training", "host"]


@dataclass(frozen=True)
class GPU:
    """Nominal figures of a device, dense (without sparsity).

    Attributes:
        memory_bytes: of the device.
        bf16_flops, fp32_flops: a second, of matrix products.
        bandwidth: bytes a second.
        link: bytes a second that it sends, and as many that it receives, among the GPUs of its machine (NVLink).
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),  # NVIDIA A100 datasheet, 80 GB SXM
        GPU("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9),  # NVIDIA H100 datasheet, SXM
        GPU("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9),  # NVIDIA H200 datasheet, SXM
    )
}


class Weight(NamedTuple):
    """A parameter: its rows, which are divided among devices, the numbers of each, and whether it is trained."""

    rows: int
    width: int
    trained: bool


@dataclass(frozen=True)
class Shape:
    """What the model's config.json decides, and the adapter.

    Attributes:
        weights: of the model, tied ones once.
        embeddings: numbers in the input embedding and the head, E.
        layer, rest: numbers in the largest layer, and in what is no layer.
        layers, hidden, intermediate, attention, key_value, vocab: L, H, I, A, K, V.
    """

    weights: tuple[Weight, ...]
    embeddings: int
    layer: int
    rest: int
    layers: int
    hidden: int
    intermediate: int
    attention: int
    key_value: int
    vocab: int

    @property
    def parameters(self) -> int:
        return self.shard(1)

    @property
    def trained(self) -> int:
        return self.shard(1, trained=True)

    @property
    def tensors(self) -> int:
        """Trained ones, counted."""
        return sum(w.trained for w in self.weights)

    def shard(self, devices: int, trained: bool = False) -> int:
        """Numbers of the largest shard of all weights, or of the trained ones: FSDP2 cuts rows as ``torch.chunk`` does,
        and gives every rank room for as many as the first.
        """
        return sum(-(-w.rows // devices) * w.width for w in self.weights if w.trained or not trained)


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
    layers = [sum(p.numel() for p in layer.parameters()) for layer in find_layers(find_decoder(model))]
    weights = [Weight(len(p), p.numel() // len(p), p.requires_grad) for p in model.parameters()]
    head_size = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    return Shape(
        weights=tuple(weights),
        embeddings=head.numel() + (0 if embedding is head else embedding.numel()),
        layer=max(layers, default=0),
        rest=sum(w.rows * w.width for w in weights) - sum(layers),
        layers=plain.num_hidden_layers,
        hidden=plain.hidden_size,
        intermediate=plain.intermediate_size,
        attention=plain.num_attention_heads * head_size,
        key_value=(getattr(plain, "num_key_value_heads", None) or plain.num_attention_heads) * head_size,
        vocab=head.shape[0],
    )
