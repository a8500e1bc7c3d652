"""Where the time of the fused loss goes on one GPU: floors by kind of product, our kernels alone, the pass by kernel.

    PYTHONPATH=. python3 benchmarks/gpu_profile.py            every section, in the order below
    PYTHONPATH=. python3 benchmarks/gpu_profile.py --sections products pass --shape 4096,4096,128256 --json profile.json

Sections: ``products`` (bare products by rows and output), ``pass`` (ours beside the floors), ``budgets`` (the pass by
the size of its buffers), ``profile`` (the pass by kernel), ``sweeps`` and ``gathers`` (the row kernels and the sparse
products by their constants), ``crossover`` (sparse against dense rows by entropy). All bf16, medians, milliseconds.

Letters: N rows, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

import aapo_fast as af
from aapo_fast.bench import builtin, clock, inputs, machine, shapes
from aapo_fast.ops.linear_policy import chunked, kernels_triton, rows_triton, sparse_triton, targets_triton
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, SparseProduct, Transform, finish

GOALS = ("8192,4096,151936", "4096,4096,128256", "16384,2048,248320")


def milliseconds(function, *arguments, **options):
    """Median of five calls after one that does not count, by device events."""
    function(*arguments, **options)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*arguments, **options)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def problem_of(shape, distribution="model-like"):
    [case] = shapes.cases([shape], [], ["bfloat16"], [distribution])
    return inputs.make_problem(case, torch.device("cuda"))


def copy(_):
    """Bytes read and written a second, on 4 GiB."""
    a = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    ms = milliseconds(b.copy_, a)
    return [{"copy of 4 GiB": ms, "TB/s": 2 * a.numel() * 4 / ms / 1e9}]


def products(shape):
    """Each product of the pass, by rows and by what comes out."""
    _, h, v = map(int, shape.split(","))
    w = torch.randn(v, h, device="cuda").bfloat16()
    return [{"rows": c, **_products_of(c, w)} for c in (256, 512, 1024, 1280, 1536, 2048, 3072, 4096)]


def _products_of(c, w):
    v, h = w.shape
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x, d = torch.randn(c, h, device="cuda").bfloat16(), torch.randn(c, v, device="cuda").bfloat16()
    z, dx, dw = (torch.empty(shape, device="cuda") for shape in ((c, v), (c, h), (v, h)))
    wide = {"out_dtype": torch.float32}
    found = {
        "Z bf16": milliseconds(torch.mm, x, w.t(), out=torch.empty(c, v, **make)),
        "Z fp32": milliseconds(torch.mm, x, w.t(), **wide, out=z),
        "dX bf16": milliseconds(torch.mm, d, w, out=torch.empty(c, h, **make)),
        "dX fp32": milliseconds(torch.mm, d, w, **wide, out=dx),
        "dW bf16": milliseconds(torch.mm, d.t(), x, out=torch.empty(v, h, **make)),
        "dW fp32": milliseconds(torch.mm, d.t(), x, **wide, out=dw),
        "dW fp32 +=": milliseconds(torch.addmm, dw, d.t(), x, **wide, out=dw),
    }
    return {**found, "TFLOP/s at Z bf16": 2 * c * h * v / found["Z bf16"] / 1e9}


def our_runs(problem, names=("exact", "sparse-13", "logprobs")):
    options = {"exact": {}, "sparse-13": {"backward": "sparse", "sparsity_threshold": 2.0**-13}}
    runs = {"1G": builtin.bare_products(1)(problem), "3G": builtin.bare_products(3)(problem)}
    for name in names:
        made = builtin.logprobs() if name == "logprobs" else builtin.policy_loss(**options[name])
        runs[name] = made(problem)
    return runs


def timed(problem, runs, rounds=6):
    timing = clock.alternate(runs, problem, rounds, 2, clock.Deadline(None))
    floor = timing.seconds["3G"]
    row = {}
    for name, seconds in timing.seconds.items():
        summary = clock.summary(seconds, floor)
        row[f"{name} ms"], row[f"{name} of 3G"] = summary["milliseconds"], summary["ratio_to_3G"]
    for name, error in timing.failures.items():
        row[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def whole_pass(shape):
    found = []
    for goal in dict.fromkeys((shape, *GOALS)):
        problem = problem_of(goal)
        found.append({"shape": goal, **timed(problem, our_runs(problem))})
        del problem
        torch.cuda.empty_cache()
    return found


def budgets(shape):
    """The exact and the sparse pass by GiB of buffers."""
    problem, found = problem_of(shape), []
    for gib in (0.5, 1, 1.5, 2, 4):
        with patch.object(chunked, "gpu_budget", lambda weight_bytes, gib=gib: int(gib * 2**30)):
            row = timed(problem, our_runs(problem, ("exact", "sparse-13")), rounds=4)
            found.append({"GiB": gib, **row})
    return found


def profile(shape):
    """Device time by kernel, and the wall time of the same pass."""
    problem = problem_of(shape)
    return [row for name, run in our_runs(problem, ("exact", "sparse-13")).items() if name != "1G"
            for row in _profile_of(name, run, problem)]  # fmt: skip


def _profile_of(name, run, problem):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    wall = min(clock.seconds_of(run, problem) for _ in range(3)) * 1e3
    problem.clear_gradients()
    with profiler(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    rows = [
        ("(wall, without the profiler)", [wall]),
        ("(sum of all kernels)", [t for times in kernels.values() for t in times]),
    ]
    rows += sorted(kernels.items(), key=lambda item: -sum(item[1]))[:16]
    return [{"method": name, "ms": sum(times), "times": len(times), "kernel": kernel[:90]} for kernel, times in rows]


def panel(shape, rows=512, distribution="model-like"):
    """Logits of a panel, its targets, and all that its sweeps want."""
    _, h, v = map(int, shape.split(","))
    problem = problem_of(f"{rows},{h},{v}", distribution)
    z = torch.mm(problem.hidden.detach(), problem.weight.detach().t(), out_dtype=torch.float32)
    return problem, z, problem.targets


def sweeps(shape):
    """Row kernels over one panel by (BLOCK, warps); a read of it and a copy to bf16 are their floors."""
    _, z, targets = panel(shape)
    out = torch.empty_like(z, dtype=torch.bfloat16)
    found = [{"floors": "", "read": milliseconds(z.amax, 1), "to bf16": milliseconds(out.copy_, z)}]
    for block, warps in ((4096, 8), (8192, 8), (8192, 16), (2048, 4), (4096, 4), (2048, 8)):
        with ExitStack() as stack:
            for module in (kernels_triton, rows_triton):
                stack.enter_context(patch.object(module, "BLOCK", block))
            stack.enter_context(patch.object(kernels_triton, "NUM_WARPS", warps))
            found.append({"BLOCK": block, "warps": warps, **_sweeps_of(z, targets, out, block)})
    return found


def _sweeps_of(z, targets, out, block):
    plain, tiled = (rows_triton.TritonRows(z, sparse=sparse) for sparse in (False, True))
    given = z, targets
    stats = finish(plain.statistics(*given, Transform()))
    wanted = Coefficients(torch.full_like(stats.logps, 1e-4))
    both = (
        kernels_triton.both_sweeps_kernel, *given, Transform(), wanted.logps[:1], torch.zeros_like(targets), out,
        out.stride(0), z.new_empty(4, len(z)), len(z),
    )  # fmt: skip
    return {
        "statistics": milliseconds(plain.statistics, *given, Transform()),
        "statistics, tiles": milliseconds(tiled.statistics, *given, Transform()),
        "gradient": milliseconds(plain.gradient, *given, stats, wanted, Transform(), out),
        "both": milliseconds(kernels_triton.launch, *both, APART=True, BLOCK=block),
    }


def sample(shape, rows, distribution="model-like", threshold=2.0**-13):
    problem, z, targets = panel(shape, rows, distribution)
    kernels = rows_triton.TritonRows(z, sparse=True)
    stats = finish(kernels.statistics(z, targets, Transform()))
    wanted = Coefficients(torch.full_like(stats.logps, 1e-4))
    walk = (z, targets, kernels._tiles, stats, wanted, Transform(), threshold)
    uniforms = torch.rand(rows, device="cuda")
    plan = sparse_triton.count(*walk, uniforms)
    made = sparse_triton.emit(*walk, plan, int(plan.starts[-1]))
    times = {
        "count": milliseconds(sparse_triton.count, *walk, uniforms),
        "emit": milliseconds(sparse_triton.emit, *walk, plan, made.row.numel()),
    }
    return problem, made, times


def gathers(shape):
    """Sampling 512 rows by SECTION; the sparse products over 2048 rows' entries by (GROUP, WIDTH)."""
    found = []
    for section in (8, 16, 32, 64):
        with patch.object(sparse_triton, "SECTION", section):
            _, made, times = sample(shape, 512)
            found.append({"SECTION": section, "entries a row": made.row.numel() / 512, **times})
    problem, made, _ = sample(shape, 2048)
    x, w = problem.hidden.detach(), problem.weight.detach()
    dx, dw = torch.zeros(x.shape, device="cuda"), torch.zeros(w.shape, device="cuda")
    entries = Entries(*made)
    lines = sparse_triton.transposed(entries, len(w))
    value, one = torch.rand(len(x), device="cuda", dtype=torch.float64), torch.ones((), device="cuda")
    found.append({
        "entries": made.row.numel(), "sort of entries": milliseconds(torch.sort, made.column, stable=True),
        "zero dW": milliseconds(dw.zero_), "dW to bf16": milliseconds(torch.empty_like(w).copy_, dw),
        "dW of the targets": milliseconds(targets_triton.add_transposed_times, value, problem.targets, x, dw),
    })  # fmt: skip
    for held in ((8, 1024), (16, 1024), (8, 512), (4, 1024), (2, 2048), (1, 2048), (1, 4096), (2, 1024)):
        with patch.object(sparse_triton, "WHOLE_ROWS", held), patch.object(sparse_triton, "COLUMNS", held):
            found.append({
                "entries and columns": held,
                "dX": milliseconds(sparse_triton.add_times_weight, entries, w, dx),
                "dW +=": milliseconds(sparse_triton.add_transposed_times, entries, x, dw),
                "dW bf16": milliseconds(sparse_triton.made, SparseProduct(*lines, x), one, torch.bfloat16),
            })  # fmt: skip
    return found


