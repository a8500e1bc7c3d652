"""The fused loss on a GPU: accuracy, size, memory, determinism, and a host that never waits.

Needs torch with CUDA, triton and pytest, and transformers with tokenizers, which tests/support.py imports.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import accuracy
import pytest
import support
import torch
from op_support import relative

import aapo_fast as af
from aapo_fast.bench.inputs import make_problem
from aapo_fast.bench.shapes import Case, Head
from aapo_fast.ops.linear_policy import buffers, sizes

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(data, **options):
    found = accuracy.results(data, options.pop("implementation", "triton"), **options)
    return found["dX"], found["dW"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", accuracy.KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_at_the_rounding_floor(implementation, kind, dtype):
    data = accuracy.make(kind, 700, 256, 32_003, dtype, "cuda")
    found, true = accuracy.results(data, implementation), accuracy.truth(data)
    assert not accuracy.complaints(data, found, true, dense_bf16=dtype == torch.bfloat16)


@pytest.mark.parametrize(("h", "v"), [(896, 151_936), (4096, 128_256), (2304, 256_000)], ids=str)
def test_real_heads_in_several_chunks(h, v):
    data = accuracy.make("model-like", 3000, h, v, torch.bfloat16, "cuda")
    found, true = accuracy.results(data, "triton"), accuracy.truth(data)
    assert not accuracy.complaints(data, found, true, dense_bf16=True)


@pytest.mark.usefixtures("sparse_whatever_it_costs")
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_the_same_bits_every_time(backward, roads):
    data = accuracy.make("model-like", 3000, 512, 151_936, torch.bfloat16, "cuda")
    once, again = (gradients(data, backward=backward, seed=7) for _ in range(2))
    assert set(roads) == {"sparse" if backward == "sparse" else "dense"}
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_sparse_rows_are_unbiased_and_no_worse_than_dense_bf16():
    """fp32 operands, so that the sample is the only error; dense rows in bf16 are the yardstick. Rows have the entropy
    of a model's own samples, for which this is promised: flatter ones have more dust to sample.
    """
    problem = make_problem(Case(Head("narrow", 128, 49_152), 400, "float32", "model-like"), torch.device("cuda"))
    hidden, weight, targets = problem.hidden.detach(), problem.weight.detach(), problem.targets
    a = -problem.token_weights.double() / len(targets)
    rows = -(hidden.double() @ weight.double().t()).softmax(1) * a[:, None]
    rows[torch.arange(len(a)), targets] += a
    true, dense = ((d @ weight.double(), d.t() @ hidden.double()) for d in (rows, rows.bfloat16().double()))
    objective = af.AAPO(problem.advantages, problem.sequence_index, float(len(targets)))

    def draw(seed):
        x, w = (t.clone().requires_grad_() for t in (hidden, weight))
        options = {"implementation": "triton", "backward": "sparse", "sparsity_threshold": 2**-13, "seed": seed}
        af.linear_policy_loss(x, w, targets, objective, **options).loss.backward()
        return x.grad, w.grad

    draws = [draw(seed) for seed in range(16)]
    for index in range(2):
        errors = [relative(d[index], true[index]) for d in draws]
        mean = relative(sum(d[index].double() for d in draws) / 16, true[index])
        assert sum(errors) / 16 <= 1.2 * relative(dense[index], true[index])
        assert mean < 0.4 * sum(errors) / 16


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_triton_and_torch_take_the_same_sample():
    data = accuracy.make("model-like", 300, 64, 32_003, torch.float32, "cuda")
    options = {"backward": "sparse", "sparsity_threshold": 2**-10, "seed": 3}
    ours, other = (gradients(data, implementation=name, **options) for name in ("triton", "torch"))
    assert all(relative(a, b) < 5e-3 for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("memory", ["little", "one panel"])
@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_more_than_two_to_the_31_logits(backward, memory, roads, monkeypatch):
    """65,537 rows of 49,152, beyond a grid of 65,535 and beyond 32-bit offsets: in little memory, where no kernel sees
    so many at a time, and in a single panel, where all of them do.
    """
    n, h, v = 65_537, 256, 49_152
    real, made = buffers.buffer_rows, []
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device="cuda").repeat(3)  # no sequence without a weight
    data = replace(accuracy.make("model-like", n, h, v, torch.bfloat16, "cuda"), rewards=rewards)
    if backward == "sparse":
        data.hidden.mul_(2.5)  # some fifty entries a row, where 197 would be dense
    if memory == "one panel":
        monkeypatch.setenv(sizes.BUFFER_VARIABLE, "48")
    monkeypatch.setattr(buffers, "buffer_rows", lambda *given: made.append(real(*given)) or made[-1])
    true = accuracy.truth(data)
    hidden, weight = (t.requires_grad_() for t in (data.hidden, data.weight))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = af.linear_policy_loss(
        hidden, weight, data.targets, data.objective(), temperature=data.temperature, all_logps=True, backward=backward
    )
    out.loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    [(_, panel_rows)] = made
    if memory == "one panel":
        assert panel_rows == n and panel_rows * v > 2**31
    else:
        assert extra < 2**30, f"{extra / 2**20:.0f} MiB beyond dX and dW"
    assert set(roads) == {"sparse" if backward == "sparse" else "dense"}
    last = slice(n - 64, n)
    for rows in (slice(None), last):
        assert relative(out.logps[rows], true["logps"][rows]) < 1e-5
        assert relative(hidden.grad[rows], true["dX"][rows]) < 6e-3
    assert relative(weight.grad, true["dW"]) < 6e-3


@pytest.fixture
def sent_from_pinned_memory(monkeypatch):
    """Of each tensor sent without blocking, whether it was pinned. From other memory the copy waits all the same, which
    CUDA's debug mode does not see.
    """
    found, real = [], torch.Tensor.to

    def to(tensor, *given, **options):
        if options.get("non_blocking"):
            found.append(tensor.is_pinned())
        return real(tensor, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_host_never_waits(dtype, implementation, sent_from_pinned_memory):
    data = accuracy.make("ninety per cent without weight", 900, 128, 32_003, dtype, "cuda")
    data.targets[::7] = af.ops.linear_policy.IGNORE_INDEX
    objective = data.objective()
    assert (objective.advantages == 0).any()
    on_the_host = af.AAPO(objective.advantages.cpu(), objective.sequence_index.cpu(), objective.num_tokens)
    accuracy.results(data, implementation)  # compiled beforehand
    hidden, weight = (t.requires_grad_() for t in (data.hidden, data.weight))
    torch.cuda.set_sync_debug_mode("error")
    try:
        af.aapo_advantages(data.rewards, data.reference_rewards, accuracy.GROUP)
        options = {"implementation": implementation, "temperature": 0.8}
        af.linear_policy_loss(hidden, weight, data.targets, objective, all_logps=True, **options).loss.backward()
        af.linear_policy_loss(hidden, weight, data.targets, on_the_host, **options).loss.backward()
        res = af.linear_logprobs(hidden, weight, data.targets, **options)
        (res.logps * res.entropy).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all() and hidden.grad[::7].norm() == 0
    assert len(sent_from_pinned_memory) >= 3 and all(sent_from_pinned_memory)  # advantages, index, rows to visit


@pytest.mark.usefixtures("sparse_whatever_it_costs")
def test_sparse_rows_wait_for_their_counts_only(roads, monkeypatch):
    """Which arrive behind an event: what would wait for the whole stream is an error here."""
    monkeypatch.setenv(sizes.BUFFER_VARIABLE, "0.1")  # several panels
    data = accuracy.make("model-like", 900, 128, 32_003, torch.bfloat16, "cuda")
    objective = data.objective()
    accuracy.results(data, "triton", backward="sparse")  # compiled beforehand
    assert set(roads) == {"sparse"}
    hidden, weight = (t.requires_grad_() for t in (data.hidden, data.weight))
    torch.cuda.set_sync_debug_mode("error")
    try:
        options = {"temperature": 0.8, "all_logps": True, "backward": "sparse"}
        af.linear_policy_loss(hidden, weight, data.targets, objective, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all() and hidden.grad.norm() > 0


def test_a_cuda_graph_holds_the_exact_pass():
    """In which nothing can wait. Replayed with other hidden states; what waits is refused."""
    data = accuracy.make("model-like", 700, 128, 32_003, torch.bfloat16, "cuda")
    hidden, weight = (t.clone().requires_grad_() for t in (data.hidden, data.weight))
    objective, other = data.objective(), data.hidden.flip(0)

    def step(**options):
        out = af.linear_policy_loss(hidden, weight, data.targets, objective, temperature=0.8, **options)
        out.loss.backward()
        return out

    def cleared():
        hidden.grad = weight.grad = None

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled beforehand, and the vendor's libraries have their workspaces
        step(all_logps=True)
        step(backward="sparse")
    torch.cuda.current_stream().wait_stream(side)
    for options in ({}, {"all_logps": True, "backward": "sparse"}):
        cleared()
        with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(**options)
    cleared()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(all_logps=True)
    with torch.no_grad():
        hidden.copy_(other)
    graph.replay()
    found = [t.clone() for t in (out.loss.detach(), out.logps, hidden.grad, weight.grad)]
    cleared()
    truth = step(all_logps=True)
    true = (truth.loss.detach(), truth.logps, hidden.grad, weight.grad)
    assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_objective_on_the_host_drops_the_same_rows(implementation):
    data = accuracy.make("ninety per cent without weight", 900, 128, 32_003, torch.float32, "cuda")
    there = data.objective()
    here = af.AAPO(there.advantages.cpu(), there.sequence_index.cpu(), there.num_tokens)
    found = []
    for objective in (there, here):
        hidden, weight = (t.detach().clone().requires_grad_() for t in (data.hidden, data.weight))
        out = af.linear_policy_loss(hidden, weight, data.targets, objective, implementation=implementation)
        out.loss.backward()
        found.append((out.loss.detach(), out.logps.nan_to_num(nan=7.0), hidden.grad, weight.grad))
    assert found[0][1].eq(7.0).any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("group_size", [1, 4, 64])
@pytest.mark.parametrize("scale_rewards", [True, False])
def test_group_advantages_are_those_of_the_cpu(group_size, scale_rewards):
    g = torch.Generator().manual_seed(0)
    rewards, reference = torch.rand(2, 512, generator=g)
    rewards[::9], reference[::11], rewards[64:128] = torch.nan, torch.nan, 0.3
    ours = af.aapo_advantages(rewards.cuda(), reference.cuda(), group_size, scale_rewards=scale_rewards)
    truth = af.aapo_advantages(rewards, reference, group_size, scale_rewards=scale_rewards)
    assert torch.allclose(ours.cpu(), truth, rtol=1.3e-7, atol=1e-14)


@support.needs_compiler  # for the numbers of the objective, which are tensors on the CPU
def test_torch_compile_in_one_graph():
    data = accuracy.make("model-like", 300, 64, 32_003, torch.bfloat16, "cuda")
    advantages = data.objective().advantages

    def step(hidden, weight):
        objective = af.AAPO(advantages, data.sequence_index, 300.0)
        return af.linear_policy_loss(hidden * 1.5, weight, data.targets, objective).loss

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        hidden, weight = (t.clone().requires_grad_() for t in (data.hidden, data.weight))
        function(hidden, weight).backward()
        found.append((hidden.grad, weight.grad))
    assert all(relative(a, b) < 1e-2 for a, b in zip(*found, strict=True))


def test_a_target_out_of_range_is_an_assertion_of_the_device():
    code = (
        "import torch, aapo_fast as af\n"
        "t = torch.tensor([1, 50, 2], device='cuda')\n"
        "x, w = torch.randn(3, 8, device='cuda'), torch.randn(40, 8, device='cuda')\n"
        "print(af.linear_policy_loss(x, w, t, af.SFT(3.0)).loss.item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0 and "targets outside [0, 40)" in done.stdout + done.stderr


SANITIZED = """
import sys, torch, aapo_fast as af
from aapo_fast.ops.linear_policy import buffers, chunked, sparse_triton
sparse_triton.DENSE_SHARE = 10.0
chunked.Buffers = lambda *given: buffers.Buffers(*given[:-1], False)  # not all in one allocation

