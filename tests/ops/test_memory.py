"""Where the buffers of a pass lie."""

import ctypes
import io
import mmap
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
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

IMPLEMENTATIONS = ["torch", *(["native"] if native.why_not() is None else [])]


@pytest.fixture(autouse=True)
def nothing_kept():
    for kept in (memory._buffers, memory._weight_gradients):
        kept.pieces.clear()


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
        weight_gradient(torch.Size((40_001, 16)), torch.empty(0), zeros=False).fill_(left)
        assert all(torch.equal(a, b) for a, b in zip(everything(), fresh, strict=True))


@KEEPS
def test_a_fork_shares_nothing_that_is_kept():
    x = aligned(*LARGE, torch.float32, CPU).fill_(0)
    address = x.data_ptr()
    del x
    assert mapping(address)
    child = os.fork()
    if child == 0:
        os._exit(0 if not memory._buffers.pieces else 1)
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


KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SHAPE = torch.Size((2003, 1003))


@KINDS
@pytest.mark.parametrize("shape", [SHAPE, torch.Size((3, 5)), torch.Size((0, 7))])
def test_a_weight_gradient_is_a_tensor_like_others(shape, dtype):
    like = torch.empty(0, dtype=dtype)
    for left in (1.0, float("nan")):
        x = weight_gradient(shape, like, zeros=True)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
        x.fill_(left)
        del x
    x = weight_gradient(shape, like, zeros=False).fill_(2.0)
    saved = io.BytesIO()
    torch.save(x, saved)
    saved.seek(0)
    for copy in (x.clone(), deepcopy(x), torch.load(saved), pickle.loads(pickle.dumps(x)), x.share_memory_()):
        assert torch.equal(copy, torch.full(shape, 2.0, dtype=dtype))


@KEEPS
def test_a_weight_gradient_nobody_has_any_more_is_the_next_ones_memory():
    like = torch.empty(0)
    first, second = (weight_gradient(SHAPE, like, zeros=True) for _ in range(2))
    addresses = {first.data_ptr(), second.data_ptr()}
    row = first[7]
    del first, second
    third, fourth = (weight_gradient(SHAPE, like, zeros=False) for _ in range(2))
    assert third.data_ptr() in addresses and fourth.data_ptr() not in addresses and not row.any()
    assert aligned(*SHAPE, torch.float32, CPU).data_ptr() not in addresses  # buffers are kept apart
    assert "hg" in mapping(third.data_ptr())["VmFlags"]


@KEEPS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_training_has_the_memory_of_its_last_weight_gradient(backward, implementation):
    """Handed out without a copy, and found again after ``zero_grad``, or by the second half of an accumulation."""
    hidden, weight, targets = torch.randn(8, 16), torch.randn(40_001, 16).requires_grad_(), torch.arange(8)

    def backward_pass():
        af.linear_policy_loss(
            hidden, weight, targets, objective=af.SFT(8.0), backward=backward, implementation=implementation
        ).loss.backward()

    backward_pass()
    address, once = weight.grad.data_ptr(), weight.grad.clone()
    weight.grad = None
    assert int(mapping(address)["LazyFree"][0]) > 0
    backward_pass()
    assert weight.grad.data_ptr() == address and torch.equal(weight.grad, once)
    for times in (2, 3, 4):
        backward_pass()
        [kept] = memory._weight_gradients.pieces
        assert ctypes.addressof(ctypes.c_char.from_buffer(kept)) != address
        assert weight.grad.data_ptr() == address
        torch.testing.assert_close(weight.grad, times * once, rtol=1e-6, atol=0.0)
