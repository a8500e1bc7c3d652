"""AAPO in verl 0.9: an advantage estimator and a policy loss under the name ``aapo`` (docs/integrations/verl.md).

    export VERL_USE_EXTERNAL_MODULES=aapo_fast.integrations.verl
    python -m verl.trainer.main_ppo algorithm.adv_estimator=aapo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=aapo ...

``import verl`` imports what that variable names, in every process: the trainer computes advantages, the workers losses.

Reference rewards, K of the frozen policy for each prompt, are the data set's column ``reference_rewards``. verl's
trainer (``trainer.use_v1=True``, its default) stores each column of a prompt beside its trajectories in TransferQueue
and hands an estimator neither, so the estimator fetches them there. verl's older trainers have no TransferQueue; there
the reference rewards are ``reward_baselines``, a column of tensors, which they do hand over.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.torch_functional import masked_mean

from aapo_fast.advantages import aapo_advantages, pair_references
from aapo_fast.types import UserError

COLUMN = "reference_rewards"
PARTITION = "train"  # where verl's trainer keeps the trajectories it trains on


@dataclass(frozen=True)
class Options:
    """What ``+algorithm.aapo.NAME=VALUE`` on verl's command line sets.

    Attributes:
        delta_low, delta_high: bounds of the momentum, in units of reward.
        pairing: "paired" (sample i of a group with reference i mod K, the paper) or "mean" (all with their mean).
        momentum: False asks for GRPO's estimator, for which no reference rewards are needed.
    """

    delta_low: float = -0.2
    delta_high: float = 0.28
    pairing: str = "paired"
    momentum: bool = True

    @classmethod
    def of(cls, config: Any) -> Options:
        """From verl's ``algorithm`` section, an omegaconf section or its ``AlgoConfig``."""
        given = dict((config.get("aapo") if config is not None else None) or {})
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"algorithm.aapo.{name} is not a setting; there are {', '.join(known)}")
        options = cls(**given)
        if options.pairing not in ("paired", "mean"):
            raise UserError(f"algorithm.aapo.pairing={options.pairing!r}; give 'paired' or 'mean'")
        return options


