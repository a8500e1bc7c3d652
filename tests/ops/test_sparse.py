"""Sparse gradient rows: unbiased, bounded, reproducible, and dense where that is cheaper."""

import math

import pytest
import torch
from op_support import VARIANTS, objectives, problem, relative, run, sequences, variant_problem

import aapo_fast as af
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import chunked, rows_native, rows_torch, sizes, sparse, uniforms


@pytest.fixture(autouse=True)
def _sparse_whatever_it_costs(monkeypatch):
    """Tests are small: entries kept are a large share of their vocabulary, and dense rows would be cheaper."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 10.0)


def test_philox_by_its_published_vector():
    """Random123's known answer for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8; the first word is ours."""
    assert uniforms.row_uniforms(0, torch.tensor([0])).item() == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)


def test_uniforms_are_uniform_and_belong_to_seed_and_row():
    rows = torch.arange(100_000)
    u = uniforms.row_uniforms(7, rows)
    assert (u >= 0).all() and (u < 1).all()
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 4 * math.sqrt(2 * 49)  # chi-squared, 49 degrees of freedom
    assert torch.equal(uniforms.row_uniforms(7, rows[500:600]), u[500:600])
    assert not torch.equal(uniforms.row_uniforms(8, rows[:100]), u[:100])
    assert uniforms.row_uniforms(2**32 + 7, rows[:1]) != u[0]
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.02


def probabilities(kind, v=1000, rows=4):
    g = torch.Generator().manual_seed(0)
    scale = {"peaked": 8.0, "model-like": 3.0, "flat": 0.1}[kind]
    return (torch.randn(rows, v, generator=g, dtype=torch.float64) * scale).softmax(1)


def sample(p, threshold, u):
    """Dense (C, V) rows of the sample."""
    width = sparse.padded_width(p.shape[1])
    padded = torch.zeros(p.shape[0], width, dtype=p.dtype)
    padded[:, : p.shape[1]] = p * 3.0  # any scale: totals are given
    total = padded.sum(1, keepdim=True)
    kept = sparse.sample_rows(padded, total, threshold, torch.full((p.shape[0],), u))
    dense = torch.zeros(p.shape[0], width, dtype=p.dtype)
    dense[kept.row, kept.column] = kept.value.to(p.dtype)
    assert torch.unique(kept.row * width + kept.column).numel() == kept.row.numel()
    assert (dense[:, p.shape[1] :] == 0).all()
    return dense[:, : p.shape[1]]


@pytest.mark.parametrize("threshold", [2**-4, 2**-8, 2**-12])
@pytest.mark.parametrize("kind", ["peaked", "model-like", "flat"])
def test_kept_entries(kind, threshold):
    p = probabilities(kind)
    for u in (0.0, 0.3, 1 - 2**-24):
        dense = sample(p, threshold, u)
        large = p >= threshold
        assert torch.allclose(dense[large], p[large], rtol=1e-12, atol=0)
        assert ((dense[~large] == 0) | (dense[~large] == threshold)).all()
        assert ((dense.sum(1) - 1).abs() <= threshold * (1 + 1e-9)).all()
        assert ((dense != 0).sum(1) <= 1 / threshold + 1).all()


@pytest.mark.parametrize("kind", ["peaked", "model-like", "flat"])
def test_every_entry_is_unbiased(kind):
    """Averaged over an even grid of u, an entry comes out to within one grid step; a random sample would need luck."""
    p, threshold, grid = probabilities(kind), 2**-6, 512
    mean = sum(sample(p, threshold, (k + 0.5) / grid) for k in range(grid)) / grid
    assert ((mean - p).abs() <= 1.01 * threshold / grid).all()


