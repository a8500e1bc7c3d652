"""CUDA IPC where there is no CUDA: what exports memory and what opens it, through files that both processes map.

These two calls, and the identity of the GPU, are all that differs from the real thing; tests/gpu has that. ``export``
plays ``reduce_tensor`` in the trainer's process. A server's worker imports this module as its extension, after which
``open_exported`` plays ``rebuild_cuda_tensor`` there. A handle's fields are those of the real one, in its order.
"""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import torch

FOLDER = "AAPO_FAST_TEST_IPC"  # names the folder that stands for the GPU's memory
numbers = itertools.count()


def gpu(index):
    return SimpleNamespace(uuid=f"GPU-{os.environ[FOLDER]}")


def export(tensor):
    path = Path(os.environ[FOLDER]) / str(next(numbers))
    path.write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    place = (0, str(path).encode(), tensor.nbytes, 0)
    kind = (torch.Tensor, tensor.shape, tensor.stride(), 0, torch.storage.UntypedStorage, tensor.dtype)
    return open_exported, (*kind, *place, False, b"counter", 0, b"event", True)


def open_exported(cls, shape, stride, offset, storage, dtype, device, handle, *_):
    mapped = torch.from_file(handle.decode(), shared=True, size=shape.numel(), dtype=dtype)
    return mapped.as_strided(shape, stride, offset)


class Worker:
    """Of vLLM's --worker-extension-cls, which wants a class."""


if FOLDER in os.environ:
    from vllm.distributed.weight_transfer import ipc_engine

    ipc_engine.rebuild_cuda_tensor = open_exported
    torch.cuda.get_device_properties = gpu
