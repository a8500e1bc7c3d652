"""Where the buffers of a pass lie."""

import ctypes
import mmap
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_support import problem, run

import aapo_fast as af
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import memory
from aapo_fast.ops.linear_policy.memory import HUGE_PAGE, aligned, weight_gradient

CPU = torch.device("cpu")
LARGE = (3, HUGE_PAGE // 4 + 5)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
KEEPS = pytest.mark.skipif(
    not (hasattr(mmap, "MADV_HUGEPAGE") and HUGE_PAGES.exists() and Path("/proc/self/smaps").exists()),
    reason="this system has no transparent huge pages or does not list its mappings",
)

POPULATES = pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14),
    reason="MADV_POPULATE_WRITE came with Linux 5.14",
)
NATIVE = pytest.mark.skipif(native.why_not() is not None, reason=native.describe())

IMPLEMENTATIONS = ["torch", *(["native"] if native.why_not() is None else [])]


@pytest.fixture(autouse=True)
def nothing_kept():
    memory._kept.clear()


def mapping(address: int) -> dict[str, list[str]]:
    """What the kernel says of the mapping that holds an address."""
    said: dict[str, list[str]] = {}
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            if said:
                return said
            start, end = (int(number, 16) for number in first.split("-"))
            here = start <= address < end
        elif here:
            said[first.rstrip(":")] = line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def bytes_present(x: torch.Tensor) -> int:
    """Of the whole pages that a tensor lies on, how much is in memory."""
    start = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_pages = -(-(x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * num_pages)()
    size = ctypes.c_size_t(num_pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), size, there) == 0
    return sum(page & 1 for page in there) * mmap.PAGESIZE


@pytest.mark.parametrize("shape", [(0, 7), (3, 5), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_tensors_like_others(shape, dtype):
    x = aligned(*shape, dtype, CPU)
    assert x.shape == shape and x.dtype == dtype and x.device == CPU and x.is_contiguous()
    x.fill_(2.0)
    assert bool((x + x == 4).all())


@KEEPS
def test_large_ones_ask_for_huge_pages():
    assert "hg" in mapping(aligned(*LARGE, torch.float32, CPU).data_ptr())["VmFlags"]


@KEEPS
def test_the_last_view_gives_it_back_for_the_next():
    x = aligned(*LARGE, torch.float32, CPU)
    x.fill_(1.0)
    address, row = x.data_ptr(), x[1]
    del x
    meanwhile = aligned(*LARGE, torch.float32, CPU)
    meanwhile.fill_(2.0)
    assert meanwhile.data_ptr() != address and row.sum() == LARGE[1]  # still there
    del meanwhile, row
    assert aligned(2, HUGE_PAGE // 4, torch.float32, CPU).data_ptr() == address  # a smaller one, too


@KEEPS
def test_one_is_kept_and_the_system_may_take_it():
    first, second = (aligned(*LARGE, torch.float32, CPU) for _ in range(2))
    addresses = [x.fill_(1.0).data_ptr() for x in (first, second)]
    assert int(mapping(addresses[1])["LazyFree"][0]) == 0
    del first, second
    with pytest.raises(AssertionError, match="no mapping holds"):
        mapping(addresses[0])
    assert int(mapping(addresses[1])["LazyFree"][0]) * 1024 >= 3 * 4 * LARGE[1] - 2 * HUGE_PAGE
    larger = aligned(2 * LARGE[0], LARGE[1], torch.float32, CPU)
    larger.fill_(1.0)
    assert larger.sum() == larger.numel()


@KEEPS
def test_threads_have_their_own():
    def fill(value):
        for _ in range(20):
            x = aligned(*LARGE, torch.float32, CPU).fill_(value)
            assert bool((x == value).all())

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(fill, float(value)) for value in range(8)]:
            future.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_what_the_pass_before_left_there_changes_nothing(backward, implementation, dtype):
    """A buffer of 40 x 40,001 numbers in fp32."""
    inputs, weights = problem(40, 16, 40_001, dtype), torch.arange(40) % 3 - 0.5
    how = {"backward": backward, "seed": 3, "softcap": 30.0}

    def everything():
        out, gradients = run(implementation, inputs, af.SFT(40.0, weights=weights), **how)
        return out.loss.detach(), out.logps, out.entropy, *gradients

    fresh = everything()
    for left in (float("nan"), float("inf"), 1e30):
        aligned(40, 40_001, torch.float32, CPU).fill_(left)
        assert all(torch.equal(a, b) for a, b in zip(everything(), fresh, strict=True))


@KEEPS
def test_a_fork_shares_nothing_that_is_kept():
    x = aligned(*LARGE, torch.float32, CPU).fill_(0)
    address = x.data_ptr()
    del x
    assert mapping(address)
    child = os.fork()
    if child == 0:
        os._exit(0 if not memory._kept else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(AssertionError, match="no mapping holds"):
        mapping(address)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_writes_on_its_own_copy():
    x = aligned(*LARGE, torch.float32, CPU).fill_(0)
    child = os.fork()
    if child == 0:
        x.numpy()[:] = 1.0  # PyTorch's threads are not there after a fork
        os._exit(0 if x.numpy().all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and not x.any()


@NATIVE
@POPULATES
@pytest.mark.parametrize("offset", [0, 1, 1023, 1024 * 1024 + 3])
def test_fresh_memory_is_made_present_and_nothing_around_it(offset):
    mapped = mmap.mmap(-1, 8 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_NOHUGEPAGE)
    x = torch.frombuffer(mapped, dtype=torch.float32)
    fresh = x[offset : 5 * HUGE_PAGE // 4]
    assert bytes_present(x) == 0
    native.operators().make_present(fresh)
    assert fresh.nbytes - 2 * mmap.PAGESIZE <= bytes_present(x) <= fresh.nbytes
    assert not x.any()


@NATIVE
def test_memory_that_is_there_keeps_what_is_written_on_it():
    for size in (0, 1, 1023, 3 * HUGE_PAGE // 4 + 1):
        x = torch.arange(float(size))
        native.operators().make_present(x)
        assert torch.equal(x, torch.arange(float(size)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_gradient_is_a_tensor_like_others(implementation, dtype):
    shape, like = torch.Size((1001, 1003)), torch.empty(0, dtype=dtype)
    x = weight_gradient(shape, like, implementation, zeros=True)
    assert x.shape == shape and x.dtype == dtype and not x.any()
    x.resize_(2000, 1003)  # as of an optimizer's
    assert weight_gradient(shape, like, implementation, zeros=False).fill_(1.0).sum() == shape.numel()


@NATIVE
@POPULATES
def test_a_weight_gradient_has_its_pages_with_the_native_library_alone():
    for implementation, share in (("native", 1.0), ("torch", 0.0)):
        x = weight_gradient(torch.Size((40_000, 512)), torch.empty(0), implementation, zeros=False)
        assert bytes_present(x) / x.nbytes == pytest.approx(share, abs=0.05)
        del x
