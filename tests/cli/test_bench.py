"""``aapo-fast bench`` from the command line."""

import json

import pytest

from aapo_fast import cli
from aapo_fast.bench import memory


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "peak_on_cpu", lambda case, name, seed: 2**20)


def test_head_then_report(tmp_path, capsys):
    arguments = ["--shape", "64,16,211", "--method", "exact", "naive", "trl", "--rounds", "2", "--device", "cpu"]
    assert cli.main(["bench", "head", *arguments, "--without", "trl", "--output", "out", "--note", "a note"]) == 0
    printed = capsys.readouterr().out
    assert "**a note**" in printed and "| ours: exact |" in printed and "out/head.json" in printed
    content = json.loads((tmp_path / "out" / "head.json").read_text())
    assert content["command"].startswith("aapo-fast bench head --shape 64,16,211 --method exact naive")
    [case] = content["cases"]
    assert [row["method"] for row in case["rows"]] == ["1G", "3G", "exact", "naive"]
    assert case["rounds"] == 2 and case["rows"][2]["timing"]["ratio_to_3G"] > 0

    assert cli.main(["bench", "report", "out"]) == 0
    assert "| ours: exact |" in capsys.readouterr().out
    assert cli.main(["bench", "report", "out", "--docs", "docs"]) == 0
    assert capsys.readouterr().out.strip() == "docs/benchmarks.md"
    assert "**a note**" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_accuracy(tmp_path, capsys):
    arguments = ["--shape", "64,16,211", "--method", "exact", "--dtype", "float32", "--distribution", "peaked", "flat"]
    assert cli.main(["bench", "accuracy", *arguments, "--device", "cpu", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert "64,16,211 peaked" in printed and "64,16,211 flat" in printed and "| floor |" in printed
    assert cli.main(["bench", "report", "out", "--docs", "docs"]) == 0
    assert (tmp_path / "docs" / "accuracy.md").exists()


def test_one_of_ours_that_breaks_is_exit_code_1(monkeypatch, capsys):
    from aapo_fast.bench import builtin

    def broken(*_, **__):
        raise RuntimeError("the loss broke")

    monkeypatch.setattr(builtin.af, "linear_policy_loss", broken, raising=False)
    arguments = ["--shape", "64,16,211", "--method", "exact", "--rounds", "1", "--device", "cpu"]
    assert cli.main(["bench", "head", *arguments]) == 1
    assert "ours, exact: failed: RuntimeError: the loss broke" in capsys.readouterr().err


def test_list_says_what_can_run(capsys):
    assert cli.main(["bench", "head", "--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "qwen3-8b" in out and "soft-cap 30" in out and "model-like" in out
    assert "unavailable: needs" in out and "sparse-14" in out and "computes less" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--shape", "qwen3-b"], "--shape 'qwen3-b' is unknown (is it qwen3-8b?); use one of"),
        (["head", "--shape", "1,2"], "--shape '1,2': give N,H,V as three positive integers"),
        (["head", "--shape", "8,8,1"], "a vocabulary needs at least two tokens"),
        (["head", "--rows", "1k"], "--rows '1k': give positive integers"),
        (["head", "--method", "ligerr"], "--method 'ligerr' is unknown"),
        (["head", "--method", "exact:cuda"], "'cuda' is unknown; use one of reference, torch"),
        (["head", "--method", "naive:torch"], "only ours"),
        (["head", "--dtype", "int8"], "--dtype 'int8' is unknown; use one of float32"),
        (["head", "--distribution", "spiky"], "--distribution 'spiky' is unknown"),
        (
            ["head", "--distribution", "a mean entropy in nats"],
            "is unknown; use one of model-like, peaked, flat; or a mean",
        ),
        (["head", "--distribution", "11"], "--distribution 11: rows of smollm2-135m are made with 0.1 to 10.3 nats"),
        (["head", "--shape", "gemma-2-2b", "--distribution", "3"], "rows of gemma-2-2b are made with 0.1 to 2.5 nats"),
        (["head", "--rounds", "0"], "--rounds 0: give a number above zero"),
        (["head", "--minutes", "-1"], "--minutes -1.0: give a number above zero"),
        (["head", "--output", "/proc/nowhere"], "--output /proc/nowhere cannot be written"),
        (["accuracy", "--method", "nobody"], "--method 'nobody' is unknown"),
        (["report", "nowhere"], "nowhere is not there"),
        (["head", "--train.steps", "1"], "bench takes no --train.steps"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_cuda_is_one_line(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert cli.main(["bench", "head", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["head", "accuracy", "report"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", command, "--help"])
    assert f"aapo-fast bench {command}" in capsys.readouterr().out
