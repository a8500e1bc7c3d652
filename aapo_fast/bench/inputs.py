"""The tensors of a case: hidden states, head weight, targets drawn from the policy itself, signed advantages.

Everything is decided by the case, the seed and the kind of device. Rows are handled in blocks, so that a case of
N*V = 10^10 logits is made in little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.bench.shapes import Case, entropy_of

BLOCK_BYTES = 512 * 2**20
PROBE_ROWS = 64
FAVOURED = 16
MAX_SEQUENCES = 32


@dataclass(frozen=True, eq=False)
class Problem:
    """What every method computes: ``loss = -(1 / N) sum_t A[s(t)] logp_t`` and its gradients.

    Attributes:
        hidden: (N, H) leaf with gradient.
        weight: (V, H) leaf with gradient.
        targets: (N,) int64.
        advantages: (B,) fp32, B sequences of equal length.
        sequence_index: (N,) int64.
        softcap: of the logits, or None.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    sequence_index: Tensor
    softcap: float | None

    @property
    def num_rows(self) -> int:
        return self.targets.numel()

    @property
    def token_weights(self) -> Tensor:
        """(N,) fp32 advantage of each token's sequence."""
        return self.advantages[self.sequence_index]

    @property
    def rectangular(self) -> bool:
        """Whether sequences are contiguous and of one length."""
        length, rest = divmod(self.num_rows, self.advantages.numel())
        even = torch.arange(self.num_rows, device=self.targets.device) // max(1, length)
        return rest == 0 and bool((self.sequence_index == even).all())

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def to(self, dtype: torch.dtype, device: torch.device) -> Problem:
        """The same problem on ``device`` with its operands rounded to ``dtype``."""
        x, w = (t.detach().to(device, dtype).clone().requires_grad_() for t in (self.hidden, self.weight))
        return Problem(
            hidden=x,
            weight=w,
            targets=self.targets.to(device),
            advantages=self.advantages.to(device),
            sequence_index=self.sequence_index.to(device),
            softcap=self.softcap,
        )


def make_problem(case: Case, device: torch.device, seed: int = 0, sample_targets: bool = True) -> Problem:
    """The tensors of ``case``. ``sample_targets=False`` draws targets uniformly, which saves a matrix product."""
    generator = torch.Generator(device).manual_seed(seed)
    n, h, v = case.shape
    dtype = getattr(torch, case.dtype)
    make = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(v, h, generator=generator, device=device, dtype=make).mul_(h**-0.5)
    hidden = torch.randn(n, h, generator=generator, device=device, dtype=make)
    softcap, nats = case.head.softcap, entropy_of(case.distribution)
    if nats is not None:
        if softcap is None:
            hidden *= _scale_for_entropy(nats, hidden[:PROBE_ROWS] @ weight.t())
        else:
            _favour_some_tokens(nats, hidden, weight, softcap, generator)
    elif case.distribution == "peaked":
        _point_at_a_token(hidden, weight, softcap, generator)
    else:
        hidden *= 0.1
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if sample_targets:
        targets = torch.cat([_draw(z, generator) for _, z in logit_blocks(hidden, weight, softcap)])
    else:
        targets = torch.randint(v, (n,), generator=generator, device=device)
    num_sequences = math.gcd(n, MAX_SEQUENCES)
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        advantages=torch.randn(num_sequences, generator=generator, device=device),
        sequence_index=torch.arange(n, device=device) // (n // num_sequences),
        softcap=softcap,
    )


def logit_blocks(
    hidden: Tensor, weight: Tensor, softcap: float | None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each block, and their logits in ``dtype``, at most BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // (weight.shape[0] * dtype.itemsize))
    weight = weight.detach().t()
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, min(start + size, hidden.shape[0]))
        yield rows, soft_capped((hidden[rows].detach() @ weight).to(dtype), softcap)


def soft_capped(z: Tensor, softcap: float | None) -> Tensor:
    """``c tanh(z / c)``, or z itself without a cap."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def describe(problem: Problem) -> dict[str, float]:
    """Mean entropy in nats, and the share of rows with p > 0.999, of the first rows."""
    _, z = next(logit_blocks(problem.hidden[:PROBE_ROWS], problem.weight, problem.softcap))
    certain = (z.softmax(1).amax(1) > 0.999).float().mean().item()
    return {"mean_entropy_nats": _mean_entropy(z), "share_of_rows_above_0.999": certain}


def _draw(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)


def _scale_for_entropy(nats: float, z: Tensor) -> float:
    """What to multiply Gaussian logits by so that the mean entropy is so much."""
    return _bisect(nats, lambda scale: _mean_entropy(z * scale), 0.1, 100.0)


def _favour_some_tokens(
    nats: float, hidden: Tensor, weight: Tensor, softcap: float, generator: torch.Generator
) -> None:
    """Let FAVOURED tokens of each row stand out, by Zipf's law with the exponent that gives such a mean entropy.

    Gaussian logits will not do under a soft-cap: it flattens their tops before the rows become as peaked as a model's.
    """
    n, v = hidden.shape[0], weight.shape[0]
    chosen = torch.randint(v, (n, FAVOURED), generator=generator, device=hidden.device)
    ranks = torch.arange(1, FAVOURED + 1, device=hidden.device, dtype=hidden.dtype).log()

    def favour(rows: Tensor, exponent: float) -> Tensor:
        capped = (math.log(v) + 8.0 - exponent * ranks) / softcap
        heights = softcap * capped.clamp(-0.98, 0.98).atanh()
        for place in range(FAVOURED):
            rows += heights[place] * weight[chosen[: rows.shape[0], place]]
        return rows

    def entropy(exponent: float) -> float:
        probe = favour(hidden[: PROBE_ROWS // 4].clone(), exponent)
        return _mean_entropy(soft_capped(probe @ weight.t(), softcap))

    favour(hidden, _bisect(nats, entropy, 0.1, 10.0))


def _bisect(nats: float, entropy: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function passes so much."""
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle) > nats else (low, middle)
    return (low * high) ** 0.5


def _mean_entropy(z: Tensor) -> float:
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean().item()


def _point_at_a_token(hidden: Tensor, weight: Tensor, softcap: float | None, generator: torch.Generator) -> None:
    """Make one token's logit stand 9.5 nats above the log-sum-exp of the others."""
    (n, h), v = hidden.shape, weight.shape[0]
    chosen = torch.randint(v, (n,), generator=generator, device=hidden.device)
    height = 0.0
    for _ in range(8):
        # The others are N(0, 1 + height^2 / H): a hidden state that points at one token leans a little towards all.
        wanted = math.log(v) + (1 + height**2 / h) / 2 + 9.5
        height = wanted if softcap is None else softcap * math.atanh(min(wanted / softcap, 0.98))
    hidden += height * weight[chosen] / weight[chosen].square().sum(1, keepdim=True)
