"""Which weights an in-process vLLM holds, and how it comes to hold others: the whole model, or an adapter on it.

whole model    loaded anew at each sync, for the reference, and after each sleep
adapter        the base model stays, and is the reference; a sync adds the adapter under a name of its own version
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from aapo_fast.models.lora import adapter_state
from aapo_fast.rollout.vllm.adapter import LocalLLM
from aapo_fast.rollout.vllm.transport import SHARED_MEMORY, AdapterTransport
from aapo_fast.rollout.vllm.weights import frozen_copy, named_weights, size_bytes
from aapo_fast.types import Weights

NOTHING = ("none", -1)


class Held(Protocol):
    """The weights of an engine."""

    def keep_reference(self) -> None:
        """The policy's present weights are those of the reference from now on."""

    def hold(self, weights: Weights, version: int) -> int:
        """Have the engine awake and ready to generate with these weights; bytes that were sent to it, -1 for none."""

    def sleep(self) -> bool:
        """Give the device's memory back until the next ``hold``; False where that cannot be."""

    def close(self) -> None:
        """Leave nothing behind."""


class WholeModel:
    """All weights, of the policy or of the reference.

    The engine always knows which it holds, and loads others before it generates with them, whatever it may have kept in
    its sleep.
    """

    def __init__(self, llm: LocalLLM, model: nn.Module) -> None:
        self._llm, self._model = llm, model
        self._holds: tuple[str, int] = ("policy", 0)
        self._asleep = False
        self._reference: list[tuple[str, Tensor]] | None = None

    def keep_reference(self) -> None:
        self._reference = frozen_copy(self._model)

    def hold(self, weights: Weights, version: int) -> int:
        wanted = ("policy", version)  # before the first update the policy is the reference
        if weights == "reference" and version != 0:
            wanted = ("reference", 0)
            if self._reference is None:
                raise RuntimeError("the reference weights were not kept; call keep_reference before the first update")
        if self._holds == wanted:
            return -1
        source = named_weights(self._model) if wanted[0] == "policy" else iter(self._reference or [])
        self._holds = NOTHING  # until the load has succeeded
        if self._asleep:
            self._llm.wake_for_loading()
        self._llm.load(source)
        if self._asleep:
            self._llm.wake_for_generating()
        self._holds, self._asleep = wanted, False
        return size_bytes(named_weights(self._model))

    def forget(self) -> None:
        """Somebody else has loaded weights."""
        self._holds = NOTHING

    def sleep(self) -> bool:
        if self._llm.sleep(keep_weights=False):
            self._asleep, self._holds = True, NOTHING
        return self._asleep

    def close(self) -> None:
        """Nothing but memory."""


class AdapterOnly:
    """The base model for good, and the policy's adapter: a few megabytes a sync instead of gigabytes."""

    def __init__(self, llm: LocalLLM, model: Any) -> None:
        self._llm, self._model = llm, model
        self._holds, self._asleep = -1, False
        self._files = AdapterTransport.within(SHARED_MEMORY, model)

    def keep_reference(self) -> None:
        """The base model is the reference."""

    def hold(self, weights: Weights, version: int) -> int:
        if self._asleep:
            self._llm.wake_for_loading()
            self._llm.wake_for_generating()
            self._asleep = False
        if weights == "reference" or self._holds == version:
            return -1
        state = adapter_state(self._model)
        self._holds = -1  # until the load has succeeded
        self._files.publish(f"policy-{version}", state.items())
        self._llm.load_adapter(self._files.path(f"policy-{version}"), version)
        self._holds = version
        return size_bytes(state.items())

    def forget(self) -> None:
        """Somebody else has loaded weights."""
        raise RuntimeError("an engine with an adapter keeps its base weights")

    def sleep(self) -> bool:
        self._asleep = self._llm.sleep(keep_weights=True)
        return self._asleep

    def close(self) -> None:
        self._files.close()
