"""Where the buffers of a pass lie."""

import io
import mmap
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from op_support import problem, run

import aapo_fast as af
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import memory
from aapo_fast.ops.linear_policy.memory import HUGE_PAGE, aligned, new_gradient
from aapo_fast.ops.linear_policy.products import Products

CPU = torch.device("cpu")
LARGE = (3, HUGE_PAGE // 4 + 5)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
KEEPS = pytest.mark.skipif(
    not (memory._KEEPS and HUGE_PAGES.exists() and Path("/proc/self/smaps").exists()),
    reason="this system has no transparent huge pages or does not list its mappings",
)

IMPLEMENTATIONS = ["torch", *(["native"] if native.why_not() is None else [])]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """In the lists of this module: who still holds something from other tests has it in the others."""
    monkeypatch.setattr(memory, "os", SimpleNamespace())  # without forks to listen for
    for name in ("_buffers", "_gradients"):
        getattr(memory, name).drop()
        monkeypatch.setattr(memory, name, memory._Kept())
    yield
    for name in ("_buffers", "_gradients"):
        getattr(memory, name).drop()


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


def bytes_to_take():
    """What the system may take of this process without writing it out."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))


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
    del row
    assert aligned(2, HUGE_PAGE // 4, torch.float32, CPU).data_ptr() == address  # a smaller one, too


@KEEPS
def test_the_system_may_take_what_is_kept():
    held = [aligned(*LARGE, torch.float32, CPU).fill_(1.0) for _ in range(2)]
    before = bytes_to_take()
    for number in (1, 2):
        held.pop()
        assert bytes_to_take() - before >= number * (3 * 4 * LARGE[1] - 2 * HUGE_PAGE)
    larger = aligned(2 * LARGE[0], LARGE[1], torch.float32, CPU)  # for which neither is enough: both go back
    assert len(memory._buffers._leases) == 1 and memory._buffers._free() == []
    assert larger.fill_(1.0).sum() == larger.numel()
    assert bytes_to_take() - before < HUGE_PAGE


@KEEPS
def test_the_smallest_that_is_enough():
    def rows_of(*sizes):
        return [aligned(rows, HUGE_PAGE // 4, torch.float32, CPU) for rows in sizes]

    held = rows_of(5, 3, 4)
    five, three, four = (x.data_ptr() for x in held)
    del held
    assert [x.data_ptr() for x in rows_of(4, 2, 1)] == [four, three, five]
    assert len(memory._buffers._free()) == 3


@KEEPS
def test_no_python_runs_where_the_last_tensor_dies():
    """It would be the first to see a Ctrl-C that came while PyTorch was in C++, and swallow it."""
    x = aligned(*LARGE, torch.float32, CPU)
    seen = []
    sys.setprofile(lambda frame, event, what: seen.append((event, getattr(what, "__name__", frame.f_code.co_name))))
    try:
        del x
    finally:
        sys.setprofile(None)
    assert [what for what in seen if what[0] == "call"] == []
    assert len(memory._buffers._free()) == 1


@KEEPS
@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, memory.MADV_FREE] if hasattr(mmap, "MADV_HUGEPAGE") else [])
def test_ordinary_memory_where_the_system_refuses(advice, monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, option):
            if option == advice:
                raise OSError("not here")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    x = aligned(*LARGE, torch.float32, CPU)
    x.fill_(2.0)
    assert x.sum() == 2 * x.numel() and memory._buffers._leases == {}


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
    """In the buffer, the widened weight, dW and its rounding. Eleven rows of the weight are padding."""
    inputs, weights = problem(40, 32, 39_990, dtype), torch.arange(40) % 3 - 0.5
    inputs[1].data = torch.cat([inputs[1].data, torch.ones(11, 32, dtype=dtype)])
    how = {"backward": backward, "seed": 3, "softcap": 30.0, "vocab_size": 39_990}

    def everything():
        out, gradients = run(implementation, inputs, af.SFT(40.0, weights=weights), **how)
        res = af.linear_logprobs(*inputs[:3], implementation=implementation, **how)
        res.logps.sum().backward()
        assert not inputs[1].grad[39_990:].any()
        left = [x.grad.clone() for x in inputs[:2]]
        for x in inputs[:2]:
            x.grad = None
        return out.loss.detach(), out.logps, out.entropy, *gradients, *left

    fresh = everything()
    for left in (float("nan"), float("inf"), 1e30):
        for lease in (*memory._buffers._leases.values(), *memory._gradients._leases.values()):
            if lease() is None:
                torch.frombuffer(lease.memory, dtype=torch.float32).fill_(left)
        assert all(torch.equal(a, b) for a, b in zip(everything(), fresh, strict=True))


@KEEPS
def test_a_fork_shares_nothing_that_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "os", os)
    kept = memory._Kept()  # one that listens for forks
    first, second = (kept.empty(LARGE, torch.float32).fill_(0) for _ in range(2))
    del first, second
    assert len(kept._free()) == 2
    child = os.fork()
    if child == 0:
        os._exit(0 if kept._leases == {} else 1)
    assert os.waitpid(child, 0)[1] == 0 and kept._leases == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_writes_on_its_own_copy():
    x = aligned(*LARGE, torch.float32, CPU).fill_(0)
    child = os.fork()
    if child == 0:
        x.numpy()[:] = 1.0  # PyTorch's threads are not there after a fork
        os._exit(0 if x.numpy().all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and not x.any()


SHAPE = torch.Size((2003, 1003))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, torch.Size((3, 5)), torch.Size((0, 7))])
def test_a_weight_gradient_is_a_tensor_like_others(shape, dtype):
    for left in (1.0, float("nan")):
        x = new_gradient(shape, dtype, CPU, zeros=True)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
        x.fill_(left)
        del x
    x = new_gradient(shape, dtype, CPU).fill_(2.0)
    saved = io.BytesIO()
    torch.save(x, saved)
    saved.seek(0)
    assert not x._is_view()  # made without grad, one may not be added to in place
    for copy in (x.clone(), deepcopy(x), torch.load(saved), pickle.loads(pickle.dumps(x)), x.share_memory_()):
        assert torch.equal(copy, torch.full(shape, 2.0, dtype=dtype))


@KEEPS
def test_a_weight_gradient_nobody_has_any_more_is_the_next_ones_memory():
    first, second = (new_gradient(SHAPE, torch.float32, CPU, zeros=True) for _ in range(2))
    addresses = {first.data_ptr(), second.data_ptr()}
    row = first[7]
    del first, second
    third, fourth = (new_gradient(SHAPE, torch.float32, CPU).fill_(1.0) for _ in range(2))
    address = third.data_ptr()
    assert address in addresses and fourth.data_ptr() not in addresses and not row.any()
    assert "hg" in mapping(address)["VmFlags"]
    del third
    assert aligned(*SHAPE, torch.float32, CPU).data_ptr() != address  # buffers are kept apart
    assert new_gradient(SHAPE, torch.float32, CPU).data_ptr() == address


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
    before = bytes_to_take()
    weight.grad = None
    assert bytes_to_take() - before >= once.nbytes - HUGE_PAGE
    backward_pass()
    assert weight.grad.data_ptr() == address and torch.equal(weight.grad, once)
    for times in (2, 3, 4):
        backward_pass()
        assert weight.grad.data_ptr() == address
        torch.testing.assert_close(weight.grad, times * once, rtol=1e-6, atol=0.0)
    assert len(memory._gradients._leases) == 2 and len(memory._gradients._free()) == 1


@KEEPS
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_low_precision_has_all_its_memory_again(backward, upstream):
    """The buffer and the widened weight; dW in fp32 and as it is handed out."""
    hidden, targets = torch.randn(64, 32).bfloat16(), torch.arange(64)
    weight = torch.randn(40_001, 32).bfloat16().requires_grad_()

    def found():
        weight.grad = None
        loss = af.linear_policy_loss(hidden, weight, targets, objective=af.SFT(64.0), backward=backward).loss
        (upstream * loss).backward()
        return weight.grad.data_ptr(), [[*kept._leases.values()] for kept in (memory._buffers, memory._gradients)]

    address, leases = found()
    memories = [{id(lease.memory) for lease in kept} for kept in leases]
    assert [len(kept) for kept in memories] == [2, 2]
    again, leases = found()
    assert again == address
    assert [{id(lease.memory) for lease in kept} for kept in leases] == memories


@KEEPS
def test_compiled_passes_find_it_too():
    hidden, weight, targets = torch.randn(8, 16), torch.randn(40_001, 16).requires_grad_(), torch.arange(8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(weight):
        return af.linear_policy_loss(hidden, weight, targets, objective=af.SFT(8.0), vocab_size=39_990).loss

    found = []
    for _ in range(3):
        loss(weight).backward()
        found.append(weight.grad.clone())
        weight.grad = None
        new_gradient(weight.shape, torch.float32, CPU).fill_(float("nan"))
        assert len(memory._gradients._free()) == 1
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    assert found[0][:39_990].any() and not found[0][39_990:].any()


def test_a_weight_is_copied_where_it_is_to_be_widened_alone():
    hidden, weight = torch.rand(4, 8), torch.rand(16, 8)
    for given, dtype in ((hidden, torch.float32), (hidden.bfloat16(), torch.float32)):
        assert Products(given, weight, dtype).weight is weight
    wide = Products(hidden.bfloat16(), weight.bfloat16(), torch.float32).weight
    assert wide.dtype == torch.float32 and torch.equal(wide, weight.bfloat16().float())
    assert Products(hidden.bfloat16().to("meta"), weight.half().to("meta"), torch.float32).weight.is_meta
