"""The rollout engine that [rollout] and [vllm] ask for, and how far it may be from the trainer."""

from __future__ import annotations

import math
import os
import secrets
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
    if config.vllm.servers:
        key = os.environ.get(KEY_VARIABLE, "")
        servers = [Server(ServerClient(url, key, limit, settings.max_model_len), None) for url in config.vllm.servers]
    else:
        display.note(f"starting {config.vllm.num_servers} vLLM server(s); their logs: {folder}/vllm-*.log")
        servers = [Server(None, process) for process in _processes(config, settings, policy.device, folder)]
    width = max(1, config.rollout.max_batch_size // config.rollout.group_size)
    dtype = getattr(torch, settings.dtype)
    return VLLMServersEngine(model, tokenizer, servers, _transport(config, policy), limit, dtype, width, display.note)


def engine_settings(config: Config, device: torch.device) -> EngineSettings:
    """[vllm] for an engine beside a trainer on ``device``."""
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
        lora_rank=0 if config.vllm.address else config.lora.rank,  # by NCCL go whole weights
    )


def engine_version(config: Config, device: torch.device) -> str:
    """What the engine adds to what decides a completion: nothing, where the model samples for itself in float32."""
    if config.rollout.engine != "hf":
        return f" by vLLM in {engine_dtype(config.vllm.dtype, device)}"
    precision = resolve_precision(config.model.precision, device)
    return "" if precision == torch.float32 else f" in {precision}"


def max_logprob_gap(config: Config, device: torch.device) -> float:
    """How far the engine's log-probabilities may be from the trainer's, in nats, on average over a step's tokens.

    Infinite where they differ by design: a model that samples for itself is not compared with itself, and below a
    top-p of 1 the sampler's distribution is another one.
    """
    if config.rollout.engine == "hf" or config.rollout.top_p < 1:
        return math.inf
    return config.vllm.max_logprob_gap or LOGPROB_GAPS[engine_dtype(config.vllm.dtype, device)]


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
    """The GPUs of server ``number``: those after the trainer's, of those that the trainer sees."""
    if device.type != "cuda":
        return {}
    width = config.vllm.tensor_parallel_size
    first = (device.index or 0) + 1 + number * width
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = seen if seen != [""] else [str(i) for i in range(torch.cuda.device_count())]
    if first + width > len(seen):
        raise ConfigError(
            f"vllm.num_servers={config.vllm.num_servers} of {width} GPUs each beside {device}: this machine has "
            f"{len(seen)} of them; start fewer, or use rollout.engine='vllm' on the trainer's own"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen[first : first + width])}


def _transport(config: Config, policy: Policy) -> Transport:
    device = policy.device
    if config.vllm.address:
        if device.type != "cuda":
            raise ConfigError(
                f"vllm.address={config.vllm.address!r} is for NCCL between GPUs, and model.device is {device}"
            )
        from aapo_fast.rollout.vllm.adapter import NCCLTransport

        return NCCLTransport(config.vllm.address, config.vllm.time_limit_seconds)
    folder = Path(config.vllm.weights_folder) if config.vllm.weights_folder else SHARED_MEMORY
    if config.lora.rank:
        return AdapterTransport.within(folder, policy.model)
    return FolderTransport.within(folder)
