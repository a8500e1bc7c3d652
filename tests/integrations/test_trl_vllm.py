"""TRL's trainers with TRL's vLLM engine in the process: real weights, synced by TRL, sampled by vLLM.

vLLM packs the weights of its linear layers on a CPU, and TRL's sync writes to where they were: with PyTorch's products
in the place of oneDNN's (``_supports_onednn``) and, for small bfloat16 weights where there is AMX, of another library's
(``check_cpu_sgl_kernel``) they stay where they are, as on a GPU.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl_support
import vllm_support
from trl import GRPOConfig, GRPOTrainer
from trl_support import PROMPTS, completion_logps, gradient, microbatch, relative
from trl_vllm_support import (
    ADAPTERS,
    CPU_SETTINGS,
    GREEDY,
    LORA,
    WHY_SKIPPED,
    Watched,
    draw,
    greedy,
    make,
    move,
)

from aapo_fast.integrations.trl import fuse
from aapo_fast.types import UserError

if WHY_SKIPPED is not None:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

import trl.generation.vllm_generation
import vllm._custom_ops
import vllm.model_executor.layers.utils

pytestmark = pytest.mark.timeout(600)

ROUNDING = 2e-5


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """vLLM's settings for a small CPU; the engine itself is TRL's."""
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    monkeypatch.setattr(vllm.model_executor.layers.utils, "check_cpu_sgl_kernel", lambda *_: False)
    for name, value in CPU_SETTINGS.items():
        monkeypatch.setenv(name, value)
    engine_dtype("float32", monkeypatch)


def engine_dtype(dtype, monkeypatch):
    """TRL has no setting for it: an engine takes the checkpoint's, or bfloat16 in place of float32."""
    eager = functools.partial(vllm.LLM, enforce_eager=True, dtype=dtype)
    monkeypatch.setattr(trl.generation.vllm_generation, "LLM", eager)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vllm_support.save_model(tmp_path_factory.mktemp("trl") / "model", tied=True)


@ADAPTERS
def test_each_is_drawn_from_its_own_weights_whatever_the_policy_does(more, tmp_path, folder):
    """Weights are known by what they say greedily. The tied head is among them."""
    trainer = make(tmp_path, folder, reward_funcs=Watched(), reference_mode="online", more=more, **GREEDY)
    first = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    of_reference = {p: greedy(first, p) for p in PROMPTS[:2]}
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if ".lora_" not in name}
    assert draw(trainer) == (of_reference, of_reference)
    for _ in range(2):
        move(trainer)
        of_policy = {p: greedy(trainer.model.eval(), p) for p in PROMPTS[:2]}
        assert not set(of_policy.values()) & set(of_reference.values())
        # Within one step, too: TRL by itself would load the engine when the step has changed.
        assert draw(trainer) == (of_reference, of_policy)
        assert draw(trainer) == (of_reference, of_policy)
    if more:  # merged into copies
        assert all(torch.equal(before[name], trainer.model.state_dict()[name]) for name in before)


