"""For the tests of the kernels and the products."""

import pytest

from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import products, rows_native, sparse


@pytest.fixture(params=native.available_levels() if native.why_not() is None else ["none"])
def level(request, monkeypatch):
    monkeypatch.setenv("AAPO_FAST_NATIVE_LEVEL", request.param)
    return request.param


@pytest.fixture
def sparse_whatever_it_costs(monkeypatch):
    """Tests are small: entries kept are a large share of their vocabulary, and dense rows would be cheaper."""
    monkeypatch.setattr(rows_native, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sparse, "DENSE_SHARE", 10.0)


@pytest.fixture
def widened(monkeypatch):
    """bf16 operands as on a CPU without AMX, which rounds no gradient row."""
    monkeypatch.setattr(products, "cpu_has_amx", lambda: False)
