"""TRL's vLLM engine in AAPO's service: it holds the policy's weights, and in its turn the reference's.

Policy and reference are drawn by one engine with the same sampling parameters, so that all that can differ between
them is the weights. TRL decides when its engine is loaded (``VLLMGeneration.sync_weights``); here is decided with what.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aapo_fast.models.lora import checkpoint_state, has_adapter, is_plain_lora

NOT_LOADED = -1
"""TRL's mark, in ``_last_loaded_step``, for an engine whose weights are not those of any step."""


class EngineWeights:
    """What the vLLM engine of a trainer is loaded with.

    Args:
        trainer: a ``GRPOTrainer`` with ``use_vllm=True``; its engine asks this from now on.
        reference: the frozen model; None where it is the trainer's model without its adapter.
    """

    def __init__(self, trainer: Any, reference: Any) -> None:
        self.trainer, self.reference = trainer, reference
        self.of_reference = False
        trainer.vllm_generation._iter_named_params = self.named

    @contextmanager
    def reference_in_place(self) -> Iterator[None]:
        """While it lasts the engine draws from the reference; before its next draw it is loaded with the policy."""
        self.trainer._last_loaded_step, self.of_reference = NOT_LOADED, True
        try:
            yield
        finally:
            self.trainer._last_loaded_step, self.of_reference = NOT_LOADED, False

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors by the names of the checkpoint; tied ones once, as vLLM wants them.

        An adapter is added to a copy of each weight. TRL's own iteration merges it into the base and takes it out
        again, which rounds the base each time: the reference would drift away from what it was.
        """
        model = self.trainer.model
        if has_adapter(model):
            names = {name.replace(".base_layer.", ".") for name, _ in model.get_base_model().named_parameters()}
            state = checkpoint_state(model, merged=not self.of_reference)
            yield from ((name, tensor) for name, tensor in state if name in names)
            return
        for name, parameter in (self.reference if self.of_reference else model).named_parameters():
            yield name, parameter.detach()


def without_weights_for_an_engine(model: Any) -> Iterator[str]:
    """Why an adapter cannot be loaded into an engine, in a line with the remedy."""
    if has_adapter(model) and not is_plain_lora(model):
        yield (
            "use_vllm=True with an adapter that is not plain LoRA on unquantized linear layers (but DoRA, "
            "modules_to_save, embeddings, biases, 4 bits, ...): the engine would be loaded with other weights than are "
            "trained; use plain LoRA, or use_vllm=False"
        )
