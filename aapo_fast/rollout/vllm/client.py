"""One vLLM server over HTTP: completions, health, and the order of a weight sync. Every wait has its time limit."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import requests

from aapo_fast.rollout.vllm.samples import FINISHED, Completion, stream_seed
from aapo_fast.types import SamplingParams, UserError

CONTROL_SECONDS = 60.0
"""Limit of what a server answers at once, busy or not: health, pause, resume, versions."""

CONNECTIONS = 256


class ServerError(UserError):
    """A server that cannot be used; the text says which, what it did, and what to do."""


class RequestError(ServerError):
    """A request that no server will take: a prompt that is too long, say."""


class ServerClient:
    """A server that was started by ``aapo-fast serve``, or as its flags say.

    Args:
        url: "http://127.0.0.1:8000".
        api_key: sent with every request; empty is none.
        time_limit_seconds: of one request for completions, and of one transfer of weights.
        min_model_len: tokens of prompt and completion together that it has to take.
    """

    def __init__(self, url: str, api_key: str, time_limit_seconds: float, min_model_len: int = 0) -> None:
        self.url = url.rstrip("/")
        self._limit, self._min_model_len = time_limit_seconds, min_model_len
        self._model = ""
        self._session = requests.Session()
        # No proxies, which would see the key, and no .netrc, which would replace it.
        self._session.trust_env = False
        for scheme in ("http://", "https://"):  # in full: the longest prefix wins, and the session brings these two
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
        self._session.headers.update({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def check(self, limit_seconds: float = CONTROL_SECONDS) -> None:
        """Raises ServerError unless the server is there, lets us in, and has the routes that a weight sync needs."""
        self._call("GET", "/health", limit_seconds)
        models = self._json("GET", "/v1/models", limit_seconds)
        try:
            self._model, length = models["data"][0]["id"], models["data"][0]["max_model_len"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.url} is no vLLM server: it has no model to name") from error
        if length < self._min_model_len:
            raise ServerError(
                f"{self.url} takes {length} tokens of prompt and completion, and data.max_prompt_tokens + "
                f"rollout.max_tokens are {self._min_model_len}; start it with a larger --max-model-len"
            )
        self._call("GET", "/is_paused", limit_seconds)

    def complete(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: SamplingParams,
        seed: int,
        eos: Collection[int],
        adapter: str = "",
    ) -> list[Completion]:
        """n completions of one prompt, ended by a token of ``eos``; ``adapter`` names one that was loaded."""
        body: dict[str, Any] = {
            "model": adapter or self._model,
            "prompt": list(prompt),
            "n": n,
            "seed": stream_seed(seed),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # What a server that was not started by us might otherwise take from the model's generation_config.json.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": sorted(eos),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,  # that of the sampled token alone
            "return_token_ids": True,
        }
        answer = self._json("POST", "/v1/completions", self._limit, json=body)
        try:
            found = sorted(answer["choices"], key=lambda choice: choice["index"])
            completions = [
                Completion(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in found
            ]
        except (KeyError, TypeError) as error:
            raise RequestError(
                f"{self.url} gives completions without tokens or log-probabilities; it has to be a vLLM server of "
                f"version 0.32 or 0.33 ({type(error).__name__}: {error})"
            ) from error
        unfinished = [c.finish_reason for c in completions if c.finish_reason not in FINISHED]
        if len(completions) != n or unfinished:  # an aborted request answers, too
            raise ServerError(
                f"{self.url} gave {len(completions) - len(unfinished)} whole completions of {n} asked for"
                + (f" (finish_reason={unfinished[0]!r})" if unfinished else "")
            )
        return completions

    def weight_version(self) -> str:
        """What the last sync called the weights that the server holds."""
        return str(self._json("GET", "/weight_info", CONTROL_SECONDS).get("weight_version"))

    @contextmanager
    def replacing_weights(self, version: int) -> Iterator[None]:
        """Requests wait while the weights are replaced inside; then the prefix cache is reset and the version set.

        Where that fails the server stays paused, for its weights may be half of each.
        """
        self._call("POST", "/pause", CONTROL_SECONDS, params={"mode": "keep"})
        yield
        if not self._json("POST", "/reset_prefix_cache", CONTROL_SECONDS).get("success"):
            raise ServerError(
                f"{self.url} did not reset its prefix cache after a weight sync: something is still generating. "
                "Let the trainer be its only user"
            )
        self._call("POST", "/update_weight_version", CONTROL_SECONDS, json={"new_version": str(version)})
        self._call("POST", "/resume", CONTROL_SECONDS)

    def load_from_folder(self, folder: str) -> None:
        """Have every worker read the weights in ``folder``, which it must see under the same name."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._call("POST", "/collective_rpc", self._limit, json=body)

    def load_adapter(self, name: str, folder: str) -> None:
        """Have it read an adapter in ``folder``, which it must see under the same name, in place of any so called."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        self._call("POST", "/v1/load_lora_adapter", self._limit, json=body)

    # --- vLLM's own transfer, which its trainer side drives through these (VLLMWeightSyncClient) -----------------

    def world_size(self) -> int:
        """GPUs of the server."""
        return int(self._json("GET", "/get_world_size", CONTROL_SECONDS)["world_size"])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", self._limit, json={"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("POST", "/shutdown_weight_transfer_engine", self._limit)

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update", self._limit)

    def update_weights(self, update_info: Any) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:  # what JSON cannot carry; the route takes it pickled, and in no other form
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            update_info = update_info | {"ipc_handles": None, "ipc_handles_pickled": pickled}
        self._call("POST", "/update_weights", self._limit, json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", self._limit, json={"weight_version": weight_version})

    def _json(self, method: str, path: str, limit: float, **arguments: Any) -> dict[str, Any]:
        try:
            found = self._call(method, path, limit, **arguments).json()
        except ValueError as error:
            raise ServerError(
                f"{self.url}{path} answered with something else than JSON; is it a vLLM server?"
            ) from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} answered with {type(found).__name__}; is it a vLLM server?")
        return found

    def _call(self, method: str, path: str, limit: float, **arguments: Any) -> requests.Response:
        try:
            response = self._session.request(method, self.url + path, timeout=limit, **arguments)
        except requests.Timeout as error:
            raise ServerError(f"{self.url}{path} gave no answer within {limit:g} s; is the server stuck?") from error
        except requests.RequestException as error:
            raise ServerError(f"{self.url}{path}: no connection ({_reason(error)}); is the server running?") from error
        if response.status_code == 401:
            raise ServerError(f"{self.url}{path} refused our key; set AAPO_FAST_API_KEY to the server's")
        if response.status_code == 404:
            raise ServerError(
                f"{self.url}{path} does not exist; start the server with `aapo-fast serve`, or with "
                "VLLM_SERVER_DEV_MODE=1"
            )
        if not response.ok:
            kind = RequestError if response.status_code in (400, 413, 422) else ServerError
            raise kind(f"{self.url}{path} answered {response.status_code}: {_complaint(response)}")
        return response


def _reason(error: BaseException) -> str:
    """The innermost cause: "Connection refused" and not the four wrappings round it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _complaint(response: requests.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    found = body.get("error", body.get("detail", body)) if isinstance(body, Mapping) else body
    return str(found.get("message", found) if isinstance(found, Mapping) else found)[:300]
