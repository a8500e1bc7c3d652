"""Rows of chunks and panels: within the budget, the same on every rank, and what the variable may hold."""

import pytest
import torch

from aapo_fast.ops.linear_policy import sizes

GIB = 2**30


@pytest.mark.parametrize("hidden", [1, 576, 4096])
@pytest.mark.parametrize("vocab", [1, 997, 49_152, 151_936, 256_000, 10**7])
@pytest.mark.parametrize("num_rows", [0, 1, 127, 300, 5000, 65_537])
def test_buffers_stay_within_the_budget(num_rows, vocab, hidden):
    budget = sizes.gpu_budget(0)
    chunk, panel = sizes.buffer_rows(num_rows, vocab, hidden, torch.float32, torch.bfloat16, budget)
    in_place = sizes.buffer_rows(num_rows, vocab, hidden, torch.float32, torch.float32, budget)
    in_flight = sizes.sparse_panel_rows(num_rows, vocab, torch.float32, budget)
    assert in_place[0] == in_place[1] and 1 <= panel <= chunk
    for rows, taken in (
        (chunk, panel * vocab * 4 + chunk * vocab * 2),
        (in_place[0], in_place[0] * vocab * 4),
        (in_flight, 2 * in_flight * vocab * 4),
    ):
        assert 1 <= rows <= max(1, num_rows)
        assert taken <= budget or rows == 1  # one row has to fit, whatever it takes
        assert rows % 128 == 0 or rows < 128 or rows == num_rows  # whole tiles


# (rows, H, V) and the rows of a chunk and of the panels of dense and of sparse rows. At H = 4096 chunks of 2,816 rows
# were slower than those of 2,048 on an H200: 352 tiles for 132 multiprocessors are three waves, 256 are two.
HEADS = [
    ((8192, 4096, 151_936), 3072, 512, 1024),
    ((4096, 4096, 128_256), 2048, 512, 1024),
    ((16_384, 2048, 248_320), 1536, 256, 512),
    ((8192, 3584, 152_064), 2048, 512, 768),
    ((8192, 2560, 151_936), 2048, 256, 768),
    ((1000, 4096, 151_936), 1000, 512, 1000),
    ((2049, 4096, 151_936), 2049, 512, 768),  # no row is left over where all fit
]


@pytest.mark.parametrize(("shape", "chunk", "panel", "in_flight"), HEADS, ids=str)
def test_chunks_and_panels_of_real_heads(shape, chunk, panel, in_flight):
    num_rows, hidden, vocab = shape
    budget = sizes.gpu_budget(hidden * vocab * 2)
    assert sizes.buffer_rows(num_rows, vocab, hidden, torch.float32, torch.bfloat16, budget) == (chunk, panel)
    assert sizes.sparse_panel_rows(num_rows, vocab, torch.float32, budget) == in_flight


def test_tiles_of_a_chunk_fill_the_multiprocessors():
    """Of at most 2,816 rows, as in the measurement."""
    assert sizes._chunk_rows(8192, 2816, 4096) == 2048


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
