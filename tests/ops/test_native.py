"""The native row kernels, at every level of instructions this machine has, against float64 and plain PyTorch."""

import math

import accuracy
import numpy as np
import pytest
import torch
from op_support import VARIANTS, objectives, problem, relative, run, variant_problem

import aapo_fast as af
from aapo_fast.ops import dispatch, native
from aapo_fast.ops.linear_policy import chunked, rows_native, sparse
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Transform, finish, merge

if native.why_not() is not None:
    pytest.skip(native.describe(), allow_module_level=True)

LEVELS = native.available_levels()
TRANSFORMS = {
    "plain": Transform(),
    "scaled": Transform(0.7, None, 1.3),
    "capped": Transform(0.7, 5.0, 1.3),
    "capped, one temperature a row": Transform(torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1]), 8.0, 0.4),
}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("AAPO_FAST_NATIVE_LEVEL", request.param)
    return request.param


@pytest.fixture
def sparse_whatever_it_costs(monkeypatch):
    """Tests are small: entries kept are a large share of their vocabulary, and dense rows would be cheaper."""
    monkeypatch.setattr(rows_native, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sparse, "DENSE_SHARE", 10.0)


# --- exp -------------------------------------------------------------------------------------------------------------


def exp(x, level):
    x = torch.as_tensor(x, dtype=torch.float32)
    out = torch.empty_like(x)
    native.operators().exp(x, out, native.LEVELS.index(level))
    return out.numpy()


def test_exp_within_two_units_in_the_last_place_over_its_whole_range(level):
    bits = [np.arange(0, top.view(np.int32), 509, dtype=np.int32) for top in np.array([104, 88.7228], np.float32)]
    x = np.concatenate([-bits[0].view(np.float32), bits[1].view(np.float32), np.float32([-103.97, -87.33655, 88.7228])])
    truth = np.exp(x.astype(np.longdouble))
    unit = np.spacing(truth.astype(np.float32)).astype(np.longdouble)
    assert len(x) > 4e6 and (np.abs(exp(x, level) - truth) / unit).max() < 2
    assert exp([0.0, -0.0, 89, 1e30, math.inf], level).tolist() == [1, 1, math.inf, math.inf, math.inf]
    assert exp([-104, -1e30, -math.inf], level).tolist() == [0, 0, 0]
    assert np.isnan(exp([math.nan] * 40, level)).all()


# --- the sweeps ------------------------------------------------------------------------------------------------------


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
    kernels = NativeRows(products)
    found = finish(kernels.statistics(products, targets, transform))
    for ours, truth in zip((found.logps.where(targets >= 0, 0.0), *found[1:3]), statistics, strict=True):
        assert ours.dtype == torch.float32 and (ours - truth).abs().max() < 1e-6 * (1 + truth.abs().max())
    kernels.gradient(products, targets, found, wanted, transform, products)
    assert relative(products, gradient) < 1e-6 or gradient.norm() < 1e-9
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
    assert torch.equal(again, out) and (out[-1] == 0).all()


