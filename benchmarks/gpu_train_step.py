"""A train step's forward and backward through whole models on one GPU, with our head and with other people's.

    PYTHONPATH=. python3 benchmarks/gpu_train_step.py --json FILE           Qwen2.5-0.5B, 1.5B and 7B in shape, within
                                                                            75 seconds
    PYTHONPATH=. python3 benchmarks/gpu_train_step.py --device cpu --tiny   the same code on two tiny models

Weights and tokens are random. The last norm is scaled so that the mean entropy is a model's, and the targets are drawn
from the model. Completions have long-tailed lengths, eight to a prompt of 256 tokens, packed with shared prompts;
attention is PyTorch's variable-length kernel, products are bf16 under autocast, and every layer is computed again in
the backward pass. 0.5B and 1.5B have fp32 weights as in training, 7B bf16 ones: with AdamW it would not fit. No
optimizer step is timed. All heads stand on the same decoder; others than ours get hidden states and weight in bf16,
which is what autocast would give them. ``decoder`` is the step without a head, from a random gradient. Peaks are
beyond model and batch; the gradients of the parameters are in them.

Every head is held against the first that works (ours, exact): loss, gradient of the head's weight (a tied one has the
embedding's in it) and of the first layer's queries. What differs by more than rounding is WRONG and has no time.
"""

# ruff: noqa: E402
from __future__ import annotations

import time

START = time.monotonic()  # before the imports, which are on the GPU's time too

import argparse
import contextlib
import gc
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_train_cases as cases
import torch
from gpu_train_cases import MODELS, TINY, TITLES, Case, Shape, Step
from torch import Tensor

from aapo_fast.bench import machine, results
from aapo_fast.bench.method import UnavailableError

LONGEST = "1.5B", (16384, 32768, 65536, 131072, 262144), 3.0
TINY_LONGEST = "tiny", (64, 128), 1.0
"""Which model gets ever longer batches, of how many completion tokens, and that part's share of the time."""

LOSS_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 0.1
"""Logits rounded to bf16 cost two or three per cent of the gradient (on a CPU, at V = 151936 and H = 896); a head that
leaves out an eighth of the tokens is off by 35."""

Row = dict[str, Any]
Keep = Callable[[], None]


