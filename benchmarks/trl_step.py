"""TRL's trainers on the quickstart's model and task: AAPOTrainer's accuracy, and what ``fuse`` saves of a GRPO step.

    pip install trl==1.16.0
    python benchmarks/trl_step.py accuracy [--steps 60] [--seed 0]
    python benchmarks/trl_step.py pairs [--rounds 7] [--output benchmarks/results/cpu/trl_step.json]

``accuracy`` trains SmolLM2-135M in float32 to add two numbers, 8 prompts x 8 completions of at most 6 tokens a step,
ended by a newline, by the quickstart's recipe, and scores its held-out sums greedily before and after.

``pairs`` times loss and backward of one microbatch, 64 completions of at most 10 tokens: two trainers, one of them
fused, with the same weights and the same microbatch, taking turns in alternating order. Generation is in neither. On a
machine that others use, give it one thread (OMP_NUM_THREADS=1) and read the processor time.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from dense_reward import dense_reward
from trl import GRPOConfig, GRPOTrainer

from aapo_fast import cli, config
from aapo_fast.bench import machine
from aapo_fast.data.tasks import load_problems
from aapo_fast.integrations.trl import AAPOConfig, AAPOTrainer, fuse
from aapo_fast.models.load import load_model

PROMPTS, GROUP, WARMUP = 8, 8, 1


def first_integer(text: str) -> str | None:
    found = re.search(r"-?\d+", text)
    return found and found[0]


def is_right(completions, answer, **_):
    return [float(first_integer(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]


def task():
    """Model, tokenizer, training rows and held-out problems of the quickstart."""
    settings = config.load(cli.QUICKSTART, [])
    model, tokenizer = load_model(settings.model.path, torch.device("cpu"))
    model.set_attn_implementation("sdpa")
    tokenizer.padding_side = "left"
    problems = load_problems(settings.data, tokenizer, settings.run.seed)
    rows = [{"prompt": p.prompt, "answer": p.columns["answer"]} for p in problems.train]
    return model, tokenizer, Dataset.from_list(rows), problems.held_out


def arguments_of(folder: str, **changes) -> dict:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }


@torch.no_grad()
def accuracy(model, tokenizer, problems) -> float:
    model.eval()
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return statistics.mean(is_right(texts, [p.columns["answer"] for p in problems]))


def measure_accuracy(steps: int, seed: int) -> dict:
    model, tokenizer, rows, held_out = task()
    ends = model.generation_config
    ends.eos_token_id = [ends.eos_token_id, *tokenizer("\n").input_ids]  # as rollout.stop of the quickstart
    with tempfile.TemporaryDirectory() as folder:
        settings = AAPOConfig(
            **arguments_of(
                folder, max_completion_length=6, max_steps=steps, learning_rate=2e-5, warmup_steps=3, seed=seed
            )
        )
        trainer = AAPOTrainer(model, is_right, settings, rows, processing_class=tokenizer)
        before = accuracy(model, tokenizer, held_out)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    after = accuracy(trainer.model, tokenizer, held_out)
    return {"steps": steps, "seed": seed, "before": before, "after": after, "seconds_per_step": seconds / steps}


def measure_pairs(rounds: int) -> dict:
    model, tokenizer, rows, _ = task()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in ("trl", "fused"):
            settings = GRPOConfig(**arguments_of(folder, max_completion_length=10))
            trainers[name] = GRPOTrainer(copy.deepcopy(model), dense_reward, settings, rows, processing_class=tokenizer)
        fuse(trainers["fused"])
        first = trainers["trl"]
        first.model.train()
        inputs = first._prepare_inputs(next(iter(first.get_train_dataloader())))
    seconds, processor = {name: [] for name in trainers}, {name: [] for name in trainers}
    for number in range(rounds + WARMUP):
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            trainer = trainers[name]
            trainer.model.train().zero_grad()
            trainer.current_gradient_accumulation_steps = 1
            start = time.perf_counter(), time.process_time()
            trainer.compute_loss(trainer.model, dict(inputs)).backward()
            seconds[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
        print({name: (round(seconds[name][-1], 2), round(processor[name][-1], 2)) for name in trainers}, flush=True)
    return {
        "tokens": int(inputs["completion_mask"].sum()),
        "threads": torch.get_num_threads(),
        "wall": compared(seconds),
        "processor": compared(processor),
    }


def compared(seconds: dict[str, list[float]]) -> dict:
    """Medians, and the ratio pair by pair, without the rounds that warm up."""
    theirs, ours = (seconds[name][WARMUP:] for name in ("trl", "fused"))
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    return {
        "trl_seconds": theirs,
        "fused_seconds": ours,
        "median": {
            "trl": statistics.median(theirs),
            "fused": statistics.median(ours),
            "ratio": statistics.median(ratios),
        },
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "pairs"])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of accuracy")
    parser.add_argument("--seed", type=int, default=0, help="of accuracy")
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs, after one to warm up")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    if arguments.what == "accuracy":
        found = measure_accuracy(arguments.steps, arguments.seed)
    else:
        found = measure_pairs(arguments.rounds)
    print(json.dumps(found, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        size = f"--steps {arguments.steps}" if arguments.what == "accuracy" else f"--rounds {arguments.rounds}"
        command = f"python benchmarks/trl_step.py {arguments.what} {size}"
        record = {"machine": machine.describe("transformers", "trl"), "command": command, **found}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
