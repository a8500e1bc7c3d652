"""Each native row kernel beside a floor measured in the same round: what its memory traffic or its exponentials cost.

    python benchmarks/row_kernels.py [--shape 1024,576,49152] [--threads 1] [--output benchmarks/results/cpu/rows.json]

Floors are PyTorch's own loops over the same data, and the larger of the two counts:
- memory: one read of the logits (a sum), or one read and write (a multiplication in place), from where the kernel finds
  them: a whole chunk, too large for the caches, except for what the second of two sweeps reads again;
- arithmetic: as many exponentials as the kernel needs over an array that stays in a cache, by `torch.exp` or by our own
  exp, whichever is quicker. The sweeps compute one a logit each, both sweeps in one launch two.
Of sparse rows: reading the tile sums, then gathering the tiles that hold an entry, with one exponential for each of
their numbers. "Sweep 1 and sample" is both in one launch, and what the loss wants of the entries put in afterwards, as
sparse rows have it; "sample, apart" is the second half of that in a call of its own, as rows have it whose vocabulary
is cut up among processes: these tell each other of sweep 1, which has kept tiles of the whole chunk, before it. Sweep 2
and both sweeps are for dense rows.
Of sparse products: a dot product of as many numbers as there are multiply-adds, from the second cache (two reads each,
as the kernel's source row and sum), or one gather of the rows of W, or dW, that have an entry.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from aapo_fast.bench import inputs, machine, shapes
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy.memory import aligned
from aapo_fast.ops.linear_policy.rows_native import TILE, NativeRows
from aapo_fast.ops.linear_policy.rows_torch import even_parts
from aapo_fast.ops.linear_policy.sizes import CHUNK_BYTES, CHUNK_ROWS
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Transform, finish
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

THRESHOLD = 2.0**-13
FIRST_CACHE, SECOND_CACHE = 8192, 65_536
"""Numbers of fp32 in an array that fits there beside its result."""

Action = Callable[[], object]


class Chunk:
    """One chunk of the pass, its kernels and its sparse entries."""

    def __init__(self, shape: str) -> None:
        [case] = shapes.cases([shape], [CHUNK_ROWS], ["float32"], ["model-like"])
        rows = even_parts(case.rows, min(CHUNK_ROWS, CHUNK_BYTES // (4 * case.head.vocab)))
        self.problem = inputs.make_problem(case, torch.device("cpu"))
        self.hidden, self.weight = self.problem.hidden.detach()[:rows], self.problem.weight.detach()
        self.targets, self.weights = self.problem.targets[:rows], self.problem.token_weights[:rows]
        self.products = self.hidden @ self.weight.t()
        self.logits = aligned(*self.products.shape, torch.float32, self.products.device).copy_(self.products)
        self.kernels = NativeRows(self.logits)
        self.uniforms, self.live = row_uniforms(0, torch.arange(rows)), torch.ones(rows, dtype=torch.bool)
        size = self.kernels.block_rows
        self.blocks = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
        self.stats = finish(self.sweep_1(slice(rows), keep=True))
        self.entries = self.sample()
        self.d_hidden, self.d_weight = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)

    def sweep_1(self, rows: slice, keep: bool):
        return self.kernels.statistics(self.logits[rows], self.targets[rows], Transform(), sparse=keep)

    def sample(self) -> Entries:
        """Of what ``sweep_1`` has kept of all rows."""
        given = (self.logits, self.targets, Transform(), self.stats, self.live, THRESHOLD, self.uniforms)
        sampled = self.kernels.sample(*given)
        if sampled.dense:
            raise SystemExit(f"--shape: too many of {self.logits.shape[1]} columns have entries; give more of them")
        return sampled.entries(self.stats, Coefficients(self.weights))

    def sweep_and_sample(self) -> Entries:
        given = (self.logits, self.targets, Transform(), self.live, THRESHOLD, self.uniforms)
        partials, sampled = self.kernels.sparse_sweeps(*given)
        return sampled.entries(finish(partials), Coefficients(self.weights))


def timed(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def repeated(action: Action, times: int) -> Action:
    def run() -> None:
        for _ in range(times):
            action()

    return run


class Kernels:
    """Seconds of every kernel over a whole chunk, by name; blocks in the order of the pass."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk

    def round(self) -> dict[str, float]:
        c, seconds = self.chunk, {}
        c.logits.copy_(c.products)
        seconds["sweep 1"] = timed(lambda: c.sweep_1(slice(len(c.targets)), keep=False))
        c.logits.copy_(c.products)  # rows are swept once: sweep 1 takes the targets out
        seconds["sweep 1, keeping tiles"] = timed(lambda: c.sweep_1(slice(len(c.targets)), keep=True))
        seconds["sample, apart"] = timed(c.sample)
        c.logits.copy_(c.products)
        seconds["sweep 2"] = 0.0
        for block in c.blocks:
            c.sweep_1(block, keep=False)
            x, stats, wanted = c.logits[block], c.stats.of(block), Coefficients(c.weights[block])
            given = (x, c.targets[block], stats, wanted, Transform(), x)
            seconds["sweep 2"] += timed(lambda given=given: c.kernels.gradient(*given))
        c.logits.copy_(c.products)
        given = (c.logits, c.targets, c.weights, torch.arange(len(c.targets)), Transform())
        seconds["both sweeps"] = timed(lambda: c.kernels.both_sweeps(*given, c.logits))
        c.logits.copy_(c.products)
        seconds["sweep 1 and sample"] = timed(c.sweep_and_sample)
        seconds["sparse dX"] = timed(lambda: c.kernels.add_times_weight(c.entries, c.weight, c.d_hidden))
        seconds["sparse dW"] = timed(lambda: c.kernels.add_transposed_times(c.entries, c.hidden, c.d_weight))
        return seconds


