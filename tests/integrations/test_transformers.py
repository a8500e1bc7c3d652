"""The fused cross entropy of Transformers' models and Trainer. Yardstick: their own."""

import copy
import math

import peft
import pytest
import support
import torch
import transformers
from datasets import Dataset
from trl_support import relative

from aapo_fast.integrations.transformers import FusedLossMixin, fuse_loss
from aapo_fast.types import UserError

ROUNDING = 2e-5


class FusedTrainer(FusedLossMixin, transformers.Trainer):
    pass


def batch(seed=0, rows=4, length=12):
    """Right-padded rows; prompts and padding without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, len(support.CHARACTERS), (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [length - 3], [5], [length - 1]])[:rows]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def loss_and_gradient(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def check(model, **inputs):
    model.train()
    theirs, truth = loss_and_gradient(model, **inputs)
    fuse_loss(model)
    ours, found = loss_and_gradient(model, **inputs)
    assert theirs.logits is not None and ours.logits is None
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert relative(found, truth) < ROUNDING and truth.norm() > 0


@pytest.mark.parametrize("family", support.FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(family):
    check(support.tiny(family), **batch())


@pytest.mark.parametrize("num_items", [7, torch.tensor(91)])
def test_with_the_tokens_of_the_whole_step(num_items):
    check(support.tiny(), **batch(), num_items_in_batch=num_items)


def test_labels_that_are_shifted_already():
    """They are what counts, as in Transformers, whatever ``labels`` says."""
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    check(support.tiny(), **{**inputs, "labels": inputs["input_ids"]}, shift_labels=shifted)


def test_an_adapter():
    model = peft.get_peft_model(support.tiny(), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    check(model, **batch())


def test_weights_a_token():
    """Against the sum written out; the weight of a label is the one at its own position."""
    model = support.tiny("granite, scaled logits")
    inputs = batch()
    weights = torch.rand(inputs["labels"].shape, generator=torch.Generator().manual_seed(1)) - 0.3
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    logps = logits[:, :-1].gather(2, labels.clamp(min=0)[..., None])[..., 0]
    truth_loss = -(weights[:, 1:] * logps)[labels != -100].sum() / (labels != -100).sum()
    truth_loss.backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    fuse_loss(model)
    for training in (True, False):
        out, found = loss_and_gradient(model.train(training), **inputs, loss_weights=weights)
        assert (out.logits is None) is training and out.loss.item() == pytest.approx(truth_loss.item(), rel=1e-4)
        assert relative(found, truth) < ROUNDING


def test_another_index_to_ignore():
    """As Transformers' loss takes it: labels of -100 would be out of range then, and none are given."""
    inputs = batch()
    inputs["labels"] = inputs["labels"].clamp(min=0)
    check(support.tiny(), **inputs, ignore_index=0)


def test_weights_in_evaluation_leave_the_logits_there():
    model = support.tiny().eval()
    inputs, weights = batch(), torch.rand(4, 12)
    own = model(**inputs).logits
    fuse_loss(model)
    weighted = model(**inputs, loss_weights=weights)
    assert torch.equal(weighted.logits, own)
    assert torch.equal(weighted.loss, model.train()(**inputs, loss_weights=weights).loss)


def test_evaluation_generation_and_calls_without_labels_are_the_models_own():
    model, inputs = support.tiny(), batch()
    ids = inputs["input_ids"][:1, :3]
    spoken = model.generate(ids, max_new_tokens=5, do_sample=False)
    theirs = model(**inputs)
    fuse_loss(model)
    for ours in (model(**inputs), model.train()(**inputs, skip_logits=False)):
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    model.eval()
    lean = model(**inputs, skip_logits=True)
    assert lean.logits is None and lean.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    inputs.pop("labels")
    assert torch.equal(model.train()(**inputs).logits, theirs.logits)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=5, do_sample=False), spoken)


