"""`aapo-fast eval` on vLLM: greedy completions are those of the other engine, and they are kept apart from them."""

import json

import pytest
import support
import vllm_support

from aapo_fast import cli

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(600)]


def greedy(folder):
    [file] = folder.glob("*.jsonl")
    lines = map(json.loads, file.read_text().splitlines())
    return {line["problem"]: line["completions"][0]["text"] for line in lines if line["pass"] == "greedy"}, file.name


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_an_evaluation_on_vllm(tmp_path, engine, capsys):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    path = tmp_path / "config.toml"
    changes = {"data__max_prompt_tokens": 64, "vllm__cpu_kv_cache_gib": 1, "rollout__max_batch_size": 8}
    # An adapter's settings are the training's: what is evaluated has it merged.
    path.write_text(support.toml(support.tiny_run(tmp_path, folder, **changes, lora__rank=4)))
    found = {}
    for name in ("hf", engine):
        output = tmp_path / name
        assert cli.main(["eval", str(path), "--rollout.engine", name, "--output", str(output)]) == 0
        assert "held-out (4)" in capsys.readouterr().out
        [result] = (json.loads(file.read_text()) for file in output.glob("*.json"))
        assert result["completions"] == 4 + 4 * 2 and not result["failures"]
        found[name], file = greedy(output)
        found[name, "file"] = file
    assert found["hf"] == found[engine] and len(found["hf"]) == 4
    assert found["hf", "file"] != found[engine, "file"]