@register_adv_est("aapo")
def aapo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Sequence[str] | None = None,
    reward_baselines: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``aapo_advantages`` of each group, spread over the tokens of its responses.

    The reward of a response is the sum of its tokens' rewards. Groups may differ in size: sessions fail, and a batch
    may hold part of a group. ``algorithm.norm_adv_by_std_in_grpo`` says whether the standard deviation divides, as it
    does for verl's ``grpo``. A reward that is NaN is a missing one.

    Args:
        token_level_rewards: (B, T) rewards.
        response_mask: (B, T) 1 at tokens of the response.
        config: verl's ``algorithm`` section; ``Options`` are read from its ``aapo``.
        index: (B,) the group of each response (verl's ``uid`` of the prompt).
        reward_baselines: (B,) the reward each response is set against, where the trainer hands it over.

    Returns:
        advantages, returns: (B, T) fp32, the same tensor.

    Raises:
        UserError: no groups, no reference rewards (and momentum was not switched off), settings that are none.
    """
    if index is None:
        raise UserError("adv_estimator 'aapo' got no index: it needs the prompt's uid of each response")
    options = Options.of(config)
    rewards = token_level_rewards.sum(-1)
    rows = _rows_of_groups(index, rewards.device)
    reference = None
    if options.momentum:
        reference = reward_baselines
        if reference is None:
            reference = _reference_rewards([str(uid) for uid in index], options.pairing).to(rewards.device)
    scale = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    advantages = aapo_advantages(
        _grouped(rewards, rows),
        None if reference is None else _grouped(reference, rows),
        group_size=rows.shape[1],
        delta_low=options.delta_low,
        delta_high=options.delta_high,
        scale_rewards=scale,
    )
    of_rows = torch.zeros_like(rewards, dtype=torch.float32)
    of_rows[rows[rows >= 0]] = advantages[rows.flatten() >= 0]
    tokens = of_rows.unsqueeze(-1) * response_mask
    return tokens, tokens


@register_policy_loss("aapo")
def aapo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Advantage-weighted cross entropy, ``-A* log pi`` summed as verl's ``loss_agg_mode`` says.

    With ``token-mean``, verl's default, it is divided by the response tokens of the whole mini-batch over all ranks
    (AAPO, arXiv 2505.14264, eq. 7). No ratio and no clipping: where verl takes several optimizer steps on one batch,
    only ``rollout_is_weights`` correct for that.

    Args:
        old_log_prob: (B, T) of the policy that the batch was drawn by; for the metric.
        log_prob: (B, T) of the policy, with gradient.
        advantages, response_mask: (B, T).
        loss_agg_mode, config: verl's; ``config.global_batch_info`` has the counts of the mini-batch.
        rollout_is_weights: (B, T) verl's importance weights (``algorithm.rollout_correction``), or None.

    Returns:
        The loss, a scalar with gradient, and figures of this micro-batch: the mean of log pi_old - log pi, and the
        share of response tokens whose advantage is zero.
    """
    losses = -advantages * log_prob
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        metrics = {
            "actor/ppo_kl": masked_mean(old_log_prob - log_prob, response_mask).item(),
            "actor/zero_advantage_share": masked_mean((advantages == 0).float(), response_mask).item(),
        }
    return loss, metrics


def _members(uids: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each group, in their order."""
    members: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        members.setdefault(str(uid), []).append(row)
    return members


def _rows_of_groups(index: Sequence[str], device: torch.device) -> Tensor:
    """(groups, largest group) int64: the rows of each group in their order, -1 where a group is smaller."""
    members = _members(index)
    largest = max(len(rows) for rows in members.values())
    return torch.tensor([rows + [-1] * (largest - len(rows)) for rows in members.values()], device=device)


def _grouped(values: Tensor, rows: Tensor) -> Tensor:
    """(groups x largest,) values group by group. Missing members are NaN, which the estimator leaves out."""
    return torch.where(rows >= 0, values[rows.clamp(min=0)], math.nan).flatten()


def _reference_rewards(uids: Sequence[str], pairing: str) -> Tensor:
    """(B,) the reference reward that each response is set against, from the data set's column."""
    members = _members(uids)
    columns = _column_of_prompts(list(members))
    reference = torch.empty(len(uids))
    for uid, rows in members.items():
        reference[rows] = torch.tensor(pair_references(columns[uid], len(rows), pairing))
    return reference


def _column_of_prompts(uids: Sequence[str]) -> dict[str, list[float]]:
    """The column ``reference_rewards`` of each prompt, out of the TransferQueue that this process is a client of."""
    queue = sys.modules.get("transfer_queue")
    if queue is None:
        raise _missing("this trainer hands over no reward_baselines and uses no TransferQueue")
    keys = _a_key_of_each(uids, queue.kv_list(PARTITION).get(PARTITION, {}))
    data = queue.kv_batch_get(keys=[keys[uid] for uid in uids], partition_id=PARTITION, select_fields=["uid", COLUMN])
    if COLUMN not in data.keys():  # noqa: SIM118 - a TensorDict answers `in` with an error
        raise _missing(f"the data set has no column {COLUMN!r}")
    columns = {}
    for uid, value in zip(data["uid"], data[COLUMN], strict=True):
        values = list(value) if hasattr(value, "__iter__") else [value]
        if not values or values == [None]:
            raise _missing(f"the column {COLUMN!r} of a prompt is empty")
        columns[str(uid)] = [math.nan if reward is None else float(reward) for reward in values]
    return columns


def _a_key_of_each(uids: Sequence[str], tags: Mapping[str, Any]) -> dict[str, str]:
    """One trajectory of each prompt: all carry the prompt's columns. verl's keys are ``{uid}_{session}_{output}``."""
    wanted = set(uids)
    keys: dict[str, str] = {}
    for key, tag in tags.items():
        uid = key.rsplit("_", 2)[0]
        if uid in wanted and tag.get("status") == "success":
            keys.setdefault(uid, key)
    if wanted - keys.keys():
        raise _missing(f"{len(wanted - keys.keys())} prompts have no trajectory in TransferQueue")
    return keys


def _missing(reason: str) -> UserError:
    return UserError(
        f"AAPO has no reference rewards: {reason}; see docs/integrations/verl.md for how to give them, or set "
        "+algorithm.aapo.momentum=False to do without momentum"
    )
