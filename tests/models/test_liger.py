"""Liger's patches: applied on GPUs alone, never to the loss, and of the same gradient. On a GPU itself: tests/gpu."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import torch

from aapo_fast import config
from aapo_fast.models import liger
from aapo_fast.models.liger import use_liger
from aapo_fast.trainer import setup

KNOWN = ["llama", "qwen3", "gemma2, both soft-caps"]
UNKNOWN = "cohere, scaled logits"


def test_a_model_on_a_cpu_is_left_alone():
    model = support.tiny()
    assert use_liger(model) is False and "liger" not in model.model.norm.forward.__func__.__module__


def test_a_liger_that_cannot_be_loaded_is_passed_over_with_a_note(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise ImportError('no LlamaRMSNorm')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    model = support.tiny()
    weight = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(liger, "find_head", lambda model: SimpleNamespace(weight=weight))
    assert use_liger(model) is False
    [note] = setup.passed_over(config.parse({}))
    assert "liger-kernel is installed and cannot be loaded (ImportError: no LlamaRMSNorm)" in note
    assert setup.passed_over(config.parse({"model": {"liger": "off"}})) == []


@pytest.fixture(scope="module")
def interpreted():
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make test installs it on Linux)")
    tests = Path(support.__file__).parent
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }
    command = [sys.executable, tests / "liger_interpreted.py", *KNOWN, UNKNOWN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", [*KNOWN, UNKNOWN])
def test_norms_gated_layers_and_rope_are_patched_and_the_loss_is_not(interpreted, family):
    assert interpreted[family]["patched"] == [family in KNOWN] * 3 + [False, family in KNOWN]


@pytest.mark.parametrize("family", KNOWN)
def test_ligers_kernels_compute_the_same(interpreted, family):
    """Of packed rows that share prompts; measured: 6e-7 to 8e-7. Never 0: they are other kernels."""
    assert 0 < interpreted[family]["moved"] < 1e-5


def test_a_model_that_liger_does_not_know_computes_what_it_did(interpreted):
    assert interpreted[UNKNOWN]["moved"] == 0
