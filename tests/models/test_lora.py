"""LoRA: what is trained, what the reference is, and what leaves the trainer."""

import peft
import pytest
import support
import torch
import transformers

from aapo_fast import config
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import load_model, save_model
from aapo_fast.models.lora import (
    adapter_state,
    add_adapter,
    checkpoint_state,
    has_adapter,
    is_plain_lora,
    without_adapter,
)
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.loop import train
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import SamplingParams, UserError

IDS = torch.arange(1, 9)[None]
SAMPLES = [
    Weighted(support.sample(prompt, tokens), advantage)
    for prompt, tokens, advantage in (((5, 3, 9), (6, 8, 3), 0.7), ((5, 3, 9), (9, 1), -0.4), ((7, 2), (4,), 1.1))
]


def adapted(family="llama", moved=True, targets=("all-linear",)):
    """A tiny model with an adapter that is no longer the fresh one, and the same model without."""
    plain = support.tiny(family)
    model = add_adapter(support.tiny(family), rank=3, alpha=6.0, target_modules=targets)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, plain


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained():
    model, plain = adapted(moved=False)
    assert torch.equal(logits(model), logits(plain)) and not model.training
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)
    few, _ = adapted(targets=("q_proj", "v_proj"))
    assert len([n for n, p in few.named_parameters() if p.requires_grad]) == 2 * 2 * plain.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi, biased head"])
def test_merged_and_bare_states_are_checkpoints_of_the_model(family):
    model, plain = adapted(family)
    assert has_adapter(model) and not has_adapter(plain)
    bare = dict(checkpoint_state(model, merged=False))
    assert bare.keys() == plain.state_dict().keys()
    assert all(torch.equal(bare[name], tensor) for name, tensor in plain.state_dict().items())
    with without_adapter(model):
        assert torch.equal(logits(model), logits(plain))
    merged = dict(checkpoint_state(model))
    truth = adapted(family)[0].merge_and_unload().state_dict()
    assert merged.keys() == truth.keys() and all(relative(merged[n], truth[n]) < 1e-6 for n in truth if truth[n].norm())
    plain.load_state_dict(merged)
    assert relative(logits(plain), logits(model)) < 1e-5


def test_gradients_are_those_of_the_plain_loss():
    """Packed with shared prompts through the fused head, against one forward pass a completion and log_softmax.

    In float64, but for norms and rotary angles, which the model computes in fp32.
    """
    model = adapted()[0].double()
    policy = Policy(model, support.tokenizer(), temperature=1.0)
    num_tokens = sum(len(w.sample.token_ids) for w in SAMPLES)
    out = policy.loss(policy.batch(SAMPLES), num_tokens)
    out.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert ours and all("lora_" in name for name in ours)
    model.zero_grad()
    for w in SAMPLES:
        ids = torch.tensor([[*w.sample.prompt_ids, *w.sample.token_ids]])
        logps = model(input_ids=ids).logits[0, len(w.sample.prompt_ids) - 1 : -1].log_softmax(-1)
        picked = logps.gather(1, torch.tensor(w.sample.token_ids)[:, None])
        (-w.advantage * picked.sum() / num_tokens).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative(ours[name], parameter.grad) < 1e-6


def test_the_reference_is_the_model_without_its_adapter():
    model, plain = adapted(moved=False)
    engine, truth = HFEngine(model, support.tokenizer()), HFEngine(plain, support.tokenizer())
    engine.keep_reference()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.5
    engine.sync_weights(1)

    def drawn(engine, **more):
        sampling = SamplingParams(max_tokens=6)
        return [
            s.token_ids
            for group in engine.generate([[5, 3], [7]], n=3, sampling=sampling, seeds=[1, 2], **more)
            for s in group
        ]

    assert drawn(engine, weights="reference") == drawn(truth)
    assert drawn(engine) != drawn(truth)
    [[one]] = engine.generate([[5]], n=1, sampling=SamplingParams(max_tokens=2), seeds=[0])
    assert one.weight_version == 1


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_run_learns_and_leaves_both_the_merged_model_and_the_adapter(tmp_path, tiny_model, mode):
    tree = support.tiny_run(
        tmp_path,
        tiny_model,
        lora={"rank": 8, "alpha": 16.0},
        reference__mode=mode,
        train__steps=25,
        train__learning_rate=1e-2,
        rollout__group_size=16,
    )
    summary = train(config.parse(tree), Display(quiet=True))
    assert summary["accuracy_before"] <= 0.25 and summary["accuracy_after"] == 1.0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(row["reference_reward"] for row in rows) < 0.3  # the frozen reference has not learned
    cpu = torch.device("cpu")
    final, _ = load_model(str(tmp_path / "run" / "model"), cpu)
    first, _ = load_model(str(tiny_model), cpu)
    moved = {n for n, t in final.state_dict().items() if not torch.equal(t, first.state_dict()[n])}
    assert moved and not any("embed" in name or "norm" in name or "lm_head" in name for name in moved)
    loaded = peft.PeftModel.from_pretrained(first, tmp_path / "run" / "model" / "adapter")
    assert relative(logits(loaded), logits(final)) < 1e-5


def test_reference_rewards_are_shared_with_runs_that_train_everything():
    model, plain = adapted()
    ours, theirs = (Policy(m, support.tokenizer(), 1.0).fingerprint() for m in (model, plain))
    assert ours == theirs


def test_saving_keeps_tied_weights_tied(tmp_path):
    plain = support.tiny("gemma3")
    model = add_adapter(plain, 2, 4.0, ["q_proj"])
    save_model(model, support.tokenizer(), tmp_path / "m")
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"), type(model.get_base_model()))
    assert (tmp_path / "m" / "adapter" / "adapter_config.json").exists()
    assert all("lora_" in name for name in adapter_state(model))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["no_such_layer"], r"lora.target_modules=\['no_such_layer'\]"),
        (["q_proj", "v_prjo"], r"\['q_proj', 'v_prjo'\]: the model has no layer 'v_prjo'"),
        (["mlp"], "is not supported"),
        (["q_proj", "lm_head"], "Adapters on the head"),
    ],
)
def test_layers_that_cannot_have_one(targets, match):
    with pytest.raises(UserError, match=match) as refusal:
        Policy(add_adapter(support.tiny(), 2, 4.0, targets), support.tokenizer(), 1.0)
    assert "\n" not in str(refusal.value)


PLAIN = [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"target_modules": ["q_proj", "down_proj"]}]
NOT_PLAIN = {
    "magnitudes": {"use_dora": True},
    "an adapter that begins at a token": {"alora_invocation_tokens": [3]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "biases": {"lora_bias": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "single tokens": {"trainable_token_indices": [3, 4]},
    "parameters that are no layer's": {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
}


def with_adapter(changes):
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    return peft.get_peft_model(support.tiny(), config)


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_what_is_plain_lora_is_merged_as_peft_merges_it(changes):
    model = with_adapter(changes)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert is_plain_lora(model)
    merged = dict(checkpoint_state(model))
    truth = model.merge_and_unload().state_dict()
    assert merged.keys() == truth.keys()
    assert all(torch.allclose(tensor, truth[name], atol=1e-5) for name, tensor in merged.items())


@pytest.mark.parametrize("changes", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_lora(changes):
    assert not is_plain_lora(with_adapter(changes))


def test_two_adapters_and_whole_numbers_are_not_plain_lora():
    model = with_adapter({})
    model.base_model.set_adapter(["default"])
    assert is_plain_lora(model)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert not is_plain_lora(model)
    packed = with_adapter({"target_modules": ["q_proj"]})
    packed.get_base_model().lm_head.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    assert not is_plain_lora(packed)
