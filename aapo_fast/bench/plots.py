"""Time, memory and error against N, or against the entropy of the rows. The only file here that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aapo_fast.bench.results import CaseResult, Result, Row
from aapo_fast.bench.shapes import entropy_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind; markers and dashes tell the lines apart without any colour."""

MARKERS = "osD^vP*X<>hp"
DASHES = ("-", "--", ":", "-.")

SMALLEST_MEMORY = 2**20
"""Below a mebibyte nothing is told apart on a logarithmic axis."""


def _time(row: Row) -> float | None:
    return row.timing.get("ratio_to_3G")


def _memory(row: Row) -> float | None:
    size = row.extra_memory_bytes
    return None if size is None else max(size, SMALLEST_MEMORY) / 2**30


def _error(row: Row) -> float | None:
    return row.errors.get("d_weight", {}).get("error")


PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("time, of three bare products", _time),
    ("extra memory, GiB", _memory),
    ("relative error of dW", _error),
)

TOKENS, ENTROPY = "N, tokens", "mean entropy, nats"


class _Group(NamedTuple):
    """Cases that differ in what is on the axis alone."""

    name: str
    axis: str
    cases: list[CaseResult]

    def place(self, case: CaseResult, value: Callable[[Row], float | None]) -> float:
        if self.axis == ENTROPY:
            return case.inputs["mean_entropy_nats"]
        return case.error_rows if value is _error else case.shape[0]


def pyplot() -> Any:
    """matplotlib's, for pictures in files that are the same bytes whenever they are made."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "aapo-fast", "font.size": 9})
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> None:
    """Write the picture and forget it."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)


def draw(result: Result, path: Path) -> Path | None:
    """One row of panels for each head, dtype and distribution that was measured at several N, and for each shape that
    was at several entropies; None if none was.
    """
    groups = _groups(result)
    if not groups:
        return None
    figure, axes = pyplot().subplots(
        len(groups), len(PANELS), figsize=(12, 3.4 * len(groups) + 1.2), squeeze=False, layout="constrained"
    )
    drawn = (row.title for case in result.cases for row in case.rows if row.status == "ok")
    titles = list(dict.fromkeys(drawn))
    for line, group in zip(axes, groups, strict=True):
        for panel, (label, value) in zip(line, PANELS, strict=True):
            _panel(panel, group, titles, value)
            panel.set(title=group.name, xlabel=group.axis, ylabel=label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)
    return path


def _groups(result: Result) -> list[_Group]:
    over_tokens: dict[str, list[CaseResult]] = {}
    over_entropy: dict[str, list[CaseResult]] = {}
    for case in result.cases:
        over_tokens.setdefault(f"{case.head}, {case.dtype}, {case.distribution}", []).append(case)
        if entropy_of(case.distribution) is not None:
            over_entropy.setdefault(f"{case.head}, N = {case.shape[0]}, {case.dtype}", []).append(case)
    found = [_Group(name, TOKENS, cases) for name, cases in over_tokens.items()]
    found += [_Group(name, ENTROPY, cases) for name, cases in over_entropy.items()]
    return [g for g in found if len({c.shape[0] if g.axis == TOKENS else c.distribution for c in g.cases}) > 1]


def _panel(panel: Any, group: _Group, titles: list[str], value: Callable[[Row], float | None]) -> None:
    for place, title in enumerate(titles):
        found = [
            (group.place(case, value), value(row))
            for case in group.cases
            for row in case.rows
            if row.title == title and row.status == "ok"
        ]
        points = {x: y for x, y in found if y is not None}
        ours = title.startswith("ours")
        panel.plot(
            sorted(points),
            [points[n] for n in sorted(points)],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="-" if ours else DASHES[place % len(DASHES)],
            linewidth=2.5 if ours else 1.0,
            label=title,
        )
    if group.axis == TOKENS:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
    if group.axis == TOKENS or value is _error:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
