"""The native row kernels, at every level of instructions this machine has, against float64 and plain PyTorch."""

import math

import numpy as np
import pytest
import torch
from native_support import block, coefficients
from op_support import relative, with_target

from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import rows_native, sparse
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Transform, finish, merge

if native.why_not() is not None:
    pytest.skip(native.describe(), allow_module_level=True)

TRANSFORMS = {
    "plain": Transform(),
    "scaled": Transform(0.7, None, 1.3),
    "capped": Transform(0.7, 5.0, 1.3),
    "capped, one temperature a row": Transform(torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1]), 8.0, 0.4),
}


# --- exp -------------------------------------------------------------------------------------------------------------


def exp(x, level):
    x = torch.as_tensor(x, dtype=torch.float32)
    out = torch.empty_like(x)
    native.operators().exp(x, out, native.LEVELS.index(level))
    return out.numpy()


def test_exp_within_two_units_in_the_last_place_over_its_whole_range(level):
    """Of what is not above zero: differences from a maximum."""
    bits = np.arange(0, np.float32(55).view(np.int32), 311, dtype=np.int32)
    x = -np.concatenate([bits.view(np.float32), np.float32([54.999996, 54.8, 54.4, 0.34657359])])
    truth = np.exp(x.astype(np.longdouble))
    unit = np.spacing(truth.astype(np.float32)).astype(np.longdouble)
    assert len(x) > 3e6 and (np.abs(exp(x, level) - truth) / unit).max() < 2
    assert exp([0.0, -0.0, -55, -55.5, -104, -1e30, -3.4e38, -math.inf], level).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert np.isnan(exp([math.nan] * 40, level)).all()


# --- the sweeps ------------------------------------------------------------------------------------------------------


def truth_of(products, targets, transform, wanted):
    """Statistics and d loss / d products by autograd in float64."""
    x = products.double().requires_grad_()
    t = transform.temperature
    t = t.double()[:, None] if isinstance(t, torch.Tensor) else t
    z = x * transform.scale if transform.softcap is None else transform.softcap * torch.tanh(
        x * transform.scale / transform.softcap)  # fmt: skip
    log_p = (z / t).log_softmax(1)
    logsumexp = (z / t).logsumexp(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    logps = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    statistics = logps.where(targets >= 0, 0.0), entropy, logsumexp
    logps = torch.where(targets >= 0, logps, -logsumexp)  # what no column is the target of
    losses = [d * s for d, s in zip(wanted, (logps, entropy, logsumexp), strict=True) if d is not None]
    return [s.detach() for s in statistics], torch.autograd.grad(sum(losses).sum(), x)[0]


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize(("vocab", "offset", "padding"), [(1, 0, 0), (7, 1, 0), (64, 0, 3), (101, 3, 0), (1023, 2, 9),
                                                         (1025, 1, 1), (2500, 0, 0)])  # fmt: skip
def test_sweeps_against_float64(level, vocab, offset, padding, transform, every):
    products, targets = block(vocab, offset=offset, padding=padding)
    outside = products.new_tensor(0) if not padding else products._base[offset:].view(5, -1)[:, vocab:].clone()
    transform, wanted = TRANSFORMS[transform], coefficients(every=every)
    statistics, gradient = truth_of(products, targets, transform, wanted)
    kernels, raw = NativeRows(products), products.clone()
    found = finish(kernels.statistics(products, targets, transform))
    for ours, truth in zip((found.logps.where(targets >= 0, 0.0), *found[1:3]), statistics, strict=True):
        assert ours.dtype == torch.float32 and (ours - truth).abs().max() < 1e-6 * (1 + truth.abs().max())
    kernels.gradient(products, targets, found, wanted, transform, products)
    ours = with_target(products, raw, targets, found, wanted, transform)
    assert relative(ours, gradient) < 1e-6 or gradient.norm() < 1e-9
    if padding:
        assert torch.equal(products._base[offset:].view(5, -1)[:, vocab:], outside)


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_one_launch_is_both_sweeps(level, transform):
    products, targets = block(777, offset=1, padding=2)
    again, transform = products.clone(), TRANSFORMS[transform]
    weights, index = torch.randn(3), torch.tensor([2, 0, 1, 1, 2])
    kernels = NativeRows(products)
    partials = kernels.statistics(again, targets, transform)
    wanted = Coefficients(weights[index].where(targets >= 0, 0.0))
    kernels.gradient(again, targets, finish(partials), wanted, transform, again)
    out = torch.empty_like(again)
    at_once = kernels.both_sweeps(products, targets, weights.double(), index, transform, out)
    assert all(torch.equal(a, b) for a, b in zip(partials, at_once, strict=True))
    assert relative(out, again) < 1e-6 and (out[-1] == 0).all()


def test_rows_that_nothing_depends_on_are_zero_whatever_is_in_them(level):
    products, targets = block(130)
    products[1] = math.nan
    kernels = NativeRows(products)
    rows = finish(kernels.statistics(products, targets, Transform()))
    assert rows.logps[1].isnan() and rows.entropy[1].isnan() and not rows.entropy[[0, 2, 3, 4]].isnan().any()
    wanted = Coefficients(torch.tensor([1.0, 0, 0, 2, 1]), torch.tensor([0.0, 0, 0, 1, 0]))
    kernels.gradient(products, targets, rows, wanted, Transform(), products)
    assert (products[[1, 2]] == 0).all() and (products[[0, 3, 4]].abs().sum(1) > 0.5).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0x7FC00080, 0x7F800001])
