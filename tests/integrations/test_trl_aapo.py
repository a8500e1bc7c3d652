"""``AAPOTrainer``: its advantages and loss against a written-out computation, its reference, its resumption."""

import copy
import json
import math

import peft
import pytest
import support
import torch
from trl_support import PROMPTS, completion_logps, gradient, make_trainer, microbatch, relative, rewards, wide_model

from aapo_fast.integrations.trl import AAPOConfig, AAPOTrainer, fuse
from aapo_fast.types import UserError

ROUNDING = 2e-5


def make(folder, model=None, **changes):
    return make_trainer(folder, support.tiny() if model is None else model, AAPOTrainer, AAPOConfig, **changes)


class Watched:
    """A reward function that keeps what it was asked."""

    __name__ = "watched"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **_):
        found = rewards(completions)
        self.calls.append((list(prompts), list(completions), found))
        return found


def group_relative(r, group):
    r = torch.tensor(r).view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("pairing", ["paired", "mean"])
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_advantages_are_those_of_the_paper(mode, pairing, tmp_path):
    watched = Watched()
    trainer = make(
        tmp_path, reward_funcs=watched, reference_mode=mode, reference_pairing=pairing, delta_low=-0.1, delta_high=0.15
    )
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    output = trainer._generate_and_score_completions(inputs)
    (reference_prompts, _, reference), (prompts, _, policy) = watched.calls
    assert reference_prompts == prompts == [row["prompt"] for row in inputs]
    against = torch.tensor(reference).view(-1, 4)
    if pairing == "mean":
        against = against.mean(1, keepdim=True).expand_as(against)
    momentum = (torch.tensor(policy) - against.flatten()).clamp(-0.1, 0.15)
    assert torch.allclose(output["advantages"], group_relative(policy, 4) + momentum, atol=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(output["advantages"].tolist())
    assert trainer._metrics["train"]["reference_reward"] == [pytest.approx(sum(reference) / 8)]
    # What is logged of completions and rewards is of the policy's.
    assert trainer._metrics["train"]["reward"] == [pytest.approx(sum(policy) / 8)]
    assert len(trainer._metrics["train"]["completions/mean_length"]) == 1
    assert trainer.state.num_input_tokens_seen == int(inputs_tokens(output))


def inputs_tokens(output):
    return output["prompt_mask"].sum() + output["completion_mask"].sum()


def test_conversations_are_drawn_whole_and_left_as_they_are(tmp_path):
    """The reference sees the prompt that the policy sees, and answers in the same form."""
    asked = []

    def keep(prompts, completions, **_):
        asked.append((copy.deepcopy(prompts), completions))
        return rewards([completion[0]["content"] for completion in completions])

    trainer = make(tmp_path, reward_funcs=keep)
    trainer.processing_class.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    seen = []
    own = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *rest, **more: (seen.append(ids), own(ids, *rest, **more))[1]
    trainer.model.train()
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("1 + 2", "ab") for _ in range(4)]
    before = copy.deepcopy(rows)
    trainer._generate_and_score_completions(rows)
    (reference_prompts, reference), (prompts, _) = asked
    assert seen[0] == seen[1] and rows == before
    assert reference_prompts == prompts == [row["prompt"] for row in rows]
    assert all(completion[0]["role"] == "assistant" for completion in reference)


def test_a_missing_reward_has_no_advantage_and_a_missing_reference_no_momentum(tmp_path):
    calls = []

    def sometimes(completions, **_):
        calls.append(None)
        found = rewards(completions)
        return [None if i == (3 if len(calls) == 1 else 6) else r for i, r in enumerate(found)]

    trainer = make(tmp_path, reward_funcs=sometimes)
    trainer.model.train()
    advantages = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))["advantages"]
    policy, present = trainer._rewards, torch.arange(8) != 6
    assert policy[6].isnan() and advantages[6] == 0 and present.sum() == 7
    assert advantages[3] == pytest.approx(group_relative(policy[:4].tolist(), 4)[3].item(), abs=1e-5)


def written_out(trainer, microbatches):
    """The loss of a whole step from materialised logits: one sum over its tokens, one division."""
    total, tokens = 0.0, 0
    for inputs in microbatches:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / trainer.temperature
        logps = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
        total = total - (inputs["advantages"][:, None] * logps * inputs["completion_mask"]).sum()
        tokens += inputs["completion_mask"].sum()
    return total / tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("steps_per_generation", [3, 6])
