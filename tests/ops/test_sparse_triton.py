"""Sparse rows in Triton against a plain float64 sample: the same entries, the bound, the mean, and the two products."""

import math

import pytest
import torch
from op_support import relative

pytest.importorskip("triton", reason="triton is not installed")

from aapo_fast.ops.linear_policy import sparse, sparse_triton
from aapo_fast.ops.linear_policy import targets as at_targets
from aapo_fast.ops.linear_policy.kernels_triton import TILE, Tiles
from aapo_fast.ops.linear_policy.rows_triton import TritonRows
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Transform, finish
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = Transform()
# Columns beyond the vocabulary are computed and thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _sparse_whatever_it_costs(monkeypatch):
    """Tests are small: entries kept are a large share of their vocabulary, and dense rows would be cheaper."""
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sparse, "DENSE_SHARE", 10.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chunk(rows, vocab, spread=3.0):
    x = torch.randn(rows, vocab, generator=generator()) * spread
    targets = torch.randint(vocab, (rows,), generator=generator(1))
    targets[1:2] = -1
    return x.to(DEVICE), targets.to(DEVICE), torch.rand(rows, generator=generator(2)).to(DEVICE)


def coefficients(rows, entropy=True, logsumexp=True):
    a, b, c = torch.randn(3, rows, generator=generator(3)).to(DEVICE)
    return Coefficients(a, b if entropy else None, c if logsumexp else None)


def gradient(x, targets, uniforms, threshold, wanted, transform=PLAIN):
    kernels = TritonRows(x, sparse=True)
    rows = finish(kernels.statistics(x, targets, transform))
    return kernels.sparse_gradient(x, targets, rows, wanted, transform, threshold, uniforms)()


def plain_sample(p, threshold, uniforms):
    """q of README.md, section "Sparse", read off its definition in float64."""
    exact = p >= threshold
    stands = uniforms.double()[:, None] + (p.masked_fill(exact, 0.0) / threshold).cumsum(1)
    before = torch.cat([uniforms.double()[:, None], stands[:, :-1]], 1)
    return torch.where(exact, p, (stands.floor() - before.floor()) * threshold)


def plain_gradient(x, targets, uniforms, threshold, wanted, transform=PLAIN):
    """Dense (C, V) float64 gradient rows of ``plain_sample``, zero at the target."""
    column = transform.column()
    steepness = transform.scale / (column.double() if isinstance(column, torch.Tensor) else column)
    y = x.double() * transform.scale
    slope = 1.0
    if transform.softcap is not None:
        slope = 1 - torch.tanh(y / transform.softcap) ** 2
        y = transform.softcap * torch.tanh(y / transform.softcap)
    log_p = torch.log_softmax(y / transform.scale * steepness, 1)
    p = log_p.exp()
    zeros = torch.zeros_like(wanted.logps)
    a, b, c = (zeros if k is None else k for k in wanted)
    entropy = -(p * log_p).sum(1)
    factor = (c - a)[:, None] - b[:, None] * (log_p + entropy[:, None])
    q = plain_sample(but_the_target(p, targets), threshold, uniforms)
    return q * factor * slope * steepness, q


def but_the_target(p, targets):
    return torch.where(torch.arange(p.shape[1], device=DEVICE) == targets[:, None], 0.0, p)


def dense(entries, shape):
    where = (entries.row.long(), entries.column.long())
    return torch.zeros(shape, dtype=torch.float64, device=DEVICE).index_put(
        where, entries.value.double(), accumulate=True
    )


@pytest.mark.parametrize("threshold", [2**-4, 2**-8, 0.003])
@pytest.mark.parametrize("vocab", [1, 101, TILE, 4 * TILE + 37])
def test_the_entries_of_the_definition(vocab, threshold):
    x, targets, uniforms = chunk(4, vocab)
    wanted = coefficients(4)
    exact, q = plain_gradient(x, targets, uniforms, threshold, wanted)
    entries = gradient(x, targets, uniforms, threshold, wanted)
    assert relative(dense(entries, x.shape), exact) < 2e-6
    assert (entries.row.diff() >= 0).all()
    count = torch.bincount(entries.row, minlength=4)
    assert torch.equal(count, (q > 0).sum(1)) and (count <= 1 / threshold + 1).all()


