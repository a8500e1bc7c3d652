"""The table of errors: its floor is the floor, sparse rows are unbiased."""

import bench_support as support
import pytest
from bench_support import CPU

from aapo_fast.bench import accuracy, methods, results
from aapo_fast.bench.shapes import Case, Head

WIDE = Case(Head("wide", 32, 20011), 128, "float32", "model-like")


def test_floor_yardstick_and_draws(tmp_path, monkeypatch):
    made = support.settings([])
    made.methods = methods.find(["exact", "sparse-12", "naive", "cce"])
    data = [accuracy.synthetic(WIDE, CPU, 0)]
    result = accuracy.measure(data, made, tmp_path / "accuracy.json")
    rows = {row.method: row for row in result.cases[0].rows}
    assert rows["floor"].errors["d_weight"]["error"] < 1e-7 < rows["exact"].errors["d_weight"]["error"] < 1e-5
    assert 5e-4 < rows["dense-bfloat16"].errors["d_hidden"]["error"] < 5e-3
    assert rows["cce"].status == "unavailable" and rows["naive"].status == "ok"
    sparse = rows["sparse-12"].errors
    for name in ("d_hidden", "d_weight"):
        assert 1e-4 < sparse[name]["error"] < 1e-2
        assert sparse[name]["error_of_mean"] < 0.6 * sparse[name]["error"]  # eight draws: 0.35 if unbiased


def test_a_killed_run_leaves_its_rows(tmp_path, monkeypatch):
    real, output = accuracy._errors, tmp_path / "accuracy.json"

    def dies(method, yardstick):
        if method.name == "sparse-13":
            raise KeyboardInterrupt
        return real(method, yardstick)

    monkeypatch.setattr(accuracy, "_errors", dies)
    made = support.settings([])
    made.methods = methods.find(["exact", "cce", "sparse-13"])
    with pytest.raises(KeyboardInterrupt):
        accuracy.measure([accuracy.synthetic(WIDE, CPU, 0)], made, output)
    [case] = results.load(output).cases
    assert [row.method for row in case.rows] == ["floor", "dense-bfloat16", "exact", "cce"]
    assert case.rows[2].errors["d_weight"]["error"] < 1e-5
