"""Time, memory and error against N. The only file here that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aapo_fast.bench.results import CaseResult, Result, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind; markers and dashes tell the lines apart without any colour."""

MARKERS = "osD^vP*X<>hp"
DASHES = ("-", "--", ":", "-.")

SMALLEST_MEMORY = 2**20
"""Below a mebibyte nothing is told apart on a logarithmic axis."""


def _time(case: CaseResult, row: Row) -> tuple[int, float | None]:
    return case.shape[0], row.timing.get("ratio_to_3G")


def _memory(case: CaseResult, row: Row) -> tuple[int, float | None]:
    size = row.extra_memory_bytes
    return case.shape[0], None if size is None else max(size, SMALLEST_MEMORY) / 2**30


def _error(case: CaseResult, row: Row) -> tuple[int, float | None]:
    return case.error_rows, row.errors.get("d_weight", {}).get("error")


Point = Callable[[CaseResult, Row], tuple[int, float | None]]

PANELS: tuple[tuple[str, Point], ...] = (
    ("time, of three bare products", _time),
    ("extra memory, GiB", _memory),
    ("relative error of dW", _error),
)


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
    """One row of panels for each head, dtype and distribution that was measured at several N; None if none was."""
    groups = _groups(result)
    if not groups:
        return None
    figure, axes = pyplot().subplots(
        len(groups), len(PANELS), figsize=(12, 3.4 * len(groups) + 1.2), squeeze=False, layout="constrained"
    )
    drawn = (row.title for case in result.cases for row in case.rows if row.status == "ok")
    titles = list(dict.fromkeys(drawn))
    for line, (name, cases) in zip(axes, groups.items(), strict=True):
        for panel, (label, point) in zip(line, PANELS, strict=True):
            _panel(panel, cases, titles, point)
            panel.set(title=name, xlabel="N, tokens", ylabel=label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)
    return path


def _groups(result: Result) -> dict[str, list[CaseResult]]:
    groups: dict[str, list[CaseResult]] = {}
    for case in result.cases:
        groups.setdefault(f"{case.head}, {case.dtype}, {case.distribution}", []).append(case)
    return {name: cases for name, cases in groups.items() if len({case.shape[0] for case in cases}) > 1}


def _panel(panel: Any, cases: list[CaseResult], titles: list[str], point: Point) -> None:
    for place, title in enumerate(titles):
        found = [point(case, row) for case in cases for row in case.rows if row.title == title and row.status == "ok"]
        points = {n: value for n, value in found if value is not None}
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
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.grid(alpha=0.3)
