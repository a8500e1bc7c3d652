"""The colocated engine, on a real vLLM: what Hugging Face generates, before and after a sync; stale weights caught."""

import pytest
import torch
import vllm_support
from vllm_support import GREEDY, PROMPTS, gap, move, same_greedy

from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm import held, weights
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.types import SamplingParams, UserError

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(600)]

LONG = [[2 + (7 * i) % 40 for i in range(300)]]
"""Long enough to fill blocks of the prefix cache."""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def started(request, tmp_path_factory):
    folder = vllm_support.save_model(tmp_path_factory.mktemp("vllm") / "model", request.param)
    model, tokenizer = vllm_support.load(folder)
    engine = VLLMEngine(model, tokenizer, vllm_support.settings(folder))
    yield engine, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.close()


@pytest.fixture
def engine(started):
    """As at the start: the first weights, version 0."""
    engine, first = started
    engine.model.load_state_dict(first)
    engine._held._reference = None
    engine._held.forget()
    engine.sync_weights(0)
    engine.metrics()
    return engine


def test_greedy_tokens_and_logprobs_are_hugging_faces_before_and_after_a_sync(engine):
    truth = HFEngine(engine.model, engine.tokenizer)
    assert same_greedy(engine, truth)
    before = engine.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3)
    move(engine.model)
    assert not same_greedy(engine, truth)  # the engine has weights of its own
    engine.sync_weights(1)
    assert same_greedy(engine, truth)
    after = engine.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3)
    assert [s.weight_version for (s,) in before + after] == [0] * 3 + [1] * 3
    found = engine.metrics()
    assert found["sync_bytes"] > 1e5 and found["sync_seconds"] > 0 and found["generation_seconds"] > 0
    assert engine.metrics() == {}


def test_logprobs_are_those_of_the_sampling_distribution(engine):
    drawn = engine.generate(PROMPTS, n=4, sampling=SamplingParams(temperature=0.7, max_tokens=6), seeds=[1, 2, 3])
    assert [len(group) for group in drawn] == [4, 4, 4] and gap(engine.model, drawn, temperature=0.7) < 1e-4
    assert engine.metrics()["generation_tokens"] == sum(len(sample.token_ids) for group in drawn for sample in group)


def test_the_same_seed_gives_the_same_samples_and_another_others(engine):
    sampling = SamplingParams(max_tokens=6)
    first, again, other = (
        engine.generate(PROMPTS, n=3, sampling=sampling, seeds=seeds) for seeds in ([7, 8, 9], [7, 8, 9], [1, 2, 3])
    )
    tokens = [[s.token_ids for group in drawn for s in group] for drawn in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0][:3])) > 1  # the n completions of a prompt are not one


def test_completions_end_as_those_of_the_other_engine(engine):
    """At EOS and at stop strings, both kept; at the limit otherwise."""
    ends = set()
    for stop in ((), ("a", "b", "c", "e", "o")):
        drawn = engine.generate(PROMPTS, n=16, sampling=SamplingParams(max_tokens=20, stop=stop), seeds=[1, 2, 3])
        for sample in (s for group in drawn for s in group):
            stopped = not {0, 7}.isdisjoint(sample.token_ids) or any(s in sample.text for s in stop)
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert len(sample.token_ids) == 20 or stopped
            assert {0, 7}.isdisjoint(sample.token_ids[:-1]) and not any(s in sample.text[:-1] for s in stop)
            ends.add((bool(stop), sample.finish_reason))
    assert {(False, "stop"), (True, "stop")} <= ends


def test_a_stale_tied_head_is_caught(engine, monkeypatch):
    """What the explicit head in ``named_weights`` is for, and what the comparison of log-probabilities sees."""
    monkeypatch.setattr(held, "named_weights", lambda m: ((n, t) for n, t in m.state_dict().items() if "head" not in n))
    move(engine.model)
    engine.sync_weights(1)
    drawn = engine.generate(PROMPTS, n=2, sampling=SamplingParams(max_tokens=6), seeds=[1, 2, 3])
    assert gap(engine.model, drawn) > 0.05
    monkeypatch.undo()
    engine.sync_weights(2)
    drawn = engine.generate(PROMPTS, n=2, sampling=SamplingParams(max_tokens=6), seeds=[1, 2, 3])
    assert gap(engine.model, drawn) < 1e-4


def test_a_stale_prefix_cache_is_caught(engine, monkeypatch):
    sampling = SamplingParams(max_tokens=4)
    engine.generate(LONG, n=2, sampling=sampling, seeds=[1])
    monkeypatch.setattr(engine._llm._llm, "reset_prefix_cache", lambda: True)
    move(engine.model)
    engine.sync_weights(1)
    assert gap(engine.model, engine.generate(LONG, n=2, sampling=sampling, seeds=[1])) > 0.05
    monkeypatch.undo()
    engine.sync_weights(2)
    assert gap(engine.model, engine.generate(LONG, n=2, sampling=sampling, seeds=[1])) < 1e-4


def test_a_wrong_name_is_refused(engine, monkeypatch):
    renamed = [(n.replace("q_proj", "query"), t) for n, t in weights.named_weights(engine.model)]
    monkeypatch.setattr(held, "named_weights", lambda _: iter(renamed))
    with pytest.raises(UserError, match="query"):
        engine.sync_weights(1)
    monkeypatch.undo()
    engine.sync_weights(2)  # and the engine is as good as new
    assert same_greedy(engine, HFEngine(engine.model, engine.tokenizer))


def test_the_reference_stays_frozen(engine):
    sampling = SamplingParams(max_tokens=6)
    engine.keep_reference()
    first = engine.generate(PROMPTS, n=2, sampling=sampling, seeds=[1, 2, 3], weights="reference")
    move(engine.model)
    engine.sync_weights(1)
    policy = engine.generate(PROMPTS, n=2, sampling=sampling, seeds=[1, 2, 3])
    reference = engine.generate(PROMPTS, n=2, sampling=sampling, seeds=[1, 2, 3], weights="reference")
    again = engine.generate(PROMPTS, n=2, sampling=sampling, seeds=[1, 2, 3])
    assert reference == first and policy == again != first
    assert {s.weight_version for group in reference for s in group} == {0}
    with pytest.raises(RuntimeError, match="moved already"):
        engine.keep_reference()


def test_bad_prompts(engine):
    sampling = SamplingParams(max_tokens=4)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        engine.generate([[2], []], n=1, sampling=sampling, seeds=[1, 2])
    with pytest.raises(UserError, match="600"):
        engine.generate([[2], [3] * 600], n=1, sampling=sampling, seeds=[1, 2])
    assert len(engine.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3)) == 3  # nothing of it is left behind


def test_the_trainers_process_is_left_as_it_was(engine):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
