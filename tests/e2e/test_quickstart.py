"""The quickstart's own path, on the real model, for two steps: what `make quickstart` runs, cut short."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers


@pytest.mark.timeout(600)
def test_two_steps_of_the_quickstart(tmp_path):
    """As a user types it. Its accuracy is the quickstart's business; here all parts must work on the real thing."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [
            sys.executable, "-m", "aapo_fast.cli", "quickstart",
            "--train.steps", "2", "--train.warmup_steps", "0", "--eval.every", "0", "--eval.samples", "0",
            "--reference.cache", str(tmp_path / "reference.sqlite"),
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["held_out_problems"] == 64 and summary["packed"]
    # The untrained model is right on about one held-out sum in six; a broken prompt or scorer gives none.
    assert 0.1 < summary["accuracy_before"] < 0.3
    assert summary["seconds_per_step"] > 0 and summary["wall_seconds"] > 0
    for text in ("step 2/2", "What to type next", "curve.png", "Question: What is"):
        assert text in result.stdout
    assert (folder / "curve.png").exists()
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(step["updated"] for step in steps)
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    described = {name for line in page.splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    of_vllm = {"engine_sync_seconds", "engine_sync_bytes", "engine_server_failures", "engine_server_restarts"}
    assert set(steps[0]) == described - of_vllm

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("Question: What is 1 + 1?\nAnswer:", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids.input_ids.shape[1]