def crossover(shape):
    """By entropy: entries a row as a share of V; sampling and sparse products against sweep 2 and two dense ones."""
    problem, z, targets = panel(shape, 1024)
    return [_crossover_of(problem, z * scale, targets) for scale in (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)]


def _crossover_of(problem, z, targets):
    rows, v = z.shape
    x, w = problem.hidden.detach(), problem.weight.detach()
    kernels = rows_triton.TritonRows(z, sparse=True)
    stats = finish(kernels.statistics(z, targets, Transform()))
    sweep = (z, targets, stats, Coefficients(torch.full_like(stats.logps, 1e-4)), Transform())
    uniforms, d = torch.rand(rows, device="cuda"), torch.empty_like(z, dtype=torch.bfloat16)
    dx, dw = torch.zeros(x.shape, device="cuda"), torch.zeros(w.shape, device="cuda")

    def sparse():
        kernels.statistics(z, targets, Transform())  # it leaves the tiles; counted for both
        entries = kernels.sparse_gradient(*sweep, 2.0**-13, uniforms)()
        kernels.add_times_weight(entries, w, dx)
        kernels.add_transposed_times(entries, x, dw)
        return entries.row.numel()

    def dense():
        kernels.statistics(z, targets, Transform())
        kernels.gradient(*sweep, d)
        torch.mm(d, w, out_dtype=torch.float32, out=dx)
        torch.addmm(dw, d.t(), x, out_dtype=torch.float32, out=dw)

    with patch.object(sparse_triton, "DENSE_SHARE", 10.0):
        entries, ms = sparse(), {"sparse": milliseconds(sparse), "dense": milliseconds(dense)}
    return {
        "entropy": stats.entropy.mean().item(), "entries a row": entries / rows, "share": entries / rows / v, **ms,
        "ratio": ms["sparse"] / ms["dense"],
    }  # fmt: skip


SECTIONS = {
    "copy": copy, "products": products, "pass": whole_pass, "profile": profile, "sweeps": sweeps, "gathers": gathers,
    "budgets": budgets, "crossover": crossover,
}  # fmt: skip


def shown(row):
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--shape", default=GOALS[0], help="N,H,V")
    parser.add_argument("--seconds", type=float, default=1e9, help="no section is begun after so many")
    parser.add_argument("--json", type=Path, help="where everything is written")
    arguments = parser.parse_args()
    start = time.monotonic()
    record = {"machine": machine.describe("triton"), "version": af.__version__, "sections": {}}
    print(json.dumps(record["machine"]), flush=True)
    for name in arguments.sections:
        if time.monotonic() - start > arguments.seconds:
            print(f"== {name}: left out, no time", flush=True)
            continue
        print(f"== {name} {arguments.shape} ({time.monotonic() - start:.0f} s)", flush=True)
        try:
            rows = SECTIONS[name](arguments.shape)
        except Exception:  # one section's failure is printed, the others are measured all the same
            traceback.print_exc()
            continue
        finally:
            torch.cuda.empty_cache()
        record["sections"][name] = rows
        print(*map(shown, rows), sep="\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
