"""``fuse``: TRL's own numbers, through the fused head. Yardstick: TRL's own loss of the same trainer and microbatch."""

import peft
import pytest
import support
import torch
from trl import GRPOTrainer
from trl_support import gradient, make_trainer, microbatch, relative, wide_model

from aapo_fast.integrations.trl import fuse
from aapo_fast.types import UserError

ROUNDING = 2e-5
"""Of fp32 gradients of the tiny model, TRL's against ours."""

CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
CASES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in [*CLIPPED, "cispo", "sapo"]},
    "accumulation": {"loss_type": "dapo", "gradient_accumulation_steps": 3},
    "accumulation, grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 3},
    "several steps a generation": {"loss_type": "cispo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "kl": {"beta": 0.3},
    "kl without correction": {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "bnpo"},
    "two-sided clip": {"delta": 1.3, "epsilon_high": 0.28},
    "temperature": {"temperature": 0.6},
    "truncated completions": {"mask_truncated_completions": True, "max_completion_length": 12},
    "entropy bonus": {"entropy_coef": 0.05, "loss_type": "grpo"},
    "head in fp32": {"cast_lm_head_to_fp32": True},
    "unscaled rewards": {"scale_rewards": "none"},
}


def off_policy(inputs, spread=0.4):
    """With old and reference log-probabilities away from the present ones, so that ratios are not one."""
    generator = torch.Generator().manual_seed(3)
    inputs = dict(inputs)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        if name in inputs:
            inputs[name] = inputs[name] + spread * torch.randn(inputs[name].shape, generator=generator)
    return inputs


def check(trainer, inputs, **how):
    loss, truth, metrics = gradient(trainer, inputs)
    assert truth.norm() > 0
    fuse(trainer, **how)
    our_loss, found, our_metrics = gradient(trainer, inputs)
    assert relative(found, truth) < ROUNDING
    # A loss is a sum with cancellation: of its terms, not of itself.
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert our_metrics.keys() == metrics.keys() and "entropy" in metrics
    for name, values in metrics.items():
        assert our_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("iterations", [1, 2], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_metrics_are_those_of_trl(case, iterations, tmp_path, tiny_model):
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=iterations, **CASES[case])
    inputs = microbatch(trainer)
    assert ("old_per_token_logps" in inputs) == (iterations == 2 or "steps_per_generation" in CASES[case])
    check(trainer, off_policy(inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_evaluation(loss_type, tmp_path, tiny_model):
    """Neither accumulated nor split, so with denominators of its own."""
    trainer = make_trainer(
        tmp_path, str(tiny_model), loss_type=loss_type, gradient_accumulation_steps=3, per_device_eval_batch_size=8,
        beta=0.3,
    )  # fmt: skip
    microbatch(trainer)
    trainer.model.eval()
    inputs = off_policy(trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))))
    with torch.no_grad():
        theirs, metrics = trainer.compute_loss(trainer.model, inputs), dict(trainer._metrics["eval"])
        trainer._metrics["eval"].clear()
        fuse(trainer)
        ours = trainer.compute_loss(trainer.model, inputs)
    assert theirs.abs() > 0.01 and ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert trainer._metrics["eval"]["kl"] == pytest.approx(metrics["kl"], rel=1e-5)


def test_clipping_and_masking_really_happen(tmp_path, tiny_model):
    """The cases above would be hollow on ratios of one and complete completions."""
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=2)
    inputs = off_policy(microbatch(trainer))
    _, _, metrics = gradient(trainer, inputs)
    assert metrics["clip_ratio/low_mean"][0] > 0.02 and metrics["clip_ratio/high_mean"][0] > 0.02
    assert (inputs["prompt_mask"] == 0).any()
    trainer = make_trainer(tmp_path, str(tiny_model), **CASES["truncated completions"])
    lengths = microbatch(trainer)["completion_mask"].sum(1)
    assert 0 < (lengths == 0).sum() < len(lengths)


