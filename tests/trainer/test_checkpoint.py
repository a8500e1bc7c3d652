"""Checkpoints: going on from them, and what is refused and taken instead when they are damaged or cannot be written."""

import errno
import json
import math
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import support
import torch
from resume_support import Notes, crash, folder_of, make_tree, room_for, run, steps, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aapo_fast import config
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.trainer import checkpoint, loop
from aapo_fast.trainer.records import RunFolder, read_lines
from aapo_fast.types import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_its_last_checkpoint(tmp_path, crashed, weights_alone):
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    summary, said = run(crashed, run={"resume": True})
    assert f"resuming after step 4 of 6 from {folder_of(tmp_path, 4)}" in said
    assert summary["status"] == "finished" and summary["accuracy_before"] is not None
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6] and steps(tmp_path, "evaluations.jsonl") == [0, 6]
    assert steps(tmp_path, "samples.jsonl") == [step for step in range(1, 7) for _ in range(8)]
    assert weights(tmp_path) == weights_alone
    recorded = sum(sum(r["seconds"].values()) for r in read_lines(tmp_path / "run" / "metrics.jsonl"))
    spent = summary["seconds_per_step"] * 6 - summary["reference_seconds"]
    assert spent == pytest.approx(recorded) and summary["wall_seconds"] > recorded  # of both processes


def test_the_same_command_begins_goes_on_and_is_done(tmp_path, tiny_model, monkeypatch, weights_alone):
    tree = make_tree(tmp_path, tiny_model, run__resume=True)
    crash(tree, monkeypatch, at=2)  # before there is a checkpoint
    crash(tree, monkeypatch, at=4)
    summary, said = run(tree)
    assert "resuming after step 2 of 6" in said and weights(tmp_path) == weights_alone
    assert run(tree) == (summary, f"{tmp_path}/run holds the finished run: 6 steps, nothing left to resume")


def test_without_a_checkpoint_it_says_so_and_begins(tmp_path, tiny_model):
    _, said = run(make_tree(tmp_path, tiny_model, run__resume=True))
    assert f"no checkpoint in {tmp_path}/run/checkpoints: beginning with step 1" in said


def test_as_many_are_kept_as_were_asked_for(tmp_path, tiny_model, monkeypatch):
    tree = make_tree(tmp_path, tiny_model, checkpoint__every=1, checkpoint__keep=3)
    (tmp_path / "run" / "checkpoints" / ".unfinished-step-00000009").mkdir(parents=True)  # of a killed process
    crash(tree, monkeypatch)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 4, 5)
    ]


def test_tied_weights_are_saved_once(tmp_path, monkeypatch):
    support.tiny("llama tied").save_pretrained(tmp_path / "tied")
    support.tokenizer().save_pretrained(tmp_path / "tied")
    tree = make_tree(tmp_path, tmp_path / "tied")
    crash(tree, monkeypatch)
    names = load_file(folder_of(tmp_path, 4) / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    run(tree, run={"resume": True})
    resumed = weights(tmp_path)
    run(tree, run={"overwrite": True})
    assert weights(tmp_path) == resumed


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_of_an_adapter_the_adapter_alone(tmp_path, tiny_model, monkeypatch, mode):
    changes = {"lora": {"rank": 2}, "reference__mode": mode}
    (tmp_path / "alone").mkdir()
    run(make_tree(tmp_path / "alone", tiny_model, **changes))
    tree = make_tree(tmp_path, tiny_model, **changes)
    crash(tree, monkeypatch)
    with safe_open(folder_of(tmp_path, 4) / "model.safetensors", "pt") as tensors:
        assert tensors.keys() and all("lora_" in name for name in tensors.keys())  # noqa: SIM118
    summary, said = run(tree, run={"resume": True})
    assert "resuming after step 4 of 6" in said and summary["status"] == "finished"
    assert weights(tmp_path) == weights(tmp_path / "alone")


def test_tensorboard_shows_each_step_once(tmp_path, tiny_model, monkeypatch):
    tree = make_tree(tmp_path, tiny_model, run__tensorboard=True)
    crash(tree, monkeypatch)
    run(tree, run={"resume": True})
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("metrics/reward")] == [1, 2, 3, 4, 5, 6]


def test_reference_rewards_that_no_file_has_are_taken_along(tmp_path, crashed, monkeypatch, weights_alone):
    """Those of problems of which one reward failed: drawn again, it might not fail."""
    calls, real = [], HFEngine.generate

    def spy(self, prompts, **options):
        calls.append(options.get("weights"))
        return real(self, prompts, **options)

    monkeypatch.setattr(HFEngine, "generate", spy)
    kept = checkpoint.read(folder_of(tmp_path, 4)).state["reference"]
    assert kept and all(any(math.isnan(r) for r in rewards) for rewards in kept.values())
    run(crashed, run={"resume": True})
    assert "policy" in calls and "reference" not in calls and weights(tmp_path) == weights_alone


