"""vLLM's own weight transfer, from this process's GPU to a server's; written against 0.32 and 0.33. Each is used like
``transport.FolderTransport``.

NCCL    to a server on GPUs of its own, on this host or another
IPC     to a server that we started on this process's own GPU: handles travel, and its worker copies out of our memory
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.process import ServerProcess, free_port
from aapo_fast.types import UserError


class _GPUTransport:
    """What is published is a copy on this GPU: the policy may be training when a server that was restarted loads it."""

    def __init__(self) -> None:
        self._published: dict[str, list[tuple[str, Tensor]]] = {}

    def publish(self, name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        for old in [key for key in self._published if key != "reference"]:  # first: there may be no room for two
            del self._published[old]
        self._published[name] = [(key, tensor.clone()) for key, tensor in weights]


class NCCLTransport(_GPUTransport):
    """Weights from this process's GPU straight to those of each server.

    Args:
        address: of this host, as the servers reach it.
        time_limit_seconds: of one transfer.
    """

    def __init__(self, address: str, time_limit_seconds: float) -> None:
        super().__init__()
        self._address, self._limit = address, time_limit_seconds
        self._senders: dict[ServerClient, Any] = {}
        self._turn = threading.Lock()

    def check(self, client: ServerClient) -> None:
        """Any server that was started for it."""

    def load(self, client: ServerClient, name: str) -> None:
        """Send to a paused server, in its turn: communicators that share a GPU wait for each other in any order.

        Raises:
            ServerError: it took too long or failed. The group is given up; the server has to be restarted.
        """
        with self._turn:  # the limit is that of this transfer, without the wait for those before it
            sender = self._senders.get(client)
            try:
                self._senders[client] = self._within_limit(client, sender, self._published[name])
            except ServerError:
                self.forget(client)
                raise

    def _within_limit(self, client: ServerClient, sender: Any, tensors: list[tuple[str, Tensor]]) -> Any:
        """The sender that sent them: ``sender``, or a new one for None."""
        used: list[Any] = []
        failures: list[BaseException] = []

        def send() -> None:
            try:
                used.append(self._send(client, sender, tensors))
            except BaseException as error:
                failures.append(error)

        # NCCL waits for a peer that is gone for ever, so a thread can be left behind. It holds no lock, and what it
        # may still make is nobody's.
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(self._limit)
        if failures:
            raise ServerError(f"{client.url}: weights could not be transferred: {failures[0]}") from failures[0]
        if not used:
            raise ServerError(
                f"{client.url}: weights were not transferred within {self._limit:g} s; restart the server"
            )
        return used[0]

    def _send(self, client: ServerClient, sender: Any, tensors: list[tuple[str, Tensor]]) -> Any:
        device = tensors[0][1].device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        sender = sender or self._new_sender(client, tensors)
        sender.source.tensors = tensors  # of the same names, dtypes and shapes every time
        sender.send_weights()
        sender.source.tensors = []  # or they would outlive the next ones' publication
        return sender

    def forget(self, client: ServerClient) -> None:
        """Give up its communicator, which holds memory of the GPU; vLLM does not wait for a peer that is gone."""
        sender = self._senders.pop(client, None)
        if sender is not None:
            sender.shutdown()

    def close(self) -> None:
        for sender in self._senders.values():
            sender.shutdown()

    def _new_sender(self, client: ServerClient, tensors: list[tuple[str, Tensor]]) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(self._address, free_port(), client.world_size() + 1, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=weight_source(tensors))


class IPCTransport(_GPUTransport):
    """Weights as CUDA IPC handles to servers on this process's GPU, whose workers copy out of its memory.

    Over HTTP the handles are a pickle, and whoever may send one may run code in the server. ``ServerProcess`` lets none
    but servers of our own read it, which listen on loopback and ask for our key; no other gets any.

    Args:
        processes: the servers that we started, all on ``device``: vLLM opens a handle on the GPU that made it alone.
        device: this process's GPU.

    Raises:
        UserError: ``device`` is no GPU.
    """

    def __init__(self, processes: Sequence[ServerProcess], device: torch.device) -> None:
        super().__init__()
        if device.type != "cuda":
            raise UserError(f"vllm.transfer='ipc' shares a GPU's memory, and the policy is on {device}; use 'file'")
        self._processes = processes

    def check(self, client: ServerClient) -> None:
        """Raises UserError unless we started the server."""
        if client.url not in [process.url for process in self._processes]:
            raise UserError(
                f"{client.url} was not started by this run, and vllm.transfer='ipc' sends a pickle, which no other "
                "server should read; use 'nccl' or 'file'"
            )

    def load(self, client: ServerClient, name: str) -> None:
        """Have a paused server copy the weights published as ``name``; each of its answers has the client's limit.

        Raises:
            ServerError: the server could not, or did not answer.
            UserError: this process cannot share the memory. Another try would end the same.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        tensors = self._published[name]
        source = weight_source(tensors)
        try:
            torch.cuda.set_device(tensors[0][1].device)  # of this thread
            # Without a rendezvous it costs one request, and nothing is left of a server that was restarted.
            sender = WeightTransferTrainerFactory.trainer_init(IPCTrainerInitInfo(rank=0), client=client, source=source)
            sender.send_weights()
        except RuntimeError as error:
            raise UserError(
                f"vllm.transfer='ipc': the GPU's memory could not be shared ({error}); expandable segments in "
                "PYTORCH_CUDA_ALLOC_CONF are one cause; use 'file'"
            ) from error

    def forget(self, client: ServerClient) -> None:
        """Nothing is of one server."""

    def close(self) -> None:
        self._published.clear()


def weight_source(tensors: list[tuple[str, Tensor]]) -> Any:
    """vLLM's ``WeightSource`` over a list that may be exchanged, between transfers, for one that is declared alike."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    # A method in 0.32; from 0.33 on an attribute that cannot change, or vLLM refuses the class.
    declared: Any = cached_property if hasattr(WeightSource, "iter_full") else lambda method: method

    class Source(WeightSource):
        def __init__(self) -> None:
            self.tensors = tensors

        @declared
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.tensors)

        iter_full = __iter__  # its name from 0.33 on

    return Source()
