"""What a measurement leaves behind: one JSON file with the machine, the command, and a row a method and case."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from aapo_fast.types import UserError

SCHEMA = 1

Status = Literal["ok", "wrong gradient", "out of memory", "failed", "unavailable", "left out"]


@dataclass
class Row:
    """One method on one case.

    Attributes:
        method, title, kind, gemms, weighted: of the method.
        status: "ok" where there is a time to report. A time with a wrong gradient is kept here and shown nowhere.
        reason: why the status is not "ok".
        implementation: of ours, which one ran.
        errors: of "d_hidden", "d_weight", "logps", "entropy" against float64 (``truth``).
        extra_memory_bytes: peak beyond inputs, dX and dW; None where it could not be measured.
        timing: of ``clock.summary``.
    """

    method: str
    title: str
    kind: str
    gemms: str
    weighted: bool
    status: Status = "ok"
    reason: str = ""
    implementation: str | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    extra_memory_bytes: int | None = None
    timing: dict[str, Any] = field(default_factory=dict)

    def stop(self, status: Status, reason: str) -> None:
        self.status, self.reason = status, reason


@dataclass
class CaseResult:
    """All methods on one case. ``error_rows`` is the N at which errors were measured, the case's own or a smaller."""

    head: str
    shape: list[int]
    softcap: float | None
    dtype: str
    distribution: str
    device: str
    error_rows: int
    rounds: int = 0
    inputs: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.head}, (N, H, V) = ({', '.join(map(str, self.shape))}), {self.dtype}, {self.distribution}"


@dataclass
class Result:
    """A whole run.

    Attributes:
        kind: "head" or "accuracy".
        command: that made it.
        machine: of ``machine.describe``.
        settings: rounds, seed, minutes and the like.
        notes: lines that have to stand above every table made from this.
        cases: in the order they were measured.
        left_out: labels of the cases that were not measured.
        broken_by: the method that broke the device and so ended the run, if one did.
    """

    kind: str
    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broken_by: str = ""


def save(result: Result, path: Path) -> None:
    """Write a result as JSON; numbers that are not finite become null."""
    content = {"schema": SCHEMA, **asdict(result)}
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Result | None:
    """The result in a file; None if the file is another kind of JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it or name another folder") from error
    if not isinstance(content, dict) or content.get("kind") not in ("head", "accuracy"):
        return None
    if content.pop("schema", None) != SCHEMA:
        raise UserError(f"{path} was written by another version of aapo-fast bench; measure again")
    try:
        cases = [CaseResult(**{**case, "rows": [Row(**row) for row in case["rows"]]}) for case in content["cases"]]
        return Result(**{**content, "cases": cases})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a complete result of aapo-fast bench ({error}); measure again") from error


def find(folders: Sequence[Path]) -> Iterator[tuple[Path, Result]]:
    """All results below the folders, by path.

    Raises:
        UserError: a folder is not there, or holds no result.
    """
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} is not there; give folders that aapo-fast bench wrote into")
        paths = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        found = [(path, result) for path in paths if (result := load(path)) is not None]
        if not found:
            raise UserError(f"{folder} holds no result of aapo-fast bench; run: aapo-fast bench head --output {folder}")
        yield from found


def writable_folder(path: Path) -> Path:
    """The folder, made where it is missing, and tried, so that hours of measuring do not end in an error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".tried").touch()
        (path / ".tried").unlink()
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}; name another folder") from error
    return path


def first_line(error: Exception) -> str:
    """Its kind and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _finite(value: Any) -> Any:
    """NaN and infinity to None: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
