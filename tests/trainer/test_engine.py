"""Which way weights go to vLLM servers, on which GPUs those are, and what a CPU refuses; nothing is started."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aapo_fast import config
from aapo_fast.cli import QUICKSTART, main
from aapo_fast.rollout.vllm.transfer import IPCTransport, NCCLTransport
from aapo_fast.rollout.vllm.transport import FolderTransport
from aapo_fast.trainer import engine
from aapo_fast.trainer.display import Display
from aapo_fast.types import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make(**vllm):
    overrides = {f"vllm.{name}": value for name, value in vllm.items()}
    overrides |= {"rollout.engine": "vllm_server", "model.path": "."}
    return config.load(QUICKSTART, list(overrides.items()))


@pytest.mark.parametrize(
    ("settings", "way", "transport"),
    [
        ({}, "file", FolderTransport),
        ({"address": "10.0.0.1"}, "nccl", NCCLTransport),
        ({"transfer": "file"}, "file", FolderTransport),
        ({"transfer": "nccl"}, "nccl", NCCLTransport),
        ({"transfer": "ipc"}, "ipc", IPCTransport),
    ],
)
def test_the_way_that_weights_go(settings, way, transport):
    chosen = make(**settings)
    assert engine.weight_transfer(chosen) == way
    made = engine._transport(chosen, SimpleNamespace(device=GPU, model=None), [])
    assert type(made) is transport
    made.close()
    with_lora = replace(chosen, lora=replace(chosen.lora, rank=4))
    found = engine.engine_settings(with_lora, GPU)
    assert found.weight_transfer == ("ipc" if way == "ipc" else "nccl")
    assert found.lora_rank == (4 if way == "file" else 0)  # from GPU to GPU go merged weights
    assert engine.engine_settings(with_lora, CPU).weight_transfer == ""


def test_an_engine_in_the_process_has_its_adapter_whatever_servers_would_get():
    chosen = make(address="10.0.0.1")
    chosen = replace(chosen, lora=replace(chosen.lora, rank=4), rollout=replace(chosen.rollout, engine="vllm"))
    assert engine.engine_settings(chosen, GPU).lora_rank == 4


@pytest.mark.parametrize(
    ("rollout", "gap", "compared"),
    [
        ({}, 0.005, True),
        ({"top_p": 0.9}, 0.005, False),
        ({"max_staleness": 1}, 0.005, False),
        ({"engine": "hf"}, math.inf, True),
        ({"engine": "hf", "top_p": 0.9}, math.inf, False),
    ],
)
def test_no_sampling_option_turns_the_check_of_an_engine_off(rollout, gap, compared):
    chosen = make()
    chosen = replace(chosen, rollout=replace(chosen.rollout, **rollout))
    assert engine.max_logprob_gap(chosen, CPU) == gap
    assert engine.samples_are_compared(chosen) == compared


@pytest.mark.parametrize(
    ("settings", "device", "gpus"),
    [
        ({}, "cuda", ["5"]),
        ({"num_servers": "2"}, "cuda:0", ["5", "7"]),
        ({"transfer": "nccl"}, "cuda:1", ["7"]),
        ({"transfer": "ipc"}, "cuda", ["3"]),  # vLLM opens a handle on the GPU that made it
        ({"transfer": "ipc"}, "cuda:2", ["7"]),
    ],
)
def test_servers_have_the_gpus_after_the_trainers_and_by_ipc_its_own(tmp_path, monkeypatch, settings, device, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.delenv(engine.KEY_VARIABLE, raising=False)
    chosen, trainer = make(**settings), torch.device(device)
    made = engine._processes(chosen, engine.engine_settings(chosen, trainer), trainer, tmp_path)
    assert [process.extra_environment["CUDA_VISIBLE_DEVICES"] for process in made] == gpus
    assert all(len(process.api_key) > 40 for process in made)  # nobody's guess


def test_one_gpu_leaves_a_server_the_trainers_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"has 1 of them; .* rollout.engine='vllm', or vllm.transfer='ipc'"):
        engine._gpus(make(), 0, GPU)
    assert engine._gpus(make(transfer="ipc"), 0, GPU) == {"CUDA_VISIBLE_DEVICES": "3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transfer": "ipc"}, "vllm.transfer='ipc' shares a GPU's memory, and the policy is on cpu; use 'file'"),
        ({"transfer": "nccl"}, "vllm.transfer='nccl' is for NCCL between GPUs, and model.device is cpu"),
        ({"address": "a"}, "vllm.address='a' is for NCCL between GPUs, and model.device is cpu"),
    ],
)
def test_a_cpu_shares_no_gpu_memory_and_starts_no_server(tmp_path, monkeypatch, settings, message):
    def start(*_):
        raise AssertionError("a server was started")

    monkeypatch.setattr(engine.ServerProcess, "start", start)
    policy = SimpleNamespace(device=CPU, model=None, tokenizer=None)
    with pytest.raises(UserError) as refused:
        engine.make_engine(make(**settings), policy, tmp_path, Display())
    assert str(refused.value) == message


def test_a_server_apart_is_sent_no_handles(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where vllm is installed
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("a server was started"))
    assert main(["serve", str(QUICKSTART), "--rollout.engine", "vllm_server", "--vllm.transfer", "ipc"]) == 2
    error = capsys.readouterr().err
    assert "vllm.transfer='ipc' is for the server that a training run starts itself" in error
    assert error.strip().count("\n") == 0
