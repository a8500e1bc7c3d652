"""Rows of chunks and panels: within the budget, the same on every rank, and what the variable may hold."""

import pytest
import torch

from aapo_fast.ops.linear_policy import sizes

GIB = 2**30


@pytest.mark.parametrize("num_panels", [1, 2])
@pytest.mark.parametrize("vocab", [1, 997, 49_152, 151_936, 256_000, 10**7])
@pytest.mark.parametrize("num_rows", [0, 1, 127, 5000, 65_537])
def test_buffers_stay_within_the_budget(num_rows, vocab, num_panels):
    budget = sizes.gpu_budget(0)
    chunk, panel = sizes.buffer_rows(num_rows, vocab, torch.float32, torch.bfloat16, budget, num_panels)
    assert 1 <= panel <= chunk <= max(1, num_rows)
    taken = num_panels * panel * vocab * 4 + chunk * vocab * 2
    assert taken <= budget or panel == 1  # one row has to fit, whatever it takes


def test_chunks_fill_the_multiprocessors():
    chunk, panel = sizes.buffer_rows(8192, 151_936, torch.float32, torch.bfloat16, sizes.gpu_budget(4096 * 151_936 * 2))
    assert chunk % sizes.GPU_WAVE_ROWS == 0 and panel % sizes.GPU_TILE_ROWS == 0


def test_the_variable_sets_the_budget(monkeypatch):
    monkeypatch.setenv(sizes.BUFFER_VARIABLE, "2.5")
    assert sizes.gpu_budget(0) == sizes.gpu_budget(100 * GIB) == 2.5 * GIB
    monkeypatch.setenv(sizes.BUFFER_VARIABLE, "")
    assert sizes.gpu_budget(5 * GIB) == 5 * GIB


@pytest.mark.parametrize("wish", ["nan", "inf", "-1", "0", "1e-12", "two"])
def test_what_is_no_size_is_refused(monkeypatch, wish):
    monkeypatch.setenv(sizes.BUFFER_VARIABLE, wish)
    with pytest.raises(ValueError, match=r"AAPO_FAST_BUFFER_GIB='.*': give a number of GiB from 0.1 on, or unset it"):
        sizes.gpu_budget(0)