@pytest.mark.parametrize(
    ("transform", "entropy", "logsumexp"),
    [
        (Transform(0.7), False, False),
        (Transform(1.3, scale=0.4), True, False),
        (Transform(1.0, softcap=5.0), False, True),
        (Transform("rows", softcap=20.0, scale=1.7), True, True),
    ],
    ids=lambda value: "" if isinstance(value, Transform) else None,
)
def test_transforms_and_coefficients(transform, entropy, logsumexp):
    if transform.temperature == "rows":
        rows = torch.tensor([0.6, 1.0, 1.4], device=DEVICE)
        transform = Transform(rows, transform.softcap, transform.scale)
    x, targets, uniforms = chunk(3, 2 * TILE + 11)
    wanted = coefficients(3, entropy, logsumexp)
    exact, _ = plain_gradient(x, targets, uniforms, 2**-7, wanted, transform)
    assert relative(dense(gradient(x, targets, uniforms, 2**-7, wanted, transform), x.shape), exact) < 2e-6


def test_the_same_entries_as_in_torch():
    x, targets, uniforms = chunk(3, 3 * TILE + 100)
    padded = torch.zeros(3, sparse.padded_width(x.shape[1]), dtype=torch.float64, device=DEVICE)
    padded[:, : x.shape[1]] = x.double().softmax(1)
    theirs = sparse.sample_rows(padded, padded.sum(1, keepdim=True), 2**-9, uniforms)
    nothing = torch.full_like(targets, -1)
    ours = gradient(x, nothing, uniforms, 2**-9, Coefficients(-torch.ones(3, device=DEVICE)))
    assert ours.row.tolist() == theirs.row.tolist() and ours.column.tolist() == theirs.column.tolist()
    assert relative(ours.value, theirs.value) < 1e-6


@pytest.mark.parametrize("section", [1, 2, 5])
def test_sections_join(section, monkeypatch):
    x, targets, uniforms = chunk(3, 4 * TILE + 9)
    wanted = coefficients(3)
    whole = gradient(x, targets, uniforms, 2**-6, wanted)
    monkeypatch.setattr(sparse_triton, "SECTION", section)
    cut = gradient(x, targets, uniforms, 2**-6, wanted)
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize("shift", [-200.0, 1000.0])
def test_shifted_logits(shift):
    x, targets, uniforms = chunk(3, TILE + 50)
    x, wanted = x + shift, coefficients(3)
    exact, _ = plain_gradient(x, targets, uniforms, 2**-7, wanted)
    assert relative(dense(gradient(x, targets, uniforms, 2**-7, wanted), x.shape), exact) < 2e-6


def walk_of(x, targets, threshold, wanted, transform=PLAIN):
    kernels = TritonRows(x, sparse=True)
    rows = finish(kernels.statistics(x, targets, transform))
    return x, targets, Tiles(*kernels._tiles), rows, wanted, transform, threshold


@pytest.mark.parametrize("seed", [0, 7, -1, 2**32 + 7, 2**63 + 5, 2**64 - 3])
def test_uniforms_are_those_of_the_torch_rows_to_the_bit(seed):
    rows = torch.cat([torch.arange(300), torch.tensor([2**31 - 1, 2**31, 2**32 - 1])]).to(DEVICE)
    assert torch.equal(sparse_triton.row_uniforms(seed, rows), row_uniforms(seed, rows))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0], ids=["flat", "model-like", "peaked"])
def test_the_bound_and_the_count(spread, u):
    """At most 1 / eps + 1 entries, whatever the row; each one that is counted is emitted."""
    x, targets, uniforms = chunk(3, 3 * TILE + 1, spread)
    threshold = 2**-6
    walk = walk_of(x, targets, threshold, coefficients(3, False, False))
    plan = sparse_triton.count(*walk, uniforms.fill_(u))
    counts = plan.starts[:: plan.stands.shape[1]].diff()
    assert (counts <= 1 / threshold + 1).all()
    assert plan.told[0] == counts.sum() and abs(counts.sum() - plan.told[1]) <= 3 + 1e-4
    entries = sparse_triton.emit(*walk, plan, int(plan.starts[-1]))
    assert (entries.value != 0).all() and torch.equal(torch.bincount(entries.row, minlength=3), counts)
    mass = -dense(entries, x.shape).sum(1) / walk[4].logps
    assert ((mass - walk[3].others).abs() <= threshold * (1 + 1e-5)).all()


