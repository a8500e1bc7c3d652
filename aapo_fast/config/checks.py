"""Values and combinations that cannot be, whatever their types."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from aapo_fast.config.build import ConfigError
from aapo_fast.config.layers import Config, RewardConfig

MAX_VLLM_RANK = 512

MAX_SECONDS = 1_000_000
"""Of a time limit; from 2^31 milliseconds on the system's calls refuse it."""


def check(c: Config) -> None:
    """Raises ConfigError: one line that names the key, the value and what would be right."""
    if not -(2**63) <= c.run.seed < 2**64:
        raise ConfigError(f"run.seed={c.run.seed} is more than PyTorch takes; give one of at most 64 bits")
    at_least = {
        "data.size": (c.data.size, 1),
        "data.held_out": (c.data.held_out, 0),
        "data.max_prompt_tokens": (c.data.max_prompt_tokens, 1),
        "run.samples_kept": (c.run.samples_kept, 0),
        "lora.rank": (c.lora.rank, 0),
        "rollout.prompts_per_step": (c.rollout.prompts_per_step, 1),
        "rollout.group_size": (c.rollout.group_size, 1),
        "rollout.max_tokens": (c.rollout.max_tokens, 1),
        "rollout.max_batch_size": (c.rollout.max_batch_size, 1),
        "vllm.max_model_len": (c.vllm.max_model_len, 0),
        "vllm.cpu_kv_cache_gib": (c.vllm.cpu_kv_cache_gib, 1),
        "vllm.tensor_parallel_size": (c.vllm.tensor_parallel_size, 1),
        "vllm.num_servers": (c.vllm.num_servers, 1),
        "vllm.max_logprob_gap": (c.vllm.max_logprob_gap, 0),
        "reference.samples": (c.reference.samples, 1),
        "train.steps": (c.train.steps, 1),
        "train.warmup_steps": (c.train.warmup_steps, 0),
        "train.learning_rate": (c.train.learning_rate, 0),
        "train.weight_decay": (c.train.weight_decay, 0),
        "train.max_grad_norm": (c.train.max_grad_norm, 0),
        "train.max_microbatch_tokens": (c.train.max_microbatch_tokens, 1),
        "train.max_nonfinite_steps": (c.train.max_nonfinite_steps, 1),
        "eval.every": (c.eval.every, 0),
        "eval.samples": (c.eval.samples, 0),
        "checkpoint.every": (c.checkpoint.every, 0),
        "checkpoint.keep": (c.checkpoint.keep, 1),
    }
    for key, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{key}={value} must be at least {least}")
    for key, share in (
        ("scoring.max_failure_share", c.scoring.max_failure_share),
        ("train.min_learning_rate_ratio", c.train.min_learning_rate_ratio),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{key}={share} must lie in [0, 1]")
    for key, limit in (
        ("scoring.time_limit_seconds", c.scoring.time_limit_seconds),
        ("vllm.time_limit_seconds", c.vllm.time_limit_seconds),
    ):
        if not 0 < limit <= MAX_SECONDS:
            raise ConfigError(f"{key}={limit} must be above 0, and {MAX_SECONDS} at most")
    for key, beta in (("train.beta1", c.train.beta1), ("train.beta2", c.train.beta2)):
        if not 0 <= beta < 1:
            raise ConfigError(f"{key}={beta} must lie in [0, 1)")
    if not 0 < c.lora.alpha < math.inf:
        raise ConfigError(f"lora.alpha={c.lora.alpha} must be above 0 and finite")
    if not c.lora.target_modules:
        raise ConfigError("lora.target_modules is empty; name layers, or leave it at ['all-linear']")
    _check_loss(c)
    _check_engines(c)
    _check_combinations(c)
    _check_rewards(c.rewards)


def _check_loss(c: Config) -> None:
    if not 0 < c.loss.sparsity_threshold <= 1:
        raise ConfigError(f"loss.sparsity_threshold={c.loss.sparsity_threshold} must lie in (0, 1]")
    if not math.isfinite(c.loss.entropy_bonus):
        raise ConfigError(f"loss.entropy_bonus={c.loss.entropy_bonus} must be finite; 0 is none")
    if not 0 <= c.loss.z_loss < math.inf:
        raise ConfigError(f"loss.z_loss={c.loss.z_loss} must be finite and not negative; 0 is none")
    if not (c.loss.max_importance_weight == 0 or 1 <= c.loss.max_importance_weight < math.inf):
        raise ConfigError(
            f"loss.max_importance_weight={c.loss.max_importance_weight} must be at least 1 and finite; 0: no correction"
        )
    if c.loss.implementation == "reference" and c.loss.backward == "sparse":
        raise ConfigError(
            "loss.backward='sparse' is not for loss.implementation='reference'; use 'auto' or 'torch', or "
            "loss.backward='exact'"
        )
    if c.loss.implementation == "reference" and c.model.vocabulary_parallel:
        raise ConfigError(
            "model.vocabulary_parallel=true is not for loss.implementation='reference'; use 'auto' or 'torch'"
        )


def _check_engines(c: Config) -> None:
    if c.vllm.tensor_parallel_size > 1 and c.rollout.engine == "vllm":
        raise ConfigError(
            f"vllm.tensor_parallel_size={c.vllm.tensor_parallel_size}: an engine in the trainer's process has its one "
            "GPU; use rollout.engine='vllm_server'"
        )
    if c.lora.rank > MAX_VLLM_RANK and c.rollout.engine != "hf":
        raise ConfigError(f"lora.rank={c.lora.rank}: vLLM takes adapters of rank {MAX_VLLM_RANK} at most")
    needed = c.data.max_prompt_tokens + c.rollout.max_tokens
    if 0 < c.vllm.max_model_len < needed and c.rollout.engine != "hf":
        raise ConfigError(
            f"vllm.max_model_len={c.vllm.max_model_len} would cut completions short: data.max_prompt_tokens + "
            f"rollout.max_tokens are {needed}"
        )
    if c.rollout.temperature < 0.01 and c.rollout.engine != "hf":
        raise ConfigError(f"rollout.temperature={c.rollout.temperature}: vLLM samples at 0.01 or above")
    _check_servers(c)
    _check_transfer(c)
    if not 0 < c.vllm.gpu_memory_utilization < 1:
        raise ConfigError(f"vllm.gpu_memory_utilization={c.vllm.gpu_memory_utilization} must lie in (0, 1)")
    if c.rollout.max_staleness not in (0, 1):
        raise ConfigError(f"rollout.max_staleness={c.rollout.max_staleness} must be 0 or 1")
    if c.rollout.max_staleness and c.rollout.engine != "vllm_server":
        raise ConfigError(
            f"rollout.max_staleness=1 needs rollout.engine='vllm_server': the engine {c.rollout.engine!r} shares the "
            "trainer's device"
        )


def _check_servers(c: Config) -> None:
    if not c.vllm.servers:
        return
    if c.rollout.engine != "vllm_server":
        raise ConfigError(
            f"vllm.servers={c.vllm.servers} is for rollout.engine='vllm_server', which is {c.rollout.engine!r}; set "
            "it, or leave vllm.servers empty"
        )
    if c.vllm.num_servers != 1:
        raise ConfigError(
            f"vllm.num_servers={c.vllm.num_servers} is for servers started here; vllm.servers names others"
        )
    urls = [url.rstrip("/") for url in c.vllm.servers]
    for url in urls:
        if urls.count(url) > 1:
            raise ConfigError(f"vllm.servers={c.vllm.servers} names {url} twice; name each server once")


def _check_transfer(c: Config) -> None:
    v = c.vllm
    if v.address and v.weights_folder:
        raise ConfigError("vllm.address sends weights by NCCL and vllm.weights_folder through files; set one of them")
    if v.transfer == "auto":
        return
    if c.rollout.engine == "vllm":
        raise ConfigError(
            f"vllm.transfer={v.transfer!r} is for servers: an engine in the trainer's process is handed the tensors "
            "themselves; leave it at 'auto', or use rollout.engine='vllm_server'"
        )
    for name, value, way in (("address", v.address, "nccl"), ("weights_folder", v.weights_folder, "file")):
        if value and v.transfer != way:
            raise ConfigError(f"vllm.{name}={value!r} is for vllm.transfer={way!r}, which is {v.transfer!r}; set one")
    if v.transfer == "nccl" and v.servers and not v.address:
        raise ConfigError("vllm.transfer='nccl' with vllm.servers needs vllm.address, this host as they reach it")
    if v.transfer == "ipc" and v.servers:
        raise ConfigError(
            "vllm.transfer='ipc' sends CUDA handles as a pickle, which no server but one that the run starts itself "
            "should read; leave vllm.servers empty, or use 'nccl' or 'file'"
        )
    if v.transfer == "ipc" and (v.num_servers, v.tensor_parallel_size) != (1, 1):
        raise ConfigError(
            f"vllm.transfer='ipc' is for one server on the trainer's own GPU, and vllm.num_servers={v.num_servers}, "
            f"vllm.tensor_parallel_size={v.tensor_parallel_size}; set both to 1, or use 'nccl' or 'file'"
        )


def _check_combinations(c: Config) -> None:
    if c.rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature={c.rollout.temperature} must be above 0: a policy learns only from what it samples, "
            "and an evaluation is greedy besides (eval.samples=0: greedy alone)"
        )
    if not 0 < c.rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p={c.rollout.top_p} must lie in (0, 1]")
    if c.advantage.delta_low > c.advantage.delta_high:
        raise ConfigError(
            f"advantage.delta_low={c.advantage.delta_low} must not exceed advantage.delta_high={c.advantage.delta_high}"
        )
    if c.rollout.group_size == 1 and c.reference.mode == "none":
        raise ConfigError(
            "rollout.group_size=1 with reference.mode='none' leaves every advantage zero; "
            "raise group_size or use a reference"
        )
    if c.train.warmup_steps >= c.train.steps:
        raise ConfigError(f"train.warmup_steps={c.train.warmup_steps} must be below train.steps={c.train.steps}")
    if c.eval.every and not c.data.held_out:
        raise ConfigError(f"eval.every={c.eval.every} needs problems to evaluate on; set data.held_out above 0")
    if c.model.compile and c.model.activation_checkpointing == "selective":
        raise ConfigError(
            "model.activation_checkpointing='selective' cannot look into layers that model.compile=true has compiled, "
            "which choose for themselves what to compute again; set it to 'none' or 'full'"
        )
    if c.data.system_prompt and not c.data.chat_template:
        raise ConfigError("data.system_prompt needs data.chat_template=true, which is what gives messages their form")
    if any(not s for s in c.rollout.stop):
        raise ConfigError("rollout.stop has an empty string, which would end every completion at once")


