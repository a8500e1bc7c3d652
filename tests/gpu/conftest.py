"""For the tests on a GPU."""

import os
from collections import Counter

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels():
    """Interpreted ones would pass, and say nothing of the GPU."""
    said = "nvidia-smi is not in PATH, so tests/conftest.py has Triton's kernels interpreted"
    assert os.environ.get("TRITON_INTERPRET") != "1", said


@pytest.fixture
def sparse_whatever_it_costs(monkeypatch):
    """Rows of these tests are flatter than a model's, or short: most blocks would be dense."""
    from aapo_fast.ops.linear_policy import sparse, sparse_triton

    for module in (sparse, sparse_triton):
        monkeypatch.setattr(module, "DENSE_SHARE", 10.0)


@pytest.fixture
def roads(monkeypatch):
    """How many blocks of gradient rows Triton makes "sparse" and "dense": a test of sparse rows may find none."""
    from aapo_fast.ops.linear_policy import rows_triton, sparse_triton

    taken = Counter()

    def count(owner, name, road):
        real = getattr(owner, name)

        def counted(*given, **options):
            taken[road] += 1
            return real(*given, **options)

        monkeypatch.setattr(owner, name, counted)

    count(sparse_triton, "emit", "sparse")
    for name in ("gradient", "both_sweeps"):
        count(rows_triton.TritonRows, name, "dense")
    return taken
