"""A head in pieces, on two real processes over gloo: vocabulary-parallel, and under FSDP2."""

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from op_support import objectives, problem, relative, run, sequences, variant_problem
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

import aapo_fast as af
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import rows_native, rows_torch, sizes
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Partials, finish, merge

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

CUT = 37
"""The first rank's part of the vocabulary; parts are unequal."""


def on_two_processes(check):
    """Run ``check(rank)`` in two processes of one gloo group; an assertion in either fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, args=(check, f"file://{Path(folder) / 'store'}"), nprocs=2)


def _process(rank, check, store):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()
    # Without Python's own end, in which a thread of gloo that still lets go of the last tensor aborts the process.
    os._exit(0)


def _part(tensor, rank):
    return tensor.detach()[:CUT].clone() if rank == 0 else tensor.detach()[CUT:].clone()


def _vocabulary_parallel(rank, backward):
    for name in ("aapo", "user's, of all three"):
        inputs, options = variant_problem("everything", 23, 8, 101)
        options.pop("vocab_size")
        objective = objectives(23)[name]
        truth, (dx, dw, db) = run("torch", inputs, objective, **options)
        weight, bias = (_part(t, rank).requires_grad_() for t in (inputs[1], inputs[3]))
        options["vocabulary_shard"] = af.VocabularyShard.from_local(len(weight), dist.group.WORLD)
        options |= {"backward": backward, "sparsity_threshold": 2**-40}  # keeps every entry: exact, on the sparse road
        ours, (pdx, pdw, pdb) = run("torch", (inputs[0], weight, inputs[2], bias), objective, **options)
        for a, b in ((ours.loss, truth.loss), (pdx, dx), (pdw, _part(dw, rank)), (pdb, _part(db, rank))):
            assert relative(a, b) < 1e-12
        assert relative(ours.entropy.nan_to_num(), truth.entropy.nan_to_num()) < 1e-12
        res = af.linear_logprobs(inputs[0], weight, inputs[2], bias=bias, **options)
        live = ~truth.logps.isnan()
        assert relative(res.logps[live], truth.logps[live]) < 1e-12


@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_vocabulary_parallel_equals_one_process(backward):
    on_two_processes(functools.partial(_vocabulary_parallel, backward=backward))


def _in_small_blocks(rank):
    """Of three rows by the average part; by their own parts the ranks would have four and two."""
    rows_torch.BLOCK_BYTES = 3 * 51 * 8
    _vocabulary_parallel(rank, "exact")


def test_unequal_parts_have_equal_blocks():
    on_two_processes(_in_small_blocks)


def _peaked_rows_on_one_shard(rank):
    """Rank 1 holds next to no probability: its sparse rows are empty, or hold their target alone."""
    hidden, weight, targets, _ = problem(23, 8, 101)
    bias = torch.where(torch.arange(101) < CUT, 0.0, -60.0).double()
    mine = _part(weight, rank).requires_grad_()
    shard = af.VocabularyShard.from_local(len(mine), dist.group.WORLD)
    found = []
    for backward in ("exact", "sparse"):
        inputs = (hidden, mine, targets, _part(bias, rank))
        options = {"backward": backward, "sparsity_threshold": 2**-6, "vocabulary_shard": shard}
        found.append(run("torch", inputs, af.SFT(23.0), **options)[1])
    assert all(relative(sampled, exact) < 0.1 for sampled, exact in zip(found[1][:2], found[0][:2], strict=True))


def test_sparse_rows_that_are_empty_on_one_shard():
    on_two_processes(_peaked_rows_on_one_shard)


class _Some(af.Regularized):
    def active(self):
        return (torch.arange(23)[:, None] != torch.tensor([0, 2, 3, 13, 20])).all(1)


def _native_rows(rank, dense_share):
    """Two panels, of blocks of a row; rows that do not count are sparse, of no entry, between dense ones."""
    rows_native.DENSE_SHARE = dense_share
    rows_native.BLOCK_BYTES = rows_native.ROWS_A_THREAD = 1  # one row
    sizes.CHUNK_ROWS = 12
    real, dense = NativeRows.sample, []

    def sample(*given):
        dense.append(real(*given))
        return dense[-1]

    NativeRows.sample = sample
    hidden, weight, targets, bias = problem(23, 8, 2101, bias=True)
    advantages, index = sequences(23)
    objective = _Some(af.GRPO(advantages, index, 23.0), 23.0, entropy_bonus=0.02)
    truth, (dx, dw, db) = run("reference", (hidden, weight, targets, bias), objective)
    single = [t.float() for t in (hidden, weight, bias)]
    mine = [_part(t, rank).requires_grad_() for t in single[1:]]
    shard = af.VocabularyShard.from_local(len(mine[0]), dist.group.WORLD)
    options = {"vocabulary_shard": shard, "backward": "sparse", "sparsity_threshold": 2**-30}  # keeps every entry
    inputs = (single[0], mine[0], targets, mine[1])
    ours, (pdx, pdw, pdb) = run("native", inputs, objective, **options, all_logps=True)
    for a, b in ((ours.loss, truth.loss), (pdx, dx), (pdw, _part(dw, rank)), (pdb, _part(db, rank))):
        assert relative(a.double(), b) < 3e-6
    for panel, sampled in zip(objective.active().split(12), dense, strict=True):
        full = panel.nonzero().flatten().tolist() if dense_share < 1 else []
        assert [block.start for block in sampled.dense] == full


@pytest.mark.skipif(native.why_not() is not None, reason=native.describe())
@pytest.mark.parametrize("dense_share", [0.08, 2.0], ids=["dense rows", "sparse rows"])
def test_native_rows_of_a_shard(dense_share):
    on_two_processes(functools.partial(_native_rows, dense_share=dense_share))


def _padded_last_shard(rank):
    hidden, weight, targets, _ = problem(20, 8, 70)
    _, (dx, dw) = run("torch", (hidden, weight, targets, None), af.SFT(20.0))
    mine = _part(weight, rank)
    if rank == 1:
        mine = torch.cat([mine, torch.ones(4, 8)])
    shard = af.VocabularyShard(dist.group.WORLD, start=0 if rank == 0 else CUT, vocab_size=70)
    _, (pdx, pdw) = run("torch", (hidden, mine.requires_grad_(), targets, None), af.SFT(20.0), vocabulary_shard=shard)
    assert relative(pdx, dx) < 1e-12 and relative(pdw[: len(_part(dw, rank))], _part(dw, rank)) < 1e-12
    assert rank == 0 or pdw[-4:].norm() == 0
    lost = af.VocabularyShard(dist.group.WORLD, start=70, vocab_size=70)
    with pytest.raises(ValueError, match="this rank holds padding only"):
        af.linear_policy_loss(hidden, mine, targets, af.SFT(20.0), vocabulary_shard=lost)


def test_padding_in_the_last_shard():
    on_two_processes(_padded_last_shard)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8).double(), nn.Linear(8, 101, bias=False).double()

    def forward(self, x, targets, objective):
        return af.linear_policy_loss(torch.tanh(self.body(x)), self.head.weight, targets, objective).loss


def _under_fsdp(rank, inside):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, _, targets, _ = problem(24, 8, 101)
    advantages, index = sequences(24)
    single = _Model()
    single(x, targets, af.AAPO(advantages, index, 24.0)).backward()

    mine = slice(0, 10) if rank == 0 else slice(10, 24)  # unequal: only a global denominator gives the right gradient
    objective = af.AAPO(advantages, index[mine], 24.0)
    model = _Model()
    mesh = init_device_mesh("cpu", (2,))
    if inside:  # the head's weight is unsharded while the model runs; FSDP averages gradients over ranks
        fully_shard(model, mesh=mesh)
        (2 * model(x[mine], targets[mine], objective)).backward()
    else:  # the loss is called from outside, on the sharded parameter
        fully_shard(model.body, mesh=mesh)
        fully_shard(model.head, mesh=mesh)
        hidden = torch.tanh(model.body(x[mine]))
        af.linear_policy_loss(hidden, model.head.weight, targets[mine], objective).loss.backward()
    assert relative(model.head.weight.grad.full_tensor(), single.head.weight.grad) < 1e-12


def _tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, targets, _ = problem(12, 8, 30)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="over the mesh dimension 'tp', whose ranks hold the same tokens; give"):
        af.linear_policy_loss(hidden, sharded, targets, af.SFT(12.0))
    with pytest.raises(ValueError, match=r"hidden is a DTensor; give this rank's rows of it, hidden.to_local\(\)"):
        af.linear_logprobs(distribute_tensor(hidden.detach(), mesh, [Shard(0)]), weight, targets)


def test_tensor_parallelism_is_another_sum():
    """The gradients of ranks that hold the same tokens would be added up."""
    on_two_processes(_tensor_parallel)


@pytest.mark.parametrize("inside", [True, False], ids=["called inside the model", "called on a DTensor"])
def test_head_under_fsdp2(inside):
    on_two_processes(functools.partial(_under_fsdp, inside=inside))


def test_merging_shards_of_very_different_size():
    """A shard 300 below the maximum, and one ruled out by a bias of -1e30, add nothing and spoil nothing."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 90, generator=g, dtype=torch.float64) * 3
    z[1, :30] -= 300
    z[2, 30:60] = -1e30
    z[3] += 1000

    def partials(part):
        row_max = part.amax(1)
        exps = (part - row_max[:, None]).exp()
        target = part[:, 0] if part.shape[1] == 30 and part.data_ptr() == z.data_ptr() else torch.full((5,), -torch.inf)
        return Partials(row_max, exps.sum(1), (exps * (part - row_max[:, None])).sum(1), target)

    whole = finish(partials(z)._replace(target=z[:, 0]))
    merged = finish(merge([partials(z[:, :30]), partials(z[:, 30:60]), partials(z[:, 60:])]))
    for ours, truth in zip(merged, whole, strict=True):
        assert relative(ours, truth) < 1e-13
