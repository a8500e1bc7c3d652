"""A real GRPO trainer of a tiny model on the CPU, and one microbatch of it."""

import support
import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

PROMPTS = ["ab", "say 3:", "q", "what is 1 + 2?", "xyz", "0"]


def rewards(completions, **_):
    """Of every completion another one, most of the time."""
    return [sum((i + 1) * ord(c) for i, c in enumerate(text)) % 17 / 17 for text in completions]


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }


def left_padding_tokenizer():
    tokenizer = support.make_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def dataset(repeats=8):
    return Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * repeats])


def make_trainer(folder, model, kind=GRPOTrainer, config=GRPOConfig, reward_funcs=rewards, more=None, **changes):
    return kind(
        model=model,
        reward_funcs=reward_funcs,
        args=config(**settings(folder, **changes)),
        train_dataset=dataset(),
        processing_class=left_padding_tokenizer(),
        **(more or {}),
    )


def wide_model():
    """A tiny model with 2048 tokens, most of which its tokenizer does not know and decodes to nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(support.SIZES | {"vocab_size": 2048, "initializer_range": 0.2}))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def microbatch(trainer):
    """The first one of a training run, as the trainer makes it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradient(trainer, inputs):
    """Loss, flat gradient and the metrics that were logged."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    parts = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return loss.item(), torch.cat(parts), {k: list(v) for k, v in trainer._metrics["train"].items()}


def relative(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


def completion_logps(trainer, inputs):
    """(B, T) log-probabilities of the completions' tokens, padding included, from materialised logits."""
    width = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    return logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
