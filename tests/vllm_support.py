"""Small models that vLLM runs on a CPU, a server of them, and the comparison that catches stale weights."""

import importlib.util
import json
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import support
import torch
import transformers

from aapo_fast.models.load import load_model
from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.process import free_port
from aapo_fast.rollout.vllm.settings import EngineSettings
from aapo_fast.types import SamplingParams

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed (make test installs it on Linux x86-64 without an NVIDIA driver)",
)

_WITHOUT_COMPILER = pytest.mark.skipif(
    not support.HAS_COMPILER, reason="no C++ compiler in PATH, with which vllm compiles models on a CPU"
)
needs_engine = needs_vllm if importlib.util.find_spec("vllm") is None else _WITHOUT_COMPILER

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPTS = [[2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]


def save_model(folder, tied, seed=0):
    """A Llama with heads of 32, the least that vLLM's attention takes on a CPU."""
    torch.manual_seed(seed)
    sizes = support.SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = transformers.LlamaConfig(
        **sizes | {"max_position_embeddings": 512, "initializer_range": 0.2, "tie_word_embeddings": tied}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # As chat models have them: several ends, and sampling options that training must not inherit.
    model.generation_config.update(eos_token_id=[0, 7], do_sample=True, top_k=2, repetition_penalty=1.5)
    model.save_pretrained(folder)
    support.tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return load_model(str(folder), torch.device("cpu"))


def settings(folder, **changes):
    arguments = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "cpu_kv_cache_gib": 1}
    return EngineSettings(str(folder), **arguments | changes)


@torch.no_grad()
def logprobs(model, sample, temperature=1.0):
    """Those of the sample's tokens, by the whole model in one pass."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
    logps = (model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)


def gap(model, samples, temperature=1.0):
    """Mean difference between the engine's log-probabilities and the model's, in nats."""
    found = [
        (logprobs(model, sample, temperature) - torch.tensor(sample.logprobs)).abs()
        for group in samples
        for sample in group
    ]
    return torch.cat(found).mean().item()


def same_greedy(engine, reference, atol=1e-4):
    """Whether two engines give the same greedy tokens and log-probabilities."""
    drawn = [e.generate(PROMPTS, n=1, sampling=GREEDY, seeds=[0] * 3) for e in (engine, reference)]
    pairs = [(a, b) for first, second in zip(*drawn, strict=True) for a, b in zip(first, second, strict=True)]
    return all(
        a.token_ids == b.token_ids
        and a.text == b.text
        and a.finish_reason == b.finish_reason
        and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=atol)
        for a, b in pairs
    )


@torch.no_grad()
def move(model, by=0.3, seed=1):
    """An optimizer step, as far as an engine can tell: every parameter in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += by * parameter.std() * torch.randn(parameter.shape, generator=generator)


@contextmanager
def serving(folder, model, key):
    """The address of `aapo-fast serve` for the ``model``, started as a user does, with ``key`` in AAPO_FAST_API_KEY."""
    path, port = folder / "serve.toml", free_port()
    path.write_text(
        f"[model]\npath = {json.dumps(str(model))}\n[data]\nmax_prompt_tokens = 64\n[vllm]\ncpu_kv_cache_gib = 1\n"
    )
    command = [sys.executable, "-m", "aapo_fast.cli", "serve", str(path), "--port", str(port)]
    with (
        open(folder / "serve.log", "wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        client, deadline = ServerClient(f"http://127.0.0.1:{port}", key, 60), time.monotonic() + 200
        try:
            while True:
                try:
                    client.check()
                    break
                except ServerError:
                    said = (folder / "serve.log").read_text()
                    assert server.poll() is None and time.monotonic() < deadline, said
                    time.sleep(0.5)
            yield client
        finally:
            server.terminate()
