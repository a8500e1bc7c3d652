"""Markdown tables from results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aapo_fast.bench.machine import in_words
from aapo_fast.bench.results import CaseResult, Result, Row

LESS = "†"
LEGENDS = {
    "head": "G is one matrix product of 2NHV operations; *of 3G* is the time over that of three bare products in the "
    "same round, the median of the rounds. Extra memory is the peak beyond inputs, dX and dW. Errors are relative "
    f"Frobenius errors against float64. {LESS} computes less: a plain mean over tokens, no weight a token.",
    "accuracy": "Relative Frobenius errors against float64 on the same (rounded) inputs; bias is the signed error "
    "along the truth; the worst row is the largest relative error among rows that matter. The floor is the truth "
    "rounded once to the output dtype; the yardstick, gradient rows rounded to bfloat16 before two exact products. "
    "Errors of sparse rows are means of eight draws; the mean of the draws is nearer by the square root of eight if "
    f"there is no bias. Bold: more than rounding explains. {LESS} a plain mean over tokens, no weight a token.",
}
"""What the tables of each kind of run mean."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def preamble(result: Result) -> str:
    """What stands above every table of a run: notes first, so that nobody reads past them."""
    lines = [f"**{note}**" for note in result.notes]
    lines.append(f"{in_words(result.machine)}. Made by `{result.command}`." if result.command else "")
    return "\n\n".join(line for line in lines if line)


def full(result: Result) -> str:
    """A table a case, each with what did not run beneath."""
    return "\n\n".join(case_table(case, result.kind) for case in result.cases)


def case_table(case: CaseResult, kind: str = "head") -> str:
    """Every method of one case, with what could not run beneath. ``kind`` is "head" or "accuracy"."""
    head, cells = (HEAD_COLUMNS, _head_cells) if kind == "head" else (ACCURACY_COLUMNS, _accuracy_cells)
    shown = [row for row in case.rows if row.status not in ("unavailable", "left out", "failed")]
    hidden = [f"{row.title}: {row.reason}" for row in case.rows if row not in shown]
    parts = [f"#### {case.label}", table(head, [cells(row) for row in shown])]
    if kind == "head" and case.error_rows != case.shape[0]:
        parts.append(f"Errors were measured at N = {case.error_rows}, same H, V and distribution.")
    wrong = [f"{row.title}: {row.reason}" for row in case.rows if row.status == "wrong gradient"]
    if wrong:
        what = "Wrong gradient, so no time is reported" if kind == "head" else "More than rounding explains"
        parts.append(f"{what}. " + "; ".join(wrong) + ".")
    if hidden:
        parts.append("Not run. " + "; ".join(hidden) + ".")
    return "\n\n".join(parts)


def summary(result: Result) -> str:
    """Methods down, by their short names, cases across: one table a measure, for the whole run."""
    measures: dict[str, Callable[[Row], str]] = (
        {"Time, of 3G": _ratio, "Extra memory": _memory, "Error of dW": _error("d_weight")}
        if result.kind == "head"
        else {"Error of dX": _error("d_hidden"), "Error of dW": _error("d_weight")}
    )
    parts = [f"{name}\n\n{_matrix(result.cases, cell)}" for name, cell in measures.items()]
    if result.left_out:
        why = f"since {result.broken_by} broke the device" if result.broken_by else "for want of time"
        parts.append(f"Left out, {why}: " + "; ".join(result.left_out) + ".")
    away = ("unavailable", "failed")
    missing = {_name(row): row.reason for case in result.cases for row in case.rows if row.status in away}
    if missing:
        parts.append("Not run. " + "; ".join(f"{name}: {reason}" for name, reason in missing.items()) + ".")
    return "\n\n".join(parts)


def _matrix(cases: Sequence[CaseResult], cell: Callable[[Row], str]) -> str:
    names = list(dict.fromkeys(_name(row) for case in cases for row in case.rows if row.status != "unavailable"))
    columns = [{_name(row): cell(row) for row in case.rows} for case in cases]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return table(["", *_short_labels(cases)], [row for row in rows if any(row[1:])])


def _short_labels(cases: Sequence[CaseResult]) -> list[str]:
    """The shape, and what differs between the cases besides."""
    labels = []
    for case in cases:
        more = [
            str(getattr(case, name))
            for name in ("dtype", "distribution")
            if len({getattr(other, name) for other in cases}) > 1
        ]
        labels.append(" ".join([",".join(map(str, case.shape)), *more]))
    return labels


HEAD_COLUMNS = ("method", "G", "ms (min to max)", "of 3G", "extra memory", "error dX", "error dW", "logp rms, nats")


def _head_cells(row: Row) -> list[str]:
    time = row.status.replace("ok", "")
    if row.status == "ok" and row.timing:
        low, high = row.timing["spread_milliseconds"]
        time = f"{_three_digits(row.timing['milliseconds'])} ({_three_digits(low)} to {_three_digits(high)})"
    errors = [_error(name)(row) for name in ("d_hidden", "d_weight")]
    return [_title(row), row.gemms, time, _ratio(row), _memory(row), *errors, _measure(row, "logps", "rms")]


ACCURACY_COLUMNS = (
    "method",
    "error dX",
    "error dW",
    "bias dX",
    "bias dW",
    "worst row dX",
    "error dX, mean of draws",
    "error dW, mean of draws",
    "logp rms, nats",
)


def _accuracy_cells(row: Row) -> list[str]:
    pairs = [(name, measure) for measure in ("error", "bias") for name in ("d_hidden", "d_weight")]
    more = [("d_hidden", "worst_row"), ("d_hidden", "error_of_mean"), ("d_weight", "error_of_mean"), ("logps", "rms")]
    return [_title(row), *(_measure(row, name, measure) for name, measure in [*pairs, *more])]


def _name(row: Row) -> str:
    return ("ours: " if row.kind == "ours" else "") + row.method + ("" if row.weighted else f" {LESS}")


def _title(row: Row) -> str:
    return row.title if row.weighted else f"{row.title} {LESS}"


def _ratio(row: Row) -> str:
    if row.status != "ok":
        return "" if row.status == "unavailable" else row.status
    ratio = row.timing.get("ratio_to_3G")
    return "" if ratio is None else f"{ratio:.2f}"


def _memory(row: Row) -> str:
    size = row.extra_memory_bytes
    if size is None:
        return row.status if row.status == "out of memory" else ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _error(name: str) -> Callable[[Row], str]:
    return lambda row: _measure(row, name, "error")


def _measure(row: Row, name: str, measure: str) -> str:
    value = row.errors.get(name, {}).get(measure)
    if value is None:
        return ""
    text = f"{value:+.1e}" if measure == "bias" else f"{value:.1e}"
    return f"**{text}**" if row.status == "wrong gradient" else text


def _three_digits(milliseconds: float) -> str:
    if milliseconds >= 100:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.2f}"