def test_rows_that_nothing_depends_on_are_zero_whatever_is_in_them(level):
    products, targets = block(130)
    products[1] = math.nan
    kernels = NativeRows(products)
    rows = finish(kernels.statistics(products, targets, Transform()))
    assert rows.logps[1].isnan() and rows.entropy[1].isnan() and not rows.entropy[[0, 2, 3, 4]].isnan().any()
    wanted = Coefficients(torch.tensor([1.0, 0, 0, 2, 1]), torch.tensor([0.0, 0, 0, 1, 0]))
    kernels.gradient(products, targets, rows, wanted, Transform(), products)
    assert (products[[1, 2]] == 0).all() and (products[[0, 3, 4]].abs().sum(1) > 0.5).all()


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
    assert relative(products[1:, 1::2], gradient[1:]) < 1e-6


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
    assert relative(products * 0.7, gradient) < 1e-6


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_shards_of_the_vocabulary(level):
    """Two ranks' columns: partials merge, and each rank's gradient, dense or all entries exact, is its part."""
    products, targets = block(2000, padding=3)
    products[1, :900] -= 300  # a rank without any probability
    _, gradient = truth_of(products, targets, Transform(0.7), coefficients())
    parts = [(products[:, :900], targets.where(targets < 900, -1)), (products[:, 900:], (targets - 900).clamp(min=-1))]
    kernels = [NativeRows(x, sparse=True) for x, _ in parts]
    for k, (x, t) in zip(kernels, parts, strict=True):
        k.partials = k.statistics(x, t, Transform(0.7))
    rows, found = finish(merge([k.partials for k in kernels])), []
    for k, (x, t) in zip(kernels, parts, strict=True):
        given = (x, t, rows, coefficients(), Transform(0.7))
        found.append(dense(k.sparse_gradient(*given, 1e-20, torch.rand(5)), x.shape))
        k.gradient(*given, x)
    assert relative(torch.cat(found, 1), gradient) < 1e-6 and relative(products, gradient) < 1e-6


# --- the sample ------------------------------------------------------------------------------------------------------


def sample(products, threshold, uniforms, on_logp=-1.0):
    """Entries whose values are the sampled probabilities themselves."""
    rows = products.shape[0]
    targets = torch.full((rows,), -1)
    kernels = NativeRows(products, sparse=True)
    kernels._tiles = torch.full((rows, kernels._tiles.shape[1]), math.nan)
    statistics = finish(kernels.statistics(products, targets, Transform()))
    wanted = Coefficients(torch.full((rows,), on_logp))
    return kernels.sparse_gradient(products, targets, statistics, wanted, Transform(), threshold, uniforms)


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


def test_dense_rows_where_they_are_cheaper_whatever_the_uniforms():
    flat, _ = block(5000, rows=8, scale=0.1)
    peaked, _ = block(5000, rows=8, scale=12)
    for u in (0.0, 0.5, 0.999):
        assert sample(flat, 2**-13, torch.full((8,), u)) is None
        assert sample(peaked, 2**-13, torch.full((8,), u)) is not None
        assert sample(flat, 2**-13, torch.full((8,), u), on_logp=0.0).row.numel() == 0


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
    kernels = NativeRows(torch.empty(0, 40), sparse=True)
    nothing = Entries(*(torch.empty(0, dtype=t) for t in (torch.int32, torch.int32, torch.float32)))
    kernels.add_times_weight(nothing, torch.ones(40, 8), torch.empty(0, 8))
    kernels.add_transposed_times(nothing, torch.ones(0, 8), torch.empty(40, 8))
    products, targets = torch.empty(0, 40), torch.empty(0, dtype=torch.int64)
    rows = finish(kernels.statistics(products, targets, Transform()))
    wanted = Coefficients(torch.empty(0))
    kernels.gradient(products, targets, rows, wanted, Transform(), products)
    found = kernels.sparse_gradient(products, targets, rows, wanted, Transform(), 2**-7, torch.empty(0))
    assert [t.shape for t in found] == [(0,)] * 3


# --- levels, threads, operators --------------------------------------------------------------------------------------


