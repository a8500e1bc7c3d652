"""The rollout engine that [rollout] and [vllm] ask for, and how far it may be from the trainer."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from aapo_fast.config import Config, ConfigError
from aapo_fast.models.load import model_source
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm.client import ServerClient
from aapo_fast.rollout.vllm.guard import KEY_VARIABLE
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.settings import EngineSettings, engine_dtype
from aapo_fast.rollout.vllm.transfer import IPCTransport, NCCLTransport
from aapo_fast.rollout.vllm.transport import SHARED_MEMORY, AdapterTransport, FolderTransport, Transport
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.policy import Policy, resolve_precision
from aapo_fast.types import RolloutEngine

LOGPROB_GAPS = {"float32": 0.005, "bfloat16": 0.1, "float16": 0.05}
"""Rounding of an engine in this dtype stays well below; measured for float32 (docs/LOG.md)."""


def make_engine(config: Config, policy: Policy, folder: Path, display: Display) -> RolloutEngine:
    """The engine, started. ``folder`` is the run's: logs of servers go there.

    Raises:
        UserError: vLLM is not installed, does not start, or cannot be reached.
    """
    model, tokenizer = policy.model, policy.tokenizer
    if config.rollout.engine == "hf":
        return HFEngine(model, tokenizer, config.rollout.max_batch_size, policy.autocast)
    settings = engine_settings(config, policy.device)
    if config.rollout.engine == "vllm":
        if policy.device.index:
            raise ConfigError(
                f"model.device={config.model.device!r}: vLLM in this process takes the first GPU that it sees; set "
                f"CUDA_VISIBLE_DEVICES={policy.device.index} and model.device='cuda'"
            )
        display.note("starting vLLM")
        return VLLMEngine(model, tokenizer, settings)
    limit = config.vllm.time_limit_seconds
    processes: list[ServerProcess] = []
    if config.vllm.servers:
        key = os.environ.get(KEY_VARIABLE, "")
        servers = [Server(ServerClient(url, key, limit, settings.max_model_len), None) for url in config.vllm.servers]
    else:
        display.note(f"starting {config.vllm.num_servers} vLLM server(s); their logs: {folder}/vllm-*.log")
        processes = _processes(config, settings, policy.device, folder)
        servers = [Server(None, process) for process in processes]
    width = max(1, config.rollout.max_batch_size // config.rollout.group_size)
    dtype = getattr(torch, settings.dtype)
    transport = _transport(config, policy, processes)
    return VLLMServersEngine(model, tokenizer, servers, transport, limit, dtype, width, display.note)


def weight_transfer(config: Config) -> str:
    """How weights reach servers, "file", "nccl" or "ipc", as ``vllm.transfer`` says. Of itself it is never IPC, which
    puts the server on the trainer's GPU, into memory that training may want.
    """
    if config.vllm.transfer != "auto":
        return config.vllm.transfer
    return "nccl" if config.vllm.address else "file"


def engine_settings(config: Config, device: torch.device) -> EngineSettings:
    """[vllm] for an engine beside a trainer on ``device``."""
    way = weight_transfer(config)
    whole = way != "file" and config.rollout.engine != "vllm"
    return EngineSettings(
        model=model_source(config.model.path),
        device=device.type,
        dtype=engine_dtype(config.vllm.dtype, device),
        max_model_len=config.vllm.max_model_len or config.data.max_prompt_tokens + config.rollout.max_tokens,
        max_num_seqs=config.rollout.max_batch_size,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        cpu_kv_cache_gib=config.vllm.cpu_kv_cache_gib,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        enforce_eager=config.vllm.enforce_eager,
        seed=config.run.seed,
        lora_rank=0 if whole else config.lora.rank,  # from GPU to GPU go merged weights
        # Every server on GPUs can be sent weights by NCCL, whatever the config that it was started with says.
        weight_transfer="" if device.type != "cuda" else "ipc" if way == "ipc" else "nccl",
    )


def engine_version(config: Config, device: torch.device) -> str:
    """What the engine adds to what decides a completion: nothing, where the model samples for itself in float32."""
    if config.rollout.engine != "hf":
        return f" by vLLM in {engine_dtype(config.vllm.dtype, device)}"
    precision = resolve_precision(config.model.precision, device)
    return "" if precision == torch.float32 else f" in {precision}"


def max_logprob_gap(config: Config, device: torch.device) -> float:
    """How far the engine's log-probabilities may be from the trainer's, in nats, on average over the tokens compared.

    Infinite where a model samples for itself: it is not compared with itself. Which tokens: ``samples_are_compared``.
    """
    if config.rollout.engine == "hf":
        return math.inf
    return config.vllm.max_logprob_gap or LOGPROB_GAPS[engine_dtype(config.vllm.dtype, device)]


def samples_are_compared(config: Config) -> bool:
    """Whether the samples of every step can be compared with the policy that they train.

    Not where they are of the weights before, nor below a top-p of 1, where log-probabilities are those of the nucleus:
    there a few completions more are drawn after each sync and compared (``sampling.verify_engine``).
    """
    return not config.rollout.max_staleness and config.rollout.top_p == 1


def _processes(config: Config, settings: EngineSettings, device: torch.device, folder: Path) -> list[ServerProcess]:
    key = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(32)
    return [
        ServerProcess(
            settings,
            key,
            folder / f"vllm-{number}.log",
            start_limit_seconds=config.vllm.time_limit_seconds,
            extra_environment=_gpus(config, number, device),
        )
        for number in range(config.vllm.num_servers)
    ]


def _gpus(config: Config, number: int, device: torch.device) -> dict[str, str]:
    """The GPUs of server ``number``, of those that the trainer sees: those after the trainer's, or by IPC its own."""
    if device.type != "cuda":
        return {}
    width = config.vllm.tensor_parallel_size
    first = (device.index or 0) + (0 if weight_transfer(config) == "ipc" else 1 + number * width)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = seen if seen != [""] else [str(i) for i in range(torch.cuda.device_count())]
    if first + width > len(seen):
        raise ConfigError(
            f"vllm.num_servers={config.vllm.num_servers} of {width} GPUs each beside {device}: this machine has "
            f"{len(seen)} of them; start fewer, or on the trainer's own: rollout.engine='vllm', or vllm.transfer='ipc'"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen[first : first + width])}


def _transport(config: Config, policy: Policy, processes: Sequence[ServerProcess]) -> Transport:
    way, device = weight_transfer(config), policy.device
    if way == "ipc":
        return IPCTransport(processes, device)
    if way == "nccl":
        if device.type != "cuda":
            setting = f"address={config.vllm.address!r}" if config.vllm.address else "transfer='nccl'"
            raise ConfigError(f"vllm.{setting} is for NCCL between GPUs, and model.device is {device}")
        return NCCLTransport(config.vllm.address or "127.0.0.1", config.vllm.time_limit_seconds)
    folder = Path(config.vllm.weights_folder) if config.vllm.weights_folder else SHARED_MEMORY
    if config.lora.rank:
        return AdapterTransport.within(folder, policy.model)
    return FolderTransport.within(folder)
