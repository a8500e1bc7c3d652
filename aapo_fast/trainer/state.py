"""What a checkpoint holds of a run, and how a run takes it up again.

Saved between two steps, when nothing is being drawn: weights, optimizer, totals, random states, completions drawn
ahead, reference rewards that no file has, the first evaluation, and how long the records then were. Not saved, because
the config decides them: the order of the data, the seed of every completion, the learning rate of each step.
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aapo_fast.config import to_dict
from aapo_fast.models.lora import has_adapter
from aapo_fast.ops.linear_policy.sharded import whole
from aapo_fast.trainer import checkpoint
from aapo_fast.trainer.ahead import Rollouts
from aapo_fast.trainer.checkpoint import Checkpoint, CheckpointError
from aapo_fast.trainer.evaluate import Evaluation
from aapo_fast.trainer.records import CHECKPOINTS
from aapo_fast.trainer.report import Totals
from aapo_fast.trainer.sampling import verify_engine
from aapo_fast.trainer.setup import Run
from aapo_fast.types import Group, Sample


def save(run: Run, totals: Totals, rollouts: Rollouts, before: Evaluation | None, wait: bool = True) -> bool:
    """Write a checkpoint of what the last step has left, and forget the oldest. A disk that is full does not end the
    run: it says so, and the last good one stays. Of several ranks the first writes what all have, the moments gathered;
    so it can be taken up by any number of them.

    Args:
        wait: until it is on the disk; else it is written from a copy in the host's memory while training goes on, and
            the next one, or the end of the run, waits for it.

    Returns:
        Whether it was written; True where that is not known yet.
    """
    moments = _moments(run)

    def begin() -> bool:
        run.background.finish()
        step, weights, state = totals.steps, _weights(run), _state(run, totals, rollouts, before)
        if wait:
            return _write(run, step, weights, moments, state)
        try:
            # Moments of several ranks are copies, which nobody else has.
            copies = _copies(weights), moments if run.ranks.world > 1 else _copies(moments)
        except (RuntimeError, MemoryError):  # PyTorch's own for a host without memory
            run.display.note("no memory for a copy of the checkpoint: training waits until it is written")
            return _write(run, step, weights, moments, state)
        run.background.start(lambda: _write(run, step, *copies, state))
        return True

    return run.ranks.on_first(begin)


def _state(run: Run, totals: Totals, rollouts: Rollouts, before: Evaluation | None) -> dict[str, Any]:
    """What is no tensor; nothing in it changes when training goes on."""
    drawn = rollouts.drawn()
    return {
        "config": to_dict(run.config),
        "identity": run.identity,
        "totals": {**asdict(totals), "earlier_seconds": totals.wall_seconds},
        "random": _random_states(),
        "rollouts": None if drawn is None else [[asdict(s) for s in group.samples] for group in drawn],
        "reference": {} if run.cache is None else dict(run.cache.this_run_only),
        "before": None if before is None else asdict(before),
        "records": run.folder.sizes(),
    }


def _write(run: Run, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> bool:
    parent = run.folder.path / CHECKPOINTS
    try:
        checkpoint.write(parent, step, weights, moments, state)
    except OSError as error:
        last = next(
            (f"the last is of step {number}" for number, _ in checkpoint.steps_written(parent)), "there is none"
        )
        run.display.note(f"no checkpoint of step {step}: {error.strerror or error}; {last}")
        return False
    with suppress(OSError):  # more are kept than were asked for
        checkpoint.prune(parent, step, run.config.checkpoint.keep)
    return True


def restore(run: Run, found: Checkpoint, totals: Totals, rollouts: Rollouts) -> Evaluation | None:
    """Make the run what it was when ``found`` was written. The engine has the initial model until here, and so its copy
    of the reference is the initial one. Returns the evaluation before the first step.

    Raises:
        CheckpointError: it is not of this model.
        UserError: the engine did not take the weights.
    """
    state = found.state
    _load_tensors(run, found)
    for name, value in state["totals"].items():
        if name != "started":  # another process's clock
            setattr(totals, name, value)
    if totals.updates:
        run.engine.sync_weights(totals.updates)
        verify_engine(run, run.schedule[totals.steps - 1], totals.steps)
    if state["rollouts"] is not None:
        problems = run.schedule[totals.steps]  # drawn in their order, by one set of weights after the other
        rollouts.put_back([
            Group(problems[place % len(problems)], [_sample(fields) for fields in samples])
            for place, samples in enumerate(state["rollouts"])
        ])  # fmt: skip
    for name in run.folder.cut(state["records"]):
        run.display.note(f"{run.folder.path / name} is shorter than it was at the checkpoint; it goes on with a gap")
    _set_random_states(state["random"])
    before = state["before"]
    return None if before is None else Evaluation(**before | {"samples": [_sample(s) for s in before["samples"]]})


# --- tensors --------------------------------------------------------------------------------------------------------


def _weights(run: Run) -> dict[str, Tensor]:
    """Parameters and buffers, each once under its first name; where an adapter is trained, the adapter alone."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in run.policy.model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not has_adapter(run.policy.model):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _names(run: Run) -> list[str]:
    """Of the optimizer's parameters, in its order."""
    return [name for group in run.optimizer.param_groups for name in group["param_names"]]


def _moments(run: Run) -> dict[str, Tensor]:
    """``optimizer.NAME.KEY``, whole; of parameters without a gradient so far there are none. Gathered by all ranks, for
    the first.
    """
    names, state = _names(run), run.optimizer.state_dict()["state"]
    moments = {}
    for index in state:
        for key, tensor in state[index].items():
            gathered = whole(tensor)
            if run.ranks.first:
                # Of several ranks step counts are whole on each: the optimizer's own, in which the next step counts on.
                fresh = gathered if run.ranks.world == 1 else gathered.to("cpu", copy=gathered is tensor)
                moments[f"optimizer.{names[index]}.{key}"] = fresh
    return moments


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _load_tensors(run: Run, found: Checkpoint) -> None:
    if not found.path.is_dir():  # the first rank has read it
        raise CheckpointError(
            f"{found.path} is not there on this machine; to resume, put run.folder on a disk that all of them share"
        )
    weights = _weights(run)
    if found.shapes(checkpoint.MODEL) != {name: tuple(t.shape) for name, t in weights.items()}:
        raise CheckpointError(f"{found.path} holds another model: names or shapes of its weights differ")
    indices = {name: index for index, name in enumerate(_names(run))}
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    moments: dict[str, Tensor] = {}
    for full, shape in found.shapes(checkpoint.OPTIMIZER).items():
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        trained = parameters[indices[name]].detach()
        # Like the parameter, which may be a shard, or on the host: each rank reads its own. The step count is a scalar.
        empty = torch.empty_like(trained) if shape else torch.empty((), device=trained.device)
        moments[full] = state.setdefault(indices[name], {})[key] = empty
    found.load(weights | moments)
    run.policy.distribute()
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})


# --- what JSON holds ------------------------------------------------------------------------------------------------


def _sample(fields: dict[str, Any]) -> Sample:
    tuples = {key: tuple(fields[key]) for key in ("prompt_ids", "token_ids", "logprobs")}
    return Sample(**{**fields, **tuples})


def _random_states() -> dict[str, Any]:
    """Nothing here draws from the global generators; a model's or a library's code may."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy["state"] = {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
        "python": random.getstate(),
        "numpy": numpy,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = states["numpy"]
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": np.array(numpy["state"]["key"], dtype=np.uint32)}})


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