def test_a_nan_is_one_whatever_its_bits(level, bits):
    """0x7fffffff is what a GPU makes."""
    products, targets = block(1500)
    products[1, 1100] = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    before = products.clone()
    kernels = NativeRows(products)
    rows = finish(kernels.statistics(products, targets, Transform()))
    for statistic in (rows.logps, rows.entropy, rows.logsumexp):
        assert statistic.isnan().tolist() == [False, True, False, False, False]
    kernels.gradient(products, targets, rows, coefficients(), Transform(), products)
    assert products.isnan().any(1).tolist() == [False, True, False, False, False]
    partials = kernels.both_sweeps(before, targets, torch.ones(1), torch.zeros(5).long(), Transform(), before)
    assert (
        finish(partials).logps[:4].isnan().tolist() == before[:4].isnan().any(1).tolist() == [False, True, False, False]
    )


@pytest.mark.parametrize("ruled_out", [-1e30, -math.inf])
def test_tokens_that_are_ruled_out_have_no_probability_and_no_gradient(level, ruled_out):
    products, targets = block(3000)
    products[:, ::2] = ruled_out
    products[0, 1024:2048] = ruled_out  # a whole panel
    targets = targets // 2 * 2 + 1
    statistics, gradient = truth_of(products[:, 1::2], targets // 2, Transform(), coefficients())
    kernels = NativeRows(products)
    rows = finish(kernels.statistics(products, targets, Transform()))
    assert relative(rows.entropy[1:], statistics[1][1:]) < 1e-6 and rows.entropy.isfinite().all()
    kernels.gradient(products, targets, rows, coefficients(), Transform(), products)
    assert (products[:, ::2] == 0).all() and products.isfinite().all()
    ours = with_target(products, products, targets, rows, coefficients(), Transform())
    assert relative(ours[1:, 1::2], gradient[1:]) < 1e-6


@pytest.mark.parametrize("shift", [-200.0, 1000.0, 30_000.0])
def test_shifted_logits(level, shift):
    """Sums from the maximum do not see the shift; p from the log-sum-exp, or from a logit rounded elsewhere, would."""
    products, targets = block(5000)
    products, transform = products.mul_(4) + shift, Transform(0.7)
    logits = products * (1 / torch.tensor(0.7))  # what fp32 makes of them
    statistics, gradient = truth_of(logits, targets, Transform(), coefficients())
    kernels = NativeRows(products)
    rows = finish(kernels.statistics(products, targets, transform))
    assert relative(rows.entropy, statistics[1]) < 1e-6
    kernels.gradient(products, targets, rows, coefficients(), transform, products)
    assert relative(with_target(products, products, targets, rows, coefficients(), transform) * 0.7, gradient) < 1e-6


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_shards_of_the_vocabulary(level):
    """Two ranks' columns: partials merge, and each rank's gradient, dense or all entries exact, is its part."""
    products, targets = block(2000, padding=3)
    products[1, :900] -= 300  # a rank without any probability
    _, gradient = truth_of(products, targets, Transform(0.7), coefficients())
    parts = [(products[:, :900], targets.where(targets < 900, -1)), (products[:, 900:], (targets - 900).clamp(min=-1))]
    kernels = [NativeRows(x) for x, _ in parts]
    for k, (x, t) in zip(kernels, parts, strict=True):
        k.partials = k.statistics(x, t, Transform(0.7))
    rows, found = finish(merge([k.partials for k in kernels])), []
    for k, (x, t) in zip(kernels, parts, strict=True):
        given = (x, t, rows, coefficients(), Transform(0.7))
        sampled = k.sample(x, t, Transform(0.7), rows, coefficients().live(), 1e-20, torch.rand(5))
        found.append(with_target(dense(sampled.entries(rows, coefficients()), x.shape), x, t, *given[2:]))
        k.gradient(*given, x)
        x.copy_(with_target(x, x, t, *given[2:]))
    assert relative(torch.cat(found, 1), gradient) < 1e-6 and relative(products, gradient) < 1e-6


# --- the sample ------------------------------------------------------------------------------------------------------


def sample(products, threshold, uniforms, on_logp=-1.0):
    """Entries of one block whose values are the sampled probabilities themselves; None where it is to be dense."""
    rows = products.shape[0]
    targets = torch.full((rows,), -1)
    kernels = NativeRows(products)
    kernels.block_rows = rows
    kernels._tiles = torch.full((rows, kernels._tiles.shape[1]), math.nan)
    statistics = finish(kernels.statistics(products, targets, Transform()))
    wanted = Coefficients(torch.full((rows,), on_logp))
    sampled = kernels.sample(products, targets, Transform(), statistics, wanted.live(), threshold, uniforms)
    return None if sampled.dense else sampled.entries(statistics, wanted)


def dense(entries, shape):
    return torch.zeros(shape).index_put_((entries.row.long(), entries.column.long()), entries.value, accumulate=True)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("threshold", [1.0, 0.3, 2**-6, 2**-13, 2**-24, 2**-40])
@pytest.mark.parametrize(("vocab", "scale"), [(1, 1), (63, 3), (1000, 0.1), (1000, 3), (1030, 8), (5000, 3)])
def test_kept_entries(level, vocab, scale, threshold):
    products, _ = block(vocab, rows=40, scale=scale, offset=1, padding=1)
    p = products.double().softmax(1)
    entries = sample(products, threshold, torch.linspace(0, 1 - 2**-24, 40))
    q = dense(entries, products.shape)
    assert torch.unique(entries.row * vocab + entries.column).numel() == entries.row.numel()
    assert (torch.bincount(entries.row, minlength=40) <= 1 / threshold + 1).all()
    clearly = (p / threshold - 1).abs() > 1e-5
    large = (p >= threshold) & clearly
    assert (q[large] - p[large]).abs().max() < 2e-6 * p.max() if large.any() else True
    assert ((q == 0) | (q == threshold))[(p < threshold) & clearly].all()
    assert ((q.double().sum(1) - 1).abs() <= threshold + 2e-6).all()
    assert torch.equal(entries.row, entries.row.sort().values)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("scale", [0.1, 3, 8])
def test_every_entry_is_unbiased(level, scale):
    """Averaged over an even grid of u, an entry comes out to within one grid step; a random sample would need luck."""
    grid, threshold = 512, 2**-6
    row, _ = block(1001, rows=1, scale=scale)
    uniforms = (torch.arange(grid) + 0.5) / grid
    mean = dense(sample(row.expand(grid, -1).contiguous(), threshold, uniforms), (grid, 1001)).double().mean(0)
    assert (mean - row[0].double().softmax(0)).abs().max() <= 1.01 * threshold / grid + 1e-7


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("orders_of_magnitude", [0.01, 6])
def test_dust_of_one_tile_is_unbiased_to_rounding(level, orders_of_magnitude, order):
    """Sums within a tile are fp32: how often an entry is drawn is right to 2^-24 of what the tile's dust counts."""
    grid, threshold = 2**15, 2**-7
    falling = 0.99 * threshold * 10 ** -torch.linspace(0, orders_of_magnitude, 64, dtype=torch.float64)
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    dust = {"falling": falling, "rising": falling.flip(0), "mixed": falling[mixed]}[order]
    row = torch.cat([(1 - dust.sum()).log()[None], torch.full((63,), -1e30), dust.log()]).float()
    entries = sample(row.expand(grid, -1).contiguous(), threshold, torch.arange(grid) / grid)
    often = torch.bincount(entries.column, minlength=128)[64:] / grid
    assert (often - dust / threshold).abs().max() <= 1 / grid + 64 * 2**-23


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("threshold", [2**-5, 2**-9, 2**-13])
@pytest.mark.parametrize("scale", [0.1, 2.5, 6])
def test_the_same_entries_as_the_torch_sample(level, scale, threshold):
    products, _ = block(3001, rows=30, scale=scale)
    uniforms = torch.rand(30, generator=torch.Generator().manual_seed(2))
    ours = sample(products, threshold, uniforms)
    exps = torch.zeros(30, sparse.padded_width(3001))
    exps[:, :3001] = (products - products.amax(1, keepdim=True)).exp()
    theirs = sparse.sample_rows(exps, exps.sum(1, keepdim=True), threshold, uniforms)
    keys = [dict(zip((e.row * 3001 + e.column).tolist(), e.value.tolist(), strict=True)) for e in (ours, theirs)]
    both = keys[0].keys() & keys[1].keys()
    # An entry that stands on a rounding tie may move to its neighbour.
    assert len(both) >= 0.997 * max(len(k) for k in keys) - 1
    assert all(abs(keys[0][k] - keys[1][k]) < 2e-6 * keys[1][k] for k in both)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_rows_longer_than_what_is_listed_at_a_time(level):
    """Column by column the mean over an even grid of u, in a row of three stretches of 163,840."""
    grid, threshold, vocab = 64, 2**-9, 330_001
    row, _ = block(vocab, rows=1, scale=3)
    uniforms = (torch.arange(grid) + 0.5) / grid
    entries = sample(row.expand(grid, -1).contiguous(), threshold, uniforms)
    mean = torch.zeros(vocab, dtype=torch.float64)
    mean.index_add_(0, entries.column.long(), entries.value.double() / grid)
    assert (mean - row[0].double().softmax(0)).abs().max() <= 1.01 * threshold / grid + 1e-7
    assert torch.unique(entries.row * vocab + entries.column).numel() == entries.row.numel()
    assert ((torch.bincount(entries.row, entries.value, grid) - 1).abs() <= threshold + 2e-6).all()


def test_dense_rows_where_they_are_cheaper_whatever_the_uniforms():
    flat, _ = block(5000, rows=24, scale=0.1)
    peaked, _ = block(5000, rows=24, scale=12)
    late = torch.cat([peaked[:3], flat[3:]])  # the rows that are sampled first do not say so
    for u in (0.0, 0.5, 0.999):
        assert sample(flat, 2**-13, torch.full((24,), u)) is None
        assert sample(late, 2**-13, torch.full((24,), u)) is None
        assert sample(peaked, 2**-13, torch.full((24,), u)) is not None
        assert sample(flat, 2**-13, torch.full((24,), u), on_logp=0.0).row.numel() == 0


def test_the_choice_is_by_the_mean_number_of_entries(monkeypatch, level):
    """Just below and just above it, of rows with entries above eps and below, at any uniforms; unless the eighth that
    is looked at first has half as much again as its part.
    """
    products, _ = block(3000, rows=9, scale=3)
    mean = (products.double().softmax(1) / 2**-9).clamp(max=1).sum().item() / products.numel()
    for u in (0.0, 0.999):
        for share, is_sparse in ((0.9999, False), (1.0001, True)):
            monkeypatch.setattr(rows_native, "DENSE_SHARE", share * mean)
            assert (sample(products, 2**-9, torch.full((9,), u)) is not None) == is_sparse


# --- the sparse products ---------------------------------------------------------------------------------------------


def some_entries(rows, columns, count=300):
    g = torch.Generator().manual_seed(3)
    row = torch.randint(rows, (count,), generator=g).sort().values
    return Entries(row, torch.randint(columns, (count,), generator=g), torch.randn(count, generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 100])
def test_products_against_float64(level, width, dtype):
    entries = some_entries(9, 40)
    signed, absolute = torch.zeros(2, 9, 40, dtype=torch.float64)
    for matrix, value in ((signed, entries.value), (absolute, entries.value.abs())):
        matrix.index_put_((entries.row, entries.column), value.double(), accumulate=True)
    kernels = NativeRows(torch.empty(9, 40))
    for n, m, swap, add in ((40, 9, False, kernels.add_times_weight), (9, 40, True, kernels.add_transposed_times)):
        factor = (torch.randn(n, width + 3) * 10.0 ** torch.randint(-6, 4, (n, 1))).to(dtype)[:, 1:-2]
        out = torch.ones(m, width + 2)[:, 1:-1]
        add(entries, factor, out)
        s, most = (t.t() if swap else t for t in (signed, absolute))
        error = (out - (1 + s @ factor.double())).abs()
        assert (error <= 1e-6 * (1 + most @ factor.double().abs())).all()
        assert (out._base[:, [0, -1]] == 1).all()


def test_every_half_and_bfloat16_is_widened_exactly(level):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, -1)
    one = Entries(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]))
    for factor in (every.view(torch.float16), every.view(torch.bfloat16)):
        out = torch.zeros(1, 2**16)
        NativeRows(torch.empty(1, 1)).add_times_weight(one, factor, out)
        assert torch.equal(out.isnan(), factor.isnan()) and torch.equal(out.nan_to_num(), factor.float().nan_to_num())


def test_nothing_at_all(level):
    kernels = NativeRows(torch.empty(0, 40))
    nothing = Entries(*(torch.empty(0, dtype=t) for t in (torch.int32, torch.int32, torch.float32)))
    kernels.add_times_weight(nothing, torch.ones(40, 8), torch.empty(0, 8))
    kernels.add_transposed_times(nothing, torch.ones(0, 8), torch.empty(40, 8))
    products, targets = torch.empty(0, 40), torch.empty(0, dtype=torch.int64)
    rows = finish(kernels.statistics(products, targets, Transform()))
    wanted = Coefficients(torch.empty(0))
    kernels.gradient(products, targets, rows, wanted, Transform(), products)
    how = (torch.empty(0, dtype=torch.bool), 2**-7, torch.empty(0))
    apart = kernels.sample(products, targets, Transform(), rows, *how)
    _, at_once = NativeRows(products).sparse_sweeps(products, targets, Transform(), *how)
    for sampled in (apart, at_once):
        assert [t.shape for t in sampled.entries(rows, wanted)] == [(0,)] * 3 and sampled.dense == []
