"""Rollouts by the Hugging Face model that is being trained.

Each prompt is computed once and its KV cache copied for the n completions; rows that are done leave the batch. Tokens
are drawn by inverting the cumulative distribution with uniforms that belong to the prompt's seed alone, so the samples
of a prompt do not depend on what else is generated with it.

Letters: P prompts, R rows (sequences being generated), V vocabulary, L prompt length.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aapo_fast.models.lora import has_adapter, without_adapter
from aapo_fast.rollout.figures import Figures
from aapo_fast.rollout.requests import check_prompts, eos_token_ids, in_turn
from aapo_fast.types import FinishReason, Progress, Sample, SamplingParams, UserError, Weights

TILE = 64
"""Tokens whose mass is summed before any of them is looked at."""


@dataclass
class _Row:
    """A completion while it grows."""

    prompt: int
    uniforms: list[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class HFEngine:
    """The rollout engine over a live ``transformers`` model; see ``types.RolloutEngine``.

    Args:
        model: the policy. Its weights are read at each call, so a trainer that updates them in place needs no sync.
        tokenizer: decodes completions, and says which token ends them.
        max_batch_size: most sequences generated at once.
        precision: makes the context that the model runs in; by default that of its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_batch_size: int = 256,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model = model
        self._precision = precision
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.weight_version = 0
        self._reference: nn.Module | None = None
        self._figures = Figures()
        self._eos = eos_token_ids(model, tokenizer)

    def keep_reference(self) -> None:
        if self.weight_version != 0:
            raise RuntimeError("keep_reference: the policy has moved already; call it before the first update")
        if has_adapter(self.model):  # the reference is the model without it
            self._reference = self.model
            return
        self._reference = copy.deepcopy(self.model).requires_grad_(False)

    def sync_weights(self, version: int) -> None:
        self.weight_version = version

    def free_memory(self) -> None:
        """Nothing to give back: the KV cache lives for one call."""

    def metrics(self) -> dict[str, float]:
        return self._figures.take()

    def close(self) -> None:
        """Nothing was started."""

    @torch.no_grad()
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
        """See ``types.RolloutEngine.generate``.

        Raises:
            UserError: an empty prompt.
        """
        if not isinstance(weights, str):
            return in_turn(self.generate, prompts, seeds, weights, progress, n=n, sampling=sampling)
        check_prompts(prompts, seeds)
        began = time.perf_counter()
        model, version = self._model(weights)
        results: list[list[Sample]] = []
        step = max(1, self.max_batch_size // n)
        for start in range(0, len(prompts), step):
            part = slice(start, start + step)
            reference = without_adapter(model) if weights == "reference" else nullcontext()
            with self._precision(), reference, _casts_kept(model):
                try:
                    rows = self._in_parts(model, prompts[part], n, sampling, seeds[part])
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"{str(error).split('. ')[0]} while generating; lower rollout.max_batch_size="
                        f"{self.max_batch_size} or rollout.max_tokens={sampling.max_tokens}"
                    ) from error
            samples = [self._sample(prompts[start + row.prompt], row, version) for row in rows]
            results += [samples[i : i + n] for i in range(0, len(samples), n)]
            if progress is not None:
                progress(len(results), len(prompts))
        self._figures.generated(results, began)
        return results

    def _model(self, weights: Weights) -> tuple[nn.Module, int]:
        if weights == "policy" or self.weight_version == 0:
            return self.model, self.weight_version
        if self._reference is None:
            raise RuntimeError("the reference weights were not kept; call keep_reference before the first update")
        return self._reference, 0

    def _in_parts(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
    ) -> list[_Row]:
        """All at once; the completions of one prompt in parts, where they are more than the batch may have."""
        uniforms = [_uniforms(seed, n, sampling.max_tokens) for seed in seeds]
        width = min(n, self.max_batch_size)  # below n there is one prompt
        rows: list[_Row] = []
        for first in range(0, n, width):
            rows += self._complete(model, prompts, [of[first : first + width] for of in uniforms], sampling)
        return rows

    def _complete(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        uniforms: Sequence[Sequence[list[float]]],
        sampling: SamplingParams,
    ) -> list[_Row]:
        """A batch; the same number of completions of each prompt, each by its uniforms."""
        device, n = next(model.parameters()).device, len(uniforms[0])
        rows = [_Row(prompt, own) for prompt, completions in enumerate(uniforms) for own in completions]
        ids, mask = _left_pad(prompts, device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise UserError(f"{type(model).__name__} returns no past_key_values; it cannot generate with the engine hf")
        logits = out.logits[:, -1]
        if n > 1:
            # reorder_cache, not batch_repeat_interleave: recurrent layers (Falcon-H1, LFM2) have only this one.
            cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(n))
            logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        position = mask.sum(1, keepdim=True)
        live = list(rows)
        while True:
            tokens = self._draw(live, logits, sampling)
            keep = [i for i, row in enumerate(live) if row.finish_reason is None]
            if not keep:
                return rows
            if len(keep) <= 0.75 * len(live):  # fewer rows to compute are worth a copy of the cache
                index = torch.tensor(keep, device=device)
                cache.reorder_cache(index)
                tokens, mask, position = tokens[index], mask[index], position[index]
                live = [live[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
            out = model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits, cache, position = out.logits[:, -1], out.past_key_values, position + 1

    def _draw(self, rows: Sequence[_Row], logits: Tensor, sampling: SamplingParams) -> Tensor:
        """Extend each unfinished row by a token; (R,) the tokens (any, for finished rows)."""
        # A finished row may still be in the batch; it has used up its uniforms or does not care.
        uniforms = torch.tensor(
            [row.uniforms[min(len(row.tokens), sampling.max_tokens - 1)] for row in rows],
            dtype=torch.float64,
            device=logits.device,
        )
        tokens, logprobs = draw_tokens(logits, uniforms, sampling.temperature, sampling.top_p)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish_reason is not None:
                continue
            if math.isnan(logprob):
                raise UserError(
                    "the model's next-token logits are NaN or infinite: its weights have diverged, or overflow in this "
                    "precision; go on from an earlier checkpoint with a lower train.learning_rate, or set "
                    "model.precision='float32'"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in self._eos or self._hits_stop_string(row.tokens, sampling.stop):
                row.finish_reason = "stop"
            elif len(row.tokens) == sampling.max_tokens:
                row.finish_reason = "length"
        return tokens

    def _hits_stop_string(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # Every token is at least a byte, so this tail holds any stop string that the newest token has completed.
        tail = tokens[-(max(len(s.encode()) for s in stop) + 4) :]
        text = self.tokenizer.decode(tail)
        return any(s in text for s in stop)

    def _sample(self, prompt: Sequence[int], row: _Row, version: int) -> Sample:
        assert row.finish_reason is not None
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Sample(tuple(prompt), tuple(row.tokens), tuple(row.logprobs), text, row.finish_reason, version)


@contextmanager
def _casts_kept(model: nn.Module) -> Iterator[None]:
    """Autocast keeps the cast of a weight only if it could be trained; a frozen one (the reference's, those under an
    adapter) would be cast again for every token.
    """
    device = next(model.parameters()).device.type
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    frozen = frozen if torch.is_autocast_enabled(device) else []
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inversion, and its log-probability under the distribution it was drawn from.

    Args:
        logits: (R, V) any floating-point dtype.
        uniforms: (R,) fp64 in [0, 1); unused when greedy.
        temperature: 0 is greedy, with the log-probability at temperature 1.
        top_p: keep the fewest, likeliest tokens whose mass reaches it.

    Returns:
        (R,) int64 tokens and (R,) fp32 log-probabilities.
    """
    if temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        tokens = logprobs.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
    logits = logits.float() / temperature
    if top_p < 1:
        logits = _nucleus(logits, top_p)
    largest = logits.amax(-1, keepdim=True)
    tokens, total = _invert((logits - largest).exp_(), uniforms)
    logprobs = (logits.gather(1, tokens[:, None]) - largest).squeeze(1) - total.log()
    return tokens, logprobs.float()


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The fewest, likeliest tokens whose mass reaches ``top_p``; -inf elsewhere."""
    ordered, order = logits.log_softmax(-1).sort(-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logits.masked_fill(dropped, float("-inf"))


def _invert(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) the tokens at which the running sums of (R, V) ``mass`` pass ``uniforms`` of the whole, and (R,) the whole.

    Running sums are fp64: in fp32 they would lose the tail of a large vocabulary. They go over tiles, and then over the
    one tile that is hit, which costs a fraction of a sum over every token.
    """
    tiles = nn.functional.pad(mass, (0, -mass.shape[1] % TILE)).unflatten(1, (-1, TILE))
    mass_of_tile = tiles.sum(-1).double()
    tile, share, total = _passed(mass_of_tile, uniforms)
    hit = tiles[torch.arange(len(tiles), device=tiles.device), tile].double()
    within, _, _ = _passed(hit, share)
    return (tile * TILE + within).clamp(max=mass.shape[1] - 1), total


def _passed(mass: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the running sum of each row passes ``share`` of the whole; the share of that entry that is then used; the
    whole. An entry of no mass is never hit, whatever rounding does.
    """
    running = mass.cumsum(-1)
    total = running[:, -1]
    point = torch.minimum(share * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(running, point[:, None], right=True).clamp(max=mass.shape[1] - 1)  # NaN: beyond
    of_entry = mass.gather(1, index)
    used = point[:, None] - (running.gather(1, index) - of_entry)
    return index.squeeze(1), (used / of_entry).squeeze(1).clamp(0, 1), total


def _uniforms(seed: int, n: int, max_tokens: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, max_tokens, generator=generator, dtype=torch.float64).tolist()


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