def test_the_denominator_is_all_tokens_of_the_optimizer_step(steps_per_generation, temperature, tmp_path):
    """Three microbatches a step; with six a generation the second step has a denominator of its own."""
    trainer = make(
        tmp_path, gradient_accumulation_steps=3, steps_per_generation=steps_per_generation, temperature=temperature,
        max_importance_weight=0, max_completion_length=12, mask_truncated_completions=True,
    )  # fmt: skip
    microbatch(trainer)
    for first in range(0, steps_per_generation, 3):
        step = trainer._buffered_inputs[first : first + 3]
        trainer.model.zero_grad()
        truth_loss = written_out(trainer, step)
        truth_loss.backward()
        truth = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        found, loss = 0.0, 0.0
        for inputs in step:
            part_loss, part, metrics = gradient(trainer, inputs)
            found, loss, trainer._step = found + part, loss + part_loss, trainer._step + 1
            assert math.isfinite(metrics["entropy"][0]) and metrics["entropy"][0] > 0
        assert relative(found, truth) < ROUNDING and loss == pytest.approx(truth_loss.item(), rel=1e-4)
    lengths = [m["completion_mask"].sum().item() for m in trainer._buffered_inputs]
    assert len(set(lengths)) > 1  # else a mean of means would do


def test_samples_of_older_weights_are_weighed(tmp_path):
    trainer = make(tmp_path, num_iterations=2, max_importance_weight=1.2)
    inputs = microbatch(trainer)
    old = inputs["old_per_token_logps"] + 0.5 * torch.randn(inputs["completion_mask"].shape)
    inputs["old_per_token_logps"] = old
    _, found, _ = gradient(trainer, inputs)
    trainer.model.zero_grad()
    mask, logps = inputs["completion_mask"], completion_logps(trainer, inputs)
    weight = (logps.detach() - old).exp().clamp(max=1.2)
    (-(weight * inputs["advantages"][:, None] * logps * mask).sum() / mask.sum()).backward()
    truth = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert relative(found, truth) < ROUNDING


# --- the reference ----------------------------------------------------------------------------------------------------

LORA = {"more": {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}}