def both(dtype, v, objective, **options):
    x, w = (torch.randn(n, 16, device="cuda").to(dtype).requires_grad_() for n in (37, v))
    t = torch.randint(v, (37,), device="cuda")
    options |= {"implementation": "triton", "sparsity_threshold": 2**-6}
    for backward in ("exact", "sparse"):
        af.linear_policy_loss(x, w, t, objective, backward=backward, **options).loss.backward()

known = af.AAPO(torch.linspace(-1, 1, 4), torch.arange(37) % 4, 37.0)
for v in map(int, sys.argv[1:]):
    both(torch.bfloat16, v, af.SFT(37.0))
    both(torch.bfloat16, v, known)
    both(torch.float32, v, known)
    rows = {"softcap": 5.0, "temperature": torch.linspace(0.5, 1.5, 37, device="cuda")}
    both(torch.bfloat16, v, known, **rows)
    both(torch.float32, v, af.SFT(37.0), **rows)

# Panels of eight rows, of which every third is too full.
buffers.buffer_rows, buffers.sparse_panel_rows = lambda *_: (16, 8), lambda *_: 8
begin, begun = sparse_triton.sparse_gradient, []

def sparse_gradient(*given):
    begun.append(begin(*given))
    return (lambda: None) if len(begun) % 3 == 2 else begun[-1]

sparse_triton.sparse_gradient = sparse_gradient
both(torch.bfloat16, int(sys.argv[1]), known)
torch.cuda.synchronize()
"""
"""Two sweeps, or one launch of both where the weights are known beforehand; gradient rows apart and in place (in fp32,
and in bf16 at the front of fp32 logits)."""


def test_compute_sanitizer_finds_nothing():
    """Out-of-bounds and misaligned accesses of the custom kernels, both modes, one column more than whole blocks have;
    VOCABULARIES="7 1009 4097" tries more sizes. Each tensor is an allocation of its own, without which a neighbour's
    memory would do; calls that cuBLAS tries in vain are no errors.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed here")
    command = [sanitizer, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    command += os.environ.get("VOCABULARIES", "4097").split()
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not reach the device here")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