class Floors:
    """Seconds of what a kernel cannot do without, by name of the floor."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        tiles_a_row = -(-chunk.logits.shape[1] // TILE)
        tiles = (chunk.entries.row.long() * tiles_a_row + chunk.entries.column.long() // TILE).unique()
        whole = chunk.logits.numel() // TILE * TILE
        self.as_tiles = chunk.logits.flatten()[:whole].view(-1, TILE)
        self.opened = tiles.clamp(max=len(self.as_tiles) - 1)
        self.gathered = torch.empty(len(tiles), TILE)
        self.sums = torch.rand(2, chunk.logits.shape[0], tiles_a_row)
        self.small = -torch.rand(FIRST_CACHE)
        self.small_out = torch.empty_like(self.small)
        self.pair = torch.rand(2, SECOND_CACHE // 2)
        self.columns = chunk.entries.column.long().unique()
        self.rows = torch.empty(len(self.columns), chunk.hidden.shape[1])

    def exponentials(self, count: int) -> float:
        """Seconds of the quicker one."""
        times = -(-count // FIRST_CACHE)
        ours, level = native.operators().exp, native.level()
        return min(
            timed(repeated(lambda: torch.exp(self.small, out=self.small_out), times)),
            timed(repeated(lambda: ours(self.small, self.small_out, level), times)),
        )

    def multiply_adds(self, count: int) -> Action:
        return repeated(lambda: torch.dot(self.pair[0], self.pair[1]), -(-count // (SECOND_CACHE // 2)))

    def round(self) -> dict[str, float]:
        c = self.chunk
        work = c.entries.value.numel() * c.hidden.shape[1]
        return {
            "read": timed(c.logits.sum),
            "read and write": timed(lambda: c.logits.mul_(1.0)),
            "exponentials": self.exponentials(c.logits.numel()),
            "tile sums": timed(self.sums.sum),
            "tiles": timed(lambda: torch.index_select(self.as_tiles, 0, self.opened, out=self.gathered)),
            "exponentials of tiles": self.exponentials(self.gathered.numel()),
            "multiply-adds": timed(self.multiply_adds(work)),
            "rows of W": timed(lambda: torch.index_select(c.weight, 0, self.columns, out=self.rows)),
            "rows of dW": timed(lambda: torch.index_select(c.d_weight, 0, self.columns, out=self.rows)),
        }


def floor_of(kernel: str, floor: dict[str, float]) -> float:
    """The floor of a kernel from those of its parts."""
    sweep = max(floor["read"], floor["exponentials"])
    sample = floor["tile sums"] + max(floor["tiles"], floor["exponentials of tiles"])
    return {
        "sweep 1": sweep,
        "sweep 1, keeping tiles": sweep,
        "sweep 2": max(floor["read and write"], floor["exponentials"]),
        "both sweeps": max(floor["read and write"], 2 * floor["exponentials"]),
        "sweep 1 and sample": sweep + sample,
        "sample, apart": sample,
        "sparse dX": max(floor["multiply-adds"], floor["rows of W"]),
        "sparse dW": max(floor["multiply-adds"], floor["rows of dW"]),
    }[kernel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024,576,49152", help="N,H,V; one chunk of it is swept")
    parser.add_argument("--threads", type=int, default=1, help="default 1: two share a memory bus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chunk = Chunk(arguments.shape)
    kernels, floors = Kernels(chunk), Floors(chunk)
    rounds = [(kernels.round(), floors.round()) for _ in range(arguments.rounds + 1)][1:]
    rows = {}
    for name in rounds[0][0]:
        rows[name] = {
            "milliseconds": statistics.median(k[name] for k, _ in rounds) * 1e3,
            "floor_milliseconds": statistics.median(floor_of(name, f) for _, f in rounds) * 1e3,
            "ratio": statistics.median(k[name] / floor_of(name, f) for k, f in rounds),
        }
    print(f"{tuple(chunk.logits.shape)} logits, {chunk.entries.value.numel()} entries, {arguments.threads} thread(s)\n")
    print("| kernel | ms | floor, ms | ratio |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {row['milliseconds']:.1f} | {row['floor_milliseconds']:.1f} | {row['ratio']:.2f} |")
    parts = {name: statistics.median(f[name] for _, f in rounds) * 1e3 for name in rounds[0][1]}
    print("\nfloors, ms:", {name: round(value, 2) for name, value in parts.items()})
    if arguments.output:
        result = {"machine": machine.describe(), "shape": arguments.shape, "threads": arguments.threads}
        result |= {"rounds": len(rounds), "kernels": rows, "floors_milliseconds": parts}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
