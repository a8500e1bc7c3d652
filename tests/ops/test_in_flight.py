"""Sparse blocks that are counted while the next one is computed: what a GPU does, here on the CPU.

Gradient rows have a buffer of their own and logits two, chunks have several panels, some blocks turn out too full. The
threshold is so small that every entry is kept, so that whatever is dense and whatever sparse, the gradient is exact.
"""

import pytest
import torch
from op_support import problem, relative, sequences

import aapo_fast as af
from aapo_fast.ops.linear_policy import chunked, products

pytest.importorskip("triton", reason="triton is not installed")
from aapo_fast.ops.linear_policy import rows_triton, sparse_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; on a GPU it is so anyway")
N, H, V, PANEL = 26, 8, 70, 3


@pytest.fixture
def apart(monkeypatch):
    """fp64 gradient rows in a buffer of their own, three panels of three rows a chunk."""

    class Apart(products.Products):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.gradient_dtype = torch.float64

        def hidden_gradient(self, d, out):
            super().hidden_gradient(d.float(), out)

        def weight_gradient(self, d, rows, out, add):
            super().weight_gradient(d.float(), rows, out, add)

    monkeypatch.setattr(chunked, "Products", Apart)
    monkeypatch.setattr(chunked, "buffer_rows", lambda *_: (3 * PANEL, PANEL))


def gradients(objective, backward, inputs):
    hidden, weight, targets, _ = inputs
    hidden, weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    out = af.linear_policy_loss(
        hidden, weight, targets, objective, implementation="triton", backward=backward, sparsity_threshold=2.0**-20
    )
    (3 * out.loss).backward()
    return hidden.grad, weight.grad, out.logps.nan_to_num(0.0)


@pytest.mark.parametrize("between_tries", [0, 2])
@pytest.mark.parametrize("full", ["none", "all", "every third", "the last of a chunk", "the first of a chunk"])
@pytest.mark.parametrize("linear", [True, False], ids=["weights known", "from statistics"])
def test_whatever_is_dense(apart, full, between_tries, linear, monkeypatch):
    def too_full(block):
        return {"none": False, "all": True, "every third": block % 3 == 1}.get(
            full, block % 3 == (2 if full.startswith("the last") else 0)
        )

    real, blocks, landed = sparse_triton.sparse_gradient, [], []

    def sparse_gradient(*given):
        begun = real(*given)
        block = len(blocks)
        blocks.append(block)

        def entries():
            found = begun()
            landed.append(block)
            return None if too_full(block) else found

        return entries

    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(rows_triton.sparse_triton, "sparse_gradient", sparse_gradient)
    monkeypatch.setattr(rows_triton.TritonRows, "blocks_between_tries", between_tries)
    inputs, (advantages, index) = problem(N, H, V), sequences(N)
    kind = af.AAPO if linear else af.CISPO
    objective = (
        kind(advantages.float(), index, float(N))
        if linear
        else kind(advantages.float(), index, float(N), torch.full((N,), -9.0))
    )
    exact, found = gradients(objective, "exact", inputs), gradients(objective, "sparse", inputs)
    assert landed == blocks and blocks
    for name, ours, true in zip(("dX", "dW", "logps"), found, exact, strict=True):
        assert relative(ours, true) < 2e-5, name


def test_two_blocks_are_in_flight(apart, monkeypatch):
    order = []
    real_count, real_emit = sparse_triton.count, sparse_triton.emit
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sparse_triton, "count", lambda *a: order.append("count") or real_count(*a))
    monkeypatch.setattr(sparse_triton, "emit", lambda *a: order.append("emit") or real_emit(*a))
    advantages, index = sequences(2 * PANEL)
    gradients(af.AAPO(advantages.float() + 2, index, 6.0), "sparse", problem(2 * PANEL, H, V))
    assert order == ["count", "count", "emit", "emit"]


def test_full_blocks_are_looked_at_ever_more_rarely(apart, monkeypatch):
    looked, real = [], chunked.Pass.spend

    def spend(self, rows, products, stats, wanted):
        if self._tries_sparse():
            looked.append(rows.start // PANEL)
        real(self, rows, products, stats, wanted)

    monkeypatch.setattr(chunked.Pass, "spend", spend)
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 0.0)
    monkeypatch.setattr(rows_triton.TritonRows, "blocks_between_tries", 2)
    advantages, index = sequences(22 * PANEL)
    inputs = problem(22 * PANEL, 4, 9)
    objective = af.AAPO(advantages.float() + 3, index, 66.0)
    found, exact = gradients(objective, "sparse", inputs), gradients(objective, "exact", inputs)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, exact, strict=True))
    # Two at a time, since one is in flight, but for the last block of a chunk that has dense ones; pauses of 2, 5, 11.
    assert looked == [0, 1, 4, 5, 11]
