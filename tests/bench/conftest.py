import sys
from pathlib import Path

import pytest

from aapo_fast.bench import memory

sys.path.insert(0, str(Path(__file__).parent))  # for bench_support.py


@pytest.fixture
def quick_memory(monkeypatch):
    """No child processes: every method takes a mebibyte."""
    monkeypatch.setattr(memory, "peak_on_cpu", lambda case, name, seed: 2**20)
