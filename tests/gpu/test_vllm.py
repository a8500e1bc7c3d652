"""vLLM on GPUs: an engine that sleeps while the policy trains; weights sent by NCCL to a server on another GPU, and by
CUDA IPC to one on the same.
"""

import contextlib
import importlib.util

import pytest
import torch

if importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
    pytest.skip("needs vllm and an NVIDIA GPU", allow_module_level=True)

import vllm_support
from vllm_support import PROMPTS, gap, move, same_greedy

from aapo_fast.models.load import load_model
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm import servers
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transfer import IPCTransport, NCCLTransport
from aapo_fast.rollout.vllm.weights import named_weights
from aapo_fast.types import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
SAMPLING = SamplingParams(max_tokens=6)


def on_gpu(folder, **changes):
    vllm_support.save_model(folder, tied=True)
    model, tokenizer = load_model(str(folder), torch.device("cuda"))
    return model, tokenizer, vllm_support.settings(folder, device="cuda", gpu_memory_utilization=0.3, **changes)


def test_an_engine_gives_its_memory_back_and_wakes_with_the_policys_weights(tmp_path):
    model, tokenizer, settings = on_gpu(tmp_path / "model")
    with contextlib.closing(VLLMEngine(model, tokenizer, settings)) as engine:
        for version in (1, 2):
            assert gap(model.cpu(), engine.generate(PROMPTS, n=2, sampling=SAMPLING, seeds=[1, 2, 3])) < 1e-3
            model.cuda()
            free, _ = torch.cuda.mem_get_info()
            engine.free_memory()
            assert torch.cuda.mem_get_info()[0] > free + 2**30
            move(model.cpu())
            model.cuda()
            engine.sync_weights(version)
        drawn = engine.generate(PROMPTS, n=2, sampling=SAMPLING, seeds=[1, 2, 3])
        assert gap(model.cpu(), drawn) < 1e-3 and {s.weight_version for group in drawn for s in group} == {2}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_weights_by_nccl(tmp_path):
    model, tokenizer, settings = on_gpu(tmp_path / "model", weight_transfer="nccl")
    process = ServerProcess(settings, "key", tmp_path / "log", extra_environment={"CUDA_VISIBLE_DEVICES": "1"})
    server, transport = Server(None, process), NCCLTransport("127.0.0.1", 300.0)
    engine = VLLMServersEngine(model, tokenizer, [server], transport, 600.0, torch.float32)
    with contextlib.closing(engine):
        for version in (1, 2):
            move(model.cpu())
            model.cuda()
            engine.sync_weights(version)
            drawn = engine.generate(PROMPTS, n=2, sampling=SAMPLING, seeds=[1, 2, 3])
            assert gap(model.cpu(), drawn) < 1e-3
            model.cuda()


def test_weights_by_ipc(tmp_path, monkeypatch):
    """Hugging Face's tokens before and after every sync; and a head that is not sent shows."""
    model, tokenizer, settings = on_gpu(tmp_path / "model", weight_transfer="ipc")
    process = ServerProcess(settings, "key", tmp_path / "log")
    transport = IPCTransport([process], torch.device("cuda"))
    engine = VLLMServersEngine(model, tokenizer, [Server(None, process)], transport, 600.0, torch.float32)
    with contextlib.closing(engine):
        truth = HFEngine(model, tokenizer)
        assert same_greedy(engine, truth, atol=1e-3)
        for version in (1, 2, 3):
            move(model.cpu(), seed=version)
            model.cuda()
            assert not same_greedy(engine, truth, atol=1e-3)
            engine.sync_weights(version)
            assert same_greedy(engine, truth, atol=1e-3)
            assert engine._servers[0].client.weight_version() == str(version)
        move(model.cpu(), seed=4)
        model.cuda()
        monkeypatch.setattr(servers, "named_weights", without_head)
        engine.sync_weights(4)
        drawn = engine.generate(PROMPTS, n=2, sampling=SAMPLING, seeds=[1, 2, 3])
        assert gap(model.cpu(), drawn) > 0.05


def without_head(*given):
    return ((name, tensor) for name, tensor in named_weights(*given) if name != "lm_head.weight")
