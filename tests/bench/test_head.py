"""The harness: wrong methods are found, what breaks is a row, time runs out politely, ratios are of the same round."""

import math
from dataclasses import replace

import bench_support as support
import pytest
import torch
from bench_support import CPU, TINY, altered

from aapo_fast.bench import clock, head, memory, methods, results, work
from aapo_fast.bench.inputs import make_problem
from aapo_fast.bench.method import obstacle
from aapo_fast.bench.shapes import HEADS, Case

pytestmark = pytest.mark.usefixtures("quick_memory")


def rows_of(*more, names=("naive",), **options):
    result = head.measure([TINY], support.settings(list(names), *more, **options))
    return {row.method: row for row in result.cases[0].rows}


@pytest.mark.parametrize(
    "change", [support.one_per_cent_too_large, support.flipped, support.nothing, support.nan], ids=lambda f: f.__name__
)
def test_a_wrong_gradient_is_found(change):
    row = rows_of(altered(change))["altered"]
    assert row.status == "wrong gradient" and "naive" in row.reason


def test_a_dropped_chunk_is_found():
    row = rows_of(support.SHORT)["short"]
    assert row.status == "wrong gradient" and row.errors["d_weight"]["error"] > 0.05


def test_an_unbiased_sample_may_scatter_but_not_lean():
    def scatter(problem):
        problem.weight.grad += problem.weight.grad.square().mean().sqrt() * 0.05 * torch.randn_like(problem.weight.grad)

    torch.manual_seed(0)
    assert rows_of(altered(scatter, sampled=True))["altered"].status == "ok"
    assert rows_of(altered(scatter))["altered"].status == "wrong gradient"
    assert rows_of(altered(support.one_per_cent_too_large, sampled=True))["altered"].status == "wrong gradient"


def test_ours_and_the_peers_that_run_here_are_right():
    rows = rows_of(names=("exact", "sparse-13", "logprobs", *(peer.name for peer in methods.PEERS[:4])))
    for row in rows.values():
        assert row.status == "ok" and row.timing["milliseconds"] > 0, row
        # A sample at 2^-13 promises what dense rows in bf16 give, which are off by up to 2^-9 of an entry.
        most = 2**-9 if row.method == "sparse-13" else 1e-4
        assert row.kind == "floor" or row.errors["d_weight"]["error"] < most
    assert rows["exact"].implementation and rows["exact"].extra_memory_bytes == 2**20
    assert rows["3G"].timing["ratio_to_3G"] == 1


def test_what_breaks_is_a_row():
    rows = rows_of(
        support.raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB"), "large"),
        support.raises(ZeroDivisionError("oops\nmore"), "broken"),
    )
    assert rows["large"].status == "out of memory" and "40 GiB" in rows["large"].reason
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "ZeroDivisionError: oops")
    assert rows["naive"].status == "ok" and rows["naive"].timing


def test_a_child_without_memory_is_a_row(monkeypatch):
    def full(case, name, seed):
        raise MemoryError(f"{name} does not fit")

    monkeypatch.setattr(memory, "peak_on_cpu", full)
    row = rows_of()["naive"]
    assert row.status == "out of memory" and not row.timing


def test_unavailable_peers_say_why():
    rows = rows_of(names=("naive", "liger-ce", "cce"))
    for name in ("liger-ce", "cce"):
        assert rows[name].status == "unavailable" and rows[name].reason


def test_no_time_leaves_everything_out():
    result = head.measure([TINY], support.settings(["naive"], minutes=1e-9))
    assert result.cases == [] and result.left_out == [TINY.label]


def test_time_that_runs_out_leaves_out_peers_and_finishes_ours(monkeypatch):
    class Soon(clock.Deadline):
        asked = 0

        @property
        def seconds_left(self):
            Soon.asked += 1
            return 100.0 if Soon.asked < 4 else -1.0

    monkeypatch.setattr(clock, "Deadline", Soon)
    result = head.measure([TINY, TINY], support.settings(["exact", "naive", "torch"]))
    assert len(result.cases) == 1 and result.left_out == [TINY.label]
    rows = {row.method: row for row in result.cases[0].rows}
    assert rows["torch"].status == "left out" and not rows["torch"].timing
    assert rows["exact"].status == "ok" and len(rows["exact"].timing["times_milliseconds"]) == 1


