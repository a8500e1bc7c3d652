"""Checkpoints written while the run goes on, is interrupted, or has no memory for a copy; the folder's lock."""

import errno
import os
import signal
import threading
import time

import pytest
from resume_support import Notes, folder_of, make_tree, run, weights

from aapo_fast import config
from aapo_fast.trainer import checkpoint, loop, state
from aapo_fast.trainer.background import Background
from aapo_fast.trainer.records import only_process
from aapo_fast.types import UserError


def test_what_is_written_in_the_background_is_of_its_step(tmp_path, tiny_model, monkeypatch):
    """Each writing begins when the step after it has moved the weights; it is the last step's, byte for byte."""
    tree, real = make_tree(tmp_path, tiny_model, checkpoint__keep=3), checkpoint.write
    run(tree)
    waited = {p.name: (p / "model.safetensors").read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    moments = (folder_of(tmp_path, 4) / "optimizer.safetensors").read_bytes()
    done = {number: threading.Event() for number in range(1, 7)}

    def write_late(parent, step, *rest):
        assert step == 6 or done[step + 1].wait(60)
        return real(parent, step, *rest)

    class Steps(Notes):
        def step(self, record, steps):
            done[record["step"]].set()

    monkeypatch.setattr(checkpoint, "write", write_late)
    tree["run"]["overwrite"], tree["checkpoint"]["background"] = True, True
    loop.train(config.parse(tree), Steps())
    again = {p.name: (p / "model.safetensors").read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert again == waited and (folder_of(tmp_path, 4) / "optimizer.safetensors").read_bytes() == moments


def test_a_full_disk_in_the_background_is_said_and_does_not_end_the_run(tmp_path, tiny_model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    summary, said = run(make_tree(tmp_path, tiny_model, checkpoint__background=True))
    assert summary["status"] == "finished"
    assert [f"no checkpoint of step {n}: No space left on device" in said for n in (2, 4, 6)] == [True] * 3


def test_a_second_process_in_the_folder_is_refused(tmp_path, tiny_model):
    """It would clear away what the first is writing."""
    tree = make_tree(tmp_path, tiny_model)
    with (
        only_process(tmp_path / "run", print),
        pytest.raises(UserError, match="another process is training there"),
    ):
        run(tree, run={"resume": True})
    assert run(tree)[0]["status"] == "finished"


def test_an_interrupt_waits_for_what_is_being_written():
    """Else the folder's lock would be given up with a writer still at work."""
    background, written = Background(), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # other tests' libraries leave handlers of theirs
    try:
        background.start(lambda: (time.sleep(1.0), written.append(True)))
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            background.finish()
    finally:
        signal.signal(signal.SIGINT, before)
    assert written == [True]
    background.finish()


def test_a_copy_that_does_not_fit_into_memory_is_written_at_once(tmp_path, tiny_model, monkeypatch, weights_alone):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(state, "_copies", full)
    summary, said = run(make_tree(tmp_path, tiny_model, checkpoint__background=True))
    assert summary["status"] == "finished" and weights(tmp_path) == weights_alone
    assert said.count("training waits until it is written") == 3
    assert checkpoint.read(folder_of(tmp_path, 6)).step == 6


def test_an_interrupt_after_the_last_look_saves_a_checkpoint_too(tmp_path, tiny_model, monkeypatch, weights_alone):
    tree, real = make_tree(tmp_path, tiny_model), loop._save_checkpoint

    def then_interrupt(run, totals, *rest):
        written = real(run, totals, *rest)
        if totals.steps == 3 and not folder_of(tmp_path, 3).exists():
            os.kill(os.getpid(), signal.SIGINT)
        return written

    monkeypatch.setattr(loop, "_save_checkpoint", then_interrupt)
    summary, said = run(tree)
    assert summary["status"] == "interrupted" and "a checkpoint of step 3 is saved" in said
    assert run(tree, run={"resume": True})[0]["status"] == "finished" and weights(tmp_path) == weights_alone