def test_random_states_are_restored(tmp_path, crashed, monkeypatch):
    """Nothing of ours draws from the global generators; what a model or a library draws goes on, too."""
    import numpy

    def draw():
        return torch.rand(()).item(), random.random(), numpy.random.rand()

    drawn = []
    real = loop.restore

    def then_draw(*arguments):
        before = real(*arguments)
        drawn.append(draw())
        return before

    monkeypatch.setattr(loop, "restore", then_draw)
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        crash({**crashed, "run": crashed["run"] | {"resume": True}}, monkeypatch)
    assert drawn[0] == drawn[1]


# --- checkpoints that cannot be used --------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def alter(path):
    """One bit in the middle: of a number, a name, a digest."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, alter, lambda path: path.unlink()], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, crashed, weights_alone, harm, file):
    harm(folder_of(tmp_path, 4) / file)
    _, said = run(crashed, run={"resume": True})
    assert f"not resumed: {folder_of(tmp_path, 4)}" in said and "resuming after step 2 of 6" in said
    assert file in said
    assert weights(tmp_path) == weights_alone and steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert checkpoint.read(folder_of(tmp_path, 4)).step == 4  # written again


def test_any_bit_counts(tmp_path, crashed):
    """Two hundred of them, in all files: none leads to a checkpoint that is read."""
    draw = random.Random(0)
    path = folder_of(tmp_path, 4)
    for file in FILES * 50:
        whole = (path / file).read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        (path / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.read(path)
        (path / file).write_bytes(whole)
    assert checkpoint.read(path).step == 4


def rewrite(path, change):
    """Edit a JSON file of a checkpoint."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: rewrite(path / "manifest.json", lambda m: m.update(format=7)), "has format 7, want 1"),
        (lambda path: rewrite(path / "manifest.json", lambda m: m["files"].pop("state.json")),
         "state.json is not in its manifest.json"),
        (lambda path: rewrite(path / "manifest.json", lambda m: m["files"].update({"state.json": 3})),
         "state.json is not as manifest.json has it"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "more.safetensors").touch(), "more.safetensors is not in its manifest.json"),
        (lambda path: [p.unlink() for p in path.iterdir()], "is no checkpoint: there is no manifest.json"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(tmp_path, crashed, harm, message):
    harm(folder_of(tmp_path, 4))
    _, said = run(crashed, run={"resume": True})
    assert message in said and "resuming after step 2 of 6" in said


class Bomb:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.pt"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, crashed, weights_alone, name):
    """A pickle in the place of tensors or beside them, with a manifest that vouches for it."""
    path = folder_of(tmp_path, 4)
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, path / name)
    rewrite(path / "manifest.json", lambda m: m["files"].update({name: checkpoint._seal(path / name)}))
    _, said = run(crashed, run={"resume": True})
    if name.endswith(".safetensors"):
        assert f"not resumed: {path}: {name} is no safetensors file" in said and "resuming after step 2 of 6" in said
    assert not (tmp_path / "ran").exists() and weights(tmp_path) == weights_alone