@pytest.mark.parametrize("name", ["aapo", "user's, of all three"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_gradients_average_to_the_exact_ones(variant, name, monkeypatch):
    """All rows get the same u from an even grid: dX of each row, and dW, average to the exact gradient."""
    inputs, options = variant_problem(variant, 8, 8, 129)
    objective = objectives(8)[name]
    _, exact = run("torch", inputs, objective, **options)
    grid, sums = 256, [0.0] * len(exact)
    for k in range(grid):
        monkeypatch.setattr(
            rows_torch, "row_uniforms", lambda seed, rows, k=k: torch.full(rows.shape, (k + 0.5) / grid)
        )
        _, grads = run("torch", inputs, objective, backward="sparse", sparsity_threshold=2**-5, **options)
        sums = [a + b for a, b in zip(sums, grads, strict=True)]
    for total, truth in zip(sums, exact, strict=True):
        assert relative(total / grid, truth) < 0.01


def test_unbiased_over_seeds():
    """A z-test: projections of the mean over 300 seeds on the exact gradient, against their own spread."""
    inputs = problem(24, 16, 257)
    objective = objectives(24)["aapo"]
    _, exact = run("torch", inputs, objective)
    draws = [
        run("torch", inputs, objective, backward="sparse", sparsity_threshold=2**-5, seed=s)[1] for s in range(300)
    ]
    for index, truth in enumerate(exact):
        projected = torch.stack([(d[index] * truth).sum() / truth.square().sum() for d in draws])
        assert projected.std() > 1e-4
        assert abs(projected.mean() - 1) < 4 * projected.std() / math.sqrt(300)
        error_of_mean = relative(torch.stack([d[index] for d in draws]).mean(0), truth)
        error_of_one = sum(relative(d[index], truth) for d in draws) / 300
        assert error_of_mean < 1.5 * error_of_one / math.sqrt(300)


def test_same_seed_same_gradient_whatever_the_chunks(monkeypatch):
    inputs = problem(50, 16, 1001)
    advantages, index = sequences(50)
    options = {"backward": "sparse", "sparsity_threshold": 2**-7, "seed": 3}
    _, whole = run("torch", inputs, af.AAPO(advantages, index, 50.0), **options)
    _, again = run("torch", inputs, af.AAPO(advantages, index, 50.0), **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    _, every = run("torch", inputs, af.AAPO(advantages, index, 50.0), all_logps=True, **options)
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "FLUSH_ENTRIES", 100)
    _, rows_alone = run("torch", inputs, af.AAPO(advantages, index, 50.0), **options)
    for a, b, c in zip(whole, every, rows_alone, strict=True):
        assert relative(b, a) < 1e-12 and relative(c, a) < 1e-12
    _, other = run("torch", inputs, af.AAPO(advantages, index, 50.0), **{**options, "seed": 4})
    assert relative(other[0], whole[0]) > 1e-3


def test_linear_logprobs_has_a_sparse_backward():
    hidden, weight, targets, _ = problem(20, 16, 257)
    up = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(**options):
        hidden.grad = None
        res = af.linear_logprobs(hidden, weight, targets, **options)
        (res.logps @ up[0] + res.entropy @ up[1]).backward()
        return hidden.grad

    exact = gradient()
    mean = sum(gradient(backward="sparse", sparsity_threshold=2**-5, seed=s) for s in range(200)) / 200
    assert relative(mean, exact) < 0.05


def test_rows_too_full_are_dense_and_exact(monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_SHARE", 0.03)
    flat = problem(40, 16, 1001, scale=1e-3)
    advantages, index = sequences(40)
    _, exact = run("torch", flat, af.AAPO(advantages, index, 40.0))
    _, grads = run("torch", flat, af.AAPO(advantages, index, 40.0), backward="sparse")
    assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True))


NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not there")
)


@pytest.mark.parametrize("objective", [af.SFT(40.0), af.SFT(40.0, torch.ones(40))], ids=["SFT", "known weights"])
@pytest.mark.parametrize("implementation", ["torch", NATIVE])
def test_blocks_choose_their_road_one_by_one(monkeypatch, implementation, objective):
    """Flat and peaked rows in each of two chunks: the flat ones are exact, the peaked ones sampled."""
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 20)
    monkeypatch.setattr(sparse, "DENSE_SHARE", 0.05)
    monkeypatch.setattr(rows_native, "DENSE_SHARE", 0.05)
    monkeypatch.setattr(rows_native, "ROWS_A_THREAD", 1)
    dtype = torch.float64 if implementation == "torch" else torch.float32
    for rows in (rows_torch, rows_native):
        monkeypatch.setattr(rows, "BLOCK_BYTES", 10 * 1001 * dtype.itemsize)
    hidden, weight, targets, _ = problem(40, 16, 1001, dtype=dtype, scale=2.0)
    hidden = hidden.detach()
    hidden[10:20] *= 1e-3
    hidden[30:] *= 1e-3
    inputs = (hidden.requires_grad_(), weight, targets, None)
    _, exact = run(implementation, inputs, objective)
    _, grads = run(implementation, inputs, objective, backward="sparse", sparsity_threshold=2**-6)
    difference = (grads[0] - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
    rounding = 1e-12 if implementation == "torch" else 1e-6
    assert (difference[10:20] < rounding).all() and (difference[30:] < rounding).all()
    assert (difference[:10] > 1e-3).any() and (difference[20:30] > 1e-3).any()
    assert relative(grads[1], exact[1]) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_operands(dtype):
    inputs = problem(60, 32, 2003, dtype=dtype, scale=1.5)
    _, exact = run("torch", inputs, af.SFT(60.0))
    _, grads = run("torch", inputs, af.SFT(60.0), backward="sparse", sparsity_threshold=2**-9)
    for grad, truth in zip(grads, exact, strict=True):
        assert grad.dtype == dtype and relative(grad, truth) < 0.05


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity_threshold": math.nan}, "sparsity_threshold=nan must lie in"),
        ({"sparsity_threshold": 0.0}, "sparsity_threshold=0.0 must lie in"),
        ({"sparsity_threshold": 1.5}, "sparsity_threshold=1.5 must lie in"),
        ({"seed": 0.5}, "seed=0.5 must be an int"),
        ({"backward": "sparse", "implementation": "reference"}, "is not for implementation='reference'"),
        ({"backward": "dense"}, "backward='dense' is unknown; use 'exact' or 'sparse'"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        af.linear_policy_loss(
            torch.randn(4, 8), torch.randn(10, 8), torch.zeros(4, dtype=torch.int64), af.SFT(4.0), **options
        )
