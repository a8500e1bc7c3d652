"""Peak extra memory: what a forward and backward takes beyond the inputs, dX and dW.

On CUDA the allocator counts. On a CPU a child process makes the inputs, runs the method once on a small problem (so
that libraries are loaded), and then compares its resident set before with the peak during the run; the parent's heap,
which keeps what was freed, would hide some of it.
"""

from __future__ import annotations

import gc
import json
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from aapo_fast.bench import methods
from aapo_fast.bench.inputs import Problem, make_problem
from aapo_fast.bench.method import Run
from aapo_fast.bench.shapes import Case, Head

SMALL = (32, 64, 256)
PEAK_IS_RESET_WITHIN = 64 * 2**20


def gradient_bytes(problem: Problem) -> int:
    """Bytes of dX and dW in the dtypes of their operands."""
    return sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))


def peak_on_cuda(run: Run, problem: Problem) -> int:
    """Bytes. The run should have been done once before: workspaces and compiled kernels are not its memory."""
    problem.clear_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    problem.clear_gradients()
    return max(0, peak - before - gradient_bytes(problem))


def peak_on_cpu(case: Case, name: str, seed: int) -> int | None:
    """Bytes, measured in a child process; None where that fails for another reason than memory.

    Raises:
        MemoryError: there was not enough of it.
    """
    order = json.dumps({"case": asdict(case), "method": name, "seed": seed, "threads": torch.get_num_threads()})
    child = subprocess.run(
        [sys.executable, "-m", "aapo_fast.bench.memory", order], capture_output=True, text=True, check=False
    )
    if child.returncode == -signal.SIGKILL or is_out_of_memory(RuntimeError(child.stderr)):
        raise MemoryError(f"{name} does not fit")
    return json.loads(child.stdout.splitlines()[-1])["bytes"] if child.returncode == 0 else None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the CUDA allocator, PyTorch's CPU allocator, or Python."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "CUDA out of memory" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "DefaultCPUAllocator: not enough memory" in text
    )


def _measure_here(case: Case, name: str, seed: int) -> int | None:
    """Called in the child."""
    [method] = methods.find([name])
    device = torch.device("cpu")
    n, h, v = SMALL
    small = replace(case, head=replace(case.head, hidden=h, vocab=v), rows=n)
    method.build(make_problem(small, device, seed))()
    # The memory that a method takes does not depend on which tokens were drawn.
    problem = make_problem(case, device, seed, sample_targets=False)
    run = method.build(problem)
    gc.collect()
    _limit_address_space()
    if not _reset_peak():
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before - gradient_bytes(problem))


def _status(field: str) -> int:
    """Bytes, from /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _reset_peak() -> bool:
    """Whether the peak of the resident set now counts from here (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return 0 < _status("VmHWM") < _status("VmRSS") + PEAK_IS_RESET_WITHIN


def _limit_address_space() -> None:
    """Fail with an error where memory runs out, instead of being killed, or of getting the parent killed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit = _status("VmSize") + available
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, StopIteration, ValueError):
        return


def main() -> None:
    """The child process: one order as JSON in, one line of JSON out."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    case = order["case"]
    measured = _measure_here(Case(**{**case, "head": Head(**case["head"])}), order["method"], order["seed"])
    print(json.dumps({"bytes": measured}))


if __name__ == "__main__":
    main()
