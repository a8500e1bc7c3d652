"""Whole runs of the tiny model on a GPU: stopped and resumed, and with compiled layers. Not yet run on a GPU; the same
code passed with "cpu" in the place of "cuda".

In float32 without flash attention, so that two runs differ by the order of sums alone. Even that is not always the same
on a GPU: runs are held against each other by the way that their weights have come.
"""

import importlib.util
import signal

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if missing := [name for name in ("matplotlib", "requests", "rich") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed here: {', '.join(missing)}", allow_module_level=True)

from policy_support import relative
from resume_support import folder_of, make_tree, run, steps
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from aapo_fast.trainer import loop
from aapo_fast.trainer.records import read_lines

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROUNDING = 1e-3
"""That of tests/trainer/test_ranks_run.py, for the same reason: AdamW divides each entry by its own size."""


@pytest.fixture
def begun_with(monkeypatch):
    """Copies of the weights that each step began with, by its number; the last of those that were begun again."""
    found, real = {}, loop.train_step

    def noted(run, number, *rest):
        weights = run.policy.model.state_dict()
        assert {tensor.device.type for tensor in weights.values()} == {DEVICE}
        found[number] = {name: tensor.cpu().clone() for name, tensor in weights.items()}
        real(run, number, *rest)

    monkeypatch.setattr(loop, "train_step", noted)
    return found


def tree_of(folder, tiny_model, **changes):
    folder.mkdir()
    changes = {"model__device": DEVICE, "model__precision": "float32", "model__attention": "sdpa"} | changes
    return make_tree(folder, tiny_model, **changes)


def trained(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def way(end, start):
    return torch.cat([(end[name].double() - start[name].double()).flatten() for name in sorted(end)])


def test_a_run_that_is_stopped_goes_on_with_the_same_weights(tmp_path, tiny_model, begun_with, monkeypatch):
    """SIGTERM in the third of six steps, whose checkpoint is the only one."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    run(tree_of(alone, tiny_model, checkpoint__every=0))
    start, fourth = begun_with[1], begun_with[4]
    tree = tree_of(stopped, tiny_model, checkpoint__every=0)
    begun_with.clear()
    with monkeypatch.context() as patch:
        noted = loop.train_step

        def interrupted(run, number, *rest):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
            noted(run, number, *rest)

        patch.setattr(loop, "train_step", interrupted)
        summary, said = run(tree)
    assert summary["status"] == "interrupted" and "a checkpoint of step 3 is saved" in said
    assert sorted(begun_with) == [1, 2, 3] and steps(stopped) == [1, 2, 3]
    saved, kept = trained(stopped), load_file(folder_of(stopped, 3) / "model.safetensors")
    begun_with.clear()
    summary, said = run(tree, run={"resume": True})
    assert "resuming after step 3 of 6" in said and summary["status"] == "finished"
    assert sorted(begun_with) == [4, 5, 6] and steps(stopped) == [1, 2, 3, 4, 5, 6]
    for name, tensor in saved.items():
        assert torch.equal(begun_with[4][name], tensor) and torch.equal(kept[name], tensor)
    assert relative(way(saved, start), way({name: fourth[name] for name in saved}, start)) < ROUNDING
    assert relative(way(trained(stopped), start), way(trained(alone), start)) < ROUNDING


@pytest.mark.timeout(600)
def test_a_run_with_compiled_layers_is_the_run_without(tmp_path, tiny_model, begun_with):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for folder, on in ((plain, False), (compiled, True)):
        counters.clear()
        summary, _ = run(tree_of(folder, tiny_model, model__compile=on, model__liger="off"))
        assert summary["status"] == "finished" and bool(counters["frames"]["ok"]) == on
    assert any(record["updated"] for record in read_lines(compiled / "run" / "metrics.jsonl"))
    assert relative(way(trained(compiled), begun_with[1]), way(trained(plain), begun_with[1])) < ROUNDING
