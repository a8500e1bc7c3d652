"""TRL's trainers with vLLM: the release of it that TRL supports, and what policy and reference say."""

import importlib.metadata

import peft
import pytest
import support
import torch
import transformers
import vllm_support
from trl_support import PROMPTS, make_trainer, rewards

from aapo_fast.integrations.trl import AAPOConfig, AAPOTrainer

LORA = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
ADAPTERS = pytest.mark.parametrize("more", [None, LORA], ids=["full", "adapter"])
GREEDY = {"top_k": 1}
CPU_SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


VLLM = "0.31.0"
"""The last that TRL 1.16 supports; beside it there may be a later one, which the rest of the project uses."""
FOUND = next((found.version for found in importlib.metadata.distributions(name="vllm-cpu")), None)
WHY_SKIPPED = None
if FOUND != VLLM:
    WHY_SKIPPED = (
        f"needs vllm-cpu {VLLM}, the last that TRL 1.16 supports, and finds {FOUND}: `make test` runs this file apart, "
        "on Linux x86-64 without an NVIDIA driver"
    )
elif not support.HAS_COMPILER:
    WHY_SKIPPED = "no C++ compiler in PATH, with which vllm compiles models on a CPU"


def make(tmp_path, folder, kind=AAPOTrainer, config=AAPOConfig, **changes):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return make_trainer(tmp_path, model, kind, config, use_vllm=True, vllm_max_model_length=64, **changes)


class Watched:
    """A reward function that keeps what it was asked."""

    __name__ = "watched"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **_):
        self.calls.append(dict(zip(prompts, completions, strict=True)))
        return rewards(completions)


def move(trainer):
    """The policy, away from where it began; of an adapter the factors only."""
    if trainer._reference is not None:
        vllm_support.move(trainer.model, by=1.0)
        return
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)


@torch.no_grad()
def greedy(model, prompt):
    ids = support.tokenizer()(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    while ids.shape[1] < length + 6 and ids[0, -1] not in (0, 7):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return support.tokenizer().decode(ids[0, length:], skip_special_tokens=True)


def draw(trainer):
    """One step's completions: what the reference and what the policy said."""
    trainer.model.train()
    trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)])
    reference, policy = trainer.reward_funcs[0].calls[-2:]
    return reference, policy