def everything(vocab=3001):
    """What all sweeps and products say of one block."""
    products, targets = block(vocab, rows=20, scale=3, offset=1)
    kernels = NativeRows(products, sparse=True)
    kernels._tiles = torch.zeros(20, kernels._tiles.shape[1])
    rows, wanted = finish(kernels.statistics(products, targets, Transform(0.9))), coefficients(20)
    entries = kernels.sparse_gradient(
        products, targets, rows, wanted, Transform(0.9), 2**-9, torch.linspace(0, 0.99, 20)
    )
    dx, dw, g = torch.zeros(20, 24), torch.zeros(vocab, 24), torch.Generator().manual_seed(4)
    kernels.add_times_weight(entries, torch.randn(vocab, 24, generator=g), dx)
    kernels.add_transposed_times(entries, torch.randn(20, 24, generator=g), dw)
    kernels.gradient(products, targets, rows, wanted, Transform(0.9), products)
    return [rows.logps[:-1], *rows[1:], products, dx, dw]


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_levels_agree(monkeypatch):
    found = {}
    for name in LEVELS:
        monkeypatch.setenv("AAPO_FAST_NATIVE_LEVEL", name)
        found[name] = everything()
    for name in LEVELS[1:]:
        gaps = [relative(a, b) for a, b in zip(found[name], found[LEVELS[0]], strict=True)]
        # In the sparse products a dust entry that stands on a rounding tie may move to its neighbour.
        assert max(gaps[:-2]) < 1e-6 and max(gaps[-2:]) < 1e-3


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_the_same_bits_at_every_number_of_threads_and_every_run(level):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(everything(9001))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def operator_calls():
    products, targets = block(70, rows=3)
    given = targets, torch.ones(3), 1.0, 30.0
    tiles, vector, wanted = torch.rand(3, 5), torch.rand(3), torch.rand(6, 3)
    row, value = torch.zeros(2, dtype=torch.int32), torch.rand(2)
    sampled = wanted, tiles, vector, 0.1
    return {
        "statistics": (products, *given, torch.empty(4, 3), tiles),
        "gradient": (products, *given, wanted),
        "both_sweeps": (products, *given, vector, torch.empty(4, 3)),
        "count_entries": (products, *given, *sampled, torch.zeros(3, dtype=torch.int64), vector.double()),
        "emit_entries": (products, *given, *sampled, torch.tensor([0, 1, 1, 2]), row, row.clone(), value),
        "add_times_weight": (row, row.clone(), value, torch.rand(4, 5), torch.zeros(2, 5)),
        "add_transposed_times": (row, row.clone(), value, torch.rand(2, 5), torch.zeros(4, 5)),
        "exp": (vector, torch.empty(3)),
    }


@pytest.mark.parametrize("name", list(operator_calls()))
def test_operators_pass_opcheck_and_compile(name, level):
    torch._dynamo.reset()
    operator = getattr(native.operators(), name).default
    arguments = (*operator_calls()[name], native.level())
    torch.library.opcheck(operator, arguments)
    eager, compiled = ([a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2))
    operator(*eager)
    torch.compile(operator, backend="aot_eager", fullgraph=True)(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True) if isinstance(a, torch.Tensor))


def test_what_operators_refuse():
    run_, (row, column, value, weight, out) = native.operators(), operator_calls()["add_times_weight"]
    with pytest.raises(RuntimeError, match="outside the 2 rows or 4 columns"):
        run_.add_times_weight(row, column + 4, value, weight, out, 0)
    with pytest.raises(RuntimeError, match="outside the 4 rows or 2 columns"):
        run_.add_transposed_times(row - 1, column, value, weight, out, 0)
    with pytest.raises(RuntimeError, match="row by row"):
        run_.add_times_weight(torch.tensor([1, 0], dtype=torch.int32), column, value, weight, out, 0)
    with pytest.raises(RuntimeError, match="dense factor must be Float, BFloat16 or Half, not Double"):
        run_.add_times_weight(row, column, value, weight.double(), out, 0)
    arguments = operator_calls()["emit_entries"]
    with pytest.raises(RuntimeError, match="starts must ascend"):
        run_.emit_entries(*arguments[:9], torch.tensor([0, 3, 1, 2]), *arguments[10:], 0)
    products, *rest = operator_calls()["statistics"]
    for wrong in (products.double(), products.t(), products[0]):
        with pytest.raises(RuntimeError, match="aapo_fast_native: "):
            run_.statistics(wrong, *rest, 0)
    with pytest.raises(RuntimeError, match="a target is not below the number of columns, 70"):
        run_.statistics(products, torch.tensor([1, 70, -1]), *rest[1:], 0)
    with pytest.raises(RuntimeError, match="cannot run level 7"):
        run_.statistics(products, *rest, 7)
    with pytest.raises(ValueError, match="computes in fp32, not torch.float64; use implementation='torch'"):
        NativeRows(torch.empty(2, 3, dtype=torch.float64))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_why_it_cannot_be_loaded(monkeypatch, tmp_path):
    assert "without it (to build it: make native" in native._load(tmp_path)
    (tmp_path / "_native.txt").write_text("no C++ compiler\n")
    assert native._load(tmp_path).startswith("not built: no C++ compiler (to build it:")
    (tmp_path / "_native.abi3.so").write_bytes(b"no library")
    assert native._load(tmp_path).startswith(f"cannot be loaded with torch {torch.__version__}: ")
    monkeypatch.setattr(native, "INTERFACE", -1)
    assert "other sources" in native._load(native._FOLDER)
    monkeypatch.setenv("AAPO_FAST_NATIVE", "off")
    assert native._load(native._FOLDER) == "switched off by AAPO_FAST_NATIVE=off"
    monkeypatch.setattr(native, "why_not", lambda: "no luck")
    assert native.describe() == "native kernels: no luck"
    with pytest.raises(RuntimeError, match="not available: no luck"):
        native.operators()


