"""Where the buffers of a pass lie."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from aapo_fast.ops.linear_policy.memory import HUGE_PAGE, aligned

CPU = torch.device("cpu")
LARGE = (3, HUGE_PAGE // 4 + 5)


def flags_of_mapping(address: int) -> list[str]:
    """What the kernel says of the mapping that holds an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            here = start <= address < end
        elif here and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize("shape", [(0, 7), (3, 5), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_tensors_like_others(shape, dtype):
    x = aligned(*shape, dtype, CPU)
    assert x.shape == shape and x.dtype == dtype and x.device == CPU and x.is_contiguous()
    x.fill_(2.0)
    assert bool((x + x == 4).all())


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no transparent huge pages",
)
def test_large_ones_ask_for_huge_pages():
    assert "hg" in flags_of_mapping(aligned(*LARGE, torch.float32, CPU).data_ptr())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not list its mappings")
def test_their_memory_goes_back_with_the_last_view():
    x = aligned(*LARGE, torch.float32, CPU)
    x.fill_(1.0)
    address, row = x.data_ptr(), x[1]
    del x
    assert row.sum() == LARGE[1]  # still there
    del row
    with pytest.raises(AssertionError, match="no mapping holds"):
        flags_of_mapping(address)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_writes_on_its_own_copy():
    x = aligned(*LARGE, torch.float32, CPU).fill_(0)
    child = os.fork()
    if child == 0:
        x.numpy()[:] = 1.0  # PyTorch's threads are not there after a fork
        os._exit(0 if x.numpy().all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and not x.any()
