"""The benchmark of weight syncs; whether a sync is right is asked in tests/rollout."""

import json
from types import SimpleNamespace

import pytest
import vllm_support

from aapo_fast.bench import machine, sync
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.settings import EngineSettings


def test_ipc_without_a_gpu_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(ServerProcess, "start", lambda *_: 1 / 0)  # no server is needed to say so
    settings = EngineSettings("nowhere", "cpu", "float32", 80)
    process = sync._process(settings, tmp_path / "sync.json", "ipc")
    row = sync._by_ipc(SimpleNamespace(settings=settings), process)
    measured = {"strategy": "in process", "bytes": 2**30, "seconds": 0.5, "times": [0.4, 0.6]}
    machine_used = machine.describe()
    result = {"machine": machine_used, "model": "m", "dtype": "float32", "syncs": [measured, row], "throughput": []}
    lines = sync.table(result).splitlines()
    assert "| in process | 1024 | 0.50 (0.40 to 0.60) |" in lines
    assert (
        "| server, IPC | | not available: vllm.transfer='ipc' shares a GPU's memory, and the policy is on cpu; "
        "use 'file' |" in lines
    )


@vllm_support.needs_engine
@pytest.mark.timeout(600)
def test_every_strategy_is_measured_with_the_bytes_that_it_sends(tmp_path, monkeypatch):
    """As `aapo-fast bench sync` does, of a tiny model and short completions, on real engines."""
    monkeypatch.setattr(sync, "MAX_TOKENS", 4)
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    result = sync.measure(str(folder), 1, tmp_path / "sync.json", "a command")
    assert json.loads((tmp_path / "sync.json").read_text()) == result
    rows = {row["strategy"]: row for row in result["syncs"]}
    whole, through_disk, *servers, ipc, adapter = rows
    assert whole == "in process" and through_disk == "in process, disk" and ipc == "server, IPC"
    assert servers == ["server, memory", "server, disk"] and adapter == "server, adapter of rank 16"
    measured = [row for name, row in rows.items() if name != ipc]
    assert all(len(row["times"]) == 1 and 0 < row["seconds"] < 60 for row in measured)

    model, _ = vllm_support.load(folder)
    head = model.lm_head.weight.nbytes
    every = sum(p.nbytes for p in model.parameters()) + head  # which is tied, and sent under its own name too
    assert [rows[name]["bytes"] for name in (whole, *servers)] == [every] * 3
    assert every - head <= rows[through_disk]["bytes"] < every - head + 4096  # and the file's own header
    layers = [m.weight.shape for name, m in model.named_modules() if name.endswith("_proj")]
    assert rows[adapter]["bytes"] == 4 * 16 * sum(sum(shape) for shape in layers)

    assert [row["engine"] for row in result["throughput"]] == ["hf", "vllm, in process", "vllm, server"]
    assert all(row["tokens_per_second"] == row["tokens"] / row["seconds"] > 0 for row in result["throughput"])
    assert f"| {adapter} | {rows[adapter]['bytes'] / 2**20:.1f} |" in sync.table(result)
    assert not list(tmp_path.glob("tmp*"))  # the checkpoints and files of weights are gone
