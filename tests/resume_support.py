"""Short runs that die after their checkpoints, and what they leave."""

import resource
from contextlib import contextmanager

import pytest
import support

from aapo_fast import config
from aapo_fast.trainer import loop
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import read_lines


class Notes(Display):
    """Keeps what a run says."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    @property
    def text(self):
        assert not any("\n" in line for line in self.lines)
        return "\n".join(self.lines)


def make_tree(tmp_path, tiny_model, **changes):
    """Six steps, with a checkpoint after the second and the fourth."""
    changes = {
        "train__steps": 6, "rollout__max_tokens": 4, "train__learning_rate": 3e-3, "train__schedule": "linear",
        "rewards": [{"function": "reward_functions:late_letters"}], "scoring__max_failure_share": 0.9,
        "checkpoint__every": 2, "checkpoint__background": False,
    } | changes  # fmt: skip
    return support.tiny_run(tmp_path, tiny_model, **changes)


def run(tree, **layers):
    """Train, with options added; the summary and what was said."""
    notes = Notes()
    tree = {**tree, **{layer: tree.get(layer, {}) | options for layer, options in layers.items()}}
    return loop.train(config.parse(tree), notes), notes.text


def crash(tree, monkeypatch, at=6):
    """As if killed when step ``at`` begins."""
    real = loop.train_step

    def dies(run, number, *rest):
        if number == at:
            raise KeyboardInterrupt
        real(run, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tree)


def weights(tmp_path):
    return (tmp_path / "run" / "model" / "model.safetensors").read_bytes()


def steps(tmp_path, name="metrics.jsonl"):
    return [record["step"] for record in read_lines(tmp_path / "run" / name)]


def folder_of(tmp_path, step):
    return tmp_path / "run" / "checkpoints" / f"step-{step:08d}"


@contextmanager
def room_for(size_bytes):
    """The system refuses to make any file larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
