"""The commands that need torch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shlex
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from aapo_fast.config import Config, ConfigError
from aapo_fast.types import UserError

try:
    import transformers

    from aapo_fast.data.tasks import load_problems
    from aapo_fast.rewards.scorer import Scorer
    from aapo_fast.rollout.vllm import process
    from aapo_fast.rollout.vllm.guard import KEY_VARIABLE
    from aapo_fast.trainer import loop
    from aapo_fast.trainer.curve import plot_run
    from aapo_fast.trainer.display import Display
    from aapo_fast.trainer.engine import engine_settings, make_engine
    from aapo_fast.trainer.evaluate import evaluate as run_evaluation
    from aapo_fast.trainer.policy import Policy, resolve_device
    from aapo_fast.trainer.ranks import joined_ranks
    from aapo_fast.trainer.records import CURVE, without_nan
    from aapo_fast.trainer.setup import sampling_params
except ModuleNotFoundError as error:
    raise UserError(f"the package {error.name} is missing; run: pip install 'aapo-fast[train]'") from error

# Its progress bars and advice would tear our display; errors still come through.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def train(config: Config, config_path: str, overrides: Sequence[tuple[str, str]] = ()) -> int:
    """Train, then say what came of it and what to type next."""
    with joined_ranks(config) as ranks:
        display = Display(quiet=not ranks.first)
        summary = loop.train(config, display, ranks)
    folder = Path(summary["folder"])
    display.note("")
    if summary["accuracy_after"] is not None:
        display.note(
            f"held-out accuracy (greedy, {summary['held_out_problems']} problems): "
            f"{summary['accuracy_before']:.2f} before, {summary['accuracy_after']:.2f} after {summary['steps']} steps"
        )
    if summary["steps"]:
        model = summary["model"]
        display.note(
            f"{summary['seconds_per_step']:.1f} s a step, reference rewards included; "
            f"{summary['wall_seconds']:.0f} s in all"
        )
        display.note(f"learning curve  {folder / CURVE}")
        display.note(f"trained model   {model}")
        display.note("")
        display.note("What to type next:")
        if summary["status"] == "interrupted":
            display.note(f"  aapo-fast train {_retyped(config_path, overrides)} --resume")
        display.note(f"  aapo-fast eval {_retyped(config_path, overrides, ('model.path', model))}")
        again = _retyped(config_path, overrides, ("run.folder", f"{folder}-2"), ("run.seed", "1"))
        display.note(f"  aapo-fast train {again} --rollout.group_size 16")
        display.note("  aapo-fast doctor")
    return 130 if summary["status"] == "interrupted" else 0


def _retyped(config_path: str, overrides: Sequence[tuple[str, str]], *changes: tuple[str, str]) -> str:
    """The arguments of this run, with some settings changed."""
    settings = {key: value for key, value in [*overrides, *changes] if key != "run.resume"}
    return " ".join([shlex.quote(config_path), *(f"--{key} {shlex.quote(value)}" for key, value in settings.items())])


def evaluate(config: Config, output: Path | None) -> int:
    """Held-out accuracy of the model that [model] names."""
    if not config.data.held_out:
        raise ConfigError("data.held_out=0: there is nothing to evaluate on")
    if output is not None:
        try:
            output.touch()  # now, not after minutes of evaluation
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    display = Display()
    with Scorer(config.rewards, config.scoring) as scorer:
        policy = Policy.from_config(config.model, config.rollout.temperature)
        problems = load_problems(config.data, policy.tokenizer, config.run.seed).held_out
        scorer.check(problems)
        engine = make_engine(config, policy, Path(config.run.folder), display)
        with closing(engine), display.progress("evaluating") as progress:
            result = run_evaluation(engine, scorer, problems, config.eval, sampling_params(config), progress)
        sampled = "" if math.isnan(result.sampled) else f", sampled {result.sampled:.3f}"
        display.note(f"{config.model.path}: greedy {result.greedy:.3f}{sampled} on {len(problems)} held-out problems")
        if result.failures:
            display.note(f"{result.failures} completions had no reward and were left out")
        display.completions("Greedy completions", problems[:4], {"completion": result.samples[:4]})
        if output is not None:
            lines = [
                {"prompt": p.prompt, "completion": s.text, "answer": p.columns["answer"], "reward": value}
                for p, s, value in zip(problems, result.samples, result.values, strict=True)
            ]
            content = {"greedy_accuracy": result.greedy, "sampled_accuracy": result.sampled, "greedy": lines}
            output.write_text(json.dumps(without_nan(content), indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def serve(config: Config, host: str, port: int) -> int:
    """Become a vLLM server; returns only where that is not possible."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("aapo-fast serve needs vllm; run: pip install 'aapo-fast[vllm]'")
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        key = secrets.token_urlsafe(32)
        print(f"no {KEY_VARIABLE} is set; for the trainer: export {KEY_VARIABLE}={key}")
    settings = engine_settings(config, resolve_device(config.model.device))
    reached = socket.gethostname() if host in ("0.0.0.0", "::") else host
    print(f"for the trainer: --rollout.engine vllm_server --vllm.servers '[\"http://{reached}:{port}\"]'", flush=True)
    line = process.command(settings, host, port)
    os.execve(line[0], line, process.environment(settings, key))


def plot(folder: Path) -> int:
    """Draw the learning curve of a run."""
    print(plot_run(folder))
    return 0
