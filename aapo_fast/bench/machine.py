"""The machine and the versions a figure was measured with; every result file carries this."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import aapo_fast

PEER_PACKAGES = (
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)

BFLOAT16_FEATURES = ("avx512_bf16", "amx_bf16")
"""Without either of them bfloat16 products on a CPU are up to a hundred times slower."""


def describe(*packages: str) -> dict[str, object]:
    """Processor, cores, memory, GPU, and the versions of this package, of torch and of the named packages."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": _from_cpuinfo("model name") or platform.processor(),
        "bfloat16_instructions": [f for f in BFLOAT16_FEATURES if f in _from_cpuinfo("flags").split()],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_gpu(),
        "python": platform.python_version(),
        "aapo_fast": aapo_fast.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def in_words(machine: dict[str, object]) -> str:
    """One line for beneath a table."""
    threads = f"{machine['torch_threads']} threads of {machine['processor']} ({machine['cpu_capability']})"
    where = machine.get("gpu") or threads
    commit = f" at {machine['commit']}" if machine.get("commit") else ""
    return f"{where}; torch {machine['torch']}, aapo-fast {machine['aapo_fast']}{commit}; {machine['date']}"


def _gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _from_cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _commit() -> str | None:
    """Of the checkout that this package runs from, "+" after it if files differ from it; None elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(aapo_fast.__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "aapo_fast/__init__.py"):  # installed below somebody else's checkout
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "aapo_fast", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
