"""Small real things for tests: a tokenizer, tiny models of several families, configs."""

import json
import os
import shutil
import string
from functools import cache

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from aapo_fast.types import Problem, Sample

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler in PATH, and Inductor needs one on a CPU")

CHARACTERS = string.ascii_lowercase + string.digits + " +=?:.\n"


def tiny_quickstart(folder, model, eval_every):
    """What is typed after `aapo-fast quickstart` for two steps of a tiny model, in `tests/` as the current folder."""
    data = write_jsonl(folder / "data.jsonl", [{"question": f"say {i}:", "answer": "x"} for i in range(12)])
    changes = {
        "model.path": model, "data.source": data, "data.options": "{}", "data.template": "{question}",
        "data.size": 12, "data.held_out": 4, "rewards.0.function": "reward_functions:starts_with_answer",
        "rewards.0.extract": "", "train.steps": 2, "train.warmup_steps": 0, "eval.every": eval_every,
    }  # fmt: skip
    return [part for key, value in changes.items() for part in (f"--{key}", str(value))]


@cache
def tokenizer():
    """One for all tests that do not change it."""
    return make_tokenizer()


def make_tokenizer():
    """One token a character; <end> is EOS and padding."""
    vocab = {"<end>": 0, "<unk>": 1} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


SIZES = {
    "vocab_size": len(CHARACTERS) + 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
}

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral, sliding window": (transformers.MistralConfig, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma2, both soft-caps": (
        transformers.Gemma2Config,
        {
            "sliding_window": 4,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "granite, scaled logits": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "cohere, scaled logits": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "phi, biased head": (transformers.PhiConfig, {}),
}
RECURRENT = {
    "lfm2, convolutions": (transformers.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
    "falcon-h1, recurrent": (
        transformers.FalconH1Config,
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
}


def tiny(family="llama", seed=0, dtype=torch.float32):
    """A model of the family with random weights, wide enough apart that its distributions are not flat."""
    config_class, changes = {**FAMILIES, **RECURRENT}[family]
    torch.manual_seed(seed)
    config = config_class(**(SIZES | {"initializer_range": 0.2} | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = 0
    return model


def save_tiny_model(folder, seed=0):
    tiny(seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


TIMES = (
    "seconds", "tokens_per_second", "generation_tokens_per_second", "engine_generation_seconds",
    "engine_generation_tokens", "peak_memory_bytes",
)  # fmt: skip
"""Of a step's record: what it took, and what else was drawn since the one before."""


def problem(prompt="ab", answer="c", row="test row 1", **columns):
    ids = tuple(tokenizer()(prompt).input_ids)
    return Problem(row, prompt, ids, {"answer": answer, **columns})


def sample(prompt, completion, finish_reason="stop"):
    """A sample of token ids, without log-probabilities."""
    return Sample(tuple(prompt), tuple(completion), (), "", finish_reason, 0)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_run(tmp_path, tiny_model, **changes):
    """Nested tables of a run of the tiny model on a trivial task, with ``layer__key=value`` changes."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": f"say {i}:", "answer": "x"} for i in range(12)])
    tree = {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"path": str(tiny_model), "device": "cpu"},
        "data": {"source": str(data), "held_out": 4},
        "rewards": [{"function": "reward_functions:starts_with_answer"}],
        "rollout": {"prompts_per_step": 4, "group_size": 8, "max_tokens": 2},
        "reference": {"cache": str(tmp_path / "reference.sqlite")},
        "train": {"steps": 2, "learning_rate": 1e-3, "schedule": "constant"},
        "eval": {"samples": 2},
    }
    for key, value in changes.items():
        layer, name = key.split("__") if "__" in key else (key, None)
        if name is None:
            tree[layer] = value
        else:
            tree.setdefault(layer, {})[name] = value
    return tree


def toml(tree):
    """Just enough TOML for the tests' configs."""
    lines = []
    for layer, values in tree.items():
        for entry in values if isinstance(values, list) else [values]:
            lines.append(f"[[{layer}]]" if isinstance(values, list) else f"[{layer}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
    return "\n".join(lines)
