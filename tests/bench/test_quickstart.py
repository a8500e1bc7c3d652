"""benchmarks/quickstart.py runs, with a tiny model, and its figures are those of the run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import support

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "quickstart.py"


def test_a_tiny_run(tmp_path, tiny_model):
    """On the Hugging Face engine, which starts at once."""
    settings = support.tiny_quickstart(tmp_path, tiny_model, eval_every=0)
    command = [sys.executable, str(SCRIPT), "--engine", "hf", "--output", str(tmp_path / "out.json"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == 2 and found["held_out_problems"] == 4 and 0 <= found["accuracy_after"] <= 1
    assert found["generation_tokens_per_second"] > 0 and found["largest_mean_gap"] < 1e-4
    assert found["syncs"] == 0 and found["sync_seconds"] is None  # the model samples for itself


def test_its_figures():
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = {"accuracy_before": 0.2, "accuracy_after": 0.8, "held_out_problems": 64, "steps": 3, "wall_seconds": 9.0,
            "seconds_per_step": 2.0}  # fmt: skip
    steps = [
        {"updated": True, "rollout_mean_gap": gap, "generation_tokens_per_second": speed,
         "engine_sync_seconds": seconds, "engine_sync_bytes": 100.0}
        for gap, speed, seconds in ((1e-6, 10.0, 0.5), (3e-6, 30.0, 0.9), (2e-6, 20.0, 0.6))
    ]  # fmt: skip
    skipped = {"updated": False, "rollout_mean_gap": None, "generation_tokens_per_second": None}
    assert module.figures(kept | {"seed": 0}, [*steps, skipped]) == kept | {
        "syncs": 3, "sync_seconds": 0.6, "sync_bytes": 100.0, "generation_tokens_per_second": pytest.approx(20.0),
        "largest_mean_gap": 3e-6,
    }  # fmt: skip
