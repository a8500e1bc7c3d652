"""How weights reach a server: through a folder that both can read. From GPU to GPU: transfer.py."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from aapo_fast.models.lora import ADAPTER_FILE, write_adapter_config
from aapo_fast.rollout.vllm.client import ServerClient
from aapo_fast.types import UserError

SHARED_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
"""Where weights are written unless another folder is named."""


PREFIX = "aapo-fast-weights-"

LOCK = ".lock"
"""A file in each folder, locked for as long as its trainer lives. Process numbers would not tell who does: containers
and other hosts that use the same parent have their own.
"""


class Transport(Protocol):
    """Makes weights known under a name, and has paused servers load them."""

    def publish(self, name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Get the weights ready for all servers."""
        ...

    def check(self, client: ServerClient) -> None:
        """Raises UserError, before anything is done to a server, if it is none that they may go to."""
        ...

    def load(self, client: ServerClient, name: str) -> None:
        """Bring them to one; raises ServerError."""
        ...

    def forget(self, client: ServerClient) -> None:
        """Its server is gone."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class FolderTransport:
    """Weights as a safetensors file in ``folder``; in memory, where that is /dev/shm.

    The policy's last ones are kept, and the reference's: a server that is restarted reads what the others hold.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None

    @classmethod
    def within(cls, parent: Path, *more: Any) -> Self:
        """A folder of its own in ``parent``; those of runs that were killed are cleared away.

        Raises:
            UserError: it cannot be made.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob(f"{PREFIX}*"):
                _clear(old)
            folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
            made = cls(folder, *more)
            # Locked before it has its name: a trainer that starts just now would find an open lock.
            scratch = folder / f"{LOCK}-new"
            made._lock = _locked(scratch, "xb")
            if made._lock is not None:
                scratch.rename(folder / LOCK)
            return made
        except OSError as error:
            raise UserError(f"vllm.weights_folder={str(parent)!r} cannot be used: {error}") from error

    def publish(self, name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the weights once, for all servers.

        Raises:
            UserError: the folder cannot be written.
        """
        target, scratch = self._folder / name, self._folder / f".{name}"
        try:
            for old in self._folder.glob("policy-*"):
                if old != target:
                    shutil.rmtree(old)
            scratch.mkdir(parents=True, exist_ok=True)
            self._write(dict(_apart(weights)), scratch)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        except (OSError, SafetensorError) as error:  # a full /dev/shm, which containers make small
            raise UserError(
                f"weights for the servers cannot be written to {target}: {error}; name another folder by "
                "vllm.weights_folder"
            ) from error

    def path(self, name: str) -> Path:
        """The folder of what was published as ``name``."""
        return self._folder / name

    def check(self, client: ServerClient) -> None:
        """Any server; one that does not see the folder says so."""

    def load(self, client: ServerClient, name: str) -> None:
        """Have a paused server read the weights published as ``name``."""
        client.load_from_folder(str(self.path(name)))

    def forget(self, client: ServerClient) -> None:
        """Nothing is of one server."""

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors")


class AdapterTransport(FolderTransport):
    """The policy's adapter alone, as peft writes it: what is published are its tensors.

    A server adds it to the base model, in the place of the one before: under a new name it would keep the old one, too.
    """

    NAME = "policy"

    def __init__(self, folder: Path, model: Any) -> None:
        super().__init__(folder)
        self._model = model

    def load(self, client: ServerClient, name: str) -> None:
        client.load_adapter(self.NAME, str(self.path(name)))

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        save_file(tensors, folder / ADAPTER_FILE)
        write_adapter_config(self._model, folder)


def _clear(folder: Path) -> None:
    """Remove the folder of a trainer that is gone, whose lock can be taken; every other stays."""
    try:
        lock = _locked(folder / LOCK, "r+b")
    except OSError:  # somebody else's, or one that is just being made
        return
    if lock is not None:
        with lock:
            shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path, mode: str) -> IO[bytes] | None:
    """The file, locked until it is closed or this process ends; None where that cannot be. On a file system without
    locks it never can, so nothing there is cleared.
    """
    file: IO[bytes] = path.open(mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _apart(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """On the CPU, and tied tensors as two: the format refuses one memory under two names."""
    seen = set()
    for name, tensor in weights:
        found = tensor.cpu().contiguous()
        if found.data_ptr() in seen:
            found = found.clone()
        seen.add(found.data_ptr())
        yield name, found
