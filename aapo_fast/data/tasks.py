"""Problems: from a reasoning-gym task, a JSONL or parquet file, or a Hugging Face data set.

Held-out problems are the first ones of the source; training takes what follows, less every prompt that is held out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from aapo_fast.config import DataConfig
from aapo_fast.types import DataError, Problem, first_line

REASONING_GYM = "reasoning_gym:"
HUB = "hub:"


@dataclass(frozen=True)
class Problems:
    """The two disjoint sets of a run."""

    train: list[Problem]
    held_out: list[Problem]


def load_problems(config: DataConfig, tokenizer: Any, seed: int) -> Problems:
    """Read the source, make prompts, set problems aside.

    Args:
        config: [data].
        tokenizer: a Hugging Face tokenizer.
        seed: of generated tasks. The held-out problems do not depend on it, so runs can be compared.

    Raises:
        DataError: a row, named by file and number, that lacks a column or is too long; too few problems.
    """
    held_out = load_held_out(config, tokenizer)
    seen = {problem.prompt for problem in held_out}
    train = [
        problem
        for row, columns in _rows(config, seed=seed + 1, what="training")
        if (problem := _problem(config, tokenizer, row, columns)).prompt not in seen
    ]
    if not train:
        raise DataError(
            f"data.source={config.source!r} has no training problem beside the {config.held_out} held out; "
            "lower data.held_out or raise data.size"
        )
    return Problems(train[: config.size], held_out)


def load_held_out(config: DataConfig, tokenizer: Any) -> list[Problem]:
    """The held-out problems alone, which need no others beside them. Errors as in ``load_problems``."""
    held_out: list[Problem] = []
    seen: set[str] = set()
    # Generated tasks repeat themselves; ten times as many as asked for is a task that has run out of new problems.
    for row, columns in islice(_rows(config, seed=0, what="held-out"), 10 * config.held_out):
        if len(held_out) == config.held_out:
            break
        problem = _problem(config, tokenizer, row, columns)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            held_out.append(problem)
    if len(held_out) < config.held_out:
        raise DataError(
            f"data.source={config.source!r} has only {len(held_out)} different prompts; "
            f"lower data.held_out={config.held_out}"
        )
    return held_out


def load_all(config: DataConfig, tokenizer: Any) -> list[Problem]:
    """Every row of a file or hub data set, in its order: a benchmark. Errors as in ``load_problems``."""
    if config.source.startswith(REASONING_GYM):
        raise DataError(f"data.source={config.source!r} has no last problem; evaluate on data.held_out of them")
    rows = _hub_rows(config) if config.source.startswith(HUB) else _file_rows(config.source)
    problems = [_problem(config, tokenizer, row, columns) for row, columns in rows]
    if not problems:
        raise DataError(f"data.source={config.source!r} has no rows")
    return problems


def order(num_problems: int, num_draws: int, seed: int) -> list[int]:
    """Indices of the problems of a whole run: pass after pass, each shuffled."""
    generator = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < num_draws:
        epoch = list(range(num_problems))
        generator.shuffle(epoch)
        drawn += epoch
    return drawn[:num_draws]


# --- sources: (row name, columns) ------------------------------------------------------------------------------------

Row = tuple[str, dict[str, Any]]


def _rows(config: DataConfig, seed: int, what: str) -> Iterator[Row]:
    if config.source.startswith(REASONING_GYM):
        return _reasoning_gym_rows(config, seed, what)
    rows = _hub_rows(config) if config.source.startswith(HUB) else _file_rows(config.source)
    return islice(rows, config.held_out + config.size)


def _reasoning_gym_rows(config: DataConfig, seed: int, what: str) -> Iterator[Row]:
    import reasoning_gym

    task = config.source.removeprefix(REASONING_GYM)
    size = 10 * config.held_out if what == "held-out" else config.size + config.held_out
    # reasoning-gym seeds entry i of a data set with seed + i; far-apart seeds keep the two streams apart.
    try:
        dataset = reasoning_gym.create_dataset(task, size=max(size, 1), seed=seed * 1_000_003, **config.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{_source(config)}: {first_line(error)}") from error
    for index in range(size):
        try:
            entry = dataset[index]
        except Exception as error:  # the task's own code, and its checks of options see only some of them
            raise DataError(
                f"{_source(config)}: {what} problem {index} cannot be made: {type(error).__name__}: {first_line(error)}"
            ) from error
        metadata = {k: v for k, v in entry["metadata"].items() if k not in ("question", "answer")}
        yield f"{task} {what} problem {index}", {**metadata, **entry, "metadata": entry["metadata"]}


def _file_rows(source: str) -> Iterator[Row]:
    path, kinds = Path(source), {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    try:
        if not path.is_file():
            raise DataError(
                f"data.source={source!r} is no file; give reasoning_gym:TASK, hub:NAME, or a .jsonl / .parquet"
            )
        if path.suffix not in kinds:
            raise DataError(f"data.source={source!r} must end in .jsonl or .parquet")
        yield from kinds[path.suffix](path)
    except OSError as error:
        raise DataError(f"data.source={source!r}: {path.name} cannot be read: {first_line(error)}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as parquet: {first_line(error)}") from error
    for index, row in enumerate(rows):
        yield f"{path.name} row {index + 1}", row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:  # not JSON, or not even UTF-8
                raise DataError(f"{path.name} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path.name} line {number} is a JSON {type(row).__name__}; give an object a line")
            yield f"{path.name} line {number}", row


def _hub_rows(config: DataConfig) -> Iterator[Row]:
    import datasets

    name = config.source.removeprefix(HUB)
    arguments = {"split": "train", **config.options}
    try:
        dataset = datasets.load_dataset(name, **arguments)
    except Exception as error:  # the library raises a dozen kinds, its own and its transports'
        raise DataError(
            f"{_source(config)}: {first_line(error)} (without a network give a copy: hub:FOLDER, .parquet or .jsonl)"
        ) from error
    for index, row in enumerate(dataset):
        yield f"{name} {arguments['split']} row {index}", dict(row)


# --- columns to a problem --------------------------------------------------------------------------------------------


def _problem(config: DataConfig, tokenizer: Any, row: str, columns: Mapping[str, Any]) -> Problem:
    # Some reasoning-gym tasks have many right answers and a scorer, and so no answer to show.
    if columns.get(config.answer_column) is None and not config.source.startswith(REASONING_GYM):
        raise DataError(
            f"{row} has no {config.answer_column!r}; it has {_names(columns)} (set data.answer_column if it is another)"
        )
    try:
        text = config.template.format_map(columns)
        # Half a surrogate pair, in JSON or from the command line, is no text to a tokenizer, nor in our own files.
        f"{text}{columns.get(config.answer_column)}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row}, in data.template, has a character that is no Unicode: {error}") from error
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{row} does not fit data.template={config.template!r}: {error!r}; it has {_names(columns)}"
        ) from error
    if config.chat_template:
        text = _in_chat_template(config, tokenizer, row, text)
    ids: Sequence[int] = tokenizer(text, add_special_tokens=not config.chat_template).input_ids
    if not ids:
        raise DataError(f"{row} makes an empty prompt; look at data.template={config.template!r}")
    if len(ids) > config.max_prompt_tokens:
        raise DataError(
            f"{row} makes a prompt of {len(ids)} tokens, over data.max_prompt_tokens={config.max_prompt_tokens}"
        )
    return Problem(row, text, tuple(ids), {**columns, "answer": columns.get(config.answer_column)})


def _in_chat_template(config: DataConfig, tokenizer: Any, row: str, text: str) -> str:
    if not tokenizer.chat_template:
        raise DataError("data.chat_template=true, but the model's tokenizer has none; set it to false")
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    messages = [*system, {"role": "user", "content": text}]
    try:
        made: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, which may refuse messages or fail
        raise DataError(
            f"{row} does not fit the tokenizer's chat template: {first_line(error)}; set data.chat_template=false"
            + (", or leave data.system_prompt empty" if system else "")
        ) from error
    return made


def _source(config: DataConfig) -> str:
    return f"data.source={config.source!r} with data.options={config.options}"


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(sorted(columns))
