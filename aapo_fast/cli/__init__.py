"""The command line. Nothing heavy is imported before a command is known to need it, so ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aapo_fast import __version__, config
from aapo_fast.cli import bench
from aapo_fast.types import UserError

QUICKSTART = Path(__file__).with_name("quickstart.toml")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``aapo-fast``; returns the exit status: 0, 1 (a check failed), 2 (bad input), 130 (Ctrl-C)."""
    try:
        rest, overrides = _split_overrides(sys.argv[1:] if argv is None else list(argv))
        arguments = _parser().parse_args(rest)
        if overrides and not _takes_options(arguments):
            raise config.ConfigError(f"{arguments.command} takes no --{overrides[0][0]}")
        arguments.argv = rest
        return _run(arguments, overrides)
    except UserError as error:
        print(f"aapo-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aapo-fast: interrupted", file=sys.stderr)
        return 130


def _takes_options(arguments: argparse.Namespace) -> bool:
    if arguments.command == "doctor":
        return arguments.plan is not None
    return arguments.command in ("train", "eval", "serve", "quickstart")


def _run(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if arguments.command == "bench":
        return bench.run(arguments)
    if arguments.command == "doctor":
        return _doctor(arguments) if arguments.plan is None else _plan(arguments, overrides)
    from aapo_fast.cli import commands

    if arguments.command == "plot":
        return commands.plot(arguments.run)
    if arguments.command == "serve":
        return commands.serve(config.load(arguments.config, overrides), arguments.host, arguments.port)
    if arguments.command == "eval":
        return _evaluate(arguments, overrides)
    path = QUICKSTART if arguments.command == "quickstart" else arguments.config
    resume = [("run.resume", "true")] if getattr(arguments, "resume", False) else []
    settings = _load(path, [*overrides, *resume])
    return commands.train(settings, str(path), overrides)


def _doctor(arguments: argparse.Namespace) -> int:
    if (arguments.gpu, arguments.memory_gib, arguments.devices) != (None, None, None):
        raise config.ConfigError("--gpu, --memory-gib and --devices are for --plan CONFIG.toml")
    from aapo_fast.cli.doctor import doctor

    return doctor()


def _plan(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from aapo_fast.cli.plan import show_plan

    settings = config.load(arguments.plan, overrides)
    devices = 1 if arguments.devices is None else arguments.devices
    return show_plan(settings, arguments.gpu or "h100", arguments.memory_gib, devices)


def _evaluate(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    wanted = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()]
    names = {name.partition("=")[0]: name for name in wanted} or {"all" if arguments.all else "held-out": ""}
    if arguments.benchmarks and len(names) != max(1, len(wanted)):
        raise config.ConfigError(f"--benchmarks {arguments.benchmarks!r} names one twice; give each once")
    if arguments.benchmarks and not wanted:
        raise config.ConfigError(f"--benchmarks {arguments.benchmarks!r} names none; leave it out, or name some")
    configs = {name: config.load(arguments.config, overrides, benchmark) for name, benchmark in names.items()}
    from aapo_fast.cli.evaluate import evaluate

    return evaluate(configs, every_row=arguments.all or bool(wanted), output=arguments.output)


def _load(path: Path, overrides: list[tuple[str, str]]) -> config.Config:
    try:
        return config.load(path, overrides)
    except config.ConfigError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # under torchrun one process of each machine says it
            raise SystemExit(2) from None
        raise


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take ``--dotted.key value`` and ``--dotted.key=value`` out of the arguments; argparse sees the rest."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    items = iter(argv)
    for item in items:
        key, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or "." not in key:
            rest.append(item)
            continue
        if not equals:
            following = next(items, None)
            if following is None:
                raise config.ConfigError(f"--{key} needs a value")
            value = following
        overrides.append((key, value))
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aapo-fast", description="A fused policy loss for RL post-training, and an AAPO trainer around it."
    )
    parser.add_argument("--version", action="version", version=f"aapo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    train = commands.add_parser(
        "train",
        help="train a model with AAPO",
        description="Train a model with AAPO.",
        epilog=_options_help(),
        formatter_class=raw,
    )
    train.add_argument("config", type=Path, metavar="CONFIG.toml", help="settings; what it leaves out has defaults")
    _add_resume(train)

    _add_evaluate(commands)
    plot = commands.add_parser("plot", help="draw the learning curve of a run")
    plot.add_argument("run", type=Path, metavar="RUN", help="a run's folder")

    serve = commands.add_parser(
        "serve",
        help="a vLLM server for rollouts, with the flags that training needs",
        description="A vLLM server of the model of a config, for rollout.engine = 'vllm_server' with vllm.servers.",
        epilog=(
            "Every route but /health asks for the key in $AAPO_FAST_API_KEY; without one a key is made and shown.\n"
            "Example: aapo-fast serve CONFIG.toml --port 8000 --vllm.tensor_parallel_size 2\n\n"
            "Takes the options of train."
        ),
        formatter_class=raw,
    )
    serve.add_argument("config", type=Path, metavar="CONFIG.toml", help="that of the training run")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8000)

    bench.add_parser(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which implementation will run, and why not the others; what a config will take",
        epilog="Example: aapo-fast doctor --plan CONFIG.toml --gpu h200 --lora.rank 32; with --plan, options of train.",
    )
    doctor.add_argument("--plan", type=Path, metavar="CONFIG.toml", help="memory and step time of a run, by arithmetic")
    doctor.add_argument("--gpu", metavar="NAME", help="with --plan: a100, h100 (default) or h200")
    doctor.add_argument("--memory-gib", type=float, metavar="X", help="with --plan: of a GPU with another memory")
    doctor.add_argument("--devices", type=int, metavar="N", help="with --plan: that train together (default: one)")
    quickstart = commands.add_parser(
        "quickstart",
        help="teach a small language model to add, on a CPU, in minutes",
        description="Teach SmolLM2-135M to add two numbers. Settings: aapo_fast/cli/quickstart.toml",
        epilog="Takes the options of train, for example --run.seed 1 or --train.steps 20.",
    )
    _add_resume(quickstart)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="pass@k and greedy accuracy of a model, with intervals",
        description=(
            "Greedy accuracy and pass@k of a model, with bootstrap intervals: on the held-out problems of a config,\n"
            "on every row of its data, or on benchmarks. Completions are kept as they come; the same command goes on\n"
            "from them."
        ),
        epilog=(
            f"Benchmarks: {', '.join(config.benchmark_names())}\n\nExamples:\n"
            "  aapo-fast eval CONFIG.toml --model.path runs/mine/model\n"
            "  aapo-fast eval CONFIG.toml --benchmarks aime24,math500=math500.parquet --eval.samples 16\n"
            "  aapo-fast eval CONFIG.toml --all --data.source test.jsonl\n\nTakes the options of train."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("config", type=Path, metavar="CONFIG.toml")
    evaluate.add_argument(
        "--benchmarks",
        default="",
        metavar="NAME[=SOURCE],...",
        help="their data, prompts, graders and sampling, not the config's; SOURCE reads a copy of the data",
    )
    evaluate.add_argument("--all", action="store_true", help="every row of data.source, not data.held_out of them")
    evaluate.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for completions and results (default: evals in run.folder)"
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in run.folder; begin where there is none"
    )


def _options_help() -> str:
    lines = ["Any setting can be given on the command line as --dotted.key value:", ""]
    for key, kind, default, text in config.describe():
        lines += [f"  --{key} ({kind}, default {default})", f"      {text}"]
    return "\n".join(lines)
