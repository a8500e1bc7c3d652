"""Liger's patches: applied on GPUs alone, and never to the loss. That they compute the same: tests/gpu."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import support

from aapo_fast.models.liger import use_liger

PATCHED = """
import json, sys
from types import SimpleNamespace
import support, torch
from aapo_fast.models import liger

liger.find_head = lambda _: SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
model = support.tiny(sys.argv[1])
patched = liger.use_liger(model)
parts = [model.model.norm, model.model.layers[0].mlp, model]
print(json.dumps([patched, *("liger" in part.forward.__func__.__module__ for part in parts)]))
"""


def test_a_model_on_a_cpu_is_left_alone():
    model = support.tiny()
    assert use_liger(model) is False and "liger" not in model.model.norm.forward.__func__.__module__


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize(("family", "known"), [("llama", True), ("qwen3", True), ("cohere, scaled logits", False)])
def test_norms_and_gated_layers_are_patched_and_the_loss_is_not(family, known):
    """With the real package, in a process of its own, for it changes modules of Transformers; only the device is made
    up.
    """
    command = [sys.executable, "-c", PATCHED, family]
    done = subprocess.run(command, cwd=Path(support.__file__).parent, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [known, known, known, False]
