"""What an engine has measured since it was last asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from aapo_fast.types import Sample


class Figures:
    """Sums by name, of whatever threads add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def generated(self, samples: Sequence[Sequence[Sample]], start: float) -> None:
        """Completions that have been drawn since ``start``, of ``time.perf_counter``."""
        tokens = sum(len(sample.token_ids) for of_prompt in samples for sample in of_prompt)
        self.add(generation_seconds=time.perf_counter() - start, generation_tokens=tokens)

    def take(self) -> dict[str, float]:
        """The sums, which begin anew."""
        with self._lock:
            found, self._sums = self._sums, {}
        return found
