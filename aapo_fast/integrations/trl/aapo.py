"""AAPO (arXiv 2505.14264) as a TRL trainer: its advantages, its reference, its loss."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import types
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from aapo_fast import AAPO, aapo_advantages
from aapo_fast.integrations.trl.engine import EngineWeights, without_weights_for_an_engine
from aapo_fast.integrations.trl.head import WithObjective, fuse_heads, refuse, seed, unsupported, wrong_settings
from aapo_fast.models.lora import checkpoint_state, has_adapter, without_adapter
from aapo_fast.types import UserError

REFERENCE_FILE = "aapo_reference.json"
WITHOUT_EFFECT = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "beta", "entropy_coef",
    "use_adaptive_entropy", "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl",
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
    "vespo_lambda_neg", "entropy_coef_max", "entropy_coef_min", "entropy_coef_delta", "entropy_target",
)  # fmt: skip
"""Settings of ``GRPOConfig`` that AAPO's loss has no use for: it has no ratio to clip and no KL term."""


@dataclasses.dataclass
class AAPOConfig(GRPOConfig):
    """``GRPOConfig`` for AAPO.

    Args:
        delta_low, delta_high: bounds of the momentum, in units of reward.
        reference_mode: "cached" draws num_generations reference completions of a prompt when it is first seen and
            keeps their rewards; "online" draws new ones at each step, as the paper does.
        reference_pairing: "paired" sets completion i against reference completion i, as the paper does; "mean" against
            the mean of the prompt's.
        max_importance_weight: bound of min(pi / pi_old, bound), by which tokens are weighted where TRL samples with
            weights older than those that are trained (num_iterations > 1, several steps per generation). 0: off.
        head_backward, head_sparsity_threshold: ``backward`` and ``sparsity_threshold`` of ``linear_policy_loss``.
    """

    delta_low: float = -0.2
    delta_high: float = 0.28
    reference_mode: str = "cached"
    reference_pairing: str = "paired"
    max_importance_weight: float = 2.0
    head_backward: str = "exact"
    head_sparsity_threshold: float = 2**-13

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse("AAPOConfig", self._refused())

    def _refused(self) -> Iterator[str]:
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        for name in WITHOUT_EFFECT:
            if getattr(self, name) != defaults[name]:
                yield f"{name}={getattr(self, name)!r} has no effect on AAPO's loss; leave it out"
        choices = {"reference_mode": ("cached", "online"), "reference_pairing": ("paired", "mean")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                yield f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}"
        if not self.delta_low <= self.delta_high:
            yield f"delta_low={self.delta_low} exceeds delta_high={self.delta_high}; exchange them"
        if self.max_importance_weight < 0:
            yield f"max_importance_weight={self.max_importance_weight} must be 0 (off) or above"
        yield from wrong_settings(self.head_backward, self.head_sparsity_threshold)
        if self.scale_rewards == "batch":
            yield "scale_rewards='batch' is not AAPO's estimator; use 'group' or 'none'"
        if self.multi_objective_aggregation != "sum_then_normalize":
            yield (
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} leaves no reward to set against the "
                "reference's; use 'sum_then_normalize'"
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            yield (
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the loss is divided by all tokens of an optimizer step"
            )
        if self.use_transformers_continuous_batching:
            yield (
                "use_transformers_continuous_batching=True leaves what it generated from in training mode and in "
                "another dtype, and the reference must stay as it is; set it to False, or use_vllm=True"
            )
        if self.cast_lm_head_to_fp32:
            yield "cast_lm_head_to_fp32=True is not needed: the fused head keeps its statistics in fp32; leave it out"


