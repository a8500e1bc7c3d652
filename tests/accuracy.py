"""The accuracy suite: data that has broken fused losses, a streamed float64 truth, and a verdict in words.

Errors are relative. The yardstick is the eager loss (materialised logits, fp32) on the same inputs, or the truth
rounded once to the output dtype, whichever is larger: nothing that computes in fp32 can promise less. Where a GPU's
tensor cores multiply bf16, whose sums round worse than those of fp32, it is also the eager loss on their logits.

Letters: N rows, H hidden, V vocabulary, B sequences in groups.
"""

from dataclasses import dataclass

import torch

import aapo_fast as af

GROUP = 4


@dataclass(frozen=True)
class Data:
    """A problem from rewards on: what a training step hands to the loss."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    rewards: torch.Tensor
    reference_rewards: torch.Tensor
    sequence_index: torch.Tensor
    bias: torch.Tensor | None
    temperature: float

    def objective(self):
        advantages = af.aapo_advantages(self.rewards, self.reference_rewards, GROUP)
        return af.AAPO(advantages, self.sequence_index, float(len(self.targets)))


KINDS = ("model-like", "peaked", "flat", "ninety per cent without weight", "shifted by -200", "shifted by 1000")


def make(kind, n, h, v, dtype, device="cpu", seed=0):
    """``n`` rows of 12 sequences in groups of four; rewards of 0 and 1, so that advantages have both signs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g)
    targets = torch.randint(v, (n,), generator=g)
    rewards = (torch.rand(12, generator=g) < 0.5).float()
    reference = (torch.rand(12, generator=g) < 0.4).float()
    if kind == "peaked":  # p > 0.999 at the target, and some targets that are not the peak
        peak = torch.where(torch.arange(n) % 5 == 0, torch.randint(v, (n,), generator=g), targets)
        hidden = 25 * weight[peak] / weight[peak].square().sum(1, keepdim=True)
    else:
        hidden = torch.randn(n, h, generator=g) * (1e-3 if kind == "flat" else 3.0 / h**0.5)
    if kind == "ninety per cent without weight":  # equal rewards in two groups of three, on both sides
        rewards[GROUP:], reference[GROUP:] = 1.0, 1.0
    shift = float(kind.removeprefix("shifted by ")) if kind.startswith("shifted") else None
    bias = None if shift is None else torch.full((v,), shift)
    sequences = torch.sort(torch.randint(12, (n,), generator=g)).values
    return Data(
        hidden.to(device, dtype),
        weight.to(device, dtype),
        targets.to(device),
        rewards.to(device),
        reference.to(device),
        sequences.to(device),
        None if bias is None else bias.to(device),
        0.8,
    )


def truth(data, rows_at_a_time=512):
    """Log-probabilities, entropies, dX and dW in float64, by the formulas and not by autograd; streamed over rows."""
    hidden, weight = data.hidden.double(), data.weight.double()
    r, ref = (t.double().view(-1, GROUP) for t in (data.rewards, data.reference_rewards))
    group = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    advantages = (group + (r - ref).clamp(-0.2, 0.28)).flatten()
    a = -advantages[data.sequence_index] / len(data.targets)
    logps, entropy = torch.empty_like(a), torch.empty_like(a)
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in torch.arange(len(a), device=a.device).split(rows_at_a_time):
        z = hidden[rows] @ weight.t()
        if data.bias is not None:
            z += data.bias.double()
        log_p = (z / data.temperature).log_softmax(1)
        p = log_p.exp()
        logps[rows] = log_p.gather(1, data.targets[rows, None]).squeeze(1)
        entropy[rows] = -(p * log_p).sum(1)
        d = -p * a[rows, None]
        d.scatter_add_(1, data.targets[rows, None], a[rows, None])
        d /= data.temperature
        dx[rows] = d @ weight
        dw += d.t() @ hidden[rows]
    return {"logps": logps, "entropy": entropy, "dX": dx, "dW": dw}