def always(model, token):
    """From now on the model says one token, whatever is asked: its head knows nothing else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "layernorm" not in name:
                parameter.fill_(1.0)
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
        head.bias[token] = 1000.0


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_reference_completions_come_from_the_frozen_weights(mode, tmp_path):
    """The policy is made to say nothing but "c"; the reference goes on as it was, and its weights too."""
    watched = Watched()
    trainer = make(tmp_path, reward_funcs=watched, reference_mode=mode)
    before = {name: tensor.clone() for name, tensor in trainer._reference.state_dict().items()}
    always(trainer.model, support.tokenizer()("c").input_ids[0])
    trainer.model.train()
    for _ in range(2):
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    by_reference, by_policy = watched.calls[0][1], watched.calls[1][1]
    assert set("".join(by_policy)) == {"c"} and len(set("".join(by_reference))) > 5
    assert len(watched.calls) == (3 if mode == "cached" else 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer._reference.state_dict().items())
    assert not any(p.requires_grad for p in trainer._reference.parameters()) and not trainer._reference.training


def test_the_reference_of_an_adapter_is_the_model_without_it(tmp_path):
    watched = Watched()
    trainer = make(tmp_path, reward_funcs=watched, reference_mode="online", temperature=1e-4, **LORA)
    assert trainer._reference is None
    plain = support.tiny()
    ids = support.tokenizer()(PROMPTS[0], return_tensors="pt").input_ids
    frozen = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    trainer.model.train()
    rows = [{"prompt": PROMPTS[0]}] * 8
    trainer._generate_and_score_completions(rows)
    by_reference, by_policy = watched.calls[0][1], watched.calls[1][1]
    assert set(by_reference) == {support.tokenizer().decode(frozen, skip_special_tokens=True)}
    assert not set(by_reference) & set(by_policy)


def test_cached_rewards_are_drawn_once_a_prompt(tmp_path):
    watched = Watched()
    trainer = make(tmp_path, reward_funcs=watched, max_steps=12)
    trainer.train()
    drawn = {prompt for prompts, *_ in watched.calls[: 2 * 3] for prompt in prompts}
    assert set(PROMPTS) >= drawn
    assert len(trainer._kept_rewards) == len(PROMPTS) and all(len(r) == 4 for r in trainer._kept_rewards.values())
    assert 12 + 3 <= len(watched.calls) <= 12 + len(PROMPTS)


def test_rows_with_other_answers_have_rewards_of_their_own(tmp_path):
    def of_answer(answer, **_):
        return [float(a) for a in answer]

    trainer = make(tmp_path, reward_funcs=of_answer)
    trainer.model.train()
    rows = [{"prompt": "ab", "answer": 1.0}] * 4 + [{"prompt": "ab", "answer": 0.5}] * 4
    assert trainer._reference_rewards(rows).tolist() == [1.0] * 4 + [0.5] * 4
    assert rows[0] == {"prompt": "ab", "answer": 1.0}


# --- runs -------------------------------------------------------------------------------------------------------------


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("how", ["full", "adapter"])
def test_a_resumed_run_ends_with_the_same_weights(how, tmp_path):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    changes |= LORA if how == "adapter" else {}
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole), weights(resumed)) and resumed.state.global_step == 6
    record = json.loads((checkpoint / "aapo_reference.json").read_text())
    assert resumed._kept_rewards.items() >= record["rewards"].items()


def test_a_run_is_not_resumed_with_another_reference(tmp_path):
    first = make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    moved = make(tmp_path, model=first.model, max_steps=2)
    with pytest.raises(UserError, match="had another reference than the model given now"):
        moved.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_evaluation_and_saving(tmp_path):
    watched = Watched()
    trainer = make(tmp_path, reward_funcs=watched, per_device_eval_batch_size=8)
    trainer.train()
    calls = len(watched.calls)
    found = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert len(watched.calls) == calls + 2  # two batches, and nothing of the reference
    assert math.isfinite(found["eval_loss"]) and found["eval_entropy"] > 0
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log.keys() >= {"reward", "reference_reward", "frac_advantage_zero", "entropy", "completions/mean_length"}
    trainer.save_model(str(tmp_path / "final"))
    again = type(trainer.model).from_pretrained(tmp_path / "final")
    assert torch.equal(again.lm_head.weight, trainer.model.lm_head.weight)


def test_sparse_rows_reach_the_loss(tmp_path):
    """With a vocabulary wide enough for rows to be sparse."""
    found = []
    for backward in ("exact", "sparse"):
        trainer = make(tmp_path, wide_model(), head_backward=backward, head_sparsity_threshold=2**-3)
        found.append(gradient(trainer, microbatch(trainer))[1])
    assert 1e-3 < relative(found[1], found[0]) < 1


def test_it_learns(tmp_path):
    """To begin with a digit, from about one completion in five."""

    def starts_with_digit(completions, **_):
        return [float(text[:1].isdigit()) for text in completions]

    trainer = make(
        tmp_path, reward_funcs=starts_with_digit, max_steps=30, num_generations=8, per_device_train_batch_size=32,
        max_completion_length=2, learning_rate=3e-3, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    found = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(found[:3]) / 3 < 0.5 and sum(found[-5:]) / 5 > 0.85


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.1}, "beta=0.1 has no effect on AAPO's loss; leave it out"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 has no effect"),
        ({"loss_type": "grpo"}, "loss_type='grpo' has no effect"),
        ({"head_backward": "sparce"}, "backward='sparce' is unknown; use 'exact' or 'sparse'"),
        ({"head_sparsity_threshold": -1.0}, "sparsity_threshold=-1.0 must lie in "),
        ({"delta_low": 0.5, "delta_high": -0.5}, "delta_low=0.5 exceeds delta_high=-0.5"),
        ({"max_importance_weight": -1.0}, "max_importance_weight=-1.0 must be 0"),
        ({"entropy_target": 0.7}, "entropy_target=0.7 has no effect on AAPO's loss"),
        ({"reference_mode": "frozen"}, "reference_mode='frozen' is unknown; use one of cached, online"),
        ({"reference_pairing": "best"}, "reference_pairing='best' is unknown"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "use 'sum_then_normalize'"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "must be a multiple of gradient_accum"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True leaves what it"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True is not needed"),
    ],
)
def test_settings_that_would_mean_nothing_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=f"^AAPOConfig: .*{message}"):
        make(tmp_path, **changes)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="args is a NoneType; give an AAPOConfig"):
        AAPOTrainer(support.tiny(), rewards)
    with pytest.raises(UserError, match="rollout_func would be called with the policy for the reference"):
        make(tmp_path, more={"rollout_func": lambda prompts, trainer: {}})
    with pytest.raises(UserError, match="for a GRPOTrainer, not for a AAPOTrainer"):
        fuse(make(tmp_path))
    adapted = peft.get_peft_model(support.tiny(), LORA["more"]["peft_config"])
    make(tmp_path, model=adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    with pytest.raises(UserError, match="adapter is not a fresh one"):
        make(tmp_path, model=adapted)
