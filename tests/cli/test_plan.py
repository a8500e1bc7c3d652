"""`aapo-fast doctor --plan`: the table, what dominates, the remedy, and what is refused."""

import json

import pytest
import support
import transformers

from aapo_fast import cli


@pytest.fixture
def seven_billion(tmp_path):
    """The config.json of a model the size of Qwen2.5-Math-7B, and nothing else: no weights, no tokenizer."""
    config = transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    config.save_pretrained(tmp_path / "model")
    path = tmp_path / "config.toml"
    path.write_text(f"[model]\npath = {json.dumps(str(tmp_path / 'model'))}\n")
    return str(path)


def test_a_model_that_does_not_fit(seven_billion, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--plan", seven_billion]) == 1
    out = capsys.readouterr().out
    assert "7,615,616,512 parameters, 7,615,616,512 of them trained" in out
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    assert rows["weights"] == rows["gradients"] == "28.37" and rows["AdamW moments"] == "56.74"
    assert "GiB at once of 73.5 (h100, less 1 for CUDA); most of it: AdamW moments" in out
    assert "it does not fit: weights, gradients and moments alone are too much for one device" in out
    assert "--lora.rank 32" in out


EIGHT = ("--devices", "8", "--train.max_microbatch_tokens", "1280", "--rollout.max_batch_size", "32")


def table(out):
    """Amount and time of each line, and its whole text."""
    cells = (line.split("│") for line in out.splitlines() if line.count("│") > 4)
    return {row[1].strip(): (row[2].strip(), row[3].strip(), " ".join(row)) for row in cells}


def test_eight_devices_hold_what_one_cannot(seven_billion, capsys, monkeypatch):
    """28.37 GiB in float32: whole, and an eighth of it as shards, as gradients, and twice in moments."""
    monkeypatch.setenv("COLUMNS", "220")
    assert cli.main(["doctor", "--plan", seven_billion, *EIGHT, "--model.activation_checkpointing", "full"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert [rows[name][:2] for name in ("weights", "shards of the weights", "gradients", "AdamW moments")] == [
        ("28.37", "always"), ("3.55", "always"), ("3.55", "training"), ("7.09", "always")
    ]  # fmt: skip
    # Embedding and head of 152,064 x 3,584 each, and three layers of 233 million.
    assert rows["gathered weights"][0] == f"{4 * (2 * 152064 * 3584 + 3 * 233_057_792) / 2**30:.2f}"
    assert "of 72.5 (h100, less 2 for CUDA and NCCL)" in out and "N = 8 devices, a rank on each (FSDP2)" in out
    assert "NVLink" in rows["gather, reduce"][2] and "memory of each device" in out


def test_the_model_is_there_twice_at_the_start(seven_billion, capsys):
    """28.5 GiB whole, an eighth of them, and 28.5 again until that is cut; training with an adapter takes less."""
    adapter = ("--lora.rank", "16", "--model.activation_checkpointing", "full", "--memory-gib", "60")
    assert cli.main(["doctor", "--plan", seven_billion, *EIGHT, *adapter]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "at most 60.6 GiB at once of 58.0" in out and "it does not fit: the model is there twice at the start" in out


def test_more_devices_are_offered_where_they_would_do(seven_billion, capsys):
    """16 P is 113 GiB, and of two devices each has 28 whole and 57."""
    assert cli.main(["doctor", "--plan", seven_billion, "--train.max_microbatch_tokens", "1280"]) == 1
    assert "or share them: --devices 4" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["doctor", "--plan", seven_billion, "--memory-gib", "25", "--devices", "64"]) == 1
    message = "the weights alone, which a device has whole, are too much for it; take a smaller model"
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_servers_own_devices(seven_billion, capsys, monkeypatch):
    """14.18 GiB in bfloat16 on two GPUs, of 0.9 of 40. A token is 28 layers of keys and values of 512, half on each."""
    monkeypatch.setenv("COLUMNS", "220")
    command = ["doctor", "--plan", seven_billion, "--rollout.engine", "vllm_server", "--vllm.servers", '["http://a"]']
    command += ["--vllm.gpu_memory_utilization", "0.9", "--vllm.tensor_parallel_size"]
    cli.main([*command, "2", *EIGHT, "--memory-gib", "40"])
    out = capsys.readouterr().out
    assert "memory of each of a vLLM server's 2 devices" in out and "7.09" in out and "28.91" in out
    room = int((36 * 2**30 - 7_615_616_512) // (2 * 2 * 28 * 512 / 2 * 1280))
    assert f"has room for {room:,} completions of full length at once" in out
    assert cli.main([*command, "1", *EIGHT, "--memory-gib", "14"]) == 1
    assert "a server does not fit: raise --vllm.tensor_parallel_size (now 1)" in capsys.readouterr().out


def test_an_offloaded_optimizer_is_offered_where_it_would_do_and_is_in_the_plan(seven_billion, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["doctor", "--plan", seven_billion, "--train.max_microbatch_tokens", "1280"]
    assert cli.main(command) == 1
    assert "or put the moments on the host: --train.offload_optimizer true" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command, "--train.offload_optimizer", "true", "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 3}
    assert "AdamW moments" not in rows and "most of it: weights" in out
    assert [cell.strip() for cell in rows["optimizer on the host"]] == ["113.48", "host"]
    assert [cell.strip() for cell in rows["optimizer"]] == ["4.6", "host"]


def test_an_adapter_fits(seven_billion, capsys):
    tokens = ["--train.max_microbatch_tokens", "1280", "--rollout.max_batch_size", "32"]
    assert cli.main(["doctor", "--plan", seven_billion, "--lora.rank", "16", "--gpu", "h200", *tokens]) == 0
    out = capsys.readouterr().out
    assert "40,370,176 of them trained" in out and "it does not fit" not in out


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "--train.max_microbatch_tokens 1280 holds one completion at a time"),
        ({"rollout.max_tokens": "3072"}, "--model.activation_checkpointing full: activations would take"),
        (
            {"train.max_microbatch_tokens": "1280", "rollout.max_tokens": "7000",
             "rollout.max_batch_size": "8", "model.activation_checkpointing": "full"},
            "shorter completions, or --lora.rank",
        ),
        (
            {"train.max_microbatch_tokens": "300", "data.max_prompt_tokens": "44", "rollout.prompts_per_step": "1000",
             "rollout.max_batch_size": "8000"},
            "lower --rollout.max_batch_size",
        ),
        (
            {"train.max_microbatch_tokens": "300", "data.max_prompt_tokens": "44", "rollout.engine": "vllm",
             "vllm.gpu_memory_utilization": "0.9"},
            "lower --vllm.gpu_memory_utilization",
        ),
    ],
)  # fmt: skip
def test_remedies(seven_billion, changes, remedy, capsys):
    options = [text for key, value in changes.items() for text in (f"--{key}", value)]
    arguments = ["doctor", "--plan", seven_billion, "--lora.rank", "16", "--memory-gib", "40", *options]
    assert cli.main(arguments) == 1
    assert remedy in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu", "h900"],
            "--gpu 'h900' is not known; known are a100, h100, h200; for another, leave it out: --memory-gib X",
        ),
        (["--memory-gib", "0"], "--memory-gib 0 must be above 0"),
        (["--devices", "0"], "--devices 0 must be at least 1"),
        (
            ["--model.vocabulary_parallel", "true"],
            "model.vocabulary_parallel=true is for several devices: give --devic",
        ),
        (
            ["--model.vocabulary_parallel", "true", "--devices", "16"],
            "45 tokens in parts of 3 are too few for 16 ranks",
        ),
        (
            ["--devices", "8", "--rollout.engine", "vllm"],
            "rollout.engine='vllm' is for one process, and there are 8 ranks; use 'vllm_server'",
        ),
        (["--model.path", "/nowhere"], "model.path='/nowhere' cannot be loaded"),
        (["--train.step", "3"], "unknown key train.step; did you mean train.steps?"),
    ],
)
def test_refusals(tmp_path, tiny_model, arguments, message, capsys):
    path = tmp_path / "config.toml"
    path.write_text(support.toml(support.tiny_run(tmp_path, tiny_model)))
    assert cli.main(["doctor", "--plan", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [["--gpu", "h200"], ["--memory-gib", "80"], ["--devices", "8"]])
def test_its_options_without_it(option, capsys):
    assert cli.main(["doctor", *option]) == 2
    assert "--gpu, --memory-gib and --devices are for --plan CONFIG.toml" in capsys.readouterr().err