def test_tiles_that_are_not_opened_count_by_their_mass_alone():
    """Seventeen tiles of a third of a step each: the sum steps in five or six of them, and the others hold NaN."""
    x, targets, uniforms = chunk(2, 20 * TILE, spread=1.0)
    x[:, 2 * TILE : 5 * TILE] += 4.2
    wanted, threshold = coefficients(2, False, False), 2**-6
    targets[:] = 3 * TILE
    exact, q = plain_gradient(x, targets, uniforms, threshold, wanted)
    mass = but_the_target(x.double().softmax(1), targets).unflatten(1, (-1, TILE)).sum(-1)
    light = (mass > 0.1 * threshold) & (mass < 0.9 * threshold)
    opened = (q.unflatten(1, (-1, TILE)) > 0).any(-1)
    assert (light.sum(1) == 17).all() and ((light & opened).sum(1) >= 4).all()
    x, targets, tiles, rows, *rest = walk_of(x, targets, threshold, wanted)
    poisoned = x.unflatten(1, (-1, TILE)).masked_fill((light & ~opened)[..., None], torch.nan).flatten(1)
    entries = sparse_triton.sparse_gradient(poisoned, targets, tiles, rows, *rest, uniforms)()
    assert relative(dense(entries, x.shape), exact) < 2e-6


def test_a_step_at_the_very_end_of_a_tile_is_not_lost():
    """A tile's stored mass and the sum of its entries differ by a rounding error; the step falls between the two."""
    x, targets, uniforms = chunk(16, TILE)
    targets[:] = -1
    *walk, wanted, transform, threshold = walk_of(x, targets, 2**-4, coefficients(16))
    walk[3] = walk[3]._replace(total=walk[3].total * 100)  # as if other shards held the rest: no tile reaches eps
    one = 2**sparse_triton._FRACTION.value
    dusts = []
    for row in range(16):
        here = slice(row, row + 1)
        x, targets, tiles, rows = walk
        few = x[here], targets[here], Tiles(*(t[here] for t in tiles)), type(rows)(*(s[here] for s in rows))
        some = Coefficients(*(k[here] for k in wanted))
        dusts.append(sparse_triton.count(*few, some, transform, threshold, uniforms[here]).told[1] * one)
    stands = (one - torch.stack(dusts).long())[:, None]
    plan = sparse_triton.Plan(stands, torch.arange(17, device=DEVICE), torch.empty(0))
    entries = sparse_triton.emit(*walk, wanted, transform, threshold, plan, 16)
    assert entries.row.tolist() == list(range(16)) and (entries.value != 0).all()


def test_every_entry_is_unbiased():
    """Averaged over an even grid of u, an entry comes out to within one grid step; a random sample would need luck."""
    grid, vocab, threshold = 40, 300, 2**-5
    x = chunk(1, vocab, 2.0)[0].expand(grid, vocab).contiguous()
    uniforms = (torch.arange(grid, device=DEVICE) + 0.5) / grid
    nothing = torch.full((grid,), -1, device=DEVICE)
    entries = gradient(x, nothing, uniforms, threshold, Coefficients(-torch.ones(grid, device=DEVICE)))
    mean = dense(entries, x.shape).mean(0)
    assert ((mean - x[0].double().softmax(0)).abs() <= 1.01 * threshold / grid).all()


def test_unbiased_over_draws():
    """A z-test: projections of 200 draws on the exact gradient, against their own spread."""
    draws, vocab = 200, 200
    one, target, _ = chunk(1, vocab, 1.5)
    x, targets = one.expand(draws, vocab).contiguous(), target.expand(draws).contiguous()
    wanted = Coefficients(*(k.expand(draws) for k in coefficients(1)))
    uniforms = row_uniforms(11, torch.arange(draws, device=DEVICE))
    drawn = dense(gradient(x, targets, uniforms, 2**-5, wanted), x.shape)
    p = one.double().softmax(1)
    log_p = p.log()
    a, b, c = (k[:1].double() for k in wanted)
    exact = p * (c - a - b * (log_p - (p * log_p).sum(1)))
    exact[0, target] = 0.0
    projected = (drawn * exact).sum(1) / exact.square().sum()
    assert projected.std() > 1e-4
    assert abs(projected.mean() - 1) < 4 * projected.std() / math.sqrt(draws)
    error_of_one = sum(relative(row, exact[0]) for row in drawn) / draws
    assert relative(drawn.mean(0), exact[0]) < 1.5 * error_of_one / math.sqrt(draws)


