"""What an in-process vLLM is told, and in which order, by those who keep which weights it holds; no vLLM is needed."""

import contextlib

import pytest
import support
import torch

from aapo_fast.models.lora import adapter_state, add_adapter
from aapo_fast.rollout.vllm import held
from aapo_fast.types import UserError

AWAKENING = ["wake weights", "load", "wake KV cache"]


class Recorder:
    """``LocalLLM`` on a GPU, or on a CPU that cannot sleep: what it was asked, and the weights that reached it."""

    def __init__(self, sleeps=True):
        self.sleeps, self.asked, self.weights, self.adapters = sleeps, [], {}, {}

    def sleep(self, keep_weights):
        self.asked.append("sleep" if keep_weights else "sleep without weights")
        return self.sleeps

    def wake_for_loading(self):
        self.asked.append("wake weights")

    def load(self, weights):
        self.asked.append("load")
        self.weights = {name: tensor.clone() for name, tensor in weights}

    def wake_for_generating(self):
        self.asked.append("wake KV cache")

    def load_adapter(self, folder, version):
        self.asked.append("load adapter")
        self.adapters[version] = sorted(path.name for path in folder.iterdir())

    def since(self):
        found, self.asked = self.asked, []
        return found

    def has(self, model):
        state = model.state_dict()
        return all(torch.equal(self.weights[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def move(model):
    for parameter in model.parameters():
        parameter += 1


def test_whole_weights_are_loaded_when_they_are_others():
    llm, model = Recorder(sleeps=False), support.tiny("llama tied")
    whole = held.WholeModel(llm, model)
    assert whole.hold("policy", 0) == -1 and llm.since() == []  # the engine has read them itself
    whole.keep_reference()
    assert whole.hold("reference", 0) == -1 and llm.since() == []
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move(model)
    assert whole.hold("policy", 1) > 0 and llm.since() == ["load"] and llm.has(model)
    assert whole.hold("policy", 1) == -1 and llm.since() == []
    assert whole.hold("reference", 1) > 0 and llm.since() == ["load"]
    assert all(torch.equal(llm.weights[name], tensor) for name, tensor in first.items())
    assert whole.hold("policy", 1) > 0 and llm.since() == ["load"] and llm.has(model)
    assert not whole.sleep()  # where that cannot be, everything stays
    assert llm.since() == ["sleep without weights"] and whole.hold("policy", 1) == -1 and llm.since() == []
    whole.forget()
    assert whole.hold("policy", 1) > 0 and llm.since() == ["load"]


def test_whole_weights_are_loaded_between_the_two_awakenings_a_new_version_or_not():
    llm, model = Recorder(), support.tiny("llama tied")
    whole = held.WholeModel(llm, model)
    whole.keep_reference()
    for version in (0, 1, 1):  # a step may change nothing
        assert whole.sleep()
        llm.weights = {}
        if version:
            move(model)
        assert whole.hold("policy", version) > 0
        assert llm.since() == ["sleep without weights", *AWAKENING] and llm.has(model)
        assert whole.hold("policy", version) == -1 and llm.since() == []
    assert whole.sleep()
    assert whole.hold("reference", 1) > 0 and llm.since() == ["sleep without weights", *AWAKENING]
    assert whole.hold("policy", 1) > 0 and llm.since() == ["load"] and llm.has(model)  # it is awake


def test_a_load_that_fails_is_not_taken_for_one_that_went_well(monkeypatch):
    llm, model = Recorder(sleeps=False), support.tiny()
    whole = held.WholeModel(llm, model)

    def refuse(weights):
        raise UserError("no")

    monkeypatch.setattr(llm, "load", refuse)
    with pytest.raises(UserError, match="no"):
        whole.hold("policy", 1)
    monkeypatch.undo()
    assert whole.hold("policy", 0) > 0 and llm.since() == ["load"] and llm.has(model)


def test_a_reference_that_was_not_kept_cannot_be_held():
    whole = held.WholeModel(Recorder(), support.tiny())
    with pytest.raises(RuntimeError, match="call keep_reference before the first update"):
        whole.hold("reference", 1)


def test_an_adapter_is_loaded_at_each_version_and_base_weights_are_kept_in_sleep(tmp_path, monkeypatch):
    monkeypatch.setattr(held, "SHARED_MEMORY", tmp_path)
    llm, model = Recorder(), add_adapter(support.tiny(), 2, 4.0, ["q_proj"])
    with contextlib.closing(held.AdapterOnly(llm, model)) as adapter:
        sent = sum(tensor.nbytes for tensor in adapter_state(model).values())
        assert adapter.hold("reference", 0) == -1 and llm.since() == []  # the base model
        assert adapter.hold("policy", 0) == sent and llm.since() == ["load adapter"]
        assert adapter.hold("policy", 0) == -1 and adapter.hold("reference", 0) == -1 and llm.since() == []
        assert adapter.sleep() and llm.since() == ["sleep"]
        assert adapter.hold("policy", 1) == sent
        assert llm.since() == ["wake weights", "wake KV cache", "load adapter"]
        assert adapter.sleep() and adapter.hold("policy", 1) == -1  # what sleeps keeps it
        assert llm.since() == ["sleep", "wake weights", "wake KV cache"]
        assert llm.adapters == {version: ["adapter_config.json", "adapter_model.safetensors"] for version in (0, 1)}
        with pytest.raises(RuntimeError, match="keeps its base weights"):
            adapter.forget()
    assert not any(tmp_path.iterdir())
