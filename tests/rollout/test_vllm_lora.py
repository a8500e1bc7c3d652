"""An adapter on vLLM, in the process and on a server: samples of Hugging Face's model with it, and of its base."""

import os
import signal

import pytest
import support
import torch
import vllm_support
from vllm_support import GREEDY, PROMPTS, gap, same_greedy

from aapo_fast import config
from aapo_fast.models.lora import add_adapter, without_adapter
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transport import AdapterTransport
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.loop import train
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import SamplingParams

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(600)]

LONG = [[2 + (7 * i) % 40 for i in range(300)]]


@torch.no_grad()
def move(model, by=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += by * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", params=["in the process", "server"])
def engine(request, tmp_path_factory):
    folder = vllm_support.save_model(tmp_path_factory.mktemp("vllm") / "model", tied=True)
    model, tokenizer = vllm_support.load(folder)
    model = add_adapter(model, rank=3, alpha=6.0, target_modules=["all-linear"])
    settings = vllm_support.settings(folder, lora_rank=3)
    if request.param == "server":
        process = ServerProcess(settings, "a key", folder.parent / "vllm.log")
        transport = AdapterTransport(folder.parent / "weights", model)
        engine = VLLMServersEngine(model, tokenizer, [Server(None, process)], transport, 120.0, torch.float32)
    else:
        engine = VLLMEngine(model, tokenizer, settings)
    yield engine
    engine.close()


def test_each_sync_brings_the_adapter_alone_and_the_reference_stays(engine):
    truth = HFEngine(engine.model, engine.tokenizer)
    engine.keep_reference()
    engine.sync_weights(0)
    first = engine.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3)
    assert same_greedy(engine, truth)
    engine.generate(LONG, n=1, sampling=GREEDY, seeds=[0])  # fills blocks of the prefix cache
    for version in (1, 2):
        move(engine.model, seed=version)
        assert not same_greedy(engine, truth)
        engine.metrics()
        engine.sync_weights(version)
        sizes = sum(p.numel() * 4 for p in engine.model.parameters() if p.requires_grad)
        assert engine.metrics()["sync_bytes"] == sizes
        assert same_greedy(engine, truth)
        drawn = engine.generate(
            PROMPTS + LONG, n=3, sampling=SamplingParams(temperature=0.8, max_tokens=6), seeds=[1] * 4
        )
        assert gap(engine.model, drawn, temperature=0.8) < 1e-4
        assert {s.weight_version for group in drawn for s in group} == {version}
        again = engine.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3, weights="reference")
        assert [[s.token_ids for s in group] for group in again] == [[s.token_ids for s in group] for group in first]
        with without_adapter(engine.model):
            assert gap(engine.model, again) < 1e-4


def test_policy_and_reference_are_drawn_in_one_batch(engine, monkeypatch):
    move(engine.model, seed=5)
    engine.sync_weights(engine.weight_version + 1)
    sampling, seeds = SamplingParams(max_tokens=6), [1, 2, 3]
    apart = [engine.generate(PROMPTS, n=2, sampling=sampling, seeds=seeds, weights=w) for w in ("policy", "reference")]
    batches = []
    if isinstance(engine, VLLMEngine):
        generate = engine._llm.generate
        monkeypatch.setattr(engine._llm, "generate", lambda *a: batches.append(a[5]) or generate(*a))
    weights = ["policy", "reference"] * 3
    mixed = engine.generate([p for p in PROMPTS for _ in weights[:2]], n=2, sampling=sampling,
                            seeds=[s for s in seeds for _ in weights[:2]], weights=weights)  # fmt: skip
    assert batches == ([[True, False] * 3] if isinstance(engine, VLLMEngine) else [])
    for both, kind in zip((mixed[::2], mixed[1::2]), apart, strict=True):
        assert [[s.token_ids for s in group] for group in both] == [[s.token_ids for s in group] for group in kind]
        assert [[s.weight_version for s in group] for group in both] == [[s.weight_version for s in g] for g in kind]
    assert apart[0] != apart[1]


def test_a_tiny_model_learns_with_an_adapter_on_vllm(tmp_path):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    tree = support.tiny_run(
        tmp_path,
        folder,
        lora={"rank": 8, "alpha": 16.0},
        rollout__engine="vllm",
        rollout__group_size=16,
        reference__mode="online",
        train__steps=25,
        train__learning_rate=1e-2,
        data__max_prompt_tokens=64,
        vllm__cpu_kv_cache_gib=1,
    )
    summary = train(config.parse(tree), Display(quiet=True))
    assert summary["accuracy_before"] <= 0.25 and summary["accuracy_after"] == 1.0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(row["reference_reward"] for row in rows) < 0.3


def test_a_server_that_is_started_again_gets_the_adapter(engine):
    if isinstance(engine, VLLMEngine):
        pytest.skip("there is no server to kill")
    move(engine.model, seed=6)
    engine.sync_weights(engine.weight_version + 1)
    os.killpg(engine._servers[0].process.pid, signal.SIGKILL)
    assert same_greedy(engine, HFEngine(engine.model, engine.tokenizer))
    assert engine.metrics()["server_restarts"] == 1 and engine._servers[0].adapter
