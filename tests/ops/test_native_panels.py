"""Native rows that are swept and sampled a panel in one call, beside the same in two calls and a block at a time."""

import math

import pytest
import torch
from native_support import block
from op_support import relative

import aapo_fast as af
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import rows_native, sizes
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, RowStatistics, Transform, finish

if native.why_not() is not None:
    pytest.skip(native.describe(), allow_module_level=True)


def by_blocks(products, targets, wanted, transform, threshold, uniforms, block_rows):
    """The statistics, the entries and the blocks to be dense by ``statistics`` and ``sample``, a block a call."""
    kernels, parts, full = NativeRows(products), [], []
    entries = [Entries(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0))]
    kernels.block_rows = block_rows
    for first in range(0, len(products), block_rows):
        rows = slice(first, min(first + block_rows, len(products)))
        x, t, how = products[rows], targets[rows], transform.of(rows)
        parts.append(finish(kernels.statistics(x, t, how)))
        mine = wanted.of(rows)
        sampled = kernels.sample(x, t, how, parts[-1], mine.live(), threshold, uniforms[rows])
        full += [rows for _ in sampled.dense]
        found = sampled.entries(parts[-1], mine)
        entries.append(Entries(found.row + first, *found[1:]))
    stats = RowStatistics(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    return stats, Entries(*(torch.cat(columns) for columns in zip(*entries, strict=True))), full


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_rows", [1, 4, 9, 23, 40])
@pytest.mark.parametrize("kind", ["plain", "capped", "one temperature a row", "of all three"])
def test_all_blocks_in_one_launch(level, kind, block_rows, threads, monkeypatch):
    """The bits that blocks have one by one; flat blocks dense; one row is poisoned, of others nothing is wanted."""
    monkeypatch.setattr(rows_native, "DENSE_SHARE", 0.14)
    products, targets = block(2100, rows=23, offset=1, padding=3)
    products[3:9] *= 0.1  # flat rows, together and apart
    products[15] *= 0.1
    products[20, 77] = math.nan
    targets[11] = -1
    temperatures = torch.linspace(0.6, 1.4, 23)
    transform = {"plain": Transform(0.9), "capped": Transform(0.9, 30.0, 1.1)}.get(kind, Transform(temperatures))
    on_logp = torch.tensor([1.0, -0.5, 0.8])[torch.arange(23) % 3]
    on_logp[[11, 13]] = 0
    wanted = Coefficients(on_logp)
    if kind == "of all three":
        wanted = Coefficients(on_logp, 0.3 * on_logp, -0.2 * on_logp)
    live = wanted.live()
    uniforms = torch.linspace(0, 0.99, 23)
    one_by_one, before = products.clone(), torch.get_num_threads()
    truth, entries, full = by_blocks(one_by_one, targets, wanted, transform, 2**-9, uniforms, min(block_rows, 23))
    kernels = NativeRows(products)
    kernels.block_rows = block_rows
    kernels._tiles = torch.full((block_rows, kernels._tiles.shape[1]), math.nan)
    try:
        torch.set_num_threads(threads)
        partials, sampled = kernels.sparse_sweeps(products, targets, transform, live, 2**-9, uniforms)
        stats = finish(partials)
        found = sampled.entries(stats, wanted)
    finally:
        torch.set_num_threads(before)
    # Found row by row, by the first of four, at the end of nine, and not at all.
    assert sampled.dense == full and len(full) == {1: 7, 4: 2, 9: 1}.get(block_rows, 0)
    for a, b in zip([*stats, *found, products], [*truth, *entries, one_by_one], strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_rows_that_the_loss_turns_out_to_want_nothing_of(level):
    """As a clipped ratio's: sampled, and without entries."""
    products, targets = block(2100, rows=8)
    uniforms, on_logp = torch.linspace(0, 0.99, 8), torch.tensor([1.0, 0, -0.5, 0, 0, 2.0, 0.3, 0])
    partials, sampled = NativeRows(products).sparse_sweeps(
        products, targets, Transform(), torch.ones(8, dtype=torch.bool), 2**-9, uniforms
    )
    stats = finish(partials)
    entries, every = (sampled.entries(stats, Coefficients(a)) for a in (on_logp, torch.ones(8)))
    assert set(every.row.tolist()) == set(range(8)) and set(entries.row.tolist()) == {0, 2, 5, 6}
    kept = (on_logp != 0)[every.row]
    assert torch.equal(entries.column, every.column[kept])
    assert torch.allclose(entries.value, every.value[kept] * on_logp[every.row[kept]], rtol=1e-6, atol=0)


def losses_of(targets, logps):
    """Losses of hidden states and weight, by what their coefficients follow from."""
    g = torch.Generator().manual_seed(2)
    n = len(targets)
    advantages, index = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.arange(n) % 4
    old = logps + torch.randn(n, generator=g)
    old[6:12] = logps[6:12]  # rows that are clipped count in the choice between sparse and dense, and these should stay
    grpo = af.GRPO(advantages, index, float(n), old)
    cispo = af.CISPO(advantages, index, float(n), old)
    objectives = {
        "some clipped": grpo,
        "of the log-probability": cispo,
        "of all three": af.Regularized(cispo, float(n), entropy_bonus=0.1, z_loss=0.01),
    }
    upstream = torch.randn(2, n, generator=g)

    def in_the_backward(x, w, **options):
        made = af.linear_logprobs(x, w, targets, **options)
        return (upstream[0] * made.logps + upstream[1] * made.entropy).sum()

    def loss_of(objective):
        return lambda x, w, **options: af.linear_policy_loss(x, w, targets, objective, all_logps=True, **options).loss

    return {name: loss_of(objective) for name, objective in objectives.items()} | {"in the backward": in_the_backward}


class OnlyShard(af.VocabularyShard):
    """The whole vocabulary, as a shard whose group has no other."""

    columns = property(lambda shard: shard.vocab_size)

    def merged(self, partials):
        return partials

    def sum_(self, gradient):
        pass


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("kind", ["some clipped", "of the log-probability", "of all three", "in the backward"])
def test_a_whole_pass_by_either_road(kind, softcap, monkeypatch):
    """Flat and peaked blocks in panels, whatever the coefficients follow from: the same bits in one call a panel and in
    the two that shards of a vocabulary have.
    """
    monkeypatch.setattr(rows_native, "even_parts", lambda *_: 6)  # rows of a block
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 20)
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(40, 16, generator=g), torch.randn(3000, 16, generator=g)
    hidden[6:12] *= 0.05
    targets = torch.randint(3000, (40,), generator=g)
    loss = losses_of(targets, af.linear_logprobs(hidden, weight, targets, softcap=softcap).logps)[kind]
    dense, unwanted = [], []
    sparse = {"backward": "sparse", "sparsity_threshold": 2**-9}

    def gradients(**more):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        temperature = torch.linspace(0.8, 1.2, 40)
        loss(x, w, implementation="native", temperature=temperature, softcap=softcap, **more).backward()
        return x.grad, w.grad

    def sparse_sweeps(kernels, products, targets, transform, live, *given, real=NativeRows.sparse_sweeps):
        partials, sampled = real(kernels, products, targets, transform, live, *given)
        dense.append(sampled.dense)

        def entries(rows, wanted):
            unwanted.append((live & ~wanted.live()).sum().item())
            return sampled.entries(rows, wanted)

        return partials, sampled._replace(entries=entries)

    monkeypatch.setattr(NativeRows, "sparse_sweeps", sparse_sweeps)
    at_once = gradients(**sparse)
    assert dense == [[slice(6, 12)], []] and (sum(unwanted) > 0) == (kind == "some clipped")
    apart = gradients(**sparse, vocabulary_shard=OnlyShard(None, 0, 3000))
    assert len(dense) == 2 and all(torch.equal(a, b) for a, b in zip(at_once, apart, strict=True))
    exact = gradients(backward="exact")[0]
    assert relative(at_once[0][6:12], exact[6:12]) < 1e-6 and 1e-3 < relative(at_once[0], exact) < 0.5
