"""How a vLLM engine is started: its arguments, and the environment it reads them from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to know before it starts.

    Attributes:
        model: folder or hub name of the model in Hugging Face form; its config and tokenizer are those of the policy.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16": of the engine's weights and activations.
        max_model_len: longest prompt and completion together, in tokens.
        max_num_seqs: most sequences generated at once.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache.
        cpu_kv_cache_gib: KV cache of an engine on a CPU.
        tensor_parallel_size: GPUs of one engine.
        enforce_eager: no CUDA graphs and no compilation: starts sooner, generates slower. Always so on a CPU.
        seed: of what vLLM draws without a seed of its own; completions have theirs.
        lora_rank: of the adapter that requests may ask for; 0 for none.
        weight_transfer: "nccl" or "ipc": which of vLLM's own ways a server takes weights by; "" for none of them.
    """

    model: str
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.4
    cpu_kv_cache_gib: int = 2
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    seed: int = 0
    lora_rank: int = 0
    weight_transfer: Literal["", "nccl", "ipc"] = ""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``; as options, those of its server."""
        found: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager or self.device == "cpu",
            "seed": self.seed,
            # What the sampler drew from: after temperature and top-p. Raw ones would be those of temperature 1.
            "logprobs_mode": "processed_logprobs",
            # A model's generation_config.json may ask for a top-k or a repetition penalty, which a server would apply
            # to requests that do not speak of them. What ends a completion is sent with each request.
            "generation_config": "vllm",
        }
        if self.lora_rank:
            # One adapter; requests without one are the base model's, in the same batches. On a CPU vLLM gives those the
            # adapter of the last slot (vllm-project/vllm#48421): a second slot stays empty for them.
            slots = 2 if self.device == "cpu" else 1
            room = min(rank for rank in LORA_RANKS if rank >= self.lora_rank)
            found |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": room}
        if self.device == "cuda":
            found["gpu_memory_utilization"] = self.gpu_memory_utilization
        return found

    def environment(self) -> Mapping[str, str]:
        """Variables to set, where the user has not, before vllm is imported."""
        found = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.device == "cpu":
            # Bound to cores of its own, the engine would leave the trainer's threads on the same ones.
            found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_kv_cache_gib)}
        return found


def engine_dtype(name: str, device: torch.device) -> str:
    """``auto`` is bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is many times slower."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"


def telling_line(text: str) -> str:
    """The line of an error or a log that says most: the last that names an error, else the last."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For further information")]
    telling = [line for line in lines if "rror" in line and "See root cause above" not in line]
    return (telling or lines or ["no output"])[-1][-300:]
