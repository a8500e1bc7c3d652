"""Losses and gradients that are not finite, of real models and rewards: the step is skipped, its samples are kept."""

import json
import math

import pytest
import ranks_support
import support
import torch
from resume_support import crash, make_tree, run, weights
from safetensors.torch import load_file

from aapo_fast.config import TrainConfig
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import load_model
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.records import read_lines
from aapo_fast.trainer.step import make_optimizer, optimizer_step
from aapo_fast.types import Sample, UserError


def records(folder, name="metrics.jsonl"):
    return read_lines(folder / "run" / name)


def sample_of(line):
    ids = (tuple(line[key]) for key in ("prompt_ids", "token_ids", "logprobs"))
    return Sample(*ids, line["completion"], line["finish_reason"], line["weight_version"])


def test_too_many_steps_in_a_row_stop_the_run_and_their_samples_are_saved(tmp_path):
    """A model whose loss is finite, and whose gradient is not. With the saved samples its step can be done again."""
    model = ranks_support.explode(support.tiny(), channel=0)
    model.save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    start = load_file(tmp_path / "model" / "model.safetensors")
    tree = make_tree(tmp_path, tmp_path / "model", train__max_nonfinite_steps=2)
    with pytest.raises(UserError, match=r"^step 2: loss or gradient was NaN or infinite 2 steps in a row") as stopped:
        run(tree)
    assert f"their completions are in {tmp_path}/run/nonfinite.jsonl; lower" in str(stopped.value)
    for record in records(tmp_path):
        assert math.isfinite(record["loss"]) and record["grad_norm"] is None
        assert not record["updated"] and not record["finite"]
    end = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    lines = records(tmp_path, "nonfinite.jsonl")
    assert [line["step"] for line in lines] == [1] * 32 + [2] * 32
    assert {line["prompt"] for line in lines} == {f"say {i}:" for i in range(4, 12)}

    policy = Policy(*load_model(str(tmp_path / "run" / "model"), torch.device("cpu")), 1.0)
    weighted = [Weighted(sample_of(line), line["advantage"]) for line in lines[:32] if line["reward"] is not None]
    again = optimizer_step(policy, make_optimizer(policy, TrainConfig()), weighted, TrainConfig(), 1e-3)
    assert not again.finite and again.loss == pytest.approx(records(tmp_path)[0]["loss"], rel=1e-3)
    assert again.mismatch.max_gap < 1e-3


@pytest.fixture(scope="module")
def with_enormous_rewards(tmp_path_factory, tiny_model):
    """A run of which some steps are skipped, for rewards of 1e38."""
    folder = tmp_path_factory.mktemp("enormous")
    tree = make_tree(
        folder, tiny_model, rewards=[{"function": "reward_functions:late_letters_but_sometimes_enormous"}],
        advantage__scale_rewards=False, train__steps=8, train__max_nonfinite_steps=8,
    )  # fmt: skip
    summary, _ = run(tree)
    return folder, tree, summary


def test_a_step_that_is_skipped_leaves_the_run_as_it_was(with_enormous_rewards):
    folder, _, summary = with_enormous_rewards
    found = records(folder)
    skipped = [record["step"] for record in found if not record["finite"]]
    assert summary["status"] == "finished" and 0 < len(skipped) < 8 and summary["nonfinite_steps"] == len(skipped)
    assert all(record["updated"] == record["finite"] for record in found)
    lines = records(folder, "nonfinite.jsonl")
    assert [line["step"] for line in lines] == [step for step in skipped for _ in range(32)]
    assert any(line["reward"] == 1e38 for line in lines)
    assert all(torch.isfinite(t).all() for t in load_file(folder / "run" / "model" / "model.safetensors").values())


def test_a_resumed_run_has_them_once(tmp_path, with_enormous_rewards, monkeypatch):
    left_alone, tree, _ = with_enormous_rewards
    tree = {**tree, "run": {"folder": str(tmp_path / "run")}}
    last = max(record["step"] for record in records(left_alone) if not record["finite"])
    crash(tree, monkeypatch, at=last + 1)
    run(tree, run={"resume": True})
    assert weights(tmp_path) == weights(left_alone)
    assert records(tmp_path, "nonfinite.jsonl") == records(left_alone, "nonfinite.jsonl")


def test_many_ranks_skip_the_same_steps(tmp_path, with_enormous_rewards):
    left_alone, tree, alone = with_enormous_rewards
    tree = {**tree, "run": {"folder": str(tmp_path / "run")}}
    found = ranks_support.results(2, ranks_support.train, tree)
    assert [s["nonfinite_steps"] for s, _ in found] == [alone["nonfinite_steps"]] * 2
    assert [r["finite"] for r in records(tmp_path)] == [r["finite"] for r in records(left_alone)]
    truth, ours = (records(folder, "nonfinite.jsonl") for folder in (left_alone, tmp_path))
    assert [line["token_ids"] for line in ours] == [line["token_ids"] for line in truth]


def test_weights_that_have_diverged_stop_the_run_before_it_samples(tmp_path, tiny_model):
    """A learning rate at which one step is too many: the model samples no more, and the checkpoint before is whole."""
    tree = make_tree(tmp_path, tiny_model, train__learning_rate=1e38, checkpoint__every=1)
    with pytest.raises(UserError, match="next-token logits are NaN or infinite: its weights have diverged"):
        run(tree)
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_what_an_earlier_run_skipped_is_replaced_with_it(tmp_path, tiny_model):
    tree = make_tree(tmp_path, tiny_model, train__steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    (tmp_path / "run" / "nonfinite.jsonl").write_text("{}\n")
    run(tree, run={"overwrite": True})
    assert not (tmp_path / "run" / "nonfinite.jsonl").exists()