def test_what_is_said_of_it(monkeypatch):
    assert LEVELS[-1] == "plain" and f"{LEVELS[0]} runs here (of {', '.join(LEVELS)})" in native.describe()
    monkeypatch.setenv("AAPO_FAST_NATIVE_LEVEL", "sse9")
    with pytest.raises(ValueError, match="AAPO_FAST_NATIVE_LEVEL='sse9' cannot run here; use one of .*plain"):
        native.level()


# --- the whole pass --------------------------------------------------------------------------------------------------


@pytest.fixture
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 5)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("name", list(objectives(4)))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_as_accurate_as_eager_fp32(variant, name):
    inputs, options = variant_problem(variant, 13, 8, 101, dtype=torch.float32)
    wide = [None if t is None else t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    objective = objectives(13)[name]
    truth, true_grads = run("reference", wide, objective, upstream=1.7, **options)
    _, eager = run("reference", inputs, objective, upstream=1.7, **options)
    ours, grads = run("native", inputs, objective, upstream=1.7, **options)
    assert relative(ours.loss, truth.loss) < 2e-6
    for a, b in ((ours.logps, truth.logps), (ours.entropy, truth.entropy)):
        assert torch.equal(a.isnan(), b.isnan()) and relative(a.nan_to_num(), b.nan_to_num()) < 1e-6
    for grad, true_grad, plain in zip(grads, true_grads, eager, strict=True):
        assert relative(grad, true_grad) < max(1e-6, 1.5 * relative(plain, true_grad))


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_at_the_rounding_floor(kind, dtype, level):
    data = accuracy.make(kind, 48, 32, 997, dtype)
    assert not accuracy.complaints(data, accuracy.results(data, "native"), accuracy.truth(data))


@pytest.mark.usefixtures("several_chunks", "sparse_whatever_it_costs")
@pytest.mark.parametrize("name", ["aapo", "user's, of all three"])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_sparse_gradients_are_those_of_the_torch_implementation(variant, name):
    inputs, options = variant_problem(variant, 13, 8, 1009, dtype=torch.float32)
    options |= {"backward": "sparse", "sparsity_threshold": 2**-7, "seed": 5}
    _, ours = run("native", inputs, objectives(13)[name], **options)
    _, truth = run("torch", inputs, objectives(13)[name], **options)
    assert all(relative(a, b) < 2e-3 for a, b in zip(ours, truth, strict=True))


@pytest.mark.usefixtures("several_chunks")
def test_the_pass_in_one_compiled_graph():
    assert dispatch.resolve("auto", torch.device("cpu")) == "native"
    inputs = problem(20, 8, 101, dtype=torch.float32)
    step = lambda x, w: af.linear_policy_loss(x, w, inputs[2], af.SFT(20.0), implementation="native").loss  # noqa: E731
    assert relative(torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs[:2]), step(*inputs[:2])) < 1e-6
