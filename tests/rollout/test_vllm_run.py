"""Whole runs on vLLM: a tiny model learns as it does on the other engine; weights that do not arrive stop the run."""

import copy

import pytest
import resume_support
import support
import torch
import vllm_support
from safetensors.torch import load_file

from aapo_fast import config
from aapo_fast.rollout.vllm import local
from aapo_fast.trainer import loop, sampling, setup
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import UserError

pytestmark = [vllm_support.needs_vllm, pytest.mark.timeout(600)]


@pytest.fixture
def tree(tmp_path):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    return support.tiny_run(
        tmp_path, folder, rollout__engine="vllm", data__max_prompt_tokens=64, vllm__cpu_kv_cache_gib=1,
        train__steps=25, train__learning_rate=3e-3, rollout__group_size=16, loss__max_importance_weight=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_tiny_model_learns_on_vllm(tmp_path, tree, mode):
    tree["reference"]["mode"] = mode
    summary = loop.train(config.parse(tree), Display(quiet=True))
    assert summary["accuracy_before"] <= 0.25 and summary["accuracy_after"] == 1.0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(r["reference_reward"] for r in records) < 0.3
    trained = [r for r in records if r["updated"]]
    assert trained and all(r["rollout_mean_gap"] < 1e-4 for r in trained)
    assert all(0.99 < r["rollout_ratio_mean"] < 1.01 and r["rollout_clipped_share"] == 0 for r in trained)
    assert all(r["engine_sync_bytes"] > 0 and r["seconds"]["sync"] > 0 for r in trained)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, tree, monkeypatch):
    """The engine of the resumed run starts with the first weights: those of the checkpoint have to reach it."""
    tree["train"]["steps"], tree["checkpoint"] = 8, {"every": 3}
    left_alone, killed = copy.deepcopy(tree), tree
    left_alone["run"]["folder"] = str(tmp_path / "left_alone")
    loop.train(config.parse(left_alone), Display(quiet=True))
    resume_support.crash(killed, monkeypatch, at=5)
    killed["run"]["resume"] = True
    loop.train(config.parse(killed), Display(quiet=True))
    resumed, alone = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "left_alone"))
    assert all(torch.equal(resumed[name], alone[name]) for name in alone)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9)) and all(r["rollout_mean_gap"] < 1e-4 for r in records)


def test_weights_that_do_not_arrive_stop_the_run(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(local.LocalLLM, "load", lambda self, weights: None)
    with pytest.raises(UserError, match=r"differ from the trainer's by .* nats on average"):
        loop.train(config.parse(tree), Display(quiet=True))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) >= 1 and (tmp_path / "run" / "model").exists()  # what was reached is kept


def test_weights_that_do_not_arrive_stop_a_run_below_a_top_p_of_one(tmp_path, tree, monkeypatch):
    """Its samples say nothing of the weights, so that a few more are drawn of the whole distribution."""
    tree["rollout"]["top_p"] = 0.8
    monkeypatch.setattr(local.LocalLLM, "load", lambda self, weights: None)
    with pytest.raises(UserError, match=r"differ from the trainer's by .* nats on average"):
        loop.train(config.parse(tree), Display(quiet=True))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(records) < 25 and records[-1]["updated"] and (tmp_path / "run" / "model").exists()


def test_a_nucleus_is_no_gap(tmp_path, tree):
    """Log-probabilities of a nucleus differ from the policy's by far more than the limit."""
    tree["rollout"]["top_p"], tree["train"]["steps"] = 0.8, 3
    assert loop.train(config.parse(tree), Display(quiet=True))["status"] == "finished"
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    trained = [r for r in records if r["updated"]]
    assert len(records) == 3 and trained and all(r["rollout_mean_gap"] > 0.05 for r in trained)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_an_engine_that_holds_other_weights_is_seen_without_a_step(tree, top_p):
    """What is done before the reference is drawn, and after a sync where no step's samples can be compared."""
    tree["rollout"]["top_p"] = top_p
    with setup.prepare(config.parse(tree), Display(quiet=True)) as run:
        sampling.verify_engine(run, run.schedule[0], 0)
        vllm_support.move(run.policy.model)
        with pytest.raises(UserError, match="differ from the trainer's by"):
            sampling.verify_engine(run, run.schedule[0], 1)
        run.engine.sync_weights(1)
        sampling.verify_engine(run, run.schedule[0], 1)