def results(data, implementation, **options):
    """What the loss gives for the data, in its own dtypes."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (data.hidden, data.weight))
    out = af.linear_policy_loss(
        hidden, weight, data.targets, data.objective(), bias=data.bias, temperature=data.temperature,
        implementation=implementation, all_logps=True, **options,
    )  # fmt: skip
    out.loss.backward()
    return {"logps": out.logps, "entropy": out.entropy, "dX": hidden.grad, "dW": weight.grad}


def errors(found, true):
    """Relative Frobenius error, 1 - cosine, worst row, and signed bias of every tensor."""
    measured = {}
    for name, t in true.items():
        f = found[name].double()
        gap, rows = f - t, t.flatten(1) if t.ndim == 2 else t[:, None]
        alive = rows.norm(dim=1) > 1e-3 * rows.norm(dim=1).max()
        worst = (gap.view_as(rows).norm(dim=1) / rows.norm(dim=1))[alive].max()
        cosine = (f * t).sum() / (f.norm() * t.norm()).clamp(min=1e-300)
        bias = (gap * t.sign()).sum() / t.abs().sum()
        measured[name] = {
            "relative": (gap.norm() / t.norm()).item(),
            "cosine gap": 1 - cosine.item(),
            "worst row": worst.item(),
            "bias": abs(bias.item()),
        }
    return measured


def eager(data, logits):
    """The loss and its gradients by plain fp32 formulas from (N, V) fp32 products on."""
    a = -data.objective().advantages[data.sequence_index] / len(data.targets)
    z = logits if data.bias is None else logits + data.bias.float()
    log_p = (z / data.temperature).log_softmax(1)
    p = log_p.exp()
    d = -p * a[:, None]
    d.scatter_add_(1, data.targets[:, None], a[:, None])
    d /= data.temperature
    return {
        "logps": log_p.gather(1, data.targets[:, None]).squeeze(1),
        "entropy": -(p * log_p).sum(1),
        "dX": d @ data.weight.float(),
        "dW": d.t() @ data.hidden.float(),
    }


def yardsticks(data, true):
    """Errors of what is as good as can be: of eager losses, and of the truth rounded once, which comes last."""
    dtype = data.hidden.dtype
    wide = Data(**{**vars(data), "hidden": data.hidden.float(), "weight": data.weight.float()})
    found = [results(wide, "reference")]
    if data.hidden.is_cuda and dtype == torch.bfloat16:
        found.append(eager(data, torch.mm(data.hidden, data.weight.t(), out_dtype=torch.float32)))
    found.append({k: t.to(dtype if k in ("dX", "dW") else torch.float32) for k, t in true.items()})
    return [errors(f, true) for f in found]


def complaints(data, found, true, dense_bf16=False):
    """What rounding does not explain, a line each. ``dense_bf16``: gradient rows were rounded to bf16 on the way."""
    sticks, said = yardsticks(data, true), []
    for name, measured in errors(found, true).items():
        floor, worst = (max(stick[name][what] for stick in sticks) for what in ("relative", "worst row"))
        # The yardstick is lucky or unlucky itself: little over a whole matrix, more over 48 numbers, and with logits
        # near 1000, which lie on a grid of 6e-5.
        matrix = name in ("dX", "dW")
        luck = 1.1 if matrix and data.bias is None else 1.5
        if dense_bf16 and matrix:
            luck = 2.0
        limits = {
            "relative": luck * floor + 2e-7,
            "cosine gap": 2 * (luck * floor + 2e-7) ** 2 + 1e-14,
            "worst row": 2 * luck * worst + 1e-6,
            # Gradients among fp16's subnormal numbers lean, since what is small becomes zero.
            "bias": max((0.5 if matrix else 6.0) * floor, 1.1 * sticks[-1][name]["bias"]) + 2e-7,
        }
        said += [f"{name}: {what} {measured[what]:.1e} > {most:.1e}" for what, most in limits.items()
                 if not measured[what] <= most]  # fmt: skip
    return said
