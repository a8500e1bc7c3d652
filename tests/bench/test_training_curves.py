"""benchmarks/training_curves.py trains with both kinds of gradient rows, goes on where it stopped, and draws."""

import json
import subprocess
import sys
from pathlib import Path

import support

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "training_curves.py"


def test_tiny_runs(tmp_path, tiny_model):
    settings = support.tiny_quickstart(tmp_path, tiny_model, eval_every=1)
    output, picture = tmp_path / "out.json", tmp_path / "curves.svg"
    script = [sys.executable, str(SCRIPT), "--output", str(output), "--picture", str(picture)]

    def curves(*more, status=0):
        done = subprocess.run([*script, *more, *settings], capture_output=True, text=True, cwd=ROOT / "tests")
        assert done.returncode == status, done.stdout + done.stderr
        return done, json.loads(output.read_text())["runs"]

    _, first = curves("--seeds", "3")
    assert [(r["backward"], r["seed"]) for r in first] == [("exact", 3), ("sparse", 3)]
    assert all(len(r["reward"]) == 2 and r["evaluated_at"] == [0, 1, 2] for r in first)
    assert picture.read_text().count("exact gradient rows") == 1
    picture.unlink()
    done, again = curves("--seeds", "3")
    assert again == first and "run 1 of" not in done.stderr and picture.exists()
    done, kept = curves("--seeds", "4", "--train.steps", "1", status=2)
    assert kept == first and "holds runs with other options" in done.stderr
