"""The train step's benchmark, with tiny models on a CPU: the same code as on a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def test_heads_agree_and_every_one_has_its_row(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_train_step.py", "--device", "cpu", "--tiny", "--rounds", "1"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [*command, "--json", tmp_path / "step.json", "--heads", "exact", "decoder", "naive", "sparse", "liger-ce-none"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "step.json").read_text())
    assert [model["model"] for model in record["models"]] == ["tiny", "tiny-bf16"]
    for model in record["models"]:
        heads = model["heads"]
        assert [heads[name]["status"] for name in ("exact", "decoder", "naive", "sparse")] == ["ok"] * 4
        assert heads["liger-ce-none"]["status"] == "unavailable"
        assert heads["naive"]["apart"]["loss"] < 1e-2 and heads["naive"]["apart"]["head error"] < 5e-2
        assert heads["sparse"]["apart"]["loss"] == 0.0
    assert [row["status"] for row in record["longest"]] == ["fits"] * 4
    for title in ("ours, exact", "decoder alone", "logits materialised", "ours, sparse"):
        assert result.stdout.count(f"| tiny | {title} | ") == result.stdout.count(f"| tiny-bf16 | {title} | ") == 1
    assert "unavailable: needs" in result.stdout


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_train_step"), importlib.import_module("gpu_train_cases")
    for name in ("gpu_train_step", "gpu_train_cases"):
        sys.modules.pop(name)


def test_a_wrong_head_is_flagged_and_a_broken_one_is_a_row(modules):
    script, cases = modules
    shape = cases.TINY["tiny"]
    policy, _ = cases.make_policy(shape, torch.device("cpu"))
    case, _ = cases.make_case(policy, shape)
    right = cases.make_step("exact")

    def without_an_eighth(case, seed):
        sequences = case.batch.sequence_index.unique().numel()
        kept = torch.arange(sequences) % 8 != 0
        advantages = case.batch.advantages * kept
        return right(cases.replace(case, batch=cases.replace(case.batch, advantages=advantages)), seed)

    def broken(case, seed):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    rows = {}
    steps = {"exact": right, "naive": without_an_eighth, "trl": broken}
    ends = (script.Deadline(1e9), script.Deadline(1e9))
    script.measure_heads(case, steps, rows, 1, ends, lambda: None)
    assert [row["status"] for row in rows.values()] == ["ok", "WRONG", "out of memory"]
    model = {"model": "tiny", "status": "ok", "heads": rows, "completion_tokens": case.num_tokens}
    table = script.table({"models": [model], "longest": []}).splitlines()
    [wrong] = [line for line in table if "logits materialised" in line]
    assert wrong.startswith("| tiny | logits materialised | - | - | - |") and "WRONG" in wrong
    assert any("out of memory: CUDA out of memory" in line for line in table)


def test_out_of_time_is_said(modules):
    script, cases = modules
    rows = {}
    policy, _ = cases.make_policy(cases.TINY["tiny"], torch.device("cpu"))
    case, _ = cases.make_case(policy, cases.TINY["tiny"])
    steps = {name: cases.make_step("exact") for name in ("exact", "decoder", "naive", "sparse")}
    ends = (script.Deadline(-1), script.Deadline(-1))
    script.measure_heads(case, steps, rows, 1, ends, lambda: None)
    assert rows["sparse"]["status"] == "left out" and rows["naive"]["seconds"] == []
