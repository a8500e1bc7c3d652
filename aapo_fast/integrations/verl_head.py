"""verl 0.9's fused head by ``linear_logprobs``, where the model is asked for it (docs/integrations/verl.md).

    export VERL_USE_EXTERNAL_MODULES=aapo_fast.integrations.verl,aapo_fast.integrations.verl_head
    ... actor_rollout_ref.model.use_fused_kernels=True actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

verl keeps no registry of heads. Its forward functions look one class up in one module whenever they run, and importing
this file puts a subclass in that class's place. Only the backend "torch" is ours; "liger" and "triton" stay verl's.
"""

from __future__ import annotations

from torch import Tensor
from verl.utils.experimental import torch_functional

from aapo_fast.ops.linear_policy import linear_logprobs


class LinearLogProbs(torch_functional.FusedLinearForPPO):
    """verl's fused head: log-probabilities and entropies in fp32, both with gradient, no logits kept."""

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(..., H) hidden states, (V, H) weight and (...) tokens to log-probabilities and entropies of shape (...)."""
        if self.impl_backend != "torch":
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        out = linear_logprobs(
            hidden_states.flatten(0, -2), vocab_weights, input_ids.flatten().long(), temperature=float(temperature)
        )
        return out.logps.view(input_ids.shape), out.entropy.view(input_ids.shape)


torch_functional.FusedLinearForPPO = LinearLogProbs
