"""The commands that need torch."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from aapo_fast.config import Config
from aapo_fast.types import UserError

try:
    import transformers

    from aapo_fast.rollout.vllm import process
    from aapo_fast.rollout.vllm.guard import KEY_VARIABLE
    from aapo_fast.trainer import loop
    from aapo_fast.trainer.curve import plot_run
    from aapo_fast.trainer.display import Display
    from aapo_fast.trainer.engine import engine_settings
    from aapo_fast.trainer.policy import resolve_device
    from aapo_fast.trainer.ranks import joined_ranks
    from aapo_fast.trainer.records import CURVE
except ModuleNotFoundError as error:
    raise UserError(
        f"the package {error.name} is missing; run: pip install '.[train]' in aapo-fast's folder"
    ) from error

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
        before = summary["accuracy_before"]  # None where every reward of that evaluation failed
        display.note(
            f"held-out accuracy (greedy, {summary['held_out_problems']} problems): "
            f"{'none' if before is None else f'{before:.2f}'} before, {summary['accuracy_after']:.2f} after "
            f"{summary['steps']} steps"
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


def serve(config: Config, host: str, port: int) -> int:
    """Become a vLLM server; returns only where that is not possible."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("aapo-fast serve needs vllm; run: pip install '.[vllm]' in aapo-fast's folder")
    if config.vllm.transfer == "ipc":
        raise UserError(
            "vllm.transfer='ipc' is for the server that a training run starts itself; for this one set 'nccl' or 'file'"
        )
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
