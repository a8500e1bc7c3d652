"""Which implementation of an operator runs, and why the others do not.

``resolve`` is the one place that turns a user's wish (``"auto"`` or a name) into an implementation; ``survey`` gives
the same knowledge to ``aapo-fast doctor``.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from aapo_fast.ops import native

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = ("reference", "torch", "triton", "native")


@dataclass(frozen=True)
class Candidate:
    """One implementation on one device.

    Attributes:
        name: of the implementation.
        available: whether it can run there.
        reason: in words why, or why not and what to do.
        automatic: whether ``auto`` may choose it.
    """

    name: str
    available: bool
    reason: str
    automatic: bool = True


def survey(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Candidate]:
    """All implementations, the one that ``auto`` takes first.

    Args:
        device: where the operands live.
        dtype: in which the pass computes, fp32 or fp64.
    """
    return [
        _triton(device, dtype),
        _native(device, dtype),
        _torch(device),
        Candidate("reference", True, "materialises all logits; for tests, never chosen by auto", automatic=False),
    ]


def _torch(device: torch.device) -> Candidate:
    if device.type == "mps":  # which has no float64, in which sums of rows are taken
        return Candidate("torch", False, "MPS devices have no float64; move the operands to the CPU")
    return Candidate("torch", True, f"chunked PyTorch, runs on {device.type}")


def _triton(device: torch.device, dtype: torch.dtype) -> Candidate:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not HAS_TRITON:
        return Candidate("triton", False, "Triton is not installed (pip install triton); use implementation='torch'")
    if dtype != torch.float32:
        return Candidate("triton", False, f"its kernels compute in fp32, not {dtype}; use implementation='torch'")
    if device.type == "cuda" and not interpreted:
        return Candidate("triton", True, "row kernels in Triton, matrix products from the vendor")
    if interpreted:
        return Candidate("triton", True, "through Triton's interpreter (TRITON_INTERPRET=1), for tests", False)
    return Candidate("triton", False, f"needs an NVIDIA GPU, not {device.type}; use implementation='torch'")


def _native(device: torch.device, dtype: torch.dtype) -> Candidate:
    if device.type != "cpu":
        return Candidate("native", False, f"its kernels are for CPUs, not {device.type}; use implementation='triton'")
    if dtype != torch.float32:
        return Candidate("native", False, f"its kernels compute in fp32, not {dtype}; use implementation='torch'")
    reason = native.why_not()
    if reason is not None:
        return Candidate("native", False, f"{reason}; or use implementation='torch'")
    return Candidate("native", True, f"row kernels in C++ ({native.LEVELS[native.level()]}), products from the vendor")


@torch.compiler.assume_constant_result
def resolve(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation to run for the wish ``name``; other arguments as in ``survey``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: it was asked for by name and cannot run on ``device``; the message says what to do.
    """
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation={name!r} is unknown; use 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    candidates = survey(device, dtype)
    if name == "auto":
        found = next((c.name for c in candidates if c.available and c.automatic), None)
        if found is None:
            why = "; ".join(f"{c.name}: {c.reason}" for c in candidates if c.automatic)
            raise RuntimeError(f"no implementation runs on {device.type}: {why}")
        return found
    chosen = next(c for c in candidates if c.name == name)
    if not chosen.available:
        raise RuntimeError(f"implementation={name!r} is not available on {device.type}: {chosen.reason}")
    return name
