"""Whole runs on vLLM: a tiny model learns as it does on the other engine; weights that do not arrive stop the run."""

import pytest
import support
import vllm_support

from aapo_fast import config
from aapo_fast.rollout.vllm import local
from aapo_fast.trainer import loop
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import UserError

pytestmark = [vllm_support.needs_vllm, pytest.mark.timeout(600)]


@pytest.fixture
def tree(tmp_path):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    return support.tiny_run(
        tmp_path, folder, rollout__engine="vllm", vllm__max_model_len=256, vllm__cpu_kv_cache_gib=1,
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


def test_weights_that_do_not_arrive_stop_the_run(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(local.LocalLLM, "load", lambda self, weights: None)
    with pytest.raises(UserError, match=r"differ from the trainer's by .* nats on average"):
        loop.train(config.parse(tree), Display(quiet=True))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) >= 1 and (tmp_path / "run" / "model").exists()  # what was reached is kept
