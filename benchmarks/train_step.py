"""One training step against TRL's GRPO step, on the same model, prompts, lengths and machine, alternating.

    pip install trl==1.16.0
    python benchmarks/train_step.py [--rounds 7] [--output benchmarks/results/cpu/train_step.json]

Both train the quickstart's model in float32 with 8 prompts x 8 completions of at most 10 tokens. The reward is a dense
one (a different number for nearly every completion), so that no completion has weight zero: dropping those is ours
alone, and would flatter us. Every step of ours draws a reference completion for each of the policy's (mode online, as
the paper does); the cache, the default, draws them once for all passes over a problem. TRL runs without gradient
checkpointing (its default is on, and slower) and without a KL term. Ours runs inside TRL's end-of-step callback, so the
two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from dense_reward import dense_reward
from trl import GRPOConfig, GRPOTrainer

from aapo_fast import cli, config
from aapo_fast.bench import machine
from aapo_fast.models.load import load_model
from aapo_fast.trainer import ahead, loop, report, sampling, setup
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import METRICS, read_lines

PROMPTS, GROUP, MAX_TOKENS, LEARNING_RATE, WARMUP = 8, 8, 10, 1e-6, 2


def our_config(folder: str) -> config.Config:
    settings = {
        "run.folder": f"{folder}/ours",
        "rewards.0.function": "dense_reward:dense_reward",
        "rewards.0.extract": "",
        "rollout.max_tokens": str(MAX_TOKENS),
        "rollout.stop": "[]",
        "rollout.prompts_per_step": str(PROMPTS),
        "rollout.group_size": str(GROUP),
        "reference.mode": "online",
        "train.learning_rate": str(LEARNING_RATE),
        "train.schedule": "constant",
        "train.warmup_steps": "0",
    }
    return config.load(cli.QUICKSTART, list(settings.items()))


class Ours:
    """One of our steps at a time, reference rewards included."""

    def __init__(self, run: setup.Run) -> None:
        self.run, self.totals, self.steps = run, report.Totals(), []
        self.rollouts = ahead.Rollouts(run)
        sampling.before_the_first_step(run, threading.Event())

    def step(self) -> None:
        start = time.perf_counter()
        loop.train_step(self.run, len(self.steps) + 1, self.totals, self.rollouts)
        total = time.perf_counter() - start
        record = read_lines(self.run.folder.path / METRICS)[-1]
        self.steps.append({"total": total, **record["seconds"]})


class TakeTurns(transformers.TrainerCallback):
    """Times TRL's steps and runs one of ours after each."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.seconds = ours, []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)
        self.ours.step()
        print(f"TRL {self.seconds[-1]:6.2f} s    ours {self.ours.steps[-1]['total']:6.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, after two to warm up")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    steps = arguments.rounds + WARMUP

    with tempfile.TemporaryDirectory() as folder, setup.prepare(our_config(folder), Display(quiet=True)) as run:
        model, tokenizer = load_model(run.config.model.path, torch.device("cpu"))
        model.set_attn_implementation("sdpa")
        turns = TakeTurns(Ours(run))
        trl = GRPOTrainer(
            model=model,
            reward_funcs=dense_reward,
            train_dataset=Dataset.from_list([{"prompt": p.prompt} for problems in run.schedule for p in problems]),
            processing_class=tokenizer,
            callbacks=[turns],
            args=GRPOConfig(
                output_dir=f"{folder}/trl",
                per_device_train_batch_size=PROMPTS * GROUP,
                num_generations=GROUP,
                shuffle_dataset=False,
                max_completion_length=MAX_TOKENS,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=0.0,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
        )
        trl.train()

    theirs, ours = turns.seconds[WARMUP:], turns.ours.steps[WARMUP:]
    ratios = [o["total"] / t for o, t in zip(ours, theirs, strict=True)]
    result = {
        "machine": machine.describe("transformers", "trl"),
        "command": f"python benchmarks/train_step.py --rounds {arguments.rounds}",
        "work": f"SmolLM2-135M fp32, {PROMPTS} x {GROUP} completions of at most {MAX_TOKENS} tokens, dense reward",
        "trl_seconds": theirs,
        "ours": ours,
        "median": {
            "trl_seconds": statistics.median(theirs),
            "ours_seconds": statistics.median(o["total"] for o in ours),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            **{f"ours_{k}": statistics.median(o[k] for o in ours) for k in ("rollout", "reward", "reference", "train")},
        },
    }
    print(json.dumps(result["median"], indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
