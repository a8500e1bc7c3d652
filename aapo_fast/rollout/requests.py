"""What every engine asks of a request, and which tokens end its completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aapo_fast.types import Progress, Sample, UserError, Weights


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    """Raises ValueError unless there is a seed a prompt, and UserError for a prompt without tokens."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one a prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens; an empty prompt cannot be continued")


def in_turn(
    generate: Callable[..., list[list[Sample]]],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    weights: Sequence[Weights],
    progress: Progress | None,
    **more: Any,
) -> list[list[Sample]]:
    """``generate`` for an engine that holds one set of weights at a time: the prompts of each set together."""
    check_prompts(prompts, seeds)
    if len(weights) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(weights)} weights; give one a prompt, or one for all")
    found: dict[int, list[Sample]] = {}
    for wanted in dict.fromkeys(weights):
        places = [i for i, w in enumerate(weights) if w == wanted]
        before = len(found)

        def count(done: int, total: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, len(prompts))

        drawn = generate(
            [prompts[i] for i in places], seeds=[seeds[i] for i in places], weights=wanted, progress=count, **more
        )
        found |= dict(zip(places, drawn, strict=True))
    return [found[i] for i in range(len(prompts))]


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Those of the model's generation config (chat models have several) and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
