"""The native extension: levels, threads, operators, loading, and the whole pass on its row kernels."""

import subprocess
import sys
from pathlib import Path

import accuracy
import pytest
import torch
from native_support import block, coefficients
from op_support import VARIANTS, objectives, problem, relative, run, variant_problem

import aapo_fast as af
from aapo_fast.ops import dispatch, native
from aapo_fast.ops.linear_policy import sizes
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Transform, finish

if native.why_not() is not None:
    pytest.skip(native.describe(), allow_module_level=True)

LEVELS = native.available_levels()


# --- levels, threads, operators --------------------------------------------------------------------------------------


def everything(vocab=3001):
    """What all sweeps and products say of one block."""
    products, targets = block(vocab, rows=20, scale=3, offset=1)
    kernels, how = NativeRows(products), Transform(0.9)
    rows, wanted = finish(kernels.statistics(products, targets, how)), coefficients(20)
    sampled = kernels.sample(products, targets, how, rows, wanted.live(), 2**-9, torch.linspace(0, 0.99, 20))
    entries = sampled.entries(rows, wanted)
    dx, dw, g = torch.zeros(20, 24), torch.zeros(vocab, 24), torch.Generator().manual_seed(4)
    kernels.add_times_weight(entries, torch.randn(vocab, 24, generator=g), dx)
    kernels.add_transposed_times(entries, torch.randn(20, 24, generator=g), dw)
    kernels.gradient(products, targets, rows, wanted, Transform(0.9), products)
    return [rows.logps[:-1], *rows[1:], products, dx, dw]


THREADS = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from aapo_fast.ops import native
x = torch.empty(1 << 22)  # filling it would start PyTorch's threads
before = len(os.listdir("/proc/self/task"))
native.operators().exp(x, torch.empty_like(x), native.level())
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list its threads")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_as_many_threads_as_pytorch_is_told(threads):
    said = subprocess.run([sys.executable, "-c", THREADS, str(threads)], capture_output=True, text=True, check=True)
    assert int(said.stdout) == threads - 1  # beside the one that asks


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
    tiles, vector, wanted = torch.rand(3, 5), torch.rand(3), (torch.full((3,), 90.0), *torch.rand(4, 3), None)
    row, value = torch.zeros(2, dtype=torch.int32), torch.rand(2)
    found, live = (torch.zeros(3, 12, dtype=torch.int32), torch.rand(3, 12)), torch.tensor([True, False, True])
    starts, dense = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    return {
        "statistics": (products, *given, torch.empty(4, 3), tiles),
        "gradient": (products, *given, *wanted),
        "both_sweeps": (products, *given, vector, torch.empty(4, 3)),
        "sample_entries": (
            products,
            *given,
            *wanted[:2],
            live,
            tiles,
            vector,
            0.1,
            2,
            100.0,
            *found,
            starts,
            dense,
        ),
        "sparse_sweeps": (
            products,
            *given,
            live,
            torch.empty(4, 3),
            tiles[:2],
            vector,
            0.1,
            2,
            100.0,
            *found,
            starts,
            dense,
        ),
        "pack_entries": (
            products,
            *given,
            *wanted,
            *found,
            torch.tensor([0, 1, 1, 2]),
            row,
            row.clone(),
            value,
            starts[:1],
        ),
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


def test_every_operator_is_among_them():
    assert set(operator_calls()) == set(native._OPERATORS)


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
    given = operator_calls()["pack_entries"]
    (*rows, column, p, starts), packed = given[:-4], given[-4:]
    for wrong in ([0, 2, 1, 2], [0, 1, 1, 1], [1, 1, 1, 2], [0, 0, 2, 2]):
        with pytest.raises(RuntimeError, match="starts must ascend"):
            run_.pack_entries(*rows, column[:, :1].clone(), p[:, :1].clone(), torch.tensor(wrong), *packed, 0)
    for column_of_one in (-1, 70):
        with pytest.raises(RuntimeError, match="an entry lies outside the 70 columns"):
            run_.pack_entries(*rows, torch.full_like(column, column_of_one), p, starts, *packed, 0)
    with pytest.raises(RuntimeError, match="room for 3 rows"):
        run_.pack_entries(*rows, column[:2], p[:2], starts, *packed, 0)
    products, *rest = operator_calls()["statistics"]
    for wrong in (products.double(), products.t(), products[0]):
        with pytest.raises(RuntimeError, match="aapo_fast_native: "):
            run_.statistics(wrong, *rest, 0)
    with pytest.raises(RuntimeError, match="a target is not below the number of columns, 70"):
        run_.statistics(products, torch.tensor([1, 70, -1]), *rest[1:], 0)
    products, *rest = operator_calls()["sparse_sweeps"]
    for wrong, match in (
        (rest[6][:0], "tiles must have a row"),
        (rest[6][0], "tiles must be a matrix"),
        (rest[6][:, :4], "tiles must have 5 columns"),
    ):
        with pytest.raises(RuntimeError, match=match):
            run_.sparse_sweeps(products, *rest[:6], wrong, *rest[7:], 0)
    for block_rows, match in (
        (0, "block_rows must be at least 1"),
        (1, "dense must be a contiguous vector of 3 numbers"),
    ):
        with pytest.raises(RuntimeError, match=match):
            run_.sparse_sweeps(products, *rest[:9], block_rows, *rest[10:], 0)
    products, *rest = operator_calls()["sample_entries"]
    with pytest.raises(RuntimeError, match="tiles must have a row for each of products"):
        run_.sample_entries(products, *rest[:7], rest[7][:2], *rest[8:], 0)
    products, *rest = operator_calls()["statistics"]
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
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 5)


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


@pytest.mark.usefixtures("several_chunks", "widened")
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
