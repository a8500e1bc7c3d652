"""What the layers hand to each other: problems, samples, groups, batches, and the protocol of a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
"""``stop``: the model ended the completion (EOS or a stop string). ``length``: it was cut off at ``max_tokens``."""

Weights = Literal["policy", "reference"]

Progress = Callable[[int, int], None]
"""Called with (done, total) while something takes its time."""


class UserError(Exception):
    """Something the user can mend. Its text is one line that says what, where and the remedy; no traceback is shown."""


class DataError(UserError):
    """The data set is at fault: a row without an answer, an answer that cannot be parsed."""


def first_line(error: Exception) -> str:
    """Of what an error says; of its own name where that is nothing."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


@dataclass(frozen=True)
class Problem:
    """One prompt with what its rewards need.

    Attributes:
        row: where it came from, for messages: "train.jsonl row 17".
        prompt: the text given to the model, template applied.
        prompt_ids: its tokens.
        columns: everything else that the row held ("answer", "metadata", ...); rewards receive it.
    """

    row: str
    prompt: str
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, object]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus mass; 1 keeps everything.
        max_tokens: longest completion, in tokens.
        stop: strings that end a completion; the text that contains one is kept as sampled.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt_ids, token_ids: tokens; the completion includes the token that ended it.
        logprobs: log-probability of each completion token under the distribution it was drawn from.
        text: the completion decoded, without special tokens.
        finish_reason: whether the model stopped or was cut off.
        weight_version: how many optimizer steps the weights had seen.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    weight_version: int


@dataclass
class Group:
    """The samples of one problem and their rewards; NaN is a missing reward."""

    problem: Problem
    samples: list[Sample]
    rewards: list[float] = field(default_factory=list)


class RolloutEngine(Protocol):
    """Draws completions from the policy that is being trained, or from the frozen reference."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weights: Weights | Sequence[Weights] = "policy",
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """``n`` completions of each prompt (token ids). Prompt i is drawn with ``seeds[i]``: the same weights, prompt
        and seed give the same samples, whatever else is in the call. ``weights`` are those of all prompts, or of each.
        """
        ...

    def keep_reference(self) -> None:
        """Make sure that ``weights="reference"`` goes on meaning the present weights after the policy has moved."""
        ...

    def sync_weights(self, version: int) -> None:
        """The policy has been updated; what is generated from now on is of ``version``."""
        ...

    def free_memory(self) -> None:
        """The policy will be trained next: give back what device memory can be had again before the next call."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, summed: ``generation_seconds``, ``generation_tokens``, ``sync_seconds``, ..."""
        ...

    def close(self) -> None:
        """End whatever the engine has started."""
        ...


@dataclass(frozen=True, eq=False)
class Segments:
    """S attention problems of one shape: which packed tokens ask, which are seen, and how far apart they are.

    Attributes:
        query_index: (S, Q) int64 positions in the packed row; padding repeats a valid one.
        key_index: (S, K) int64 likewise.
        distance: (S, Q, K) query position less key position; negative where the key must not be seen.
        query_rows: (R,) int64, which of the S*Q flattened queries are real ...
        out_index: (R,) int64, ... and where in the packed row their results go.
    """

    query_index: Tensor
    key_index: Tensor
    distance: Tensor
    query_rows: Tensor
    out_index: Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """The same attention problems for kernels that take them at any length. S of them; their queries follow each other
    in the packed row.

    Attributes:
        key_index: (K,) int64, the packed tokens that each problem sees, one problem after the other.
        query_starts, key_starts: (S + 1,) int32, where each begins among all queries and among all keys; the end.
        most_queries, most_keys: of one problem.
    """

    key_index: Tensor
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens for one forward and backward pass. N target tokens of B sequences.

    Attributes:
        input_ids, position_ids: (1, T) packed or (B, L) right-padded, int64.
        attention_mask: (B, L) int64 of a padded batch; None when packed.
        packing: the attention of a packed batch, for SDPA or for flash attention; None when padded.
        hidden_index: (N,) which of the flattened hidden states predicts each target. Completions that share a prompt
            share the state that predicts their first token.
        targets: (N,) int64.
        sequence_index: (N,) int64 the sequence each target belongs to, counted within this batch.
        rollout_logps: (N,) fp32 log-probabilities that the rollout engine gave for the targets; NaN where it gave none.
        advantages: (B,) fp32.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    packing: tuple[Segments, ...] | Ragged | None
    hidden_index: Tensor
    targets: Tensor
    sequence_index: Tensor
    rollout_logps: Tensor
    advantages: Tensor
