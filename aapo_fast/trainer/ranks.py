"""The processes of one run, as torchrun starts them: who they are, and the few things that they tell each other.

Every rank knows the whole step: a completion is drawn by one rank and scored by one, and then all are told
(``spread``). So rewards, advantages, the denominator, records and what ends a run are the same numbers on every rank
without a sum over ranks, and every rank takes the same decisions. What is told is tokens and text, some ten bytes a
token, over gloo; weights and gradients go their own way (``trainer.sharded``).

All methods are collective calls: every rank makes the same ones in the same order. A rank that fails in one of them
says so in it, and every rank raises. With one rank nothing is told, and each is a plain call.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from aapo_fast.config import Config, ConfigError
from aapo_fast.types import UserError

T = TypeVar("T")
S = TypeVar("S")

TIME_LIMIT = timedelta(minutes=30)
"""Longest that ranks wait for each other at the start and in an optimizer step, where they go side by side."""

WORK_LIMIT = timedelta(hours=6)
"""Longest that they wait for one rank's work: rollouts that the first asks servers for, rewards, a checkpoint. One that
is killed is missed at once, by its connection; this is for one that hangs.
"""

LETTING_GO_SECONDS = 0.2
"""How long a rank that has left the group waits before Python may end. A thread of gloo's that has yet to let go of its
last tensor would abort the process: those threads outlive ``destroy_process_group`` (torch 2.13), and want the lock of
Python's interpreter for a moment.
"""


class RankError(UserError):
    """Another rank has failed; it says for itself how."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: from 0; the first alone writes the run's folder and speaks.
        world: how many there are.
        local_rank: among those of this machine.
        group: in which they tell each other things; None for the default one.
    """

    rank: int
    world: int
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def each(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives on each rank, on every rank; results are pickled.

        Raises:
            RankError: it raised on another rank. On its own rank an error stays what it is.
        """
        if self.world == 1:
            return [work()]
        mine = _attempt(work)
        every: list[_Outcome] = [mine] * self.world
        dist.all_gather_object(every, mine, group=self.group)
        return [outcome.value(rank, mine) for rank, outcome in enumerate(every)]

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, which alone does it."""
        if self.world == 1:
            return work()
        mine = _attempt(work) if self.first else _Outcome(None)
        told = [mine]
        dist.broadcast_object_list(told, src=0, group=self.group)
        value: T = told[0].value(0, mine)
        return value

    def one_a_machine(self, work: Callable[[], object]) -> None:
        """Done by one rank of each machine, before the others go on; for what then lies on its disk."""
        if self.world > 1:
            self.each(lambda: work() if self.local_rank == 0 else None)

    def spread(self, items: Sequence[S], work: Callable[[Sequence[S]], list[T]]) -> list[T]:
        """``work`` of all items, in their order; each rank does every ``world``-th of them."""
        if self.world == 1:
            return work(items)
        mine = items[self.rank :: self.world]
        shares = self.each(lambda: work(mine) if mine else [])
        return [shares[place % self.world][place // self.world] for place in range(len(items))]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.each(lambda: flag))

    def total(self, *numbers: float) -> list[float]:
        """Sums over ranks, the same bits on every rank."""
        if self.world == 1:
            return list(numbers)
        return [sum(column) for column in zip(*self.each(lambda: numbers), strict=True)]

    def pieces(self, mine: list[Tensor]) -> list[Tensor]:
        """Tensors of all ranks, on the CPU; with one rank, where they are."""
        if self.world == 1:
            return mine
        return [piece for share in self.each(lambda: [t.cpu() for t in mine]) for piece in share]


ONE = Ranks(0, 1)


class _Outcome:
    """What work gave or raised; to other ranks an error travels as text, since not every exception can be pickled."""

    def __init__(self, result: Any, error: Exception | None = None) -> None:
        self.result, self.error = result, error
        self.text = None if error is None else f"{type(error).__name__}: {error}"

    def __getstate__(self) -> dict[str, Any]:
        return {"result": self.result, "error": None, "text": self.text}

    def value(self, rank: int, mine: _Outcome) -> Any:
        """The result, of ``rank``; raises this rank's own error, or that of ``rank``."""
        if mine.error is not None:
            raise mine.error
        if self.text is not None:
            raise RankError(f"rank {rank}: {self.text}")
        return self.result


def _attempt(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work())
    except Exception as error:
        return _Outcome(None, error)


