"""Inputs, objectives and runs that the tests of the fused loss share."""

import torch

import aapo_fast as af
from aapo_fast.ops.linear_policy import targets as at_targets

VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "softcap and temperature": {"softcap": 5.0, "temperature": 1.3},
    "bias": {"bias": True},
    "logit scale": {"logit_scale": 0.3, "softcap": 4.0},
    "one temperature a row": {"temperature": "rows"},
    "padded vocabulary": {"vocab_size": -3},
    "everything": {"bias": True, "softcap": 8.0, "temperature": "rows", "logit_scale": 1.4, "vocab_size": -3},
}


def options(variant, inputs):
    """Keyword arguments of a variant: per-row temperatures made, a vocabulary size counted from the end."""
    found = dict(VARIANTS[variant])
    found.pop("bias", None)
    n, v = inputs[0].shape[0], inputs[1].shape[0]
    if found.get("temperature") == "rows":
        found["temperature"] = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    if "vocab_size" in found:
        found["vocab_size"] += v
    return found


def variant_problem(variant, n, h, v, **more):
    """Inputs of a variant, whose targets are tokens and not padding; and its options."""
    inputs = problem(n, h, v, bias=VARIANTS[variant].get("bias", False), **more)
    found = options(variant, inputs)
    return (inputs[0], inputs[1], inputs[2] % found.get("vocab_size", v), inputs[3]), found


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def with_target(d, products, targets, rows, wanted, transform):
    """(C, V) gradient rows of row kernels, which leave the target out, with the target's own entry.

    ``products`` are the raw ones, from before the kernels wrote on them.
    """
    held, column = targets >= 0, targets.clamp(min=0)[:, None]
    product = products.gather(1, column).squeeze(1)
    assert (d.gather(1, column).squeeze(1)[held] == 0).all()
    return d.scatter_add(1, column, at_targets.gradient(rows, wanted, transform, held, product)[:, None].to(d.dtype))


class FirstHalf:
    """An objective of the first half of twelve rows."""

    def active(self):
        return torch.arange(12) < 6

    def __call__(self, tokens):
        return -tokens.logps


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

    def of_everything(tokens):
        return -(tokens.logps * 0.3 + 0.1 * tokens.entropy**2 + 0.01 * tokens.logsumexp**2) * (1 + tokens.rows)

    reinforce = af.REINFORCE(advantages, index, 17.0)
    return {
        "aapo": af.AAPO(advantages, index, 17.0),
        "grpo": af.GRPO(advantages, index, 17.0),
        "grpo off-policy": af.GRPO(advantages, index, 17.0, old_logps=old, clip_high=0.28),
        "grpo, dual clip": af.GRPO(advantages, index, 17.0, old_logps=old - 1, dual_clip=1.5),
        "sft": af.SFT(9.0),
        "weighted sft": af.SFT(9.0, weights=torch.arange(n) % 3 * 1.0),
        "cispo": af.CISPO(advantages, index, 17.0, old_logps=old, clip_low=0.5, clip_high=0.28),
        "reinforce, truncated ratios": af.REINFORCE(advantages, index, 17.0, rollout_logps=old, max_ratio=1.1),
        "entropy bonus": af.Regularized(reinforce, 17.0, entropy_bonus=0.3),
        "z-loss": af.Regularized(reinforce, 17.0, z_loss=0.1),
        "KL penalty": af.Regularized(reinforce, 17.0, kl_penalty=0.2, reference_logps=old),
        "user's, of all three": of_everything,
    }


def run(implementation, inputs, objective, upstream=1.0, **options):
    hidden, weight, targets, bias = (t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None
                                     for t in inputs)  # fmt: skip
    if bias is not None:
        options["bias"] = bias
    out = af.linear_policy_loss(hidden, weight, targets, objective, implementation=implementation, **options)
    (out.loss * upstream).backward()
    return out, [t.grad for t in (hidden, weight, bias) if t is not None]