def test_code_in_a_model_does_not_run(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.path='.*' cannot be loaded: its weights are a pickle .*safetensors"):
        run(make_tree(tmp_path, tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_renamed_one_is_refused(tmp_path, crashed):
    folder_of(tmp_path, 4).rename(folder_of(tmp_path, 5))
    _, said = run(crashed, run={"resume": True})
    assert "is the checkpoint of step 4; its folder was renamed" in said and "resuming after step 2 of 6" in said


def test_one_of_another_run_is_refused(tmp_path, tiny_model, crashed, monkeypatch, weights_alone):
    (tmp_path / "other").mkdir()
    other = make_tree(tmp_path / "other", tiny_model, run__seed=1)
    crash({**other, "data": crashed["data"]}, monkeypatch)
    shutil.rmtree(folder_of(tmp_path, 4))
    shutil.copytree(folder_of(tmp_path / "other", 4), folder_of(tmp_path, 4))
    _, said = run(crashed, run={"resume": True})
    assert "is of another run: run.seed was 1 and is 0" in said and "resuming after step 2 of 6" in said
    assert weights(tmp_path) == weights_alone


def test_if_none_can_be_used_the_run_stops(tmp_path, crashed):
    for step in (2, 4):
        truncate(folder_of(tmp_path, step) / "state.json")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"can be used: .*step-00000004: state.json.*step-00000002: state.json.*") as no:
        run(crashed, run={"resume": True})
    assert "leave out --resume and give --run.overwrite true" in str(no.value) and "\n" not in str(no.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert run(crashed, run={"overwrite": True})[0]["status"] == "finished"


def test_records_that_are_shorter_are_said_to_be(tmp_path, crashed):
    (tmp_path / "run" / "samples.jsonl").unlink()
    _, said = run(crashed, run={"resume": True})
    assert f"{tmp_path}/run/samples.jsonl is shorter than it was at the checkpoint" in said
    assert set(steps(tmp_path, "samples.jsonl")) == {5, 6}


# --- writing that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit_bytes", [10_000, 100_000, 300_000])
def test_a_full_disk_does_not_end_the_run(tmp_path, tiny_model, monkeypatch, weights_alone, limit_bytes):
    """The real thing: the system refuses to write on, in the middle of weights or moments."""
    tree, real = make_tree(tmp_path, tiny_model), checkpoint.write
    attempts = []

    def with_little_room(parent, step, *rest):
        attempts.append(step)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes if step > 2 else soft, hard))
        try:
            return real(parent, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "write", with_little_room)
    summary, said = run(tree)
    assert summary["status"] == "finished" and attempts == [2, 4, 6] and weights(tmp_path) == weights_alone
    assert "no checkpoint of step 4: " in said and "File too large" in said and "; the last is of step 2" in said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.read(folder_of(tmp_path, 2)).step == 2


def test_a_disk_that_is_full_when_a_record_is_written(tmp_path, tiny_model, weights_alone):
    """In the middle of a line: the run stops with the remedy, and with room again it ends as if nothing had been."""
    tree = make_tree(tmp_path, tiny_model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(Notes):
        def step(self, record, steps):
            if record["step"] == 3:
                size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))

    notes = Fills()
    try:
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: File too large; make room.*--resume"):
            loop.train(config.parse(tree), notes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the model after step 4 could not be saved" in notes.text
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes()[-1:] != b"\n"  # half a line
    summary, said = run(tree, run={"resume": True})
    assert "resuming after step 2" in said and summary["status"] == "finished"
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6] and weights(tmp_path) == weights_alone


def test_a_disk_that_is_full_when_records_are_cut_on_resuming(tmp_path, crashed, monkeypatch, weights_alone):
    before, real = (tmp_path / "run" / "samples.jsonl").read_bytes(), RunFolder.cut

    def with_little_room(*arguments):
        with room_for(2000):
            return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "cut", with_little_room)
        with pytest.raises(UserError, match=r"jsonl cannot be written: File too large; make room, .*--resume"):
            run(crashed, run={"resume": True})
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before and len(before) > 2000
    assert run(crashed, run={"resume": True})[0]["status"] == "finished" and weights(tmp_path) == weights_alone


def test_a_disk_that_is_full_when_records_are_flushed_for_a_checkpoint(tmp_path, tiny_model, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device; make room"):
        folder.sizes()


def test_a_folder_that_cannot_be_written(tmp_path, tiny_model):
    (tmp_path / "run").mkdir()
    tree = make_tree(tmp_path, tiny_model)
    tree["checkpoint"]["every"] = 3

    class Blocks(Notes):
        def step(self, record, steps):
            (tmp_path / "run" / "checkpoints").touch()  # a file where the folder should be

    notes = Blocks()
    assert loop.train(config.parse(tree), notes)["status"] == "finished"
    assert "no checkpoint of step 3: " in notes.text and "; there is none" in notes.text


@pytest.mark.parametrize("call", range(1, 9))
def test_a_crash_while_writing_leaves_the_one_before(tmp_path, tiny_model, monkeypatch, weights_alone, call):
    """At each flush to the disk in turn: before files, between them, after the folder has its name."""
    tree, real = make_tree(tmp_path, tiny_model), checkpoint._flush
    calls = []

    def dies(path):
        calls.append(path)
        if len(calls) == 7 + call:  # a checkpoint takes seven
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", dies)
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process tidies nothing
        if call < 8:
            with pytest.raises(KeyboardInterrupt):
                run(tree)
    if call == 8:  # the whole of the second is written
        crash(tree, monkeypatch)
    _, said = run(tree, run={"resume": True})
    assert f"resuming after step {4 if call >= 6 else 2} of 6" in said and "not resumed" not in said
    assert weights(tmp_path) == weights_alone
