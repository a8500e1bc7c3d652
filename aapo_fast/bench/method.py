"""What a contestant is: from a ``Problem`` to a callable that runs forward and backward once.

Gradients land in ``problem.hidden.grad`` and ``problem.weight.grad``; log-probabilities and entropies are returned by
the methods that give them. G is one matrix product of 2*N*H*V operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aapo_fast.bench.inputs import Problem


class UnavailableError(Exception):
    """A method cannot do this problem here; the text says why, in words fit for a table's footnote."""


@dataclass(frozen=True)
class Outputs:
    """What a run gave beside gradients: (N,) log-probabilities and entropies, where the method has them."""

    logps: Tensor | None = None
    entropy: Tensor | None = None


Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Method:
    """One contestant.

    Attributes:
        name: on the command line.
        title: in tables.
        gemms: matrix products it does, in G.
        build: from a problem to a run; raises ``UnavailableError``.
        weighted: computes the loss with a weight a token. The others compute a plain mean, which is less work, and are
            measured against the truth of that.
        kind: "floor", "ours" or "peer".
        sampled: the gradient is an unbiased sample: the size of its error is its own, its mean is not.
    """

    name: str
    title: str
    gemms: str
    build: Callable[[Problem], Run]
    weighted: bool = True
    kind: str = "peer"
    sampled: bool = False


def needs(condition: bool, reason: str) -> None:
    """Raise ``UnavailableError`` with ``reason`` unless ``condition``."""
    if not condition:
        raise UnavailableError(reason)


def needs_cuda(problem: Problem) -> None:
    """Raise UnavailableError unless the problem is on a GPU."""
    needs(problem.hidden.is_cuda, "needs CUDA")


def obstacle(method: Method, problem: Problem) -> str:
    """Why ``method`` cannot do ``problem``; empty if it can, as far as can be told without running it."""
    try:
        method.build(problem)
    except UnavailableError as error:
        return str(error)
    return ""


def weighted_loss(problem: Problem, logps: Tensor) -> Tensor:
    """The loss from (N,) log-probabilities, for methods that leave it to the caller."""
    return -(problem.token_weights * logps).sum() / problem.num_rows
