"""What every engine asks of a request, and which tokens end its completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aapo_fast.types import UserError


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    """Raises ValueError unless there is a seed a prompt, and UserError for a prompt without tokens."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one a prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens; an empty prompt cannot be continued")


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Those of the model's generation config (chat models have several) and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
