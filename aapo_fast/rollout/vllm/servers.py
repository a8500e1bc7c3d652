"""Rollouts by one or several vLLM servers: requests spread over them, weights synced into each, failed ones restarted.

A server fails when a request, a sync or its start does; in between nobody asks how it is. The requests that it had go
to the others: seeds decide the completions, so none is lost, drawn otherwise or counted twice. A server that we started
is started again and given the weights that the others hold. When nobody is left, the run stops and says what each did.

    requests    one queue; every server takes from it as fast as it can
    a sync      for each server: pause, load, reset the prefix cache, set the version, resume
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from aapo_fast.models.lora import adapter_state
from aapo_fast.rollout.figures import Figures
from aapo_fast.rollout.requests import check_prompts, eos_token_ids, in_turn
from aapo_fast.rollout.vllm.client import RequestError, ServerClient, ServerError
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.samples import Completion, make_sample
from aapo_fast.rollout.vllm.transport import AdapterTransport, Transport
from aapo_fast.rollout.vllm.weights import named_weights, size_bytes
from aapo_fast.types import Progress, Sample, SamplingParams, Weights

FIRST = "policy-0"
"""The weights that every server starts with."""

MAX_RESTARTS = 3
"""Of one server, without a request answered in between: a server that dies of what it is asked dies again."""


DYING_SECONDS = 2.0
IDLE_SECONDS = 0.05


@dataclass
class Server:
    """One server.

    Attributes:
        client: speaks to it; None until it was started.
        process: ours, or None for one that somebody else runs.
        holds: name of the weights that it has; "" when they are not known.
        adapter: name of the adapter that it has; "" for none.
        fault: why it is not in use at present; "" when it is.
        restarts: since it last answered a request.
    """

    client: ServerClient | None
    process: ServerProcess | None
    holds: str = FIRST
    adapter: str = ""
    fault: str = ""
    restarts: int = 0

    @property
    def name(self) -> str:
        return self.client.url if self.client is not None else "a server not yet started"


@dataclass
class _Job:
    index: int
    prompt: Sequence[int]
    seed: int
    adapted: bool


@dataclass
class _Draw:
    """One call of ``generate`` on its way."""

    # Not a SimpleQueue: its get(timeout) may wait for ever where threads compete for the last job (CPython 3.11).
    jobs: queue.Queue[_Job]
    total: int
    found: dict[int, list[Completion]] = field(default_factory=dict)
    refused: RequestError | None = None
    abandoned: bool = False


class VLLMServersEngine:
    """The rollout engine over vLLM servers; see ``types.RolloutEngine``.

    Args:
        model: the policy, whose present weights are sent at each sync.
        tokenizer: decodes completions.
        servers: those to use; ours among them are started here.
        transport: how weights reach them.
        time_limit_seconds: of the start of a server, which then answers each request within its client's own.
        dtype: of the servers' weights; what is sent is rounded to it here.
        requests_a_server: prompts under way at a server; each brings n completions.
        note: told what failed and what was done about it.

    Raises:
        ServerError: a server cannot be reached or started.
        UserError: weights cannot go to one by this transport.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        servers: Sequence[Server],
        transport: Transport,
        time_limit_seconds: float,
        dtype: torch.dtype,
        requests_a_server: int = 32,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.weight_version = 0
        self._servers, self._transport = list(servers), transport
        self._limit, self._width, self._note = time_limit_seconds, requests_a_server, note
        self._dtype, self._eos = dtype, eos_token_ids(model, tokenizer)
        self._adapted = isinstance(transport, AdapterTransport)
        self._wanted, self._closed = FIRST, False
        self._lock = threading.Lock()
        self._figures = Figures()
        try:
            together([partial(self._begin, server) for server in self._servers])
            if any(server.holds != FIRST for server in self._servers):
                self.sync_weights(0)
        except BaseException:
            self.close()
            raise

    def keep_reference(self) -> None:
        if self.weight_version != 0:
            raise RuntimeError("keep_reference: the policy has moved already; call it before the first update")
        if self._adapted:  # the base model is the reference
            return
        self._transport.publish("reference", named_weights(self.model, self._dtype))

    def sync_weights(self, version: int) -> None:
        self.weight_version = version
        self._publish()
        self._want(self._policy)

    def free_memory(self) -> None:
        """The servers keep theirs, on devices of their own or, by IPC, the share of ours that they were given."""

    def metrics(self) -> dict[str, float]:
        return self._figures.take()

    def close(self) -> None:
        self._closed = True  # what is still being drawn fails now, and is not to be mended
        for server in self._servers:
            if server.process is not None:
                server.process.stop()
        self._transport.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weights: Weights | Sequence[Weights] = "policy",
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """See ``types.RolloutEngine.generate``.

        Raises:
            UserError: an empty prompt; a request that a server refuses; no server is left.
        """
        if not isinstance(weights, str) and not self._adapted:
            return in_turn(self.generate, prompts, seeds, weights, progress, n=n, sampling=sampling)
        check_prompts(prompts, seeds)
        each = [weights] * len(prompts) if isinstance(weights, str) else list(weights)
        swapped = weights == "reference" and self.weight_version and not self._adapted
        self._want("reference" if swapped else self._policy)
        start = time.perf_counter()
        draw = _Draw(queue.Queue(), len(prompts))
        for index, (prompt, seed, wanted) in enumerate(zip(prompts, seeds, each, strict=True)):
            draw.jobs.put(_Job(index, prompt, seed, self._adapted and wanted == "policy"))
        while len(draw.found) < draw.total:
            self._mend()
            self._take_turns(draw, n, sampling, progress)
            if draw.refused is not None:
                raise draw.refused
        samples = [
            [
                make_sample(self.tokenizer, prompt, completion, 0 if wanted == "reference" else self.weight_version)
                for completion in draw.found[index]
            ]
            for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True))
        ]
        self._figures.generated(samples, start)
        return samples

    # --- requests ----------------------------------------------------------------------------------------------------

    def _take_turns(self, draw: _Draw, n: int, sampling: SamplingParams, progress: Progress | None) -> None:
        """All servers in use work on the queue until everything is drawn or they have all failed."""

        def work(server: Server) -> None:
            while not (server.fault or draw.refused or draw.abandoned or len(draw.found) == draw.total):
                try:
                    job = draw.jobs.get(timeout=IDLE_SECONDS)
                except queue.Empty:  # but a server that fails gives back what it had
                    continue
                try:
                    assert server.client is not None
                    adapter = server.adapter if job.adapted else ""
                    completions = server.client.complete(job.prompt, n, sampling, job.seed, self._eos, adapter)
                except RequestError as error:  # the request is at fault: another server would say the same
                    draw.refused = error
                except ServerError as error:
                    draw.jobs.put(job)
                    self._failed(server, error)
                except BaseException:  # a job is lost with it, for which the others must not wait
                    draw.abandoned = True
                    raise
                else:
                    server.restarts = 0
                    with self._lock:
                        draw.found[job.index] = completions
                        if progress is not None:
                            progress(len(draw.found), draw.total)

        in_use = [server for server in self._servers if not server.fault]
        try:
            # In turns: where requests are few, each server still gets its share.
            together([partial(work, server) for _ in range(self._width) for server in in_use])
        except BaseException:
            draw.abandoned = True
            raise

    # --- weights -----------------------------------------------------------------------------------------------------

    @property
    def _policy(self) -> str:
        return f"policy-{self.weight_version}"

    def _publish(self) -> None:
        start = time.perf_counter()
        weights = list(adapter_state(self.model).items() if self._adapted else named_weights(self.model, self._dtype))
        self._transport.publish(self._policy, weights)
        self._figures.add(sync_seconds=time.perf_counter() - start, sync_bytes=size_bytes(weights))

    def _want(self, name: str) -> None:
        """Have every server that is in use hold the weights ``name``."""
        self._wanted = name
        behind = [s for s in self._servers if not s.fault and s.holds != name]
        if behind:
            start = time.perf_counter()
            together([partial(self._load, server) for server in behind])
            self._figures.add(sync_seconds=time.perf_counter() - start)
            self._mend()

    def _load(self, server: Server) -> None:
        assert server.client is not None
        self._transport.check(server.client)
        server.holds = ""
        version = 0 if self._wanted == "reference" else self.weight_version
        try:
            with server.client.replacing_weights(version):
                self._transport.load(server.client, self._wanted)
        except ServerError as error:
            self._failed(server, error)
        else:
            server.holds = self._wanted
            server.adapter = AdapterTransport.NAME if self._adapted else ""

    # --- failures ----------------------------------------------------------------------------------------------------

    def _begin(self, server: Server) -> None:
        if server.process is not None:
            server.client = server.process.start(self._limit)
        else:
            assert server.client is not None
            server.client.check()
            server.holds = ""  # perhaps those of another run

    def _failed(self, server: Server, error: ServerError) -> None:
        with self._lock:
            if server.fault:  # another of its requests has said so
                return
            server.fault = str(error)
            # A connection breaks a moment before its process is seen to have ended, which says more.
            code = None if server.process is None else server.process.exit_code(DYING_SECONDS)
            if server.process is not None and code is not None:
                server.fault = f"{server.name} ended with {code}: {server.process.last_words()}"
        if not self._closed:
            self._note(f"vLLM: {server.fault}")
        self._figures.add(server_failures=1)

    def _mend(self) -> None:
        """Start again those of our servers that failed, with the weights that are wanted.

        Raises:
            ServerError: no server is left.
        """
        together([partial(self._restart, server) for server in self._servers if server.fault])
        if all(server.fault for server in self._servers):
            faults = "; ".join(server.fault for server in self._servers)
            raise ServerError(f"no vLLM server is left: {faults}")

    def _restart(self, server: Server) -> None:
        """If it is ours, until it holds the weights that are wanted or has had its chances."""
        while server.fault and server.process and server.restarts < MAX_RESTARTS and not self._closed:
            server.restarts += 1
            self._note(f"vLLM: starting a server again ({server.restarts} of {MAX_RESTARTS})")
            if server.client is not None:
                self._transport.forget(server.client)
            try:
                server.client = server.process.start(self._limit)
            except ServerError as error:
                server.fault = str(error)
                continue
            server.fault, server.holds, server.adapter = "", FIRST, ""
            if server.holds != self._wanted:
                self._load(server)
            self._figures.add(server_restarts=1)


def together(actions: Sequence[Callable[[], None]]) -> None:
    """Run all at the same time, and raise what the first of them raised.

    Their threads are left behind by an interrupt, and at the end of the process: a request may take ten minutes.
    """
    errors: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
