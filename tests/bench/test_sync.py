"""The table of weight syncs; the syncs themselves are those of tests/rollout."""

from types import SimpleNamespace

from aapo_fast.bench import machine, sync
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.settings import EngineSettings


def test_ipc_without_a_gpu_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(ServerProcess, "start", lambda *_: 1 / 0)  # no server is needed to say so
    settings = EngineSettings("nowhere", "cpu", "float32", 80)
    process = sync._process(settings, tmp_path / "sync.json", "ipc")
    row = sync._by_ipc(SimpleNamespace(settings=settings), process)
    measured = {"strategy": "in process", "seconds": 0.5, "times": [0.4, 0.6]}
    result = {"machine": machine.describe(), "model": "m", "bytes": 2**20, "syncs": [measured, row], "throughput": []}
    lines = sync.table(result).splitlines()
    assert "| in process | 0.50 (0.40 to 0.60) |" in lines
    assert (
        "| server, IPC | not available: vllm.transfer='ipc' shares a GPU's memory, and the policy is on cpu; "
        "use 'file' |" in lines
    )
