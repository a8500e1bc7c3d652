"""Several ranks in processes of their own, over gloo; what they do is a function of this file.

One Python imports everything and forks for each rank, so that a test costs little more than what its ranks do.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
import weakref
from functools import cache
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aapo_fast.trainer.records import read_lines

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks_support", "aapo_fast.trainer.loop", "aapo_fast.trainer.sharded", "peft"])


class Raised(tuple):
    """An exception of a rank: the name of its type, and its text."""

    __slots__ = ()


def on_ranks(world, function, *arguments, limit_seconds=120):
    """``function(ranks, *arguments)`` of this file on each of ``world`` ranks; what it returns or raises, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        # The fork server has the environment of its first use.
        kept = {name: os.environ[name] for name in ("AAPO_FAST_CACHE", "AAPO_FAST_API_KEY") if name in os.environ}
        environment = {"store": f"file://{Path(folder) / 'store'}", "kept": kept}
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, world, environment, pipe[1], function.__name__, arguments))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            for rank, (end, _) in enumerate(pipes):
                assert end.poll(limit_seconds), f"rank {rank} of {world} hangs in {function.__name__}"
            return [end.recv() for end, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def results(world, function, *arguments):
    """As ``on_ranks``, where no rank may raise."""
    found = on_ranks(world, function, *arguments)
    assert not any(isinstance(result, Raised) for result in found), found
    return found


def _rank(rank, world, environment, end, name, arguments):
    from aapo_fast.trainer.ranks import Ranks

    os.environ |= {**environment["kept"], "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=environment["store"], rank=rank, world_size=world)
        end.send(globals()[name](Ranks(rank, world, rank), *arguments))
    except BaseException as error:
        traceback.print_exc()
        end.send(Raised((type(error).__name__, str(error))))
    signal.pause()  # until all are done: the others may still have something to hear from this one


# --- optimizer steps ------------------------------------------------------------------------------------------------


def explode(model, channel):
    """The same logits, by a last norm and a head of which one channel is tiny and enormous: the gradient of the norm's
    weight is finite there, and its square is not.
    """
    scale = torch.finfo(model.dtype).max ** 0.75
    with torch.no_grad():
        model.model.norm.weight[channel] /= scale
        model.lm_head.weight[:, channel] *= scale
    return model


def make_policy(
    ranks,
    family="llama",
    dtype="float64",
    lora_rank=0,
    vocab_size=45,
    precision="float32",
    vocabulary_parallel=False,
    explodes_in=None,
    compiled=False,
    **loss,
):
    from aapo_fast.config import LossConfig
    from aapo_fast.models import attention
    from aapo_fast.models.lora import add_adapter
    from aapo_fast.ops.linear_policy import sparse
    from aapo_fast.trainer.policy import Policy
    from aapo_fast.trainer.shared import share_policy

    sparse.DENSE_SHARE = 10.0  # a vocabulary of 45 would always be dense
    support.SIZES["vocab_size"] = vocab_size
    model = support.tiny(family, dtype=getattr(torch, dtype))
    model.set_attn_implementation(attention.NAME)
    if explodes_in is not None:
        explode(model, explodes_in)
    if compiled:
        from aapo_fast.models import compiled as layers

        layers._compile = cache(lambda forward: torch.compile(forward, dynamic=True, backend="eager"))
        layers.compile_layers(model.model, torch.device("cpu"))
    if lora_rank:
        torch.manual_seed(ranks.rank)  # all must begin with the first rank's
        model = add_adapter(model, lora_rank, 32.0, ["all-linear"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at zero, A would have no gradient
                torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    policy = Policy(model, support.tokenizer(), 1.0, LossConfig(**loss), getattr(torch, precision))
    return share_policy(ranks, policy, vocabulary_parallel)


def gradient(ranks, samples, seeds, max_tokens, policy):
    """What the optimizer is handed, whole, on average over seeds; what the step says of the first; and this rank's
    microbatches, each as its seed and the number of its samples.
    """
    from aapo_fast.config import TrainConfig
    from aapo_fast.ops.linear_policy.sharded import whole
    from aapo_fast.trainer.step import make_optimizer, optimizer_step

    config = TrainConfig(max_grad_norm=0.0, max_microbatch_tokens=max_tokens)
    made = make_policy(ranks, **policy)
    optimizer = make_optimizer(made, config)
    taken, parts, batch, loss = [], [], made.batch, made.loss
    made.batch = lambda part: parts.append(len(part)) or batch(part)
    made.loss = lambda *given: parts.append((given[-1], parts.pop())) or loss(*given)
    parameters = [p for p in made.trained.parameters() if p.requires_grad]
    optimizer.step = lambda: taken.append(torch.cat([whole(p.grad).flatten() for p in parameters]))
    found = [optimizer_step(made, optimizer, samples, config, 1e-3, seed) for seed in seeds]
    return sum(taken) / len(taken) if taken else None, found[0], parts


def trained(ranks, steps, policy, offload=False):
    """Parameters after AdamW steps on the samples of each, and what each step says."""
    from aapo_fast.config import TrainConfig
    from aapo_fast.trainer.step import make_optimizer, optimizer_step

    config = TrainConfig(max_grad_norm=1.0, max_microbatch_tokens=40, offload_optimizer=offload)
    made = make_policy(ranks, **policy)
    optimizer = make_optimizer(made, config)
    found = [optimizer_step(made, optimizer, samples, config, 1e-3) for samples in steps]
    return torch.cat([p.detach().flatten() for p in made.model.parameters()]), found


def largest_tensor(ranks, samples, policy):
    """Elements of the largest tensor that forward and backward of a microbatch of this rank make."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            tensors = [local(t) for t in tree_leaves(out) if torch.is_tensor(t)]
            found.extend(t.numel() for t in tensors)
            return out

    found, made = [], make_policy(ranks, **policy)
    batch = made.batch(samples[ranks.rank :: ranks.world])
    with Sizes():
        made.loss(batch, 100).loss.backward()
    return max(found)


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages take at once, of those that operations have touched."""

    def __init__(self, *there):
        super().__init__()
        self.peak, self._storages = 0, {}
        self._touch(there)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if self._touch((args, kwargs, out)):
            found = [storage() for storage in self._storages.values()]  # which FSDP empties and fills again
            self.peak = max(self.peak, sum(storage.nbytes() for storage in found if storage is not None))
        return out

    def _touch(self, tree):
        """Whether there is a new one."""
        new = False
        for tensor in tree_leaves(tree):
            if torch.is_tensor(tensor):
                storage = local(tensor).untyped_storage()
                known = self._storages.get(storage._cdata)
                if known is None or known() is None:
                    self._storages[storage._cdata], new = weakref.ref(storage), True
        return new


def local(tensor):
    """This rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors):
    """Of their storages, each once; of shards those of this rank."""
    storages = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(ranks, tree, samples):
    """Bytes that this rank holds after and in an optimizer step, by the names of the plan, and the most at once."""
    from aapo_fast import config
    from aapo_fast.trainer.policy import Policy
    from aapo_fast.trainer.shared import share_policy
    from aapo_fast.trainer.step import make_optimizer, optimizer_step

    settings = config.parse(tree)
    whole = Policy.from_config(settings.model, 1.0, settings.loss, settings.lora)
    assert whole.packed
    policy = share_policy(ranks, whole, settings.model.vocabulary_parallel)
    del whole
    optimizer, found = make_optimizer(policy, settings.train), {}
    parameters = list(policy.trained.parameters())

    def state():
        return [value for state in optimizer.state.values() for value in state.values()]

    def before(*_):
        found["gradients"] = nbytes(p.grad for p in parameters if p.grad is not None)

    assert optimizer_step(policy, optimizer, samples[: ranks.world], settings.train, 1e-3).updated  # makes the moments
    optimizer.register_step_pre_hook(before)
    with LiveBytes(list(policy.model.parameters()), parameters, state()) as live:
        optimizer_step(policy, optimizer, samples, settings.train, 1e-3)
    return found | {
        "weights": nbytes(policy.model.parameters()),
        "shards of the weights": nbytes(parameters),
        "AdamW moments": nbytes(state()),
        "peak": live.peak,
    }


# --- whole runs -----------------------------------------------------------------------------------------------------


def train(ranks, tree, dies_at=0, interrupted_in=0, servers=False):
    """A run, which dies when step ``dies_at`` begins, or whose last rank is told to stop in step ``interrupted_in``."""
    from fork_runs import snapshot_engine
    from resume_support import Notes

    from aapo_fast import config
    from aapo_fast.trainer import loop, setup

    real = loop.train_step

    def step(run, number, *rest):
        if number == dies_at:
            raise KeyboardInterrupt
        real(run, number, *rest)
        if number == interrupted_in and ranks.rank == ranks.world - 1:
            signal.raise_signal(signal.SIGTERM)

    loop.train_step = step
    setup.check_offload = lambda config: None  # which refuses it on a CPU, where alone it can be tested
    if servers:
        setup.make_engine = snapshot_engine
    notes = Notes()
    return loop.train(config.parse(tree), notes, ranks), notes.text


def train_with_late_writing(ranks, tree):
    """A run whose checkpoints are written in the background when the step after theirs has been made, but the last."""
    from aapo_fast import config
    from aapo_fast.trainer import checkpoint, loop
    from aapo_fast.trainer.display import Display

    settings = config.parse(tree)
    real_write, real_step = checkpoint.write, loop.train_step
    done = {number: threading.Event() for number in range(1, settings.train.steps + 1)}

    def write(parent, step, *rest):
        assert step == settings.train.steps or done[step + 1].wait(60)
        return real_write(parent, step, *rest)

    def train_step(run, number, *rest):
        real_step(run, number, *rest)
        done[number].set()

    checkpoint.write, loop.train_step = write, train_step
    loop.train(settings, Display(quiet=True), ranks)


def train_on_server(ranks, tree, stale=False):
    """A run on a real vLLM server: what this rank told the engine, and the samples that it trained on, step by step.

    ``stale``: the server never gets other weights than the first.
    """
    from aapo_fast import config
    from aapo_fast.rollout.vllm.client import ServerClient
    from aapo_fast.rollout.vllm.servers import VLLMServersEngine
    from aapo_fast.trainer import loop
    from aapo_fast.trainer.display import Display
    from aapo_fast.trainer.policy import Policy

    synced, asked, trained = [], [], [[]]
    sync, generate, load = VLLMServersEngine.sync_weights, VLLMServersEngine.generate, ServerClient.load_from_folder
    batch, step = Policy.batch, loop.train_step

    def sync_weights(self, version):
        synced.append(version)
        sync(self, version)

    def load_from_folder(self, folder):
        if not stale or folder.endswith("policy-0"):
            load(self, folder)

    def counted(self, prompts, **options):
        asked.append(len(prompts) * options["n"])
        return generate(self, prompts, **options)

    def taken(self, samples):
        trained[-1] += [(w.sample.prompt_ids, w.sample.token_ids, w.advantage) for w in samples if w.advantage]
        return batch(self, samples)

    def train_step(*arguments):
        trained.append([])
        step(*arguments)

    VLLMServersEngine.sync_weights, VLLMServersEngine.generate = sync_weights, counted
    ServerClient.load_from_folder = load_from_folder
    Policy.batch, loop.train_step = taken, train_step
    loop.train(config.parse(tree), Display(quiet=True), ranks)
    return synced, sum(asked), trained[1:]


def fails(ranks, which, kind):
    """One rank fails in its share of the work, and then all are asked for something else."""
    from aapo_fast.types import UserError

    def work(items):
        if ranks.rank == which:
            raise {"user": UserError, "bug": ZeroDivisionError}[kind]("no such thing")
        return items

    return ranks.spread(range(10), work)


def told(ranks):
    """One of everything."""
    return (
        ranks.spread(list("abcdefg"), lambda items: [f"{item}{ranks.rank}" for item in items]),
        ranks.spread(["a"], lambda items: [f"{item}{ranks.rank}" for item in items]),
        ranks.total(0.1 * ranks.rank, 1),
        [ranks.any(ranks.rank == 1), ranks.any(False)],
        ranks.on_first(lambda: ranks.rank),
        [t.tolist() for t in ranks.pieces([torch.tensor([ranks.rank])] * ranks.rank)],
    )


# --- comparing whole runs -------------------------------------------------------------------------------------------

# The saving of shared prompts depends on where microbatches are cut, and who waits on how many ranks there are.
TIMES = (*support.TIMES, "engine_sync_seconds", "saved_token_share", "waiting_share")
BOUND = 1e-3
"""Of the way that float32 weights have come; see test_ranks.py."""


def moved(folder, tiny_model):
    """The way of the weights from those of ``tiny_model``."""
    start, end = load_file(tiny_model / "model.safetensors"), load_file(folder / "run" / "model" / "model.safetensors")
    return torch.cat([(end[name] - start[name]).flatten() for name in sorted(end)])


def check_same(one, other, tiny_model):
    truth = moved(one, tiny_model)
    assert (moved(other, tiny_model) - truth).norm() < BOUND * truth.norm()
    for name in ("samples.jsonl", "evaluations.jsonl", "metrics.jsonl"):
        truth, found = (read_lines(folder / "run" / name) for folder in (one, other))
        assert len(truth) == len(found)
        for a, b in zip(truth, found, strict=True):
            for key in a.keys() - TIMES:
                expected = pytest.approx(a[key], rel=1e-3, abs=1e-5) if isinstance(a[key], float) else a[key]
                assert b[key] == expected, (name, key)