@ADAPTERS
def test_the_engine_is_given_the_tensors_that_trl_would_give_it(more, tmp_path, folder):
    """By TRL's names, in its order; with an adapter, merged to rounding."""
    trainer = make(tmp_path, folder, more=more)
    move(trainer)
    ours = list(trainer.vllm_generation._iter_named_params())
    # An adapter's base is given back before the generator ends.
    theirs = [(n, t.clone()) for n, t in type(trainer.vllm_generation)._iter_named_params(trainer.vllm_generation)]
    assert [(n, t.dtype, t.shape) for n, t in ours] == [(n, t.dtype, t.shape) for n, t in theirs]
    assert all(torch.allclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_cached_rewards_are_drawn_once_a_prompt(tmp_path, folder):
    watched, loaded = Watched(), []
    trainer = make(tmp_path, folder, reward_funcs=watched, max_steps=12)
    engine = trainer.vllm_generation
    load = engine.sync_weights
    engine.sync_weights = lambda: (loaded.append(trainer._engine_weights.of_reference), load())
    trainer.train()
    drawn = len(watched.calls) - 12
    assert 3 <= drawn <= len(PROMPTS) == len(trainer._kept_rewards)
    assert (loaded.count(True), loaded.count(False)) == (drawn, 12)


@ADAPTERS
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_it_learns(mode, more, tmp_path, folder):
    """To begin with a digit."""

    def starts_with_digit(completions, **_):
        return [float(text[:1].isdigit()) for text in completions]

    trainer = make(
        tmp_path, folder, reward_funcs=starts_with_digit, max_steps=30, num_generations=8, reference_mode=mode,
        per_device_train_batch_size=32, max_completion_length=2, learning_rate=3e-2 if more else 3e-3,
        lr_scheduler_type="constant", more=more,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    found = [entry["reward"] for entry in log]
    assert sum(found[:2]) / 2 < 0.5 and sum(found[-5:]) / 5 > 0.85
    # The policy drew what was trained, and the reference went on as it was.
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in log) < 1e-3
    assert all(entry["reference_reward"] < 0.6 for entry in log)


def test_a_run_of_an_adapter_is_resumed(tmp_path, folder):
    """Its base has the bits that it began with: the reference is that of the checkpoint."""
    changes = {"more": LORA, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "max_steps": 2}
    make(tmp_path, folder, **changes).train()
    resumed = make(tmp_path, folder, **changes | {"max_steps": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_two_ranks(tmp_path, folder):
    """Data parallelism, an engine a rank."""
    tests = Path(trl_support.__file__).parent
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tests), str(tests.parent)])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tests / "trl_vllm_ranks.py"), str(tmp_path), str(folder)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("both engines") == 2


# --- TRL's correction of what the engine samples ----------------------------------------------------------------------

CORRECTIONS = pytest.mark.parametrize(
    "correction",
    [
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.02},
        {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.01},
        {"vllm_importance_sampling_correction": False},
    ],
    ids=["of a token", "of a sequence", "none"],
)


def corrected(trainer, correction):
    """A microbatch sampled in bfloat16, and TRL's weights of it, which are not all alike."""
    inputs = microbatch(trainer)
    ratio = inputs.get("importance_sampling_ratio")
    assert (ratio is None) == (correction == {"vllm_importance_sampling_correction": False})
    if ratio is not None:
        assert ratio.shape[1] == (1 if "sequence" in trainer.vllm_importance_sampling_mode else 6)
        assert ratio.unique().numel() > 3 and (ratio - 1).abs().max() > 0.005
    return inputs, 1.0 if ratio is None else ratio


@CORRECTIONS
def test_aapos_loss_is_corrected(correction, tmp_path, folder, monkeypatch):
    engine_dtype("bfloat16", monkeypatch)
    trainer = make(tmp_path, folder, max_importance_weight=0, **correction)
    inputs, ratio = corrected(trainer, correction)
    _, found, _ = gradient(trainer, inputs)
    trainer.model.zero_grad()
    mask, logps = inputs["completion_mask"], completion_logps(trainer, inputs)
    (-(ratio * inputs["advantages"][:, None] * logps * mask).sum() / mask.sum()).backward()
    truth = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert relative(found, truth) < ROUNDING


@CORRECTIONS
@pytest.mark.parametrize("through", ["loss", "logprobs"])
def test_a_fused_grpo_trainers_loss_is_corrected_as_trls(through, correction, tmp_path, folder, monkeypatch):
    engine_dtype("bfloat16", monkeypatch)
    trainer = make(tmp_path, folder, GRPOTrainer, GRPOConfig, **correction)
    inputs, _ = corrected(trainer, correction)
    loss, truth, metrics = gradient(trainer, inputs)
    fuse(trainer, through=through)
    our_loss, found, our_metrics = gradient(trainer, inputs)
    assert truth.norm() > 0 and relative(found, truth) < ROUNDING
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-6) and our_metrics.keys() == metrics.keys()


def test_what_the_engine_cannot_be_given_is_refused(tmp_path, folder):
    more = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)}
    with pytest.raises(UserError, match="^AAPOTrainer: use_vllm=True with an adapter that is not plain LoRA"):
        make(tmp_path, folder, more=more)
