"""Flash attention over ragged problems, by name: the flash-attn packages where they are installed, or PyTorch's own.

Letters: Q queries and K keys of all problems together, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from aapo_fast.types import Ragged, UserError, first_line


@dataclass(frozen=True)
class Scores:
    """How a query's scores are made of its products with keys.

    Attributes:
        scaling: factor on the products; None for 1 / sqrt(D).
        window: keys that a query sees at most, its own included; None for all.
        softcap: c of c tanh(score / c), or None.
    """

    scaling: float | None
    window: int | None
    softcap: float | None


class BrokenPackageError(UserError):
    """A package that is installed and cannot be loaded."""


class Flash(Protocol):
    """Attention of every problem in one launch; (Q, heads, D) in the queries' order.

    Masks are causal and end together: the last query of a problem sees all of its keys.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scores: Scores) -> Tensor:
        """(Q, heads, D) queries; (K, kv_heads, D) keys and values."""
        ...


def find_flash(name: str, device: torch.device, dtype: torch.dtype) -> Flash | None:
    """What [model] attention names: ``sdpa`` is None, ``auto`` the best that runs here, or None.

    Raises:
        UserError: what is named is not there, or cannot compute on this device in this dtype.
    """
    if name == "sdpa":
        return None
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name != "auto":
        if not fits:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"model.attention={name!r} computes in 16 bits on a GPU, and this is {kind} on {device.type}; set "
                "model.attention='sdpa', or model.device='cuda' and model.precision='bfloat16'"
            )
        return KERNELS[name]()
    for find in KERNELS.values() if fits else ():
        try:
            return find()
        except UserError:
            continue
    return None


def broken_packages() -> list[str]:
    """Of packages that are installed and cannot be loaded, which ``auto`` passes over: what is the matter."""
    found = []
    for find in KERNELS.values():
        try:
            find()
        except BrokenPackageError as error:
            found.append(str(error))
        except UserError:
            continue
        else:
            break
    return found


def name_of(flash: Flash | None) -> str:
    """What runs, for a log."""
    if flash is None:
        return "sdpa"
    run = flash.args[0] if isinstance(flash, partial) else flash
    return f"{getattr(run, '__module__', '')}.{getattr(run, '__name__', '')}"


def _package(name: str) -> Flash:
    """A flash-attn package, under the name that Transformers gives it."""
    from transformers import utils

    # Transformers 5.17 has not heard of every version yet.
    is_there = getattr(utils, f"is_flash_attn_{name[-1]}_available", None)
    if is_there is None or not is_there():
        raise UserError(
            f"model.attention={name!r}: flash-attn {name[-1]} is not installed for this GPU; install it, or set "
            "model.attention='auto'"
        )
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        (_, run, *_), _ = lazy_import_flash_attention(name)
    except Exception as error:  # built for another torch, say: what its import runs into is ImportError, and more
        raise BrokenPackageError(
            f"model.attention={name!r}: flash-attn {name[-1]} is installed and cannot be loaded "
            f"({type(error).__name__}: {first_line(error)}); install it for torch {torch.__version__}, or remove it"
        ) from error
    return partial(_by_package, run)


def _by_package(
    run: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scores: Scores
) -> Tensor:
    more: dict[str, Any] = {} if scores.window is None else {"window_size": (scores.window - 1, 0)}
    if scores.softcap is not None:
        more["softcap"] = scores.softcap
    out = run(
        query,
        key,
        value,
        cu_seqlens_q=ragged.query_starts,
        cu_seqlens_k=ragged.key_starts,
        max_seqlen_q=ragged.most_queries,
        max_seqlen_k=ragged.most_keys,
        softmax_scale=scores.scaling,
        causal=True,
        **more,
    )
    return out[0] if isinstance(out, tuple) else out


def _torch() -> Flash:
    """PyTorch's variable-length kernel, which has no soft-cap."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        parameters: Any = ()
    else:
        parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        raise UserError(
            f"model.attention='varlen' needs torch 2.11 or newer, and this is {torch.__version__}; "
            "set model.attention='sdpa'"
        )
    return partial(_by_torch, varlen_attn, "enable_gqa" in parameters)


def _by_torch(
    run: Callable[..., Any],
    shares_keys: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ragged: Ragged,
    scores: Scores,
) -> Tensor:
    if scores.softcap is not None:
        raise ValueError("PyTorch's variable-length attention has no soft-cap")
    more: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if shares_keys:
        more["enable_gqa"] = groups > 1
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out: Tensor = run(
        query,
        key,
        value,
        ragged.query_starts,
        ragged.key_starts,
        ragged.most_queries,
        ragged.most_keys,
        scale=scores.scaling,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        **more,
    )
    return out


KERNELS: dict[str, Callable[[], Flash]] = {
    "flash_attention_4": partial(_package, "flash_attention_4"),
    "flash_attention_3": partial(_package, "flash_attention_3"),
    "flash_attention_2": partial(_package, "flash_attention_2"),
    "varlen": _torch,
}
"""By name, the best first."""
