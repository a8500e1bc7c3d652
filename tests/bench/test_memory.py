"""Extra memory on a CPU, measured in a real child process."""

import pytest
from bench_support import TINY

from aapo_fast.bench import memory
from aapo_fast.bench.shapes import Case, Head

WIDE = Case(Head("wide", 32, 32768), 512, "float32", "model-like")
LOGITS = 512 * 32768 * 4


def test_materialised_logits_are_seen():
    found = memory.peak_on_cpu(WIDE, "naive", seed=0)
    if found is None:
        pytest.skip("this kernel does not reset the peak of the resident set")
    assert 2.5 * LOGITS < found < 5.5 * LOGITS


def test_what_cannot_fit_raises_and_nothing_is_killed():
    with pytest.raises(MemoryError, match="naive does not fit"):
        memory.peak_on_cpu(Case(Head("wide", 32, 32768), 2**22, "float32", "model-like"), "naive", seed=0)


def test_an_unknown_method_is_no_measurement():
    assert memory.peak_on_cpu(TINY, "nobody", seed=0) is None