class Deadline:
    """``left`` seconds until it is over, counted from the start of the program."""

    def __init__(self, seconds: float) -> None:
        self._end = START + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def part(self, share: float) -> Deadline:
        """The end of a part that takes this share of what is left."""
        return Deadline(time.monotonic() + share * self.left - START)


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(case: Case, step: Step, seed: int) -> Row:
    """One step: seconds, peak bytes beyond what was there before it (None on a CPU), loss. Gradients are left."""
    case.forget()
    if case.policy.device.type != "cuda":
        start = time.perf_counter()
        loss = step(case, seed)
        return {"seconds": time.perf_counter() - start, "peak": None, "loss": None if loss is None else loss.item()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin.record()
    loss = step(case, seed)
    end.record()
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": begin.elapsed_time(end) / 1e3, "peak": peak, "loss": None if loss is None else loss.item()}


def attempt(row: Row, do: Callable[..., Any], *arguments: Any) -> Any:
    """What ``do`` gives; None after an error, which is written into the row."""
    try:
        return do(*arguments)
    except torch.OutOfMemoryError as error:
        row.update(status="out of memory", reason=str(error).split(". ")[0])
    except UnavailableError as error:
        row.update(status="unavailable", reason=str(error))
    except Exception as error:  # one head's failure is a row, the others are measured all the same
        row.update(status="failed", reason=results.first_line(error)[:200])
    return None


def clear(case: Case | None = None) -> None:
    """Free gradients, what a failed step left, and the allocator's cache."""
    if case is not None:
        case.forget()
    gc.collect()
    with contextlib.suppress(RuntimeError):  # a device that is broken says so at the next step too
        torch.cuda.empty_cache()


def compare(truth: Row, loss: float | None, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences: of the loss, and by gradient that of its norm, of its share along the truth (an unbiased
    sample has noise, but not along it) and of itself.
    """
    found = {} if loss is None else {"loss": abs(loss - truth["loss"]) / abs(truth["loss"])}
    for name, gradient in gradients.items():
        g, t = gradient.flatten().float(), truth[name].flatten().float()
        size = t.norm()
        found[f"{name} norm"] = (g.norm() / size - 1).item()
        found[f"{name} along"] = (g.dot(t) / size**2 - 1).item()
        found[f"{name} error"] = ((g - t).norm() / size).item()
    return found


def is_wrong(apart: dict[str, float], sampled: bool) -> bool:
    """Negated, so that NaN is wrong."""
    which = "along" if sampled else "error"
    fits = all(abs(apart[f"{name} {which}"]) <= GRADIENT_TOLERANCE for name in ("head", "q_proj"))
    return not (fits and apart.get("loss", 0.0) <= LOSS_TOLERANCE)


def warm_up(case: Case, steps: dict[str, Step], rows: dict[str, Row], deadline: Deadline, keep: Keep) -> None:
    """A step of each that does not count, for its loss and gradients. The first three are tried in any case."""
    truth: Row = {}
    for name, step in steps.items():
        row = rows[name] = {"status": "ok", "reason": "", "seconds": [], "peak": None}
        if deadline.left < 0 and len(rows) > 3:
            row.update(status="left out", reason="no time")
            continue
        made = attempt(row, measured, case, step, 0)
        if made is not None:
            row["loss"], row["warm_up_seconds"] = made["loss"], made["seconds"]
        if made is not None and name != "decoder":
            if truth:
                judge(row, truth, case, sampled=name == "sparse")
            elif made["loss"] is not None:
                truth = {"loss": made["loss"], **{k: g.clone() for k, g in case.gradients().items()}}
        print(f"  {TITLES[name]:30} warm-up {row.get('warm_up_seconds', 0):7.3f} s  {row['reason']}", flush=True)
        keep()
        # What succeeded leaves its memory to the allocator: a step that is timed must not ask the driver for it.
        case.forget() if made is not None else clear(case)


def judge(row: Row, truth: Row, case: Case, sampled: bool) -> None:
    apart = attempt(row, compare, truth, row["loss"], case.gradients())
    if apart is not None:
        row["apart"] = apart
        if is_wrong(apart, sampled):
            row.update(status="WRONG", reason="loss or gradient differs by more than rounding")


def measure_heads(
    case: Case, steps: dict[str, Step], rows: dict[str, Row], rounds: int, ends: tuple[Deadline, Deadline], keep: Keep
) -> None:
    """Fill ``rows``. Past the model's end it stops between rounds, after one; past that of the run between steps."""
    deadline, whole = ends
    warm_up(case, steps, rows, deadline, keep)
    shuffle = random.Random(0).shuffle
    for number in range(1, rounds + 1):
        live = [name for name, row in rows.items() if row["status"] in ("ok", "WRONG")]
        if number > 1 and deadline.left < sum(max(rows[name]["seconds"], default=0.0) for name in live):
            break
        shuffle(live)
        for name in live:
            if whole.left < 0:
                return
            made = attempt(rows[name], measured, case, steps[name], number)
            if made is None:
                clear(case)
            else:
                rows[name]["seconds"].append(made["seconds"])
                rows[name]["peak"] = made["peak"]
        keep()


def measure_longest(
    shape: Shape, device: torch.device, sizes: Sequence[int], whole: Deadline, found: list[Row], keep: Keep
) -> None:
    """One step each of ever longer batches into ``found``, until memory or time is out. Targets are any: what counts is
    whether it fits, and the time is of a single step.
    """
    steps = {name: cases.make_step(name) for name in ("exact", "naive")}
    policy, _ = cases.make_policy(shape, device)
    for size in sizes:
        if not steps:
            break
        case = Case(policy, policy.batch(cases.make_samples(shape, size)))
        for name in list(steps):
            row: Row = {"head": name, "tokens": size, "status": "fits", "reason": ""}
            before = [r["seconds"] for r in found if r["head"] == name]
            found.append(row)
            if whole.left < 2.5 * max(before, default=1.0):
                row.update(status="left out", reason="no time")
            elif (made := attempt(row, measured, case, steps[name], 0)) is not None:
                row.update(seconds=made["seconds"], peak=made["peak"])
            if row["status"] != "fits":
                del steps[name]
            clear(case)
            print(f"  {TITLES[name]:30} {size:7} tokens  {row['status']}  {row.get('seconds', 0):.2f} s", flush=True)
            keep()


# --- tables ----------------------------------------------------------------------------------------------------------


def table(record: Row) -> str:
    head = ["model", "head", "step, ms", "head's part, ms", "completion tokens/s", "peak, GB", "loss"]
    head += ["loss, from exact", "dW norm", "dQ norm", "remark"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for model in record["models"]:
        if model["status"] != "ok":
            lines.append(
                "| " + " | ".join([model["model"], *["-"] * 9, f"{model['status']}: {model['reason']}"]) + " |"
            )
        base = _median(model["heads"].get("decoder", {}).get("seconds"))
        lines += [_line(model, name, row, base) for name, row in model["heads"].items()]
    lines += ["", *(f"{m['model']}: {_described(m)}" for m in record["models"] if "completions" in m)]
    lines += ["", "| longest batch | completion tokens | step, s | peak, GB | |", "| --- | --- | --- | --- | --- |"]
    for row in record["longest"]:
        figures = f"{_shown(row.get('seconds'), '.2f')} | {_shown(row.get('peak'), '.1f', 1e-9)}"
        said = ": ".join(filter(None, (row["status"], row["reason"])))
        lines.append(f"| {TITLES.get(row['head'], row['head'])} | {row['tokens']} | {figures} | {said} |")
    most = {row["head"]: row["tokens"] for row in record["longest"] if row["status"] == "fits"}
    lines += [
        "",
        *(f"Longest that was seen to fit, {TITLES[name]}: {size} completion tokens" for name, size in most.items()),
    ]
    return "\n".join(lines)


def _line(model: Row, name: str, row: Row, base: float | None) -> str:
    seconds = _median(row["seconds"]) if row["status"] == "ok" else None
    part = None if seconds is None or base is None or name == "decoder" else seconds - base
    rate = None if seconds is None else model["completion_tokens"] / seconds
    apart = row.get("apart", {})
    cells = [model["model"], TITLES[name], _shown(seconds, ".1f", 1e3), _shown(part, ".1f", 1e3), _shown(rate, ",.0f")]
    cells += [_shown(row["peak"], ".2f", 1e-9), _shown(row.get("loss"), ".5f")]
    cells += [_shown(apart.get(key), ".1e") for key in ("loss", "head norm", "q_proj norm")]
    status = "" if row["status"] == "ok" else row["status"]
    return "| " + " | ".join([*cells, ": ".join(filter(None, (status, row["reason"])))]) + " |"


def _described(model: Row) -> str:
    return (
        f"{model['completions']} completions of {model['completion_tokens']} tokens, at most "
        f"{model['longest_completion']}; {model['decoder_tokens']} tokens through the decoder; {model['weights']} "
        f"weights; entropy {model['mean_entropy_nats']:.2f} nats; {model['remark']}"
    )


def _median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _shown(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


# --- the run ---------------------------------------------------------------------------------------------------------


def measure_model(model: Row, shape: Shape, arguments: Any, ends: tuple[Deadline, Deadline], keep: Keep) -> None:
    """Into ``model``, so that an error leaves what there was before it."""
    policy, model["remark"] = cases.make_policy(shape, arguments.device)
    case, figures = cases.make_case(policy, shape)
    model.update(figures)
    print(f"  made after {time.monotonic() - START:.0f} s; {_described(model)}", flush=True)
    steps = {head: cases.make_step(head) for head in arguments.heads}
    measure_heads(case, steps, model["heads"], arguments.rounds, ends, keep)


def run(arguments: Any, record: Row, keep: Keep) -> None:
    shapes = TINY if arguments.tiny else MODELS
    which, sizes, longest_share = TINY_LONGEST if arguments.tiny else LONGEST
    whole = Deadline(arguments.seconds)
    cases.import_peers(arguments.heads)
    shares = [shapes[name].share for name in arguments.models] + [0.0 if arguments.no_longest else longest_share]
    for number, name in enumerate(arguments.models):
        ends = whole.part(shares[number] / sum(shares[number:])), whole
        model: Row = {"model": name, "status": "ok", "reason": "", "heads": {}}
        record["models"].append(model)
        if whole.left < 0:
            model.update(status="left out", reason="no time")
            continue
        print(f"== {name} ({time.monotonic() - START:.0f} s)", flush=True)
        attempt(model, measure_model, model, shapes[name], arguments, ends, keep)
        clear()
        keep()
    if not arguments.no_longest and whole.left > 0:
        print(f"== longest batch, {which} ({time.monotonic() - START:.0f} s)", flush=True)
        row: Row = {"head": which, "tokens": "", "status": "", "reason": ""}
        attempt(row, measure_longest, shapes[which], arguments.device, sizes, whole, record["longest"], keep)
        record["longest"] += [row] if row["status"] else []
    keep()


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="two tiny models, for a CPU")
    parser.add_argument("--models", nargs="*", help=f"of {', '.join(MODELS)}; default all")
    default = [name for name in TITLES if name != "cce"]
    parser.add_argument("--heads", nargs="+", choices=list(TITLES), default=default, metavar="HEAD")
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--seconds", type=float, default=75.0, help="from the start; it ends with what there is")
    parser.add_argument("--no-longest", action="store_true", help="leave out the longest batch that fits")
    parser.add_argument("--json", type=Path, help="written after every head")
    arguments = parser.parse_args()
    known = TINY if arguments.tiny else MODELS
    arguments.models = list(known) if arguments.models is None else arguments.models
    if unknown := set(arguments.models) - set(known):
        parser.error(f"--models {' '.join(sorted(unknown))}: use {', '.join(known)}")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none; --device cpu --tiny runs the same code")
    return arguments


def main() -> None:
    arguments = parse()
    described = machine.describe("triton", "transformers", "liger-kernel", "trl")
    record: Row = {
        "machine": described,
        "command": "python benchmarks/gpu_train_step.py",
        "settings": {name: getattr(arguments, name) for name in ("models", "heads", "rounds", "seconds")},
        "work": "forward and backward of one step, without the optimizer's",
        "models": [],
        "longest": [],
    }

    def keep() -> None:
        record["seconds"] = time.monotonic() - START
        if arguments.json:
            arguments.json.write_text(json.dumps(results._finite(record), indent=1) + "\n", encoding="utf-8")

    print(json.dumps(described), flush=True)
    try:
        run(arguments, record, keep)
    finally:
        print(f"\nForward and backward of one step, without the optimizer's.\n\n{table(record)}")
        print(f"\n{machine.in_words(described)}; {time.monotonic() - START:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