class AAPOTrainer(GRPOTrainer):
    """AAPO (arXiv 2505.14264) as a TRL trainer: arguments of ``GRPOTrainer``, with an ``AAPOConfig``.

    Advantages are ``aapo_advantages``: group-relative, plus the clipped gap to the reward of a frozen reference, which
    is the model given here (with an adapter: the model without it). The loss is ``AAPO``: cross entropy weighted with
    the advantages, over all completion tokens of the optimizer step, whichever microbatch or rank they are on.

    With ``use_vllm=True`` TRL's engine draws policy and reference, loaded with each in turn, and TRL's correction of
    what it samples weighs the tokens of the loss.

    Evaluation draws nothing from the reference: ``eval_loss`` is without momentum.

    Raises:
        UserError: a setting that would have no effect, or is not supported.
    """

    _metrics: dict[str, Any]
    model_wrapped: Any
    _tag_names = ("trl", "aapo")
    _name = "AAPO"
    _paper = types.MappingProxyType(
        {"title": "AAPO: Enhancing the Reasoning Capabilities of LLMs with Advantage Momentum", "id": "2505.14264"}
    )

    def __init__(self, model: Any, reward_funcs: Any = None, args: AAPOConfig | None = None, *rest: Any, **more: Any):
        if not isinstance(args, AAPOConfig):
            raise UserError(f"AAPOTrainer: args is a {type(args).__name__}; give an AAPOConfig")
        super().__init__(model, reward_funcs, args, *rest, **more)
        refuse("AAPOTrainer", unsupported(self))
        refuse("AAPOTrainer", _without_reference(self))
        self._reference: Any = None
        if not has_adapter(self.model):
            self._reference = self.accelerator.prepare_model(_frozen_copy(self.model), evaluation_mode=True)
        self._engine_weights = EngineWeights(self, self._reference) if self.use_vllm else None
        self._kept_rewards: dict[str, list[float]] = {}
        fuse_heads(self, {"backward": args.head_backward, "sparsity_threshold": args.head_sparsity_threshold})

    # --- advantages ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        reference = self._reference_rewards(inputs)
        output = super()._generate_and_score_completions(inputs)
        args, metrics = self.args, self._metrics["train"]
        advantages = aapo_advantages(
            self._rewards, reference, self.num_generations, args.delta_low, args.delta_high,
            scale_rewards=args.scale_rewards != "none",
        )  # fmt: skip
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[first : first + len(inputs)]
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages.tolist())
        metrics["reference_reward"].append(reference.nanmean().item())
        metrics["frac_advantage_zero"].append((advantages == 0).float().mean().item())
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._rewards = total.masked_fill(rewards.isnan().all(1), torch.nan)
        return rewards

    def _reference_rewards(self, inputs: list[dict[str, Any]]) -> Tensor:
        """What the rewards of all ranks' completions are set against, in their order."""
        prompts = gather_object([json.dumps(row, sort_keys=True, default=repr) for row in inputs])
        prompts = prompts[:: self.num_generations]
        if self.args.reference_mode == "online":
            rewards = self._draw_reference(inputs).view(len(prompts), -1)
        else:
            # All ranks see all prompts, so all draw or none does.
            if any(prompt not in self._kept_rewards for prompt in prompts):
                drawn = self._draw_reference(inputs).view(len(prompts), -1)
                for prompt, row in zip(prompts, drawn.tolist(), strict=True):
                    self._kept_rewards.setdefault(prompt, row)
            kept = [self._kept_rewards[prompt] for prompt in prompts]
            rewards = torch.tensor(kept, device=self.accelerator.device)
        if self.args.reference_pairing == "mean":
            rewards = rewards.nanmean(1, keepdim=True).expand_as(rewards)
        return rewards.flatten()

    def _draw_reference(self, inputs: list[dict[str, Any]]) -> Tensor:
        """Rewards of one completion a row from the frozen reference, through TRL's own generation and scoring."""
        prompts = [row["prompt"] for row in inputs]
        metrics, tokens = self._metrics, self.state.num_input_tokens_seen
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        with self._reference_in_place():
            _, completion_ids, _, completions, *_ = self._generate(prompts)
        self._metrics, self.state.num_input_tokens_seen = metrics, tokens
        self._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._pending_extra_logs.clear()  # what reward functions log is of the policy
        self._pending_metrics.clear()
        return self._rewards

    @contextmanager
    def _reference_in_place(self) -> Iterator[None]:
        """While it lasts TRL generates from the reference."""
        if self._engine_weights is not None:
            with self._engine_weights.reference_in_place():
                yield
            return
        if self._reference is None:
            with without_adapter(self.accelerator.unwrap_model(self.model)):
                yield
            return
        policy, self.model_wrapped = self.model_wrapped, self._reference
        try:
            yield
        finally:
            self.model_wrapped = policy

    # --- loss ---

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        keep, old = inputs["completion_mask"].bool(), inputs.get("old_per_token_logps")
        # TRL's weights of what a vLLM engine sampled: one a sequence or one a token, by vllm_importance_sampling_mode.
        correction = inputs.get("importance_sampling_ratio", 1.0)
        advantages = (inputs["advantages"][:, None] * correction).expand_as(keep)[keep]
        rows = torch.arange(advantages.numel(), device=keep.device)
        bound = self.args.max_importance_weight
        weighted = {} if old is None or not bound else {"rollout_logps": old[keep], "max_ratio": bound}
        objective = AAPO(advantages, rows, self._tokens_a_rank(inputs), **weighted)
        policy = WithObjective(model, objective, seed(self))
        _, entropy, _ = self._get_per_token_logps_and_entropies(
            policy,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            keep.shape[1],
            compute_entropy=True,
        )
        total, count = self.accelerator.reduce(torch.stack([entropy[keep].sum(), keep.sum().float()]), "sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append((total / count.clamp(min=1)).item())
        return policy.loss

    def _tokens_a_rank(self, inputs: dict[str, Any]) -> Tensor:
        """Completion tokens of the optimizer step over all ranks, by the number of ranks: gradients are averaged."""
        tokens = inputs["num_items_in_batch"]
        if self.model.training:
            size = self.args.gradient_accumulation_steps
            first = self._step % self.args.steps_per_generation // size * size
            window = self._buffered_inputs[first : first + size]
            tokens = self.accelerator.reduce(torch.stack([m["completion_mask"].sum() for m in window]).sum(), "sum")
        return tokens.clamp(min=1) / self.accelerator.num_processes

    # --- resumption ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            record = {"reference": self._reference_digest, "rewards": self._kept_rewards}
            (folder / REFERENCE_FILE).write_text(json.dumps(record))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / REFERENCE_FILE
        if file is None or not file.exists():
            return
        record = json.loads(file.read_text())
        if record["reference"] != self._reference_digest:
            raise UserError(
                f"AAPOTrainer: the run of {checkpoint} had another reference than the model given now; make the "
                "trainer with the model that the run began with"
            )
        self._kept_rewards = record["rewards"]

    @functools.cached_property
    def _reference_digest(self) -> str:
        """Of the reference's weights, by the sums of their bytes: any step of an optimizer changes it."""
        digest = hashlib.sha256()
        for name, tensor in checkpoint_state(self.model if self._reference is None else self._reference, merged=False):
            total = tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
        return digest.hexdigest()


def _frozen_copy(model: Any) -> Any:
    """The model as it is now, out of reach of training."""
    found = copy.deepcopy(model).eval().requires_grad_(False)
    # TRL's forward and ours close over the model that they were made for: a copy would go on asking the policy.
    for module in found.modules():
        vars(module).pop("forward", None)
    return found


def _without_reference(trainer: AAPOTrainer) -> Iterator[str]:
    for name in ("rollout_func", "tools", "environment_factories"):
        if getattr(trainer, name):
            yield f"{name} would be called with the policy for the reference too; leave it out"
    model = trainer.model
    if trainer.use_vllm:
        yield from without_weights_for_an_engine(model)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        yield "a model on several devices (device_map) cannot be copied as the reference; load it on one"
    if has_adapter(model) and not _computes_what_its_base_does(model):
        yield (
            "the model's adapter is not a fresh one, and the reference is the model without it; merge the adapter "
            "first (merge_and_unload), and give peft_config for a new one"
        )


@torch.no_grad()
def _computes_what_its_base_does(model: Any) -> bool:
    ids = torch.arange(1, 7, device=model.device)[None] % model.get_output_embeddings().weight.shape[0]
    training = model.training
    adapted = model.eval()(input_ids=ids, use_cache=False).logits
    with without_adapter(model):
        plain = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return torch.equal(adapted, plain)
