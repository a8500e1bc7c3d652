"""The policy under training: model, tokenizer, and the loss of a batch through decoder and fused head."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from aapo_fast.config import LoraConfig, LossConfig, ModelConfig
from aapo_fast.data.packing import Weighted, pack, pad
from aapo_fast.models.attention import Packing
from aapo_fast.models.compiled import compile_layers
from aapo_fast.models.flash import Flash, find_flash, name_of
from aapo_fast.models.head import Head, find_decoder, find_head
from aapo_fast.models.liger import use_liger
from aapo_fast.models.load import load_model
from aapo_fast.models.lora import add_adapter, checkpoint_state
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.objectives import AAPO, Objective, Regularized
from aapo_fast.ops.linear_policy import PolicyLoss, linear_logprobs, linear_policy_loss
from aapo_fast.trainer.layout import why_padded
from aapo_fast.trainer.ranks import ONE
from aapo_fast.trainer.transfer import batch_to_device
from aapo_fast.types import Batch, UserError

DEFAULT_LOSS, FULL = LossConfig(), LoraConfig()


class Policy:
    """A causal language model as the trainer sees it.

    Args:
        model, tokenizer: from ``models.load``.
        temperature: sampling temperature, which the loss uses too.
        loss: implementation and backward of the fused loss.
        precision: of products and activations; the weights stay as they are.
        flash: attention of packed batches; None for SDPA.

    Attributes:
        trained: the module whose parameters the optimizer moves: ``model``, or shards of it (``trainer.sharded``).
        ranks: that train it together.
        max_microbatch_tokens: what the device's memory was found to hold.
        liger, passed_over: whether Liger's kernels are in the model; why a better attention is not.
        packed: whether batches are packed with shared prompts. False where the model's attention cannot be steered, or
            where it computes something else when it is (recurrent layers, say): then batches are right-padded.
        why_padded: why they are not packed; empty where they are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        temperature: float,
        loss: LossConfig = DEFAULT_LOSS,
        precision: torch.dtype = torch.float32,
        flash: Flash | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.precision, self.flash = precision, flash
        self.trained: nn.Module = model
        self.ranks = ONE
        self.max_microbatch_tokens = sys.maxsize
        self.liger, self.passed_over = False, ""
        self.decoder = find_decoder(model)
        self.device = self.head.weight.device
        self.temperature, self.how = temperature, loss
        self.why_padded = why_padded(self)
        self.packed = not self.why_padded

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        temperature: float,
        loss: LossConfig = DEFAULT_LOSS,
        lora: LoraConfig = FULL,
    ) -> Policy:
        """Load the model that [model] names, with the adapter that [lora] wants.

        Raises:
            UserError: it, its device, its attention or its adapter cannot be had.
        """
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        flash = find_flash(config.attention, device, precision)
        model, tokenizer = load_model(config.path, device)
        # A compiler makes such kernels itself, and cannot look into Liger's.
        liger = config.liger == "auto" and not config.compile and use_liger(model)
        if config.compile:
            compile_layers(find_decoder(model), device)
        recompute_layers(find_decoder(model), config.activation_checkpointing)
        if lora.rank:
            model = add_adapter(model, lora.rank, lora.alpha, lora.target_modules)
        policy = cls(model, tokenizer, temperature, loss, precision, flash)
        if flash is not None and not policy.packed:
            if config.attention != "auto":
                raise UserError(
                    f"model.attention={config.attention!r} does not compute what {type(model).__name__}'s own "
                    f"attention does ({policy.why_padded}); set model.attention='auto'"
                )
            reason = f"{name_of(flash)} does not compute what the model's own attention does: {policy.why_padded}"
            policy = cls(model, tokenizer, temperature, loss, precision)
            policy.passed_over = reason
        policy.liger = liger
        return policy

    def how_computed(self) -> str:
        """One line: precision, attention, kernels of Liger."""
        attention = name_of(self.flash) + (f" ({self.passed_over})" if self.passed_over else "")
        kernels = "Liger's norms, RoPE and gated layers" if self.liger else "no kernels of Liger"
        precision = str(self.precision).removeprefix("torch.")
        return f"{precision} products over float32 weights, attention {attention}, {kernels}"

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of what is computed inside."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    @property
    def head(self) -> Head:
        """As it is now: under FSDP the weight is another tensor within the forward than outside."""
        return find_head(self.model)

    def collect(self) -> None:
        """Bring what the optimizer moved into ``model``."""

    def distribute(self) -> None:
        """Bring what was loaded into ``model`` to where it is trained."""

    def batch(self, samples: Sequence[Weighted]) -> Batch:
        """Tensors of one microbatch, on the model's device."""
        if self.packed:
            return batch_to_device(pack(samples, ragged=self.flash is not None), self.device)
        return batch_to_device(pad(samples, self.tokenizer.pad_token_id or 0), self.device)

    def hidden_states(self, batch: Batch) -> Tensor:
        """(N, H): for each target token the hidden state that predicts it. Called under ``autocast``."""
        arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.packing is not None:
            # A prepared 4-D mask makes Transformers build none; the packing is the mask.
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
            arguments = {"position_ids": batch.position_ids, "attention_mask": mask}
            arguments["packing"] = Packing(batch.packing, self.flash)
        out = self.decoder(input_ids=batch.input_ids, use_cache=False, **arguments).last_hidden_state
        return out.flatten(0, 1).index_select(0, batch.hidden_index)

    def loss(self, batch: Batch, num_tokens: int, seed: int = 0) -> PolicyLoss:
        """AAPO's loss of a microbatch; ``num_tokens`` counts the whole optimizer step. ``seed`` decides the sample of
        sparse gradient rows and must differ from one microbatch to the next.
        """
        with self.autocast():
            return self.head_loss(self.hidden_states(batch), batch, num_tokens, seed)

    def head_loss(self, hidden: Tensor, batch: Batch, num_tokens: int, seed: int) -> PolicyLoss:
        """The loss from the (N, H) hidden states on. Called under ``autocast``."""
        bound = self.how.max_importance_weight
        correction = (batch.rollout_logps, bound) if bound else ()
        objective: Objective = AAPO(batch.advantages, batch.sequence_index, num_tokens, *correction)
        if self.how.regularizes:
            objective = Regularized(objective, num_tokens, self.how.entropy_bonus, self.how.z_loss)
        head = self.head
        return linear_policy_loss(
            hidden,
            head.weight,
            batch.targets,
            objective,
            implementation=self.how.implementation,
            backward=self.how.backward,
            sparsity_threshold=self.how.sparsity_threshold,
            seed=seed,
            all_logps=True,  # each row has a weight: `optimizer_step` brings no others, and a GPU is not to be asked
            **head.arguments(self.temperature),
        )

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """(N,) fp32 log-probabilities of the targets."""
        head = self.head
        with self.autocast():
            return linear_logprobs(
                self.hidden_states(batch),
                head.weight,
                batch.targets,
                implementation=self.how.implementation,
                **head.arguments(self.temperature),
            ).logps

    def num_parameters(self) -> tuple[int, int]:
        """Those that are trained, and all."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def fingerprint(self) -> str:
        """A digest of what decides the reference's completions beside the sampling: config, tokenizer, weights without
        an adapter; not name and folder.
        """
        settings = self.model.config.to_dict()
        settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        generation = getattr(self.model, "generation_config", None)
        ends = [getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id]
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest = hashlib.sha256(json.dumps([settings, ends, vocabulary], sort_keys=True, default=str).encode())
        for name, tensor in checkpoint_state(self.model, merged=False):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, most of which compute 16 bits more slowly."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one. Raises UserError for a device that is not there or is of another kind."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"model.device={name!r} cannot be trained on; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
