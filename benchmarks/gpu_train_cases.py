"""What ``gpu_train_step.py`` measures: models in the shape of Qwen2.5 with random weights, batches, and heads on them.

Letters: N completion tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from aapo_fast.bench import inputs, methods, results
from aapo_fast.bench.shapes import MODEL_ENTROPY
from aapo_fast.config import LossConfig
from aapo_fast.data.packing import Weighted
from aapo_fast.models import attention
from aapo_fast.models.flash import find_flash, name_of
from aapo_fast.models.head import find_decoder
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.trainer.policy import Policy
from aapo_fast.types import Batch, Sample

GROUP = 8


@dataclass(frozen=True)
class Shape:
    """A model, and the batch it is measured with. ``share`` is its part of the time."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    dtype: torch.dtype
    tokens: int
    prompt: int = 256
    longest: int = 1024
    share: float = 1.0


MODELS = {
    "0.5B": Shape(896, 24, 14, 2, 4864, 151936, True, torch.float32, 16384, share=3.0),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151936, True, torch.float32, 16384, share=3.0),
    "7B": Shape(3584, 28, 28, 4, 18944, 152064, False, torch.bfloat16, 8192, share=4.0),
}
TINY = {
    "tiny": Shape(64, 2, 4, 2, 96, 512, True, torch.float32, 256, 12, 48),
    "tiny-bf16": Shape(64, 2, 4, 2, 96, 512, False, torch.bfloat16, 256, 12, 48),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A model with a batch. ``gradient`` is (N, H), what the decoder alone goes back from."""

    policy: Policy
    batch: Batch
    gradient: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.batch.targets.numel()

    def hidden_states(self) -> Tensor:
        with self.policy.autocast():
            return self.policy.hidden_states(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """Of the head's weight and of the first layer's queries."""
        queries = self.policy.decoder.layers[0].self_attn.q_proj.weight
        return {"head": self.policy.head.weight.grad, "q_proj": queries.grad}

    def forget(self) -> None:
        """Free the gradients."""
        self.policy.model.zero_grad(set_to_none=True)


# --- models and batches ----------------------------------------------------------------------------------------------


def make_policy(shape: Shape, device: torch.device) -> tuple[Policy, str]:
    """A model with random weights, made where it will be, and what has to be said about its attention."""
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()
    model.set_attn_implementation(attention.NAME)
    recompute_layers(find_decoder(model), "full")
    if device.type != "cuda":
        return _policy(model, "sdpa", device)
    try:
        return _policy(model, "varlen", device)
    except Exception as error:  # the figures of a slower attention are worth more than none
        policy, remark = _policy(model, "sdpa", device)
        return policy, f"varlen failed ({results.first_line(error)[:200]}); {remark}"


def _policy(model: Any, kernel: str, device: torch.device) -> tuple[Policy, str]:
    """With this attention, which is tried once, forward and backward."""
    flash = find_flash(kernel, device, torch.bfloat16)
    policy = Policy(model, SimpleNamespace(pad_token_id=0), 1.0, precision=torch.bfloat16, flash=flash)
    remark = f"attention {name_of(flash)}"
    if not policy.packed:
        # In training such a model's batches would be padded. Here all heads stand on the same states, true or not.
        policy.packed, remark = True, f"{remark}, packed although it differs from the padded one by more than rounding"
    case = Case(policy, policy.batch([Weighted(Sample((1, 2, 3), (4, 5), (), "", "length", 0), 1.0)] * 2))
    case.hidden_states().sum().backward()
    case.forget()
    return policy, remark


def make_samples(shape: Shape, num_tokens: int) -> list[Weighted]:
    """Completions of ``num_tokens`` tokens in all; lengths log-normal, with a median of three tenths of the longest."""
    generator = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.choices(range(shape.vocab), k=count))

    samples: list[Weighted] = []
    left = num_tokens
    while left:
        if len(samples) % GROUP == 0:
            prompt = tokens(shape.prompt)
        length = min(max(1, round(0.3 * shape.longest * generator.lognormvariate(0.0, 0.7))), shape.longest, left)
        # None is zero, so that nothing is dropped; not centred, so that the loss is no small difference of large sums.
        advantage = generator.choice((-1.0, 1.0, 2.0)) * generator.uniform(0.5, 1.0)
        samples.append(Weighted(Sample(prompt, tokens(length), (), "", "length", 0), advantage))
        left -= length
    return samples


@torch.no_grad()
def make_case(policy: Policy, shape: Shape) -> tuple[Case, dict[str, Any]]:
    """The batch, with targets drawn from the policy at a model's entropy; and figures that describe it."""
    samples = make_samples(shape, shape.tokens)
    case = Case(policy, policy.batch(samples))
    hidden, weight = case.hidden_states(), policy.head.weight.bfloat16()
    generator = torch.Generator(policy.device).manual_seed(0)
    gradient = torch.randn(hidden.shape, generator=generator, device=policy.device).div_(case.num_tokens)
    gradient = gradient.to(hidden.dtype)
    probe = hidden[: inputs.PROBE_ROWS].float() @ weight.float().t()
    scale = inputs._scale_for_entropy(MODEL_ENTROPY, probe)
    policy.decoder.norm.weight.mul_(scale)
    hidden = (hidden * scale).bfloat16()
    targets = torch.cat([inputs._draw(z, generator) for _, z in inputs.logit_blocks(hidden, weight, None)])
    batch = replace(case.batch, targets=targets)
    drawn = inputs.Problem(hidden, weight, targets, batch.advantages, batch.sequence_index, None)
    return Case(policy, batch, gradient), {
        "completions": len(samples),
        "completion_tokens": len(targets),
        "decoder_tokens": batch.input_ids.numel(),
        "longest_completion": max(len(w.sample.token_ids) for w in samples),
        "weights": str(shape.dtype).removeprefix("torch."),
        **inputs.describe(drawn),
    }


# --- heads -----------------------------------------------------------------------------------------------------------

Step = Callable[[Case, int], Tensor | None]
"""Forward and backward of a case with a seed; the loss, where the head gives one that can be compared."""

TITLES = {
    "exact": "ours, exact",
    "decoder": "decoder alone",
    "naive": "logits materialised",
    "sparse": "ours, sparse",
    "trl": "TRL chunked log-probabilities",
    "liger-ce-none": "Liger fused linear CE",
    "liger-grpo": "Liger GRPO loss",
    "cce": "cut-cross-entropy",
}
"""In the order in which they are tried, lest time runs out."""


def make_step(name: str) -> Step:
    own: dict[str, Step] = {"exact": _ours("exact"), "sparse": _ours("sparse"), "decoder": _decoder_alone}
    return own.get(name) or _peer(name)


def import_peers(names: Sequence[str]) -> None:
    """Ahead of the first model, whose time it would take. What cannot be imported says so when it is tried."""
    for package in dict.fromkeys(name.split("-")[0] for name in names):
        if package in ("trl", "liger", "cce"):
            with contextlib.suppress(Exception):
                importlib.import_module(f"aapo_fast.bench.peers.{package}")


def _ours(backward: str) -> Step:
    def step(case: Case, seed: int) -> Tensor:
        case.policy.how = LossConfig(backward=backward)
        hidden = case.hidden_states()
        # Autocast anew, as the others have it: at its end it frees the bf16 copies of the decoder's weights.
        with case.policy.autocast():
            loss = case.policy.head_loss(hidden, case.batch, case.num_tokens, seed).loss
        loss.backward()
        return loss.detach()

    return step


def _peer(name: str) -> Step:
    """A contestant of ``aapo_fast.bench``, whose backward goes on into the decoder."""
    [method] = methods.find([name])

    def step(case: Case, seed: int) -> Tensor | None:
        batch = case.batch
        weights = batch.advantages, batch.sequence_index
        if name == "liger-grpo":  # wants equal lengths: a sequence a token, so that nothing is padded
            weights = batch.advantages[batch.sequence_index], torch.arange(case.num_tokens, device=case.policy.device)
        hidden, weight = case.hidden_states().bfloat16(), case.policy.head.weight.bfloat16()
        problem = inputs.Problem(hidden, weight, batch.targets, *weights, None)
        logps = method.build(problem)().logps
        return None if logps is None else -(problem.token_weights * logps).sum() / case.num_tokens

    return step


def _decoder_alone(case: Case, seed: int) -> None:
    case.hidden_states().backward(case.gradient)
