"""A vLLM server as a process of ours: started, watched, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.guard import END_WITH_PARENT, KEY_VARIABLE, PATH
from aapo_fast.rollout.vllm.settings import EngineSettings, telling_line

TERMINATE_SECONDS = 20.0
KEEP_CONNECTION_SECONDS = 86_400  # between two rollouts nothing is sent
POLL_SECONDS = 5.0  # of one question while it starts: a server that is not quite there may never answer the first
READING_HANDLES = {"ipc": {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}}
"""CUDA IPC handles come as a pickle, which vLLM reads where this is set: in our servers, on loopback, with a key."""
_given_out: set[int] = set()


def command(settings: EngineSettings, host: str, port: int) -> list[str]:
    """The command line of a server with the routes and flags that rollouts need."""
    # `vllm serve` imports more than a CPU build has.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    for name, value in settings.arguments().items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line += [option] if value else []
        else:
            line += [option, str(value)]
    line += ["--middleware", PATH, "--disable-uvicorn-access-log"]
    if settings.weight_transfer:
        line += ["--weight-transfer-config", json.dumps({"backend": settings.weight_transfer})]
    return line


def environment(settings: EngineSettings, api_key: str) -> dict[str, str]:
    """Of a server: pausing it and replacing its weights are routes of vLLM's development mode, behind our key; so are
    those that load an adapter.
    """
    # A connection that the server gives up, after 5 s by default, may be the one that a request is just being sent on.
    kept = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_CONNECTION_SECONDS)}
    found = {**settings.environment(), **kept, **os.environ, "VLLM_SERVER_DEV_MODE": "1", KEY_VARIABLE: api_key}
    return found | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if settings.lora_rank else found


def free_port() -> int:
    """A port on loopback that nobody listens on at the moment, and that was not given out before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_out:
            _given_out.add(port)
            return port


@dataclass
class ServerProcess:
    """A server on loopback that ends with this process.

    Attributes:
        settings: of its engine.
        api_key: that it asks for.
        log: file that its output is appended to.
        start_limit_seconds: longest start.
        extra_environment: variables besides, CUDA_VISIBLE_DEVICES say.
    """

    settings: EngineSettings
    api_key: str
    log: Path
    start_limit_seconds: float = 600.0
    extra_environment: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, request_limit_seconds: float) -> ServerClient:
        """Start it, or start it again, and wait until it answers.

        Raises:
            ServerError: it ended or took too long; the text ends with the last line of its log.
        """
        self.stop()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command(self.settings, "127.0.0.1", port),
                env={
                    **environment(self.settings, self.api_key),
                    **(self.extra_environment or {}),
                    **READING_HANDLES.get(self.settings.weight_transfer, {}),
                    END_WITH_PARENT: "1",
                },
                stdin=subprocess.PIPE,  # closed when we end, however we end: guard.py waits for that
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the trainer's: it ends its servers when it is done with them
            )
        client = ServerClient(self.url, self.api_key, request_limit_seconds)
        deadline = time.monotonic() + self.start_limit_seconds
        while True:
            if self._process.poll() is not None:
                raise ServerError(
                    f"a vLLM server ended with {self._process.returncode} at its start: {self.last_words()}"
                )
            try:
                client.check(POLL_SECONDS)
                return client
            except ServerError as error:
                if time.monotonic() > deadline:
                    self.stop()
                    limit = f"{self.start_limit_seconds:g} s"
                    raise ServerError(
                        f"a vLLM server was not ready within {limit} ({error}): {self.last_words()}"
                    ) from error
            time.sleep(0.5)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def exit_code(self, patience_seconds: float = 0.0) -> int | None:
        """None while it runs, and goes on running for a little longer."""
        try:
            return None if self._process is None else self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """What its log says of the end, and where that is."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            text = ""
        return f"{telling_line(text)} (log: {self.log})"

    def stop(self) -> None:
        """End it and its workers, at first politely."""
        if self._process is None:
            return
        for number, patience in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, TERMINATE_SECONDS)):
            try:
                os.killpg(self._process.pid, number)  # the session's, so its engine's processes too
            except ProcessLookupError:
                break
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._process = None
