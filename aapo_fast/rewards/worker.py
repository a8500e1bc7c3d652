"""The process in which reward functions run. It serves one request after another until its pipe closes.

A separate process, because a reward function may hang in a way that nothing inside a process can end.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from aapo_fast.config import RewardConfig
from aapo_fast.rewards import functions


def main(descriptor: int) -> None:
    """Serve the scorer at the other end of the pipe with this file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit, which is the scorer's
    os.dup2(2, 1)  # what a reward function prints must not end up in the middle of the progress display's lines
    with suppress(OSError):  # where a reward function fills the machine's memory, Linux ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    pipe = Connection(descriptor)
    configs: list[RewardConfig] = pipe.recv()
    try:
        loaded = [(functions.load(config), config) for config in configs]
    except BaseException as error:  # the user's module may do anything, sys.exit included
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send([functions.source_digest(config) for config in configs])
    worker = os.getpid()
    while True:
        try:
            request, index, prompt, completion, columns = pipe.recv()
        except (EOFError, OSError):  # the trainer has gone, or was killed
            return
        function, config = loaded[index]
        try:
            if request == "check":
                answer: object = functions.check_answer(config, columns)
            else:
                answer = functions.call(function, config, prompt, completion, columns)
        except functions.RewardError as error:
            answer = str(error)
        except BaseException as error:
            answer = f"raised {type(error).__name__}: {error}"
        if os.getpid() != worker:  # a fork of the reward function's that came back here: one answer to one request
            os._exit(0)
        pipe.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
