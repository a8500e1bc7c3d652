import dataclasses

import pytest
import torch
from support import sample

from aapo_fast.data.packing import Weighted, pack, pad
from aapo_fast.trainer.transfer import batch_to_device

SAMPLES = [Weighted(sample([1, 2], [3, 4]), 1.0), Weighted(sample([1, 2], [5]), -1.0), Weighted(sample([7], [8]), 0.5)]


def tensors(part):
    if isinstance(part, torch.Tensor):
        return [part]
    if dataclasses.is_dataclass(part):
        part = [getattr(part, field.name) for field in dataclasses.fields(part)]
    return [t for inner in part for t in tensors(inner)] if isinstance(part, (list, tuple)) else []


@pytest.mark.parametrize("batch", [pack(SAMPLES), pack(SAMPLES, ragged=True), pad(SAMPLES, 0)], ids=type)
def test_a_batch_goes_to_the_device_whole(batch):
    there, here = batch_to_device(batch, torch.device("meta")), tensors(batch)
    moved = tensors(there)
    assert len(here) >= 7 and all(t.device.type == "meta" for t in moved)
    assert [(t.shape, t.dtype) for t in moved] == [(t.shape, t.dtype) for t in here]
    assert type(there.packing) is type(batch.packing)
    assert all(a is b for a, b in zip(tensors(batch_to_device(batch, torch.device("cpu"))), here, strict=True))