@pytest.mark.parametrize("family", ["gemma2, both soft-caps", "granite, scaled logits", "phi, biased head"])
def test_heads_with_caps_scales_and_biases(family, tmp_path):
    trainer = make_trainer(tmp_path, support.tiny(family), temperature=1.3)
    check(trainer, microbatch(trainer))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_an_adapter(beta, tmp_path):
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, support.tiny(), more={"peft_config": adapter}, beta=beta, num_iterations=2)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = microbatch(trainer)
    if beta:  # the reference is the model without its adapter
        assert relative(inputs["ref_per_token_logps"], inputs["old_per_token_logps"]) > 0.01
    check(trainer, off_policy(inputs, 0.1))


def test_bfloat16_is_no_further_from_the_truth_than_trl(tmp_path, tiny_model):
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=2)
    inputs = off_policy(microbatch(trainer))
    _, truth, _ = gradient(trainer, inputs)
    rounded = make_trainer(tmp_path, str(tiny_model), num_iterations=2, bf16=True)
    microbatch(rounded)
    _, theirs, _ = gradient(rounded, inputs)
    fuse(rounded)
    _, ours, _ = gradient(rounded, inputs)
    assert 1e-4 < relative(ours, truth) < 1.1 * relative(theirs, truth)


@pytest.mark.parametrize("shape", ["token", "sequence"])
def test_importance_weights_of_a_rollout_engine(shape, tmp_path, tiny_model):
    """As TRL hands them to its loss under vLLM, which is not started here."""
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=2, beta=0.2)
    inputs = off_policy(microbatch(trainer))
    mask = inputs["completion_mask"]
    generator = torch.Generator().manual_seed(1)
    size = mask.shape if shape == "token" else (len(mask), 1)
    inputs["importance_sampling_ratio"] = 2 * torch.rand(size, generator=generator)
    trainer.use_vllm = True
    check(trainer, inputs)


def test_tokens_of_tools_have_no_loss(tmp_path, tiny_model):
    trainer = make_trainer(tmp_path, str(tiny_model), entropy_coef=0.1)
    inputs = microbatch(trainer)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1::3] = 0
    check(trainer, inputs)


@pytest.mark.parametrize("last_entropy", [0.1, 9.0])
def test_adaptive_entropy(last_entropy, tmp_path, tiny_model):
    """Its coefficient counts below the target entropy only, and moves by TRL's own rule."""
    trainer = make_trainer(tmp_path, str(tiny_model), use_adaptive_entropy=True, entropy_coef=0.2, entropy_target=1.0)
    inputs = microbatch(trainer)
    found = []
    for fused in (False, True):
        trainer.entropy_coef, trainer._last_world_entropy = 0.2, last_entropy
        if fused:
            fuse(trainer)
        found.append((*gradient(trainer, inputs)[:2], trainer.entropy_coef, trainer._last_world_entropy))
    (loss, truth, *state), (our_loss, gradients, *our_state) = found
    assert relative(gradients, truth) < ROUNDING and our_loss == pytest.approx(loss, rel=1e-5)
    assert our_state == pytest.approx(state, rel=1e-5) and state[0] != 0.2


NOT_TOKEN_LOCAL = {
    "loss_type": "vespo",
    "importance_sampling_level": "sequence",
    "top_entropy_quantile": 0.4,
    "off_policy_mask_threshold": 0.01,
}


@pytest.mark.parametrize("name", NOT_TOKEN_LOCAL)
def test_what_is_not_token_local_is_refused_and_goes_through_log_probabilities(name, tmp_path, tiny_model):
    value = NOT_TOKEN_LOCAL[name]
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=2, **{name: value})
    with pytest.raises(UserError, match=f"^fuse: {name}={value!r} .*through='logprobs'"):
        fuse(trainer)
    check(trainer, off_policy(microbatch(trainer)), through="logprobs")


