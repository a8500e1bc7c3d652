"""Checkpoints on disk: written whole or not at all, and read only where every byte is the one that was written.

    checkpoints/step-00000040/
        model.safetensors        weights, tied ones once
        optimizer.safetensors    moments, by the names of their parameters
        state.json               everything else
        manifest.json            size and SHA-256 of the other three

Nothing that is read can run code: there is no pickle. The tensors are written by safetensors itself and read by
torch.distributed.checkpoint, whose reader of this format can hand each of many ranks its part. Its writer is not used:
it holds the file twice in memory besides, and took ten times as long (docs/LOG.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aapo_fast.types import UserError

FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
SCRATCH = ".unfinished-"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the text names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is as it was written.

    Attributes:
        path: its folder.
        step: after which it was written.
        state: what was no tensor.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in ``file``."""
        with safe_open(self.path / file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118

    def load(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors, by their names in either file; ``shapes`` has said that they fit."""
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(self.path)), no_dist=True)
            except CheckpointException as error:  # which is no Exception
                reason = next(iter(error.failures.values()))[0]
                raise CheckpointError(f"{self.path}: its tensors cannot be loaded: {reason}") from error


def write(parent: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Any) -> Path:
    """Write the checkpoint of a step, in the place of any that is there. Until the last moment it has another name.

    Args:
        parent: folder of the run's checkpoints; made if it is not there.
        step: counted from 1.
        model, optimizer: tensors by name, no two of them in the same memory.
        state: what JSON can hold (NaN is kept); else it becomes text.

    Raises:
        OSError: the disk is full, say. Nothing is left behind.
    """
    target, scratch = parent / _name(step), parent / f"{SCRATCH}{_name(step)}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_file({name: t.detach().contiguous() for name, t in model.items()}, scratch / MODEL)
        save_file({name: t.detach().contiguous() for name, t in optimizer.items()}, scratch / OPTIMIZER)
        _write_json(scratch / STATE, {"step": step, **state})
        for name in (MODEL, OPTIMIZER, STATE):
            _flush(scratch / name)
        files = {name: _seal(scratch / name) for name in (MODEL, OPTIMIZER, STATE)}
        _write_json(scratch / MANIFEST, {"format": FORMAT_VERSION, "files": files})
        _flush(scratch / MANIFEST)
        _flush(scratch)
        _discard(target)
        scratch.rename(target)
        _flush(parent)
        _flush(parent.parent)
    except SafetensorError as error:  # which hides the system's own error in its text
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def read(path: Path) -> Checkpoint:
    """A checkpoint whose every byte was compared with its manifest.

    Raises:
        CheckpointError: it is not whole, was altered, or is of another format or step.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: there is no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version!r}, want {FORMAT_VERSION}")
    here = {p.name for p in path.iterdir() if not p.name.startswith(".")} | {MODEL, OPTIMIZER, STATE}
    for name in sorted(here - {MANIFEST}):
        if name not in files:
            raise CheckpointError(f"{path}: {name} is not in its {MANIFEST}")
        try:
            found = _seal(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror or error}") from error
        wanted = files[name]
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is not as {MANIFEST} has it: {found}, written as {wanted}")
    for name in (MODEL, OPTIMIZER):
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except SafetensorError as error:  # somebody else's, under our name: a pickle, say
            raise CheckpointError(f"{path}: {name} is no safetensors file: {error}") from error
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if _name(state["step"]) != path.name:
        raise CheckpointError(f"{path} is the checkpoint of step {state['step']}; its folder was renamed")
    return Checkpoint(path, state["step"], state)


def steps_written(parent: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of what bears the name of a checkpoint, the newest first."""
    found = [(int(m[1]), p) for p in parent.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return iter(sorted(found, reverse=True))


def prune(parent: Path, step: int, keep: int) -> None:
    """Leave the last ``keep`` checkpoints up to ``step``. Those of later ones were refused when the run was resumed."""
    written = list(steps_written(parent))
    kept = [path for number, path in written if number <= step][:keep]
    for _, path in written:
        if path not in kept:
            _discard(path)


def clear_unfinished(parent: Path) -> None:
    """Remove what a process that was killed has left."""
    for path in parent.glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _discard(path: Path) -> None:
    """Renamed first: a kill while it is deleted leaves nothing that looks like a checkpoint."""
    if path.exists():
        doomed = path.with_name(f"{SCRATCH}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, default=str), encoding="utf-8")


def _seal(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """To the disk itself, a file or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
