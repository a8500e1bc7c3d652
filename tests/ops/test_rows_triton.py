"""The Triton row kernels against float64 autograd on the same products: in the interpreter, or on a GPU where one is.

Errors are relative. The bars are those of fp32: a few units of its rounding, 6e-8, over a row.
"""

import pytest
import torch
from op_support import relative, with_target

pytest.importorskip("triton", reason="triton is not installed")

from aapo_fast.ops.linear_policy.kernels_triton import BLOCK, TILE
from aapo_fast.ops.linear_policy.rows_triton import TritonRows
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    OneLaunch,
    Partials,
    Transform,
    finish,
    merge,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABS = [1, 101, 4093, BLOCK, 2 * BLOCK + 1009]
# Columns beyond the vocabulary are computed and thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature a row": {"temperature": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "everything": {"temperature": True, "softcap": 20.0, "scale": 1.7},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transform_of(name, rows):
    options = dict(TRANSFORMS[name])
    if options.get("temperature") is True:
        options["temperature"] = (torch.rand(rows, generator=generator(5)) + 0.5).to(DEVICE)
    return Transform(**options)


def chunk(rows, vocab, spread=3.0, padding=0):
    """(rows, vocab) products, a view of a wider buffer; and targets, of which row 1 has none."""
    x = torch.randn(rows, vocab + padding, generator=generator()) * spread
    targets = torch.randint(vocab, (rows,), generator=generator(1))
    targets[1:2] = -1
    return x.to(DEVICE)[:, :vocab], targets.to(DEVICE)


def coefficients(rows, entropy=True, logsumexp=True):
    a, b, c = torch.randn(3, rows, generator=generator(2)).to(DEVICE)
    return Coefficients(a, b if entropy else None, c if logsumexp else None)


def rounded(values):
    """To bf16; the interpreter cuts digits off where hardware rounds to nearest."""
    return (values if DEVICE == "cuda" else (values.view(torch.int32) & -65536).view(torch.float32)).bfloat16()


def truth(x, targets, transform, wanted=None):
    """Statistics in float64, and the gradient of the products; a row without a target counts all but its logit."""
    x = x.detach().double().requires_grad_()
    column = transform.column()
    y = x * transform.scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    z = y / (column.double() if isinstance(column, torch.Tensor) else column)
    logsumexp = z.logsumexp(1)
    log_p = z - logsumexp[:, None]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(1)
    at_target = z.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).where(targets >= 0, 0.0)
    found = (at_target - logsumexp, entropy, logsumexp)
    if wanted is not None:
        sum(k.double() @ s for k, s in zip(wanted, found, strict=True) if k is not None).backward()
    return [s.detach() for s in found], x.grad


def sweep(x, targets, transform):
    return finish(TritonRows(x).statistics(x, targets, transform))


def but_the_target(x, targets, transform, wanted, dtype=torch.float32, rows=None):
    """What the kernel writes."""
    kernels = TritonRows(x)
    rows = finish(kernels.statistics(x, targets, transform)) if rows is None else rows
    out = torch.full_like(x, torch.nan, dtype=dtype)
    kernels.gradient(x, targets, rows, wanted, transform, out)
    return out


def gradient(x, targets, transform, wanted, rows=None):
    rows = sweep(x, targets, transform) if rows is None else rows
    ours = but_the_target(x, targets, transform, wanted, rows=rows)
    return with_target(ours, x, targets, rows, wanted, transform)


@pytest.mark.parametrize("name", list(TRANSFORMS))
@pytest.mark.parametrize("vocab", VOCABS)
def test_statistics(vocab, name):
    x, targets = chunk(4, vocab)
    transform = transform_of(name, 4)
    (logps, entropy, logsumexp), _ = truth(x, targets, transform)
    before = x.clone()
    ours = TritonRows(x).statistics(x, targets, transform)
    assert torch.equal(x, before)
    assert all(p.dtype == torch.float32 and p.shape == (4,) for p in ours)
    assert ours.target[1] == -torch.inf and ours.target.isfinite().sum() == 3
    rows, held = finish(ours), targets >= 0
    assert relative(rows.logsumexp, logsumexp) < 5e-7
    assert (rows.logps[held] - logps[held]).norm() <= 1e-6 * (logps[held].norm() + ours.row_max.norm())
    assert (rows.entropy - entropy).norm() <= 1e-6 * (entropy.norm() + 1)


