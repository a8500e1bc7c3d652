"""One piece of work at a time beside the training: a checkpoint that is written while the next step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs what it is given in a thread of its own."""

    def __init__(self) -> None:
        # Not Thread.join: interrupted by Ctrl-C, CPython 3.11 takes the thread for ended.
        self._done = threading.Event()
        self._done.set()
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin ``work``, after what was begun before.

        Raises:
            Exception: what that raised.
        """
        self.finish()
        self._done.clear()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
            finally:
                self._done.set()

        threading.Thread(target=run, name="checkpoint").start()

    def finish(self) -> None:
        """Wait for what was begun, and raise what it raised. Ctrl-C is raised when it is done: it must not go on
        writing in a folder that is not ours any more.
        """
        interrupt: BaseException | None = None
        while not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt as asked:
                interrupt = asked
        failure, self._error = self._error or interrupt, None
        if failure is not None:
            raise failure
