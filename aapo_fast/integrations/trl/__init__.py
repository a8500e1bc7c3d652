"""TRL's GRPO trainer with the fused loss, and AAPO as a TRL trainer (trl 1.16).

trainer = GRPOTrainer(...)
fuse(trainer)                       # the same loss, gradients and metrics, three matrix products in the head
trainer.train()

AAPOTrainer(model, reward_funcs, AAPOConfig(...), train_dataset).train()
"""

from importlib.metadata import PackageNotFoundError, version

try:
    _found = version("trl")
except PackageNotFoundError as error:
    raise ImportError(
        "aapo_fast.integrations.trl needs trl; run: pip install '.[trl]' in aapo-fast's folder"
    ) from error
# TRL's losses are written out here, term by term: of another release they may be others.
if not _found.startswith("1.16."):
    raise ImportError(
        f"aapo_fast.integrations.trl is for trl 1.16, not {_found}; run: pip install '.[trl]' in aapo-fast's folder"
    )

from aapo_fast.integrations.trl.aapo import AAPOConfig, AAPOTrainer
from aapo_fast.integrations.trl.grpo import fuse

__all__ = ["AAPOConfig", "AAPOTrainer", "fuse"]