@pytest.mark.parametrize(
    ("name", "entropy", "logsumexp"),
    [("plain", True, False), ("plain", False, True), ("softcap", False, False), *((n, True, True) for n in TRANSFORMS)],
)
@pytest.mark.parametrize("vocab", [101, 2 * BLOCK + 1009])
def test_gradient(vocab, name, entropy, logsumexp):
    x, targets = chunk(4, vocab)
    transform, wanted = transform_of(name, 4), coefficients(4, entropy, logsumexp)
    _, exact = truth(x, targets, transform, wanted)
    ours = gradient(x, targets, transform, wanted)
    assert relative(ours, exact) < 1e-6
    assert all(relative(one, row) < 6e-6 for one, row in zip(ours, exact, strict=True))
    wide = but_the_target(x, targets, transform, wanted)
    narrow = but_the_target(x, targets, transform, wanted, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and relative(narrow, rounded(wide)) < 1e-4


@pytest.mark.parametrize("vocab", VOCABS)
def test_gradient_in_place_and_into_the_front_of_its_own_rows(vocab):
    """Written narrower into the memory it is read from, a block must not overwrite what is still to be read."""
    transform, wanted = transform_of("everything", 4), coefficients(4)
    for padding in (0, 31):
        x, targets = chunk(4, vocab, padding=padding)
        rows = sweep(x, targets, transform)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            apart = but_the_target(x, targets, transform, wanted, dtype, rows)
            buffer = torch.full((5, vocab + padding), 7.0, device=DEVICE)
            buffer[:4, :vocab] = x
            products = buffer[:4, :vocab]
            out = products if dtype == torch.float32 else buffer.view(dtype)[:4, :vocab]
            TritonRows(products).gradient(products, targets, rows, wanted, transform, out)
            assert torch.equal(out, apart)
            assert (buffer[4] == 7.0).all() and (buffer[:, vocab:] == 7.0).all()


@pytest.mark.parametrize("shift", [-200.0, 1000.0, -3e4])
def test_shifted_logits(shift):
    x, targets = chunk(4, 4093)
    x = x + shift
    transform, wanted = Transform(), coefficients(4)
    (logps, entropy, _), exact = truth(x, targets, transform, wanted)
    rows, held = sweep(x, targets, transform), targets >= 0
    assert relative(rows.logps[held], logps[held]) < 5e-7 and relative(rows.entropy, entropy) < 5e-7
    assert relative(gradient(x, targets, transform, wanted), exact) < 1e-6


def test_peaked_rows():
    """p > 0.999 at the target: 1 - p keeps the digits that a difference of nearly equal numbers loses."""
    x, targets = chunk(6, 4093, spread=1.0)
    targets[1] = 77
    x.scatter_(1, targets[:, None], 16.0 + torch.arange(6.0, device=DEVICE)[:, None] / 2)
    transform, wanted = Transform(), coefficients(6, entropy=False, logsumexp=False)
    (logps, _, _), exact = truth(x, targets, transform, wanted)
    assert (logps.exp() > 0.999).all()
    rows = sweep(x, targets, transform)
    assert relative(rows.logps, logps) < 1e-6 and relative(rows.others, -torch.expm1(logps)) < 1e-6
    assert relative(gradient(x, targets, transform, wanted), exact) < 1e-6


@pytest.mark.parametrize("ruled_out", [-1e30, -torch.inf])
@pytest.mark.parametrize("place", [slice(0, BLOCK), slice(BLOCK, None), slice(3, 4)], ids=["first", "last", "one"])
def test_tokens_ruled_out(place, ruled_out):
    x, targets = chunk(4, 2 * BLOCK - 5)
    targets[:] = BLOCK if place.start == 0 else 2
    x[:, place] = ruled_out
    wanted = coefficients(4)
    (logps, entropy, _), exact = truth(x.clamp(min=-1e30), targets, Transform(), wanted)
    rows, ours = sweep(x, targets, Transform()), gradient(x, targets, Transform(), wanted)
    assert relative(rows.logps, logps) < 5e-7 and relative(rows.entropy, entropy) < 5e-7
    assert (ours[:, place] == 0).all() and relative(ours, exact) < 1e-6


def test_a_target_that_is_ruled_out():
    """Its log-probability is -1e30; the gradient is still that of a softmax row."""
    x, targets = chunk(3, 101)
    targets[:] = 7
    x[:, 7] = -1e30
    wanted = coefficients(3)
    _, exact = truth(x, targets, Transform(), wanted)
    assert relative(gradient(x, targets, Transform(), wanted), exact) < 1e-6


def test_gradient_rows_sum_to_zero():
    x, targets = chunk(5, 9001)
    targets[1] = 4500
    rows = gradient(x, targets, transform_of("temperature a row", 5), coefficients(5, logsumexp=False)).double()
    assert (rows.sum(1).abs() < 1e-6 * rows.abs().sum(1)).all()


def test_rows_that_nothing_depends_on_are_zero_whatever_they_hold():
    x, targets = chunk(4, 101)
    x[2] = torch.nan
    wanted = coefficients(4)
    for coefficient in wanted:
        coefficient[2] = 0.0
    for name in ("plain", "everything"):
        ours = gradient(x, targets, transform_of(name, 4), wanted)
        assert (ours[2] == 0).all() and (ours[[0, 1, 3]] != 0).any(1).all() and ours.isfinite().all()
    wanted.logsumexp[2] = 1.0
    assert gradient(x, targets, Transform(), wanted)[2].isnan().all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_both_sweeps_in_one_launch(name, index_dtype):
    for vocab in (101, 2 * BLOCK + 1009):
        x, targets = chunk(5, vocab)
        transform = transform_of(name, 5)
        weights = torch.tensor([0.5, 0.0, -1.25], device=DEVICE)
        index = torch.tensor([0, 2, 1, 2, 0], dtype=index_dtype, device=DEVICE)
        live = weights[index.long()] * (targets >= 0)
        _, exact = truth(x, targets, transform, Coefficients(live, None, None))
        apart = TritonRows(x).statistics(x, targets, transform)
        narrow = torch.empty_like(x, dtype=torch.bfloat16)
        kernels, raw = TritonRows(x), x.clone()
        assert isinstance(kernels, OneLaunch)
        kernels.both_sweeps(x, targets, weights, index, transform, narrow)
        partials = kernels.both_sweeps(x, targets, weights, index, transform, x)
        assert all(relative(ours, theirs) < 1e-6 for ours, theirs in zip(partials[:3], apart[:3], strict=True))
        assert torch.equal(partials.target.isinf(), targets < 0)
        assert relative(narrow, rounded(x)) < 1e-4 and (x[1:3] == 0).all()
        ours = with_target(x, raw, targets, finish(partials), Coefficients(live), transform)
        assert relative(ours, exact) < 1e-6


def test_shards_of_the_vocabulary_make_whole_rows():
    x, targets = chunk(4, 900)
    transform, wanted = transform_of("everything", 4), coefficients(4)
    x[:, :300] -= 500.0  # a shard with no probability to speak of
    (_, entropy, logsumexp), exact = truth(x, targets, transform, wanted)
    cuts = [slice(0, 300), slice(300, 301), slice(301, 900)]
    local = [torch.where((targets >= c.start) & (targets < c.stop), targets - c.start, -1) for c in cuts]
    parts = [TritonRows(x[:, c]).statistics(x[:, c], t, transform) for c, t in zip(cuts, local, strict=True)]
    rows = finish(merge(parts))
    assert relative(rows.entropy, entropy) < 1e-6 and relative(rows.logsumexp, logsumexp) < 1e-6
    ours = torch.cat([gradient(x[:, c], t, transform, wanted, rows=rows) for c, t in zip(cuts, local, strict=True)], 1)
    assert relative(ours, exact) < 1e-6


def test_the_same_bits_at_every_run_and_in_any_block_of_rows():
    x, targets = chunk(6, 5001)
    transform, wanted = transform_of("everything", 6), coefficients(6)
    rows, whole = sweep(x, targets, transform), gradient(x, targets, transform, wanted)
    part = slice(2, 5)
    again = sweep(x[part], targets[part], transform.of(part))
    assert all(torch.equal(a, b[part]) for a, b in zip(again, rows, strict=True))
    few = Coefficients(*(k[part] for k in wanted))
    assert torch.equal(gradient(x[part], targets[part], transform.of(part), few), whole[part])


def test_no_rows_one_row_and_expanded_coefficients():
    x, targets = chunk(3, 50)
    none = TritonRows(x[:0]).statistics(x[:0], targets[:0], Transform())
    assert isinstance(none, Partials) and none.total.shape == (0,)
    empty = Coefficients(x.new_empty(0))
    TritonRows(x[:0]).gradient(x[:0], targets[:0], finish(none), empty, Transform(), x[:0])
    one = gradient(x[:1], targets[:1], Transform(), Coefficients(torch.ones(1, device=DEVICE)))
    every = gradient(x, targets, Transform(), Coefficients(torch.ones(1, device=DEVICE).expand(3)))
    assert torch.equal(every[:1], one) and every.norm() > 0


def test_fp64_is_refused():
    with pytest.raises(ValueError, match="implementation='triton' computes in fp32, not torch.float64"):
        TritonRows(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("where", [0, 2500, 5999], ids=["first columns", "beyond them", "last column"])
@pytest.mark.parametrize("height", [5.0, 40.0, 300.0])
def test_masses_of_tiles_from_one_level(where, height):
    """A row that goes far beyond its first columns is swept again from its maximum; its target is in no sum."""
    x = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[:, where] = height
    targets = torch.tensor([-1, where, 17], device=DEVICE)
    kernels = TritonRows(x, sparse=True)
    partials = kernels.statistics(x, targets, Transform())
    rest = x.double().masked_fill(torch.arange(6000, device=DEVICE) == targets[:, None], -torch.inf)
    e = (rest - rest.amax(1, keepdim=True)).exp()
    shifted = (rest - rest.amax(1, keepdim=True)).clamp(min=-1e30)
    for found, true in zip(partials, (rest.amax(1), e.sum(1), (e * shifted).sum(1)), strict=False):
        assert ((found - true).abs() <= 2e-6 * true.abs().clamp(min=1e-3)).all()
    level, mass = kernels._tiles
    tiles = torch.nn.functional.pad((rest - level.double()[:, None]).exp(), (0, -6000 % TILE)).view(3, -1, TILE).sum(2)
    assert ((mass - tiles).abs() <= 1e-6 * tiles + 1e-37).all()
