"""The fused loss against its floors and its peers: forward and backward on the CPU, everything in turn.

    python benchmarks/head.py [--shape 1024,576,49152] [--dtype float32] [--rounds 5] [--output FILE.json]

Floors are the three bare matrix products of the same shapes (3G), timed in the same rounds. Rows are model-like:
Gaussian logits scaled to a mean entropy of 1.66 nats, targets drawn from them. Errors are relative Frobenius errors of
dX and dW against float64 on the same inputs. Peers that are not installed are left out: trl==1.16.0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import torch
import torch.nn.functional as F

import aapo_fast as af

ENTROPY = 1.66


def make_inputs(n: int, h: int, v: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) / h**0.5
    low, high = 1.0, 30.0
    probe = hidden[:64] @ weight.t()
    for _ in range(20):
        scale = (low + high) / 2
        entropy = torch.distributions.Categorical(logits=probe * scale).entropy().mean()
        low, high = (scale, high) if entropy > ENTROPY else (low, scale)
    hidden *= scale
    draws = [torch.multinomial((x @ weight.t()).softmax(1), 1, generator=generator) for x in hidden.split(64)]
    advantages = torch.randn(n, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.cat(draws).squeeze(1), advantages


def bare_products(count: int):
    def run(hidden, weight, targets, advantages):
        x, w = hidden.detach(), weight.detach()
        z = x @ w.t()
        if count == 3:
            z @ w
            z.t() @ x

    return run


def ours(**options):
    def run(hidden, weight, targets, advantages):
        index = torch.arange(len(targets))
        af.linear_policy_loss(
            hidden, weight, targets, af.AAPO(advantages, index, len(targets)), **options
        ).loss.backward()

    return run


def naive(hidden, weight, targets, advantages):
    logps = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (-(advantages * logps).sum() / len(targets)).backward()


def torch_linear_cross_entropy(hidden, weight, targets, advantages):
    """PyTorch's own: no weights a token, so it does less than the others."""
    F.linear_cross_entropy(hidden, weight, targets).backward()


def candidates():
    found = {
        "1G (bare)": bare_products(1),
        "3G (bare)": bare_products(3),
        "ours, exact": ours(),
        "ours, sparse 2^-13": ours(backward="sparse"),
        "naive": naive,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_linear_cross_entropy
    return found


def errors(run, inputs) -> dict[str, float]:
    hidden, weight, targets, advantages = inputs
    wide = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), targets, advantages)
    ours(implementation="torch")(wide[0], wide[1], targets, advantages.double())
    hidden.grad = weight.grad = None
    run(*inputs)
    return {
        name: ((grad.double() - truth).norm() / truth.norm()).item()
        for name, grad, truth in (("dX", hidden.grad, wide[0].grad), ("dW", weight.grad, wide[1].grad))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024,576,49152", help="N,H,V")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    n, h, v = map(int, arguments.shape.split(","))
    inputs = make_inputs(n, h, v, getattr(torch, arguments.dtype))
    runs = candidates()

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds + 1):
        for name, run in runs.items():
            inputs[0].grad = inputs[1].grad = None
            start = time.perf_counter()
            run(*inputs)
            seconds[name].append(time.perf_counter() - start)
    floor = seconds["3G (bare)"][1:]
    rows = {}
    for name, run in runs.items():
        timed = seconds[name][1:]
        rows[name] = {
            "milliseconds": statistics.median(timed) * 1e3,
            "spread": [min(timed) * 1e3, max(timed) * 1e3],
            "ratio_to_3G": statistics.median(t / f for t, f in zip(timed, floor, strict=True)),
            **(errors(run, inputs) if name.startswith("ours") or name == "naive" else {}),
        }
    print(f"(N, H, V) = ({n}, {h}, {v}), {arguments.dtype}")
    print("| | ms | of 3G | error dX | error dW |\n|---|---|---|---|---|")
    for name, row in rows.items():
        error = " | ".join(f"{row[k]:.1e}" if k in row else "" for k in ("dX", "dW"))
        print(f"| {name} | {row['milliseconds']:.0f} | {row['ratio_to_3G']:.2f} | {error} |")
    if arguments.output:
        result = {"machine": machine.describe(), "shape": [n, h, v], "dtype": arguments.dtype, "rows": rows}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
