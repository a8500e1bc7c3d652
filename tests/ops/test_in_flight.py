"""Sparse blocks that are counted while the next one is computed: what a GPU does, here on the CPU.

Gradient rows are narrower than logits: of dense rows in a buffer of their own, three panels a chunk; of a panel among
sparse ones that turns out too full, in the panel itself. The threshold is so small that every entry is kept, so that
whatever is dense and whatever sparse, the gradient is exact but for what fp16 rounds away.
"""

import pytest
import torch
from op_support import problem, relative, sequences

import aapo_fast as af
from aapo_fast.ops.linear_policy import buffers, chunked, products, sizes

pytest.importorskip("triton", reason="triton is not installed")
from aapo_fast.ops.linear_policy import rows_triton, sparse_triton
from aapo_fast.ops.linear_policy.rows_triton import TritonRows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; on a GPU it is so anyway")
N, H, V, PANEL, SPARSE_PANEL = 30, 8, 70, 3, 4


@pytest.fixture
def apart(monkeypatch):
    """fp16 gradient rows; chunks of three panels of three rows for dense rows, panels of four for sparse ones."""

    class Apart(products.Products):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.gradient_dtype = torch.float16

        def hidden_gradient(self, d, out):
            super().hidden_gradient(d.float(), out)

        def weight_gradient(self, d, rows, out, add):
            super().weight_gradient(d.float(), rows, out, add)

    monkeypatch.setattr(chunked, "Products", Apart)
    monkeypatch.setattr(buffers, "buffer_rows", lambda *_: (3 * PANEL, PANEL))
    monkeypatch.setattr(buffers, "sparse_panel_rows", lambda *_: SPARSE_PANEL)


def gradients(objective, backward, inputs):
    hidden, weight, targets, _ = inputs
    hidden, weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    out = af.linear_policy_loss(
        hidden, weight, targets, objective, implementation="triton", backward=backward, sparsity_threshold=2.0**-20
    )
    (3 * out.loss).backward()
    return hidden.grad, weight.grad, out.logps.nan_to_num(0.0)


FULL = {
    "none": lambda block: False,
    "all": lambda block: True,
    "the first": lambda block: block == 0,
    "every other": lambda block: block % 2 == 1,
    "two together": lambda block: block % 4 in (1, 2),
}


@pytest.mark.parametrize("between_tries", [0, 2])
@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("linear", [True, False], ids=["weights known", "from statistics"])
def test_whatever_is_dense(apart, full, between_tries, linear, monkeypatch):
    real, real_gradient, blocks, landed, places = sparse_triton.sparse_gradient, TritonRows.gradient, [], [], set()

    def sparse_gradient(*given):
        begun = real(*given)
        block = len(blocks)
        blocks.append(block)

        def entries():
            found = begun()
            landed.append(block)
            return None if FULL[full](block) else found

        return entries

    def gradient(self, products, *rest):
        places.add("beside" if rows_triton._apart(products, rest[-1]) else "in place")
        real_gradient(self, products, *rest)

    inputs, (advantages, index) = problem(N, H, V), sequences(N)
    if linear:
        objective = af.AAPO(advantages.float(), index, float(N))
    else:
        objective = af.CISPO(advantages.float(), index, float(N), torch.full((N,), -9.0))
    exact = gradients(objective, "exact", inputs)
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(rows_triton.sparse_triton, "sparse_gradient", sparse_gradient)
    monkeypatch.setattr(TritonRows, "gradient", gradient)
    monkeypatch.setattr(TritonRows, "blocks_between_tries", between_tries)
    found = gradients(objective, "sparse", inputs)
    assert landed == blocks and len(blocks) > (6 if full == "none" else 1)
    in_panels = {"none": set(), "all": {"beside"}, "the first": {"beside"}}.get(full, {"in place"})
    assert in_panels <= places and (full in ("every other", "two together") or places == in_panels)
    for name, ours, true in zip(("dX", "dW", "logps"), found, exact, strict=True):
        assert relative(ours, true) < 5e-4, name
    row_errors = (found[0] - exact[0]).norm(dim=1)
    assert row_errors.max() < 1e-3 * exact[0].norm(dim=1).median()


def test_two_blocks_are_in_flight(apart, monkeypatch):
    """But for the first, which says that rows come out sparse."""
    order = []
    real_count, real_emit = sparse_triton.count, sparse_triton.emit
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sparse_triton, "count", lambda *a: order.append("count") or real_count(*a))
    monkeypatch.setattr(sparse_triton, "emit", lambda *a: order.append("emit") or real_emit(*a))
    n = PANEL + 3 * SPARSE_PANEL
    advantages, index = sequences(n)
    gradients(af.AAPO(advantages.float() + 2, index, 6.0), "sparse", problem(n, H, V))
    assert order == ["count", "emit", *["count"] * 2, "emit", "count", "emit", "emit"]


def test_full_blocks_are_looked_at_ever_more_rarely(apart, monkeypatch):
    looked, real = [], chunked.Pass.spend

    def spend(self, rows, products, stats, wanted):
        if self._tries_sparse():
            looked.append(rows.start // PANEL)
        real(self, rows, products, stats, wanted)

    monkeypatch.setattr(chunked.Pass, "spend", spend)
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 0.0)
    monkeypatch.setattr(TritonRows, "blocks_between_tries", 2)
    advantages, index = sequences(22 * PANEL)
    inputs = problem(22 * PANEL, 4, 9)
    objective = af.AAPO(advantages.float() + 3, index, 66.0)
    found, exact = gradients(objective, "sparse", inputs), gradients(objective, "exact", inputs)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, exact, strict=True))
    assert looked == [0, 3, 9, 21]  # pauses of 2, 5, 11


def test_panels_of_sparse_rows_are_larger():
    """On a GPU: half of the room is for one of them, where a chunk of dense rows and its logits share it."""
    budget = sizes.gpu_budget(4096 * 151_936 * 2)
    assert sizes.buffer_rows(8192, 151_936, 4096, torch.float32, torch.bfloat16, budget) == (3072, 512)
    assert sizes.sparse_panel_rows(8192, 151_936, torch.float32, budget) == 1024
    assert sizes.sparse_panel_rows(700, 151_936, torch.float32, budget) == 700
    assert sizes.sparse_panel_rows(16_384, 248_320, torch.float32, 2048 * 248_320 * 2) == 512
