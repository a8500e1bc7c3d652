"""The benchmark of packing and shared prompts, with a tiny model: the same code as with the quickstart's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_layouts_agree_and_share_what_they_say(tmp_path, tiny_model):
    command = [sys.executable, ROOT / "benchmarks" / "shared_prompts.py", "--model", tiny_model]
    command += ["--prompt", "24", "--group", "4", "--longest", "16", "--rounds", "2", "--output", tmp_path / "out.json"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    layouts = record["layouts"]
    # Completions of 2, 7, 11 and 16 tokens, of which the last is only predicted.
    tokens = {"padded": 4 * (24 + 15), "packed": 4 * 24 + 32, "shared": 24 + 32}
    assert {name: row["forward_tokens"] for name, row in layouts.items()} == tokens
    assert all(row["gradient_difference"] < 1e-5 for row in layouts.values())
    assert layouts["padded"]["ratio"] == 1.0 and all(len(record["all_seconds"][name]) == 2 for name in tokens)
    assert all(f"| {name} | {count} | " in result.stdout for name, count in tokens.items())
