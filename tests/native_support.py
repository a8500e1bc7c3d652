"""Blocks of logits for the tests of the native kernels."""

import torch

from aapo_fast.ops.linear_policy.statistics import Coefficients


def block(vocab, rows=5, offset=0, padding=0, scale=4.0, seed=0):
    """(C, V) products in rows that begin anywhere, and targets, of which the last row has none."""
    g = torch.Generator().manual_seed(seed)
    memory = torch.randn(offset + rows * (vocab + padding), generator=g) * scale
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[-1] = -1
    return memory[offset:].view(rows, vocab + padding)[:, :vocab], targets


def coefficients(rows=5, every=True):
    a = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    return Coefficients(a, 0.3 * a, 0.2 * a.flip(0)) if every else Coefficients(a)