class AnyRank(threading.Event):
    """Set as soon as ``event`` is on any rank, on which all agree: ``is_set`` is a collective call."""

    def __init__(self, event: threading.Event, ranks: Ranks) -> None:
        super().__init__()
        self._event, self._ranks = event, ranks

    def is_set(self) -> bool:
        return self._ranks.any(self._event.is_set())


@contextmanager
def joined_ranks(config: Config) -> Iterator[Ranks]:
    """The ranks that torchrun has started, connected; ``ONE`` where it has not.

    One rank speaks for all when they fail: the first to fail raises its error, with its number; the others end without
    a word. A rank that is killed is missed by the next that waits for it; torchrun, which sees it too, sends the others
    SIGTERM at about that moment, and an error that is on its way is told nevertheless.

    Raises:
        UserError: what cannot be done on several ranks, or what failed.
        SystemExit: another rank has failed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        check_ranks(config, 1)
        yield ONE
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end_unless_failing)
        # A process that is ending ends by itself: raised in a callback at the exit, SystemExit would be a traceback.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    store, rank, world = next(dist.rendezvous("env://", timeout=TIME_LIMIT))
    try:
        # What ranks tell each other is in the CPU's memory, so gloo is there beside NCCL.
        backend = "cpu:gloo,cuda:nccl" if _takes_gpu(config, world) else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIME_LIMIT)
        group = dist.new_group(backend="gloo", timeout=WORK_LIMIT)
        yield Ranks(rank, world, int(os.environ.get("LOCAL_RANK", "0")), group)
    except Exception as error:
        if isinstance(error, RankError) or not _fails_first(store):
            raise SystemExit(1) from None
        if isinstance(error, UserError):
            raise UserError(f"rank {rank}: {error}") from error
        if _is_lost_connection(error):
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank {rank}: another rank was killed, or did not answer within {WORK_LIMIT} (in a step "
                f"{TIME_LIMIT}): {reason}"
            ) from error
        raise
    dist.destroy_process_group()
    time.sleep(LETTING_GO_SECONDS)


def check_ranks(config: Config, world: int) -> None:
    """Raises ConfigError for what so many ranks cannot do."""
    if world == 1:
        if config.model.vocabulary_parallel:
            raise ConfigError(
                "model.vocabulary_parallel=true is for several ranks, and there is one; start them with torchrun, or "
                "leave it at false"
            )
        return
    rollout = config.rollout
    if config.model.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"model.device={config.model.device!r}: with {world} ranks each takes its own GPU; give auto, cuda or cpu"
        )
    if rollout.engine == "vllm":
        raise ConfigError(
            f"rollout.engine='vllm' is for one process, and there are {world} ranks; use 'vllm_server' with "
            "vllm.servers, or 'hf'"
        )
    if rollout.engine == "vllm_server" and not config.vllm.servers:
        raise ConfigError(
            f"rollout.engine='vllm_server' with {world} ranks: start the servers apart (aapo-fast serve) and name them "
            "in vllm.servers"
        )
    if rollout.max_staleness:
        raise ConfigError(f"rollout.max_staleness=1 is for one rank, and there are {world}; set it to 0")


def rows_a_rank(num_rows: int, world: int) -> int:
    """Rows of a vocabulary in each part, but the last, of a sharded embedding and head; raises UserError if that would
    leave the last rank none.
    """
    width = -(-num_rows // world)
    if width * (world - 1) >= num_rows:
        raise UserError(
            f"model.vocabulary_parallel=true: {num_rows} tokens in parts of {width} are too few for {world} ranks, the "
            "last would have none; leave it at false"
        )
    return width


def _takes_gpu(config: Config, world: int) -> bool:
    """Whether ranks train on CUDA, each on a GPU of its own: then this one's is the current device from now on."""
    check_ranks(config, world)
    if config.model.device == "cpu" or not torch.cuda.is_available():
        return False
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"more ranks than the {torch.cuda.device_count()} GPUs of this machine; start one a GPU "
            "(torchrun --nproc-per-node), or give model.device='cpu'"
        )
    torch.cuda.set_device(local_rank)
    return True


def _end_unless_failing(number: int, _: object) -> None:
    """Handles a signal: an error in flight ends the process by itself, and has something to say first."""
    if sys.exc_info()[1] is None:
        raise SystemExit(128 + number)


def _fails_first(store: dist.Store) -> bool:
    """Whether no other rank has failed yet. Where the store is gone nobody else can say what happened."""
    with suppress(RuntimeError):
        return store.add("aapo_fast/failures", 1) == 1
    return True


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
