"""vLLM in the trainer's process: the colocated engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from aapo_fast.models.lora import has_adapter
from aapo_fast.rollout.figures import Figures
from aapo_fast.rollout.requests import check_prompts, eos_token_ids, in_turn
from aapo_fast.rollout.vllm.adapter import LocalLLM
from aapo_fast.rollout.vllm.held import AdapterOnly, WholeModel
from aapo_fast.rollout.vllm.samples import make_sample
from aapo_fast.rollout.vllm.settings import EngineSettings
from aapo_fast.types import Progress, Sample, SamplingParams, Weights


class VLLMEngine:
    """The rollout engine over an in-process vLLM; see ``types.RolloutEngine``.

    Args:
        model: the policy, whose present weights, or adapter, are sent at each sync.
        tokenizer: decodes completions.
        settings: how the engine is started. It reads the model's first weights from ``settings.model``.

    Raises:
        UserError: vllm is not installed, or the engine does not start.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: EngineSettings) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.weight_version = 0
        self._eos = eos_token_ids(model, tokenizer)
        self._llm = LocalLLM(settings)
        self._adapted = has_adapter(model)
        self._held: AdapterOnly | WholeModel = (AdapterOnly if self._adapted else WholeModel)(self._llm, model)
        self._asleep = False
        self._figures = Figures()

    def keep_reference(self) -> None:
        if self.weight_version != 0:
            raise RuntimeError("keep_reference: the policy has moved already; call it before the first update")
        self._held.keep_reference()

    def sync_weights(self, version: int) -> None:
        self.weight_version = version
        if not self._asleep:  # else when it wakes up
            self._hold("policy")

    def load_checkpoint(self, folder: Path) -> None:
        """Load weights from a folder, as a trainer would that knows no other way; for comparison."""
        self._held.forget()
        self._llm.load_from_folder(folder)

    def free_memory(self) -> None:
        self._asleep = self._held.sleep()

    def metrics(self) -> dict[str, float]:
        return self._figures.take()

    def close(self) -> None:
        self._held.close()
        self._llm.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weights: Weights | Sequence[Weights] = "policy",
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """See ``types.RolloutEngine.generate``.

        Raises:
            UserError: an empty prompt; a completion that is not whole.
        """
        if not isinstance(weights, str) and not self._adapted:
            return in_turn(self.generate, prompts, seeds, weights, progress, n=n, sampling=sampling)
        check_prompts(prompts, seeds)
        each = [weights] * len(prompts) if isinstance(weights, str) else list(weights)
        for wanted in dict.fromkeys(each):  # several with an adapter only, which leaves the base model where it is
            self._hold(wanted)
        start, total = time.perf_counter(), len(prompts)
        adapted = [self._adapted and wanted == "policy" for wanted in each]
        drawn = self._llm.generate(
            prompts, n, sampling, seeds, self._eos, adapted, lambda done: progress and progress(done, total)
        )
        samples = [
            [make_sample(self.tokenizer, prompt, completion, self._version(wanted)) for completion in completions]
            for prompt, completions, wanted in zip(prompts, drawn, each, strict=True)
        ]
        self._figures.generated(samples, start)
        return samples

    def _version(self, weights: Weights) -> int:
        return 0 if weights == "reference" else self.weight_version

    def _hold(self, weights: Weights) -> None:
        """Have the engine awake with the weights that are wanted."""
        start = time.perf_counter()
        sent = self._held.hold(weights, self.weight_version)
        self._asleep = False
        if sent >= 0:
            self._figures.add(sync_seconds=time.perf_counter() - start, sync_bytes=sent)
