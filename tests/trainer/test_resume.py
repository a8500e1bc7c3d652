"""What may change between a run and its resumption, and what makes it another run."""

import json
import shutil

import pytest
import support
from resume_support import crash, folder_of, make_tree, run, steps, weights

from aapo_fast import cli, config
from aapo_fast.trainer import resume
from aapo_fast.types import UserError


@pytest.mark.parametrize(
    ("layer", "key", "value", "was"),
    [
        ("train", "steps", 9, "6"),
        ("train", "learning_rate", 1e-5, "0.003"),
        ("run", "seed", 5, "0"),
        ("loss", "entropy_bonus", 0.1, "0.0"),
        ("rollout", "temperature", 0.5, "1.0"),
        ("reference", "mode", "none", "'cached'"),
        ("data", "template", "{question}!", "'{question}'"),
        ("advantage", "delta_high", 0.5, "0.28"),
    ],
)
def test_another_config_is_another_run(tmp_path, crashed, layer, key, value, was):
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changed = {**crashed, layer: crashed.get(layer, {}) | {key: value}}
    with pytest.raises(UserError) as refusal:
        run(changed, run=changed["run"] | {"resume": True})
    assert f"holds another run: {layer}.{key} was {was} and is {value!r}; set it back" in str(refusal.value)
    assert "\n" not in str(refusal.value) and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # ... also without the folder's config: each checkpoint says what it is of
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=f"is of another run: {layer}.{key} was"):
        run(changed, run=changed["run"] | {"resume": True})


def test_another_reward_is_another_run(crashed):
    changed = {**crashed, "rewards": [{"function": "reward_functions:number", "weight": 2.0}]}
    with pytest.raises(UserError, match=r"rewards.0.function was .* and is .*, rewards.0.weight was 1.0 and is 2.0"):
        run(changed, run={"resume": True})


def test_what_does_not_decide_a_run_may_change(tmp_path, crashed, weights_alone):
    summary, said = run(crashed, run={"resume": True}, eval={"every": 2}, checkpoint={"every": 1, "keep": 1})
    assert "with other settings than before: eval.every was 0 and is 2, checkpoint.every was 2 and is 1" in said
    assert summary["status"] == "finished" and weights(tmp_path) == weights_alone
    assert steps(tmp_path, "evaluations.jsonl") == [0, 4, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_keys_that_may_change_are_keys():
    assert {key for key, *_ in config.describe()} >= resume.MAY_CHANGE


@pytest.mark.parametrize("what", ["model.path", "data.source", "rewards"])
def test_what_the_config_only_names_may_not_change(tmp_path, tiny_model, monkeypatch, what):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reward.py").write_text("def f(completions, prompts, **columns): return [len(completions[0]) / 4]")
    shutil.copytree(tiny_model, tmp_path / "model")
    tree = make_tree(tmp_path, tmp_path / "model", rewards=[{"function": "own_reward:f"}])
    crash(tree, monkeypatch)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    if what == "model.path":
        support.save_tiny_model(tmp_path / "model", seed=1)
    elif what == "data.source":
        support.write_jsonl(tmp_path / "data.jsonl", [{"question": f"tell {i}:", "answer": "x"} for i in range(12)])
    else:
        (tmp_path / "own_reward.py").write_text("def f(completions, prompts, **columns): return [0.5]")
    with pytest.raises(UserError, match=f"is of another run: what {what} stands for has changed since it began"):
        run(tree, run={"resume": True})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_a_run_is_not_taken_without_being_asked(tmp_path, crashed):
    with pytest.raises(UserError, match="holds an earlier run; name another, .*; --resume goes on with it"):
        run(crashed)
    assert folder_of(tmp_path, 4).exists()
    assert "beginning" not in run(crashed, run={"overwrite": True})[1]  # anew
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_resume_goes_before_overwrite(crashed):
    """A config that replaces what is there, as the quickstart's does, can be resumed all the same."""
    assert "resuming after step 4" in run(crashed, run={"overwrite": True, "resume": True})[1]
    changed = {**crashed, "advantage": {"delta_high": 0.5}}
    assert "beginning with step 1" in run(changed, run={"overwrite": True, "resume": True})[1]


def test_the_command_line(tmp_path, crashed, capsys):
    path = tmp_path / "config.toml"
    path.write_text("")
    layers = {**crashed, "rewards.0": crashed["rewards"][0]}
    del layers["rewards"]
    command = ["train", str(path), *(f"--{a}.{k}={json.dumps(v)}" for a, b in layers.items() for k, v in b.items())]
    assert cli.main([*command, "--resume"]) == 0
    assert "resuming after step 4 of 6" in capsys.readouterr().out
    assert cli.main([*command, "--resume"]) == 0
    assert "nothing left to resume" in capsys.readouterr().out
    assert cli.main([*command, "--run.resume", "true", "--train.steps", "7"]) == 2
    assert "train.steps was 6 and is 7" in capsys.readouterr().err