def _check_rewards(rewards: Sequence[RewardConfig]) -> None:
    if not rewards:
        raise ConfigError("rewards is empty; give at least one [[rewards]] entry")
    for index, reward in enumerate(rewards):
        builtin = reward.function in ("reasoning_gym", "math_verify", "format", "cosine")
        if not builtin and reward.function.count(":") != 1:
            raise ConfigError(
                f"rewards.{index}.function={reward.function!r} must be reasoning_gym, math_verify, format, "
                "cosine, or module:function"
            )
        if (reward.function == "format") != bool(reward.pattern):
            raise ConfigError(
                f"rewards.{index}.pattern={reward.pattern!r} goes with function='format', and only with that"
            )
        _check_reward_options(f"rewards.{index}.options", reward)
        for name, expression in (("extract", reward.extract), ("pattern", reward.pattern)):
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(
                    f"rewards.{index}.{name}={expression!r} is not a regular expression: {error}"
                ) from error


def _check_reward_options(key: str, reward: RewardConfig) -> None:
    options = reward.options
    if reward.function != "cosine":
        if options:
            raise ConfigError(f"{key}={options!r} goes with function='cosine', and only with that")
        return
    if set(options) != {"max_length", "correct", "wrong"}:
        raise ConfigError(f"{key} has {sorted(options)}; function='cosine' wants max_length, correct and wrong")
    if not _is_number(options["max_length"]) or options["max_length"] <= 0:
        raise ConfigError(f"{key}.max_length={options['max_length']!r} must be a number of characters above 0")
    for name in ("correct", "wrong"):
        ends = options[name]
        if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)):
            raise ConfigError(f"{key}.{name}={ends!r} must be [reward at length 0, reward at max_length]")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
