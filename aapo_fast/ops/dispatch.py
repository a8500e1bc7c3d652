"""Which implementation of an operator runs, and why the others do not.

``resolve`` is the one place that turns a user's wish (``"auto"`` or a name) into an implementation; ``survey`` gives
the same knowledge to ``aapo-fast doctor``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("reference", "torch", "triton", "native")


@dataclass(frozen=True)
class Candidate:
    """One implementation on one device: whether it can run there, and in words why or why not."""

    name: str
    available: bool
    reason: str


def survey(device: torch.device) -> list[Candidate]:
    """All implementations, the one that ``auto`` takes first.

    Args:
        device: where the operands live.
    """
    return [
        Candidate("torch", True, f"chunked PyTorch, runs on {device.type}"),
        Candidate("reference", True, "materialises all logits; for tests, never chosen by auto"),
        Candidate("triton", False, "not part of this version; use implementation='torch'"),
        Candidate("native", False, "not part of this version; use implementation='torch'"),
    ]


def resolve(name: str, device: torch.device) -> str:
    """The implementation to run for the wish ``name``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: it was asked for by name and cannot run on ``device``; the message says what to do.
    """
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation={name!r} is unknown; use 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    candidates = survey(device)
    if name == "auto":
        return next(c.name for c in candidates if c.available)
    chosen = next(c for c in candidates if c.name == name)
    if not chosen.available:
        raise RuntimeError(f"implementation={name!r} is not available on {device.type}: {chosen.reason}")
    return name