def test_what_else_an_output_holds():
    model, inputs = support.tiny().train(), batch()
    theirs = model(**inputs, output_hidden_states=True, use_cache=True)
    fuse_loss(model)
    ours = model(**inputs, output_hidden_states=True, use_cache=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    loss, *_ = model(**inputs, return_dict=False)
    assert torch.equal(loss, ours.loss)


def test_the_head_is_not_called_in_training(monkeypatch):
    model = support.tiny().train()
    fuse_loss(model)
    monkeypatch.setattr(model.lm_head, "forward", None)
    loss_and_gradient(model, **batch())


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    model, inputs = support.tiny().train(), batch()
    fuse_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert other(**inputs).loss != model(**inputs).loss
    assert not torch.equal(other.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_no_labels_at_all():
    model, inputs = support.tiny().train(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    fuse_loss(model)
    out, found = loss_and_gradient(model, **inputs)
    assert out.loss == 0 and found.norm() == 0


def test_refusals():
    model = support.tiny().train()
    model.loss_function = lambda *_, **__: 0
    with pytest.raises(UserError, match="loss of LlamaForCausalLM is not the plain causal cross entropy"):
        fuse_loss(model)
    model = support.tiny().train()
    fuse_loss(model)
    with pytest.raises(UserError, match="LlamaForCausalLM is fused already"):
        fuse_loss(model)
    inputs = batch()
    with pytest.raises(UserError, match="logits_to_keep beside labels"):
        model(**inputs, logits_to_keep=3)
    with pytest.raises(UserError, match="output_router_logits=True"):
        model(**inputs, output_router_logits=True)
    with pytest.raises(UserError, match="loss_weights needs labels"):
        model(input_ids=inputs["input_ids"], loss_weights=torch.ones(4, 12))
    moe = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**support.SIZES, num_local_experts=2, output_router_logits=True)
    )
    with pytest.raises(UserError, match="adds a load-balancing loss; set config.output_router_logits=False"):
        fuse_loss(moe)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**support.SIZES)
    llava = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text)
    with pytest.raises(UserError, match="takes more than text"):
        fuse_loss(transformers.LlavaForConditionalGeneration(llava))


# --- Trainer ----------------------------------------------------------------------------------------------------------


def rows(weights=False, number=24):
    """Of very different numbers of labels, so that a mean of means is far from the mean."""
    generator = torch.Generator().manual_seed(2)
    for i in range(number):
        length = 4 + (7 * i) % 19
        ids = torch.randint(1, len(support.CHARACTERS), (length,), generator=generator).tolist()
        row = {"input_ids": ids, "labels": [-100] * 2 + ids[2:]}
        yield {**row, "loss_weights": [(i + j) % 3 - 0.5 for j in range(length)]} if weights else row


def collate(features):
    length = max(len(f["input_ids"]) for f in features)
    padding = {"input_ids": 0, "labels": -100, "loss_weights": 0.0}
    found = {
        name: torch.tensor([f[name] + [fill] * (length - len(f[name])) for f in features])
        for name, fill in padding.items()
        if name in features[0]
    }
    mask = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
    return {**found, "attention_mask": torch.tensor(mask)}


def make_trainer(kind, folder, weights=False, **changes):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-3,
        max_steps=4, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1,
        **changes,
    )  # fmt: skip
    data = Dataset.from_list(list(rows(weights)))
    return kind(model=support.tiny(), args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_is_the_run_of_transformers(checkpointing, tmp_path):
    found = []
    for kind in (transformers.Trainer, FusedTrainer):
        trainer = make_trainer(kind, tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
        found.append(
            (flat(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log], evaluation)
        )
    (weights, losses, evaluation), (our_weights, our_losses, our_evaluation) = found
    assert relative(our_weights - flat(support.tiny()), weights - flat(support.tiny())) < 1e-3
    assert our_losses == pytest.approx(losses, rel=1e-4) and len(losses) == 4
    assert our_evaluation == pytest.approx(evaluation, rel=1e-4)


def test_the_column_of_weights_reaches_the_loss(tmp_path, monkeypatch):
    """First step, three microbatches: its loss and gradient norm against the sum over its tokens written out."""
    trainer = make_trainer(FusedTrainer, tmp_path, weights=True, max_grad_norm=0.0)
    seen = []
    own = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda m, i, **k: (seen.append(i), own(m, i, **k))[1])
    trainer.args.max_steps = 1
    trainer.train()
    assert len(seen) == 3 and all("loss_weights" in inputs for inputs in seen)
    model, total, count = support.tiny(), 0.0, 0
    for inputs in seen:
        logps = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
        labels = inputs["labels"][:, 1:]
        own_logps = logps[:, :-1].gather(2, labels.clamp(min=0)[..., None])[..., 0]
        total = total - (inputs["loss_weights"][:, 1:] * own_logps)[labels != -100].sum()
        count += (labels != -100).sum()
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx((total / count).item(), rel=1e-4)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_losses_that_need_logits_are_refused(tmp_path):
    with pytest.raises(UserError, match="label_smoothing_factor needs logits; set it to 0"):
        make_trainer(FusedTrainer, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="compute_loss_func needs logits"):
        FusedTrainer(
            model=support.tiny(), compute_loss_func=lambda *_, **__: 0,
            args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        )  # fmt: skip