def test_a_broken_device_ends_the_run(monkeypatch):
    """Played: the device dies at the second synchronisation, after a method that failed."""

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def see(self, row):
        self.device = torch.device("cuda")
        original(self, row)

    original = work.Work.see_that_the_device_lives
    monkeypatch.setattr(work.Work, "see_that_the_device_lives", see)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    bad = support.raises(RuntimeError("CUDA error"), "bad")
    result = head.measure([TINY, TINY], support.settings(["exact"], bad))
    assert result.broken_by == "bad" and len(result.cases) == 1 and result.left_out == [TINY.label]
    rows = {row.method: row for row in result.cases[0].rows}
    assert rows["bad"].status == "failed" and rows["exact"].reason == "bad broke the device"


def test_ratios_are_of_the_same_round(monkeypatch):
    times = {"3G": iter([9.0, 1.0, 2.0, 4.0]), "x": iter([9.0, 2.0, 5.0, 8.0])}  # the first round is not counted
    monkeypatch.setattr(clock, "seconds_of", lambda run, problem: next(times[run]))
    problem = make_problem(TINY, CPU)
    timing = clock.alternate({"3G": "3G", "x": "x"}, problem, 3, 1, clock.Deadline(None))
    assert timing.seconds == {"3G": [1.0, 2.0, 4.0], "x": [2.0, 5.0, 8.0]}
    summary = clock.summary(timing.seconds["x"], timing.seconds["3G"])
    assert summary["ratio_to_3G"] == 2.0 and summary["milliseconds"] == 5000
    assert summary["spread_milliseconds"] == [2000, 8000]


def test_rounds_have_orders_of_their_own(monkeypatch):
    order = []
    monkeypatch.setattr(clock, "seconds_of", lambda run, problem: order.append(run) or 1.0)
    clock.alternate({name: name for name in "abcd"}, make_problem(TINY, CPU), 5, 1, clock.Deadline(None))
    rounds = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 6 and all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 2


def test_a_method_that_breaks_later_leaves_the_rounds(monkeypatch):
    calls = []

    def seconds_of(run, problem):
        calls.append(run)
        if run == "x" and len(calls) > 4:
            raise MemoryError("no more")
        return 1.0

    monkeypatch.setattr(clock, "seconds_of", seconds_of)
    timing = clock.alternate({"3G": "3G", "x": "x"}, make_problem(TINY, CPU), 3, 1, clock.Deadline(None))
    assert timing.seconds == {"3G": [1.0] * 3} and isinstance(timing.failures["x"], MemoryError)


def test_errors_of_large_cases_are_measured_on_fewer_rows(monkeypatch):
    assert work.error_rows(TINY, CPU) == 64
    big = Case(HEADS["qwen3-8b"], 65536, "bfloat16", "model-like")
    assert work.error_rows(big, CPU) == 128 and work.error_rows(big, torch.device("cuda")) == 16384
    monkeypatch.setitem(work.TRUTH_FLOPS, "cpu", 3 * 2 * 16 * 211 * 70.0)
    result = head.measure([replace(TINY, rows=128)], support.settings(["naive"])).cases[0]
    assert result.error_rows == 64 and result.shape[0] == 128 and math.isfinite(result.rows[1].errors["logps"]["rms"])


def test_the_file_is_complete_and_comes_back(tmp_path):
    path = tmp_path / "head.json"
    result = head.measure([TINY], support.settings(["exact"], notes=["careful"], command="aapo-fast bench head"), path)
    back = results.load(path)
    assert back == result
    assert back.machine["torch"] and back.machine["processor"] and back.notes == ["careful"]
    assert {"error", "one_minus_cosine", "worst_row", "bias"} <= set(back.cases[0].rows[1].errors["d_hidden"])


def test_floors_multiply_what_they_should():
    problem = make_problem(TINY, CPU)
    [three] = methods.find(["3G"])
    assert obstacle(three, problem) == ""
    three.build(problem)()
    assert problem.hidden.grad is None
