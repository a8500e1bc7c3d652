"""TRL's GRPO trainer with the fused loss, and AAPO as a TRL trainer (trl 1.16).

trainer = GRPOTrainer(...)
fuse(trainer)                       # the same loss, gradients and metrics, three matrix products in the head
trainer.train()

AAPOTrainer(model, reward_funcs, AAPOConfig(...), train_dataset).train()
"""

from aapo_fast.integrations.trl.aapo import AAPOConfig, AAPOTrainer
from aapo_fast.integrations.trl.grpo import fuse

__all__ = ["AAPOConfig", "AAPOTrainer", "fuse"]
