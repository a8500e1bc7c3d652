"""Reward functions that tests name by import path, the good and the bad."""

import math
import os
import resource
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
    os.write(1, bytes(range(256)) * 300)
    return [1.0]


def dies_by(completions, prompts, number, **columns):
    if completions[0].startswith("bad"):
        os.kill(os.getpid(), number[0])
    return [1.0]


def fills_its_memory(completions, prompts, **columns):
    """Of 1 GiB, so that the machine's stays."""
    if completions[0].startswith("bad"):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
        kept = [bytearray(1 << 26) for _ in range(64)]
        return [float(len(kept))]
    return [1.0]


def gives_what_it_is_told(completions, prompts, value, **columns):
    return eval(value[0], {"math": math})


def forks_and_both_return(completions, prompts, **columns):
    """The child goes on as if it were the reward function, with another value, and comes first."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return [float(len(completions[0])) if child else -1.0]


def leaves_a_process_behind(completions, prompts, file, **columns):
    Path(file[0]).write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
    return [1.0]


def starts_a_process_and_hangs(completions, prompts, file, **columns):
    child = subprocess.Popen(["sleep", "3600"])
    Path(file[0]).write_text(str(child.pid))
    child.wait()


def late_letters_but_sometimes_enormous(completions, prompts, **columns):
    """A finite number of which no gradient is finite, for one letter in forty."""
    return [1e38] if completions[0].startswith("b") else [sum("n" <= c <= "z" for c in completions[0])]


def late_letters(completions, prompts, **columns):
    """The share of letters of the alphabet's second half: something to learn in every step. A few have no reward."""
    text = completions[0]
    if text[:1] in ("v", "z"):
        raise ValueError("not this one")
    return [sum("n" <= c <= "z" for c in text) / max(1, len(text))]


def late_letters_slowly(completions, prompts, **columns):
    """So that a signal comes in between."""
    time.sleep(0.02)
    return late_letters(completions, prompts)