def test_the_same_seed_the_same_bits_whatever_the_block():
    x, targets, _ = chunk(4, 2 * TILE + 50)
    wanted = coefficients(4)
    uniforms = row_uniforms(5, torch.arange(4, device=DEVICE))
    whole = gradient(x, targets, uniforms, 2**-7, wanted)
    again = gradient(x, targets, uniforms, 2**-7, wanted)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    part = slice(2, 4)
    few = gradient(x[part], targets[part], uniforms[part], 2**-7, Coefficients(*(k[part] for k in wanted)))
    assert torch.equal(few.value, whole.value[whole.row >= 2])
    other = gradient(x, targets, row_uniforms(6, torch.arange(4, device=DEVICE)), 2**-7, wanted)
    assert relative(dense(other, x.shape), dense(whole, x.shape)) > 1e-3


def test_tokens_ruled_out_are_never_drawn():
    x, targets, uniforms = chunk(3, 2 * TILE)
    targets[:] = 5
    x[:, 40 : TILE + 40] = -1e30
    wanted = coefficients(3)
    entries = gradient(x, targets, uniforms, 2**-8, wanted)
    assert entries.value.isfinite().all() and not ((entries.column >= 40) & (entries.column < TILE + 40)).any()


def test_rows_that_nothing_depends_on_and_rows_of_nan():
    x, targets, uniforms = chunk(4, 101)
    targets[:] = 7
    x[2:] = torch.nan
    wanted = coefficients(4)
    for coefficient in wanted:
        coefficient[1:3] = 0.0
    entries = gradient(x, targets, uniforms, 2**-6, wanted)
    assert entries.row.unique().tolist() == [0] and entries.value.isfinite().all()
    rows = finish(TritonRows(x).statistics(x, targets, PLAIN))
    at_target = at_targets.gradient(rows, wanted, PLAIN, targets >= 0, x[:, 0])
    assert at_target.isnan().tolist() == [False, False, False, True] and (at_target[1:3] == 0).all()


def test_rows_too_full_are_left_to_the_dense_road(monkeypatch):
    x, targets, uniforms = chunk(3, 300, spread=0.1)
    wanted = coefficients(3)
    monkeypatch.setattr(sparse_triton, "DENSE_SHARE", 0.05)
    assert gradient(x, targets, uniforms, 2**-10, wanted) is None
    assert gradient(x, targets, uniforms, 2**-3, wanted) is not None


def test_a_threshold_too_small_for_fixed_point_is_refused():
    x, targets, uniforms = chunk(2, 50)
    with pytest.raises(ValueError, match="sparsity_threshold=1e-09 must lie in"):
        gradient(x, targets, uniforms, 1e-9, coefficients(2))


def some_entries(rows, columns, count):
    row = torch.randint(rows, (count,), generator=generator(4)).sort().values
    row[row == 1] = 0  # a row with none
    column = torch.randint(columns, (count,), generator=generator(5))
    column[: count // 2] = 3  # one column in many rows, and twice in one
    value = torch.randn(count, generator=generator(6))
    return Entries(row.int().to(DEVICE), column.int().to(DEVICE), value.to(DEVICE))


@pytest.mark.parametrize("count", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 1100])
def test_products(width, dtype, count):
    rows, vocab = 6, 11
    entries = some_entries(rows, vocab, count)
    s = dense(entries, (rows, vocab))
    weight = torch.randn(vocab, width, generator=generator(7)).to(DEVICE, dtype)
    hidden = torch.randn(rows, width, generator=generator(8)).to(DEVICE, dtype)
    kernels = TritonRows(torch.zeros(rows, vocab, device=DEVICE), sparse=True)
    for add, source, matrix in (
        (kernels.add_times_weight, weight, s),
        (kernels.add_transposed_times, hidden, s.t()),
    ):
        start = torch.randn(matrix.shape[0], width, generator=generator(9)).to(DEVICE)
        out, again = start.clone(), start.clone()
        add(entries, source, out)
        add(entries, source, again)
        assert torch.equal(out, again)
        assert relative(out, start.double() + matrix @ source.double()) < 1e-6
        wide = torch.zeros(source.shape[0], width + 5, dtype=dtype, device=DEVICE)
        wide[:, :width] = source
        strided = torch.zeros(matrix.shape[0], width + 3, device=DEVICE)
        strided[:, :width] = start
        add(entries, wide[:, :width], strided[:, :width])
        assert torch.equal(strided[:, :width], out) and (strided[:, width:] == 0).all()
