"""Inputs, objectives and runs that the tests of the fused loss share."""

import torch

import aapo_fast as af

VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "softcap and temperature": {"softcap": 5.0, "temperature": 1.3},
    "bias": {"bias": True},
    "everything": {"bias": True, "softcap": 8.0, "temperature": 0.6},
}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def problem(n, h, v, dtype=torch.float64, seed=0, scale=1.0, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, targets, b


def sequences(n, b=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(b, generator=g, dtype=torch.float64)
    if b > 2:
        advantages[2] = 0.0
    return advantages, torch.randint(b, (n,), generator=g)


def objectives(n):
    advantages, index = sequences(n)
    old = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.3 - 4

    def entropy_bonus(tokens):
        return -(tokens.logps * 0.3 + 0.1 * tokens.entropy**2) * (1 + tokens.rows)

    return {
        "aapo": af.AAPO(advantages, index, 17.0),
        "grpo": af.GRPO(advantages, index, 17.0),
        "grpo off-policy": af.GRPO(advantages, index, 17.0, old_logps=old, clip_high=0.28),
        "sft": af.SFT(9.0),
        "weighted sft": af.SFT(9.0, weights=torch.arange(n) % 3 * 1.0),
        "user's, with entropy": entropy_bonus,
    }


def run(implementation, inputs, objective, upstream=1.0, **options):
    hidden, weight, targets, bias = (t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None
                                     for t in inputs)  # fmt: skip
    if bias is not None:
        options["bias"] = bias
    out = af.linear_policy_loss(hidden, weight, targets, objective, implementation=implementation, **options)
    (out.loss * upstream).backward()
    return out, [t.grad for t in (hidden, weight, bias) if t is not None]
