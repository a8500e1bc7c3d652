"""Reward functions that tests name by import path, the good and the bad."""

import math
import os
import subprocess
import time
from pathlib import Path


def starts_with_answer(completions, prompts, answer, **columns):
    return [float(c.startswith(a)) for c, a in zip(completions, answer, strict=True)]


def starts_with_answer_slowly(completions, prompts, answer, **columns):
    time.sleep(0.05)
    return starts_with_answer(completions, prompts, answer)


def number(completions, prompts, **columns):
    return 0.5


def sometimes_raises(completions, prompts, **columns):
    if completions[0].startswith("bad"):
        raise KeyError("no such thing")
    return [1.0]


def fails_on_some(completions, prompts, **columns):
    if completions[0][:1] in "abcdefghij":
        raise ValueError("not this one")
    return [1.0]


def always_raises(completions, prompts, **columns):
    raise RuntimeError("broken grader")


def gives_nan(completions, prompts, **columns):
    return [math.nan]


def gives_none(completions, prompts, **columns):
    return [None]


def gives_three(completions, prompts, **columns):
    return [1.0, 2.0, 3.0]


def gives_text(completions, prompts, **columns):
    return ["good"]


def hangs(completions, prompts, **columns):
    if completions[0].startswith("bad"):
        time.sleep(3600)
    return [1.0]


def ends_the_process(completions, prompts, **columns):
    if completions[0].startswith("bad"):
        os._exit(7)
    return [1.0]


def prints(completions, prompts, **columns):
    print("a reward function may print")
    return [1.0]


def starts_a_process_and_hangs(completions, prompts, file, **columns):
    child = subprocess.Popen(["sleep", "3600"])
    Path(file[0]).write_text(str(child.pid))
    child.wait()


def late_letters(completions, prompts, **columns):
    """The share of letters of the alphabet's second half: something to learn in every step. A few have no reward."""
    text = completions[0]
    if text[:1] in ("v", "z"):
        raise ValueError("not this one")
    return [sum("n" <= c <= "z" for c in text) / max(1, len(text))]
