"""One piece of work at a time beside the training: a checkpoint that is written while the next step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs what it is given in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin ``work``, after what was begun before.

        Raises:
            Exception: what that raised.
        """
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait for what was begun, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
