"""A disk that fills up while something else than records and checkpoints is written (those: test_checkpoint.py)."""

import math
import resource
import sqlite3

import pytest
from resume_support import Notes, make_tree, room_for, run, steps, weights

from aapo_fast import config
from aapo_fast.trainer import loop
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import UserError


def test_when_the_trained_model_is_written(tmp_path, tiny_model, monkeypatch, weights_alone):
    tree, real = make_tree(tmp_path, tiny_model), loop.save_model

    def with_little_room(*arguments):
        with room_for(100_000):
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", with_little_room)
        with pytest.raises(UserError, match=r"run/model cannot be written: .*File too large.*; make room.*--resume"):
            run(tree)
    assert not (tmp_path / "run" / "model").exists() and not any((tmp_path / "run").glob(".model-*"))
    summary, said = run(tree, run={"resume": True})
    assert "resuming after step 6 of 6" in said and summary["status"] == "finished"
    assert weights(tmp_path) == weights_alone


def test_when_the_curve_is_drawn(tmp_path, tiny_model, monkeypatch, weights_alone):
    tree, real = make_tree(tmp_path, tiny_model), loop.plot_run

    def with_little_room(*arguments):
        with room_for(1000):
            real(*arguments)

    monkeypatch.setattr(loop, "plot_run", with_little_room)
    summary, said = run(tree)
    assert f"{tmp_path}/run/curve.png cannot be written: File too large" in said
    assert summary["status"] == "finished" and weights(tmp_path) == weights_alone


def test_when_reference_rewards_are_kept(tmp_path, tiny_model, weights_alone):
    """What was kept until then is whole, and the next run draws the rest."""
    tree = make_tree(tmp_path, tiny_model)
    tree["rewards"] = [{"function": "reward_functions:starts_with_answer"}]
    tree["reference"]["samples"] = 200  # a few problems fill a page of the file

    class Fills(Notes):
        def note(self, text):
            super().note(text)
            if text.startswith("reference:"):
                size = (tmp_path / "reference.sqlite").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    notes = Fills()
    with (
        room_for(resource.RLIM_INFINITY),
        pytest.raises(UserError, match=r"reference.cache=.* failed: .*(full|I/O).*; look at its disk"),
    ):
        loop.train(config.parse(tree), notes)
    assert not steps(tmp_path)
    rows = sqlite3.connect(tmp_path / "reference.sqlite").execute("SELECT rewards FROM rewards").fetchall()
    assert 0 < len(rows) < 8
    assert run(tree)[0]["status"] == "finished"
    assert all(math.isfinite(r["reference_reward"]) for r in read_lines(tmp_path / "run" / "metrics.jsonl"))
