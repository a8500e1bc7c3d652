import os
import shutil

# Before torch is imported, and for child processes: tiny models are quicker on one thread than on many.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported: without a GPU its kernels are interpreted.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
# No test may reach for a hub: what is loaded is here or made here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import support


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Llama with random weights and one token a character."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    support.save_tiny_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch, request):
    """Caches go to the test's own folder, but for the converted quickstart model, which takes long to make."""
    if "e2e" not in str(request.path):
        monkeypatch.setenv("AAPO_FAST_CACHE", str(tmp_path / "cache"))
