"""`aapo-fast eval`: a model on problems, as a table, and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aapo_fast.config import Config, ConfigError, LoraConfig
from aapo_fast.data.tasks import load_all, load_held_out
from aapo_fast.models.load import max_positions
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.trainer.benchmark import Benchmark, Summary, as_json, identify
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.engine import engine_version, make_engine
from aapo_fast.trainer.estimators import CONFIDENCE, RESAMPLES, Estimate
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.setup import check_lengths, sampling_params
from aapo_fast.types import Problem, RolloutEngine, UserError

FOLDER = "evals"
METHOD = f"{CONFIDENCE:.0%} percentile bootstrap over problems, {RESAMPLES} resamples"


def evaluate(configs: Mapping[str, Config], every_row: bool, output: Path | None) -> int:
    """Evaluate the model that [model] names on each config's problems.

    Args:
        configs: by the name that is shown. They differ in [data] and [[rewards]] alone.
        every_row: of data.source; else the held-out problems.
        output: folder for the files.

    Raises:
        UserError: what cannot be used, in one line; before the first completion is drawn.
    """
    # A trained adapter is merged into what a run saves, so there is none to add.
    configs = {name: replace(config, lora=LoraConfig()) for name, config in configs.items()}
    first = next(iter(configs.values()))
    if not (every_row or first.data.held_out):
        raise ConfigError("data.held_out=0: there is nothing to evaluate on; --all takes every row of data.source")
    folder = _made(output or Path(first.run.folder) / FOLDER)
    display = Display()
    display.note(f"loading {first.model.path}")
    policy = Policy.from_config(first.model, first.rollout.temperature)
    load = load_all if every_row else load_held_out
    problems = {name: load(config.data, policy.tokenizer) for name, config in configs.items()}
    for name, config in configs.items():
        check_lengths(problems[name], max_positions(policy.model), config.rollout.max_tokens)
    with ExitStack() as stack:
        scorers = {name: stack.enter_context(Scorer(c.rewards, c.scoring)) for name, c in configs.items()}
        for name, scorer in scorers.items():
            with display.progress(f"{name}: checking answers") as progress:
                scorer.check(problems[name], progress)
        fingerprint = policy.fingerprint()
        engine: RolloutEngine = stack.enter_context(closing(make_engine(first, policy, folder, display)))
        summaries = {}
        for name, config in configs.items():
            version = engine_version(config, policy.device)
            identity = identify(problems[name], config, fingerprint, version, scorers[name].version())
            benchmark = Benchmark(problems[name], config, folder / f"{name}-{identity}.jsonl")
            summaries[name] = _run(name, benchmark, engine, scorers[name], display)
    _show(summaries, problems, first, display)
    return 0


def _made(folder: Path) -> Path:
    """Now, not after minutes of loading."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be written: {error.strerror or error}; name another folder"
        ) from error
    return folder


def _run(name: str, benchmark: Benchmark, engine: RolloutEngine, scorer: Scorer, display: Display) -> Summary:
    total, missing = len(benchmark.problems), benchmark.missing()
    there = f", {total - missing} of them there already" if missing < total else ""
    display.note(f"{name}: {total} problems{there}; completions are kept in {benchmark.file}")
    summary = benchmark.run(engine, scorer, lambda what: display.progress(f"{name}, {what}"))
    config = benchmark.config
    result = {
        "name": name,
        "model": config.model.path,
        "problems": total,
        "interval": METHOD,
        **as_json(summary),
        "samples": config.eval.samples,
        "correct_at": config.eval.correct_at,
        "sampling": asdict(sampling_params(config)),
        "engine": config.rollout.engine,
        "data": asdict(config.data),
        "rewards": [asdict(reward) for reward in config.rewards],
    }
    text = json.dumps(result, indent=2, default=str, ensure_ascii=False)
    file = benchmark.file.with_suffix(".json")
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror or error}; make room, and give the command again"
        ) from error
    return summary


def _show(
    summaries: Mapping[str, Summary], problems: Mapping[str, list[Problem]], config: Config, display: Display
) -> None:
    rows = []
    for name, summary in summaries.items():
        measures = {"greedy": summary.greedy, **{f"pass@{k}": e for k, e in summary.pass_at.items()}}
        first = [f"{name} ({len(problems[name])})", f"{summary.truncated_share:.1%}", f"{summary.mean_tokens:.1f}"]
        for measure, estimate in measures.items():
            rows.append([first[0], measure, *_cells(estimate), *first[1:]])
            first = ["", "", ""]
    headings = ("problems", "", "accuracy", f"{CONFIDENCE:.0%} interval", "cut off", "tokens")
    display.table(f"{config.model.path}, {config.eval.samples} samples a problem", headings, rows, numbers=(2, 3, 4, 5))
    if len(summaries) > 1:
        for measure, values in _by_measure(summaries).items():
            display.note(f"average of {len(values)} benchmarks, {measure}: {sum(values) / len(values):.3f}")
    for name, summary in summaries.items():
        failed = sum(summary.failures.values())
        if failed:
            display.note(f"{name}: {failed} of {summary.completions} completions have no reward and are left out:")
        for failure, count in list(summary.failures.items())[:3]:
            display.note(f"  {count} times: {failure}")


def _cells(estimate: Estimate) -> tuple[str, str]:
    if not estimate.problems:
        return "-", "-"
    return f"{estimate.value:.3f}", f"{estimate.low:.2f} to {estimate.high:.2f}"


def _by_measure(summaries: Mapping[str, Summary]) -> dict[str, list[float]]:
    found: dict[str, Any] = {"greedy": [s.greedy.value for s in summaries.values()]}
    if all(s.pass_at for s in summaries.values()):
        found["pass@1"] = [s.pass_at[1].value for s in summaries.values()]
    return found