def test_a_trainer_with_a_loss_of_its_own(tmp_path, tiny_model):
    class Doubled(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    trainer = make_trainer(tmp_path, str(tiny_model), kind=Doubled)
    with pytest.raises(UserError, match="Doubled has a loss of its own .*through='logprobs'"):
        fuse(trainer)
    check(trainer, microbatch(trainer), through="logprobs")


def test_other_refusals(tmp_path, tiny_model):
    trainer = make_trainer(tmp_path, str(tiny_model))
    for wrong, said in (
        ({"backward": "sparce"}, "backward='sparce' is unknown"),
        ({"sparsity_threshold": 2.0}, "sparsity_threshold=2.0 must lie"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; use 'auto' or one of"),
    ):
        with pytest.raises(UserError, match=said):
            fuse(trainer, **wrong)
    with pytest.raises(UserError, match="through='head' is unknown"):
        fuse(trainer, through="head")
    for name, message in (("aux_loss_enabled", "router_aux_loss_coef=0.0"), ("_is_vlm", "vision"),
                          ("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):  # fmt: skip
        setattr(trainer, name, True)
        with pytest.raises(UserError, match=message):
            fuse(trainer)
        setattr(trainer, name, False)
    fuse(trainer)
    with pytest.raises(UserError, match="fused already"):
        fuse(trainer)
    with pytest.raises(UserError, match="for a GRPOTrainer, not for a str"):
        fuse("trainer")


def test_log_probabilities_without_gradient_go_through_the_fused_head(tmp_path, tiny_model, monkeypatch):
    """TRL's kernel is not called any more: not for old, not for reference log-probabilities, not for the loss."""
    trainer = make_trainer(tmp_path, str(tiny_model), num_iterations=2, beta=0.1)
    theirs = microbatch(trainer)
    fuse(trainer)

    def forbidden(*_):
        raise AssertionError("TRL's own head was called")

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction.apply", forbidden)
    gradient(trainer, microbatch(trainer))
    ids = torch.cat([theirs["prompt_ids"], theirs["completion_ids"]], 1)
    mask = torch.cat([theirs["prompt_mask"], theirs["completion_mask"]], 1)
    with torch.no_grad():
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, theirs["completion_ids"].shape[1], batch_size=3, compute_entropy=True
        )
    assert entropy.shape == logps.shape
    assert torch.allclose(logps, theirs["old_per_token_logps"], rtol=1e-5, atol=1e-5)


def test_a_microbatch_without_tokens(tmp_path, tiny_model):
    trainer = make_trainer(tmp_path, str(tiny_model))
    inputs = microbatch(trainer)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    fuse(trainer)
    loss, found, _ = gradient(trainer, inputs)
    assert loss == 0 and found.norm() == 0


def test_sparse_rows_are_another_sample_in_each_microbatch(tmp_path):
    """With a vocabulary wide enough for rows to be sparse."""
    trainer = make_trainer(tmp_path, wide_model(), num_iterations=2)
    inputs = off_policy(microbatch(trainer))
    _, truth, _ = gradient(trainer, inputs)
    fuse(trainer, backward="sparse", sparsity_threshold=2**-3)
    draws = []
    for step in range(16):
        trainer._step = step
        draws.append(gradient(trainer, inputs)[1])
    trainer._step = 0
    assert torch.equal(gradient(trainer, inputs)[1], draws[0])
    single = relative(draws[0], truth)
    assert 0.001 < single < 1 and relative(sum(draws) / 16, truth) < single / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_is_the_run_of_trl(checkpointing, tmp_path, tiny_model):
    """Four microbatches a step, two epochs of each generation; weights and log compared at the end."""
    runs = []
    for fused in (False, True):
        trainer = make_trainer(
            tmp_path, str(tiny_model), gradient_accumulation_steps=4, num_iterations=2, max_steps=4, beta=0.05,
            loss_type="grpo", gradient_checkpointing=checkpointing, learning_rate=1e-4,
        )  # fmt: skip
        if fused:
            fuse(trainer)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        runs.append((weights, [log for log in trainer.state.log_history if "loss" in log]))
    (weights, logs), (our_weights, our_logs) = runs
    start = torch.cat([p.flatten() for p in support.tiny().parameters()])
    assert relative(our_weights - start, weights - start) < 1e-3
    assert len(logs) == 4
    for log, ours in zip(logs, our_logs, strict=True):
        assert log.keys() == ours.keys()
        for name in log.keys() - {"step_time", "train_runtime"}:
            assert ours[name] == pytest.approx(log[name], rel=2e-3, abs=1e-5, nan_ok=True), name
