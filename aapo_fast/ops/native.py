"""The native extension (csrc/): loaded here and nowhere else, and where it cannot be, here is why."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

INTERFACE = 10
"""Of the operators, as in csrc/operators.cpp: to be raised there and here when they change."""

LEVELS = ("plain", "avx2", "avx512")
"""Levels of instructions by their number in csrc/kernels.h."""

_FOLDER = Path(__file__).parent
_REBUILD = "make native, or in aapo-fast's folder pip install --no-build-isolation --force-reinstall --no-deps ."
_OPERATORS = (
    "statistics", "gradient", "both_sweeps", "sample_entries", "sparse_sweeps", "pack_entries", "add_times_weight",
    "add_transposed_times", "exp",
)  # fmt: skip


@functools.cache
def why_not() -> str | None:
    """None where the kernels can be used; otherwise the reason, and what to do about it. Loads them once."""
    reason = _load(_FOLDER)
    if reason is None:
        # All operators write into tensors that they are given, and return nothing.
        for name in _OPERATORS:
            torch.library.register_fake(f"aapo_fast_native::{name}", lambda *_, **__: None)
    return reason


def _load(folder: Path) -> str | None:
    """Load the library that stands in ``folder``, or say why not."""
    if os.environ.get("AAPO_FAST_NATIVE") == "off":
        return "switched off by AAPO_FAST_NATIVE=off"
    library = next(folder.glob("_native*.so"), None)
    if library is None:
        note = folder / "_native.txt"
        reason = note.read_text().strip() if note.exists() else "this installation was made without it"
        return f"not built: {reason} (to build it: {_REBUILD})"
    try:
        torch.ops.load_library(str(library))
        found = torch.ops.aapo_fast_native.interface()
    except (OSError, RuntimeError, AttributeError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"cannot be loaded with torch {torch.__version__}: {first_line} (to build it again: {_REBUILD})"
    return None if found == INTERFACE else f"built from other sources than these (to build it again: {_REBUILD})"


def operators() -> Any:
    """The operators, ``torch.ops.aapo_fast_native``.

    Raises:
        RuntimeError: they cannot be used; the message says why.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the native kernels are not available: {reason}")
    return torch.ops.aapo_fast_native


def available_levels() -> list[str]:
    """Levels of instructions that were built and that this machine can run, the best first."""
    said: str = operators().describe()
    return said.partition(";")[2].split()


def level() -> int:
    """Number of the level to run: the best, or the one that AAPO_FAST_NATIVE_LEVEL names.

    Raises:
        ValueError: the level that is named cannot run here.
    """
    levels = available_levels()
    name = os.environ.get("AAPO_FAST_NATIVE_LEVEL") or levels[0]
    if name not in levels:
        raise ValueError(f"AAPO_FAST_NATIVE_LEVEL={name!r} cannot run here; use one of {', '.join(levels)}")
    return LEVELS.index(name)


def describe() -> str:
    """One line: what was built and what of it runs, or why nothing does."""
    reason = why_not()
    if reason is not None:
        return f"native kernels: {reason}"
    compiler = operators().describe().partition(";")[0]
    runs, others = LEVELS[level()], ", ".join(available_levels())
    return f"native kernels: for CPUs, {runs} runs here (of {others}); made by {compiler} for torch >= 2.10, any Python"
