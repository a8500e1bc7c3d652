"""From what vLLM answers to samples, refusing what is not whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aapo_fast.types import FinishReason, Sample, UserError

FINISHED: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Completion:
    """One completion as vLLM gives it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


def make_sample(tokenizer: Any, prompt: Sequence[int], completion: Completion, version: int) -> Sample:
    """A sample with its text decoded here, as every engine decodes it.

    Raises:
        UserError: a completion without tokens, cut off, or without a log-probability for each token. It would train on
            something that was not sampled.
    """
    token_ids, logprobs, finish_reason = completion.token_ids, completion.logprobs, completion.finish_reason
    if finish_reason not in FINISHED or not token_ids:
        raise UserError(
            f"vLLM ended a completion after {len(token_ids)} tokens with finish_reason={finish_reason!r}; "
            "want 'stop' or 'length'. Was the engine paused or a request aborted by someone else?"
        )
    if sum(map(math.isfinite, logprobs)) != len(token_ids):
        raise UserError(
            f"vLLM gave {sum(map(math.isfinite, logprobs))} finite log-probabilities for {len(token_ids)} tokens; "
            "start it with --logprobs-mode processed_logprobs, or with `aapo-fast serve`"
        )
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return Sample(tuple(prompt), tuple(token_ids), tuple(logprobs), text, FINISHED[finish_reason], version)


def stream_seed(seed: int) -> int:
    """A prompt's seed for vLLM, which gives completion j of it seed + j: neighbouring seeds would share samples."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:7], "big")
