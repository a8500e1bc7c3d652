"""What a run leaves behind: config; metrics, evaluations, samples and what made a gradient non-finite as JSON lines; a
summary.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aapo_fast.types import UserError

CONFIG, METRICS, EVALUATIONS, SAMPLES, NONFINITE, SUMMARY = (
    "config.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "samples.jsonl",
    "nonfinite.jsonl",
    "summary.json",
)
RECORDS = (METRICS, EVALUATIONS, SAMPLES, NONFINITE)
CURVE, MODEL, CHECKPOINTS, LOCK = "curve.png", "model", "checkpoints", "lock"


class RunFolder:
    """The folder of one run. Each line is flushed when it is written, so a killed run keeps what it measured.

    Making it changes nothing in the folder; ``begin`` does.

    Args:
        path: the folder.
        overwrite: replace an earlier run's files.
        tensorboard: write metrics as TensorBoard events too.
        resumed_step: of the checkpoint that the run goes on from: then everything stays, until ``cut``.

    Raises:
        UserError: an earlier run is there and may not be replaced, or what no run has left; no tensorboard.
    """

    def __init__(
        self, path: Path, overwrite: bool = False, tensorboard: bool = False, resumed_step: int | None = None
    ) -> None:
        self.path, self._resumed_step = path, resumed_step
        if resumed_step is None:
            self._check_replaceable(overwrite)
        self._writer = _summary_writer() if tensorboard else None
        self._board: Any = None

    def _check_replaceable(self, overwrite: bool) -> None:
        try:
            there = [p.name for p in replaced_in(self.path) if _holds_something(p)]
            if there and not _is_of_a_run(self.path / CONFIG):
                raise UserError(
                    f"run.folder={str(self.path)!r} is not the folder of a run, and this one would replace "
                    f"{', '.join(there)} in it; name another folder, or move them away"
                )
        except OSError as error:
            raise UserError(f"run.folder={str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if not overwrite and {CHECKPOINTS, MODEL, METRICS} & {*there}:
            raise UserError(
                f"run.folder={str(self.path)!r} holds an earlier run; name another, or replace it with "
                "--run.overwrite true; --resume goes on with it"
            )

    def begin(self, config: Mapping[str, Any], keep_model: bool = False) -> None:
        """Take the folder: what an earlier run left goes, unless this one goes on with it.

        Args:
            config: of this run, for config.json.
            keep_model: leave the model there until this run's replaces it.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._resumed_step is None:
            self._clear(() if keep_model else (MODEL,))
        self.write(CONFIG, config)
        if self._writer is not None:
            # Events of later steps, of a run that was killed, are not shown.
            purge_step = None if self._resumed_step is None else self._resumed_step + 1
            with self._written("events.out.tfevents"):
                self._board = self._writer(str(self.path), purge_step=purge_step)

    def close(self) -> None:
        """Write out what TensorBoard's writer has yet to."""
        if self._board is not None:
            with suppress(OSError):  # a full disk: the same figures are in the records
                self._board.close()

    def _clear(self, models: Sequence[str]) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Not the config, which ``begin`` replaces: as long as anything is left of a run, it says of which.
            for folder in (CHECKPOINTS, *models):
                shutil.rmtree(path / folder, ignore_errors=True)
            self._clear_unfinished()
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
            for name in (*RECORDS, SUMMARY, CURVE):
                (path / name).unlink(missing_ok=True)
            (path / METRICS).touch()
        except OSError as error:
            raise UserError(f"run.folder={str(path)!r} cannot be written: {error.strerror or error}") from error

    def _clear_unfinished(self) -> None:
        """Models that a process was writing when it was killed."""
        for scratch in self.path.glob(f".{MODEL}-*"):
            shutil.rmtree(scratch, ignore_errors=True)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all. Raises UserError where the disk refuses it."""
        scratch = self.path / f".{name}"
        with self._written(name):
            scratch.write_text(json.dumps(without_nan(content), indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(scratch, self.path / name)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line of JSON; numbers of metrics and evaluations go to TensorBoard too. NaN is written as null.

        Raises:
            UserError: the disk refuses it; half a line may be left, which ``cut`` takes away.
        """
        with self._written(name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(line), ensure_ascii=False) + "\n")
        if self._board is not None and name in (METRICS, EVALUATIONS):
            for key, value in flatten(line).items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(f"{Path(name).stem}/{key}", value, line["step"])

    @contextmanager
    def _written(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be written: {error.strerror or error}; make room, and go on from the last "
                "checkpoint with --resume"
            ) from error

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of records so far; they are on the disk when this returns. Raises UserError where the disk
        refuses it.
        """
        sizes = {}
        for name in RECORDS:
            if (self.path / name).exists():
                with self._written(name), (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[name] = file.seek(0, os.SEEK_END)
        return sizes

    def cut(self, sizes: Mapping[str, int]) -> list[str]:
        """Back to the records that ``sizes`` spoke of, whole lines; returns the files that had fewer. Raises UserError
        where the disk refuses it.
        """
        for name in (SUMMARY, CURVE):
            with self._written(name):
                (self.path / name).unlink(missing_ok=True)
        self._clear_unfinished()
        for name in RECORDS:
            with self._written(name):
                self._cut(self.path / name, sizes.get(name))
        return [name for name, size in sizes.items() if (self.path / name).stat().st_size < size]

    def _cut(self, path: Path, size: int | None) -> None:
        """To the whole lines of so many bytes; away with it where it was not there."""
        if size is None:
            path.unlink(missing_ok=True)
            return
        kept = (path.read_bytes() if path.exists() else b"")[:size]
        scratch = path.with_name(f".{path.name}")
        scratch.write_bytes(kept[: kept.rfind(b"\n") + 1])
        os.replace(scratch, path)


@contextmanager
def only_process(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from training in this folder meanwhile. The lock ends with the process, however it ends.

    Raises:
        UserError: another one is; the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # for writing: else NFS refuses the lock
    except OSError as error:
        raise UserError(f"run.folder={str(path)!r} cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.folder={str(path)!r}: another process is training there; wait for it, or name another folder"
            ) from None
        except OSError as error:  # a disk that knows no locks
            note(f"{path} cannot be locked ({error.strerror}): nothing keeps a second process from training there")
        yield
    finally:
        os.close(handle)


def holds_a_run(path: Path) -> bool:
    """Whether a run has left steps or checkpoints in a folder."""
    metrics = path / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or any((path / CHECKPOINTS).glob("step-*"))


def replaced_in(path: Path) -> list[Path]:
    """What a run replaces in its folder."""
    return [path / name for name in (CHECKPOINTS, MODEL, *RECORDS, SUMMARY, CURVE, CONFIG)]


def _holds_something(path: Path) -> bool:
    """Whether anything would be lost; unfinished checkpoints of a killed process are nothing."""
    if path.is_dir():
        return any(not entry.name.startswith(".") for entry in path.iterdir())
    return path.exists() and path.stat().st_size > 0


def _is_of_a_run(path: Path) -> bool:
    """Whether a config.json is a run's: models have files of that name too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return False
    return isinstance(content, dict) and {"run", "model", "rollout"} <= content.keys()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables to one, with keys joined by a slash."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def without_nan(value: Any) -> Any:
    """NaN and infinity to None: JSON has neither."""
    if isinstance(value, Mapping):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("run.tensorboard=true needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
