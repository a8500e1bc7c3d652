"""All contestants, by name: floors, ours, PyTorch's own, and other packages through ``peers``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from aapo_fast.bench import builtin
from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Method, Run, UnavailableError
from aapo_fast.bench.shapes import check_names
from aapo_fast.ops import dispatch
from aapo_fast.types import UserError


def _peer(file: str, function: str, package: str) -> Callable[[Problem], Run]:
    def build(problem: Problem) -> Run:
        try:
            module = importlib.import_module(f"aapo_fast.bench.peers.{file}")
        except Exception as error:  # a package built for another torch can raise anything
            raise UnavailableError(f"needs {package} ({error})") from error
        return getattr(module, function)(problem)

    return build


SPARSE: dict[str, dict[str, Any]] = {
    f"sparse-{bits}": {"backward": "sparse", "sparsity_threshold": 2.0**-bits} for bits in (12, 13, 14)
}
"""Options of our sparse backward, by name."""

OURS: dict[str, tuple[str, str, Callable[[str], Callable[[Problem], Run]]]] = {
    "exact": ("ours, exact", "3", builtin.policy_loss),
    **{
        name: (f"ours, {name.replace('-', ' 2^-')}", "1+", partial(builtin.policy_loss, **options))
        for name, options in SPARSE.items()
    },
    "logprobs": ("ours, linear_logprobs", "4", builtin.logprobs),
    "exact-mean": ("ours, exact, plain mean", "3", builtin.plain_mean),
}
"""Title, matrix products, and what makes the method from the name of an implementation."""

FLOORS = (
    Method("1G", "1G, bare product", "1", builtin.bare_products(1), kind="floor"),
    Method("3G", "3G, bare products", "3", builtin.bare_products(3), kind="floor"),
)

LIGER, CCE = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"

NAIVE = Method("naive", "naive, logits materialised", "3", builtin.naive)

PEERS = (
    NAIVE,
    Method("torch", "torch linear_cross_entropy", "3", builtin.torch_cross_entropy(False, False), weighted=False),
    Method("torch-chunked", "torch, chunked", "3", builtin.torch_cross_entropy(True, False), weighted=False),
    Method("torch-chunked-none", "torch, chunked, no reduction", "4", builtin.torch_cross_entropy(True, True)),
    Method("liger-grpo", "Liger GRPO loss", "4", _peer("liger", "grpo", LIGER)),
    Method("liger-scaled", "Liger scaled CE", "4", _peer("liger", "scaled", LIGER)),
    Method("liger-ce", "Liger fused linear CE", "3", _peer("liger", "mean", LIGER), weighted=False),
    Method("liger-ce-none", "Liger fused linear CE, no reduction", "4", _peer("liger", "tokens", LIGER)),
    Method("trl", "TRL chunked log-probabilities", "4", _peer("trl", "chunked_logprobs", "trl==1.16.0")),
    Method("cce", "cut-cross-entropy", "4", _peer("cce", "fused", CCE)),
    Method("cce-compile", "cut-cross-entropy, torch_compile", "3", _peer("cce", "compiled", CCE)),
    Method("quack", "quack linear CE", "3", _peer("quack", "chunked", "quack-kernels==0.6.5"), weighted=False),
)

DEFAULT = ("1G", "3G", "exact", "sparse-13", "logprobs", *(peer.name for peer in PEERS))


def every_name() -> list[str]:
    """All names that ``find`` knows, without implementations."""
    return [method.name for method in FLOORS] + list(OURS) + [method.name for method in PEERS]


def other_implementations(device: torch.device) -> list[str]:
    """Names of ours in every implementation that runs on the device and that ``auto`` does not take."""
    taken = dispatch.resolve("auto", device)
    others = [c.name for c in dispatch.survey(device) if c.available and c.name not in (taken, "reference")]
    return [f"{base}:{name}" for name in others for base in ("exact", "sparse-13", "logprobs")]


def find(names: list[str]) -> list[Method]:
    """Methods by name, in the order given. ``exact:triton`` is ours in that implementation.

    Raises:
        UserError: a name is unknown.
    """
    plain = {method.name: method for method in (*FLOORS, *PEERS)}
    found = []
    for name in names:
        base, colon, implementation = name.partition(":")
        check_names("--method", [base], [*OURS, *plain])
        if base not in OURS:
            if colon:
                raise UserError(f"--method {name!r}: only ours ({', '.join(OURS)}) come in several implementations")
            found.append(plain[base])
            continue
        if colon:
            check_names(f"--method {base}:", [implementation], dispatch.IMPLEMENTATIONS)
        title, gemms, make = OURS[base]
        shown = f"{title} ({implementation})" if colon else title
        made = make(implementation or "auto")
        weighted = base != "exact-mean"  # the loss of the peers that know no other
        found.append(Method(name, shown, gemms, made, kind="ours", weighted=weighted, sampled=base in SPARSE))
    return list({method.name: method for method in found}.values())
