"""A key on every route of a vLLM server. Its own ``--api-key`` guards /v1 alone, and not the routes that pause the
server or replace its weights. Loaded by the server through ``--middleware``; imports nothing of vllm.
"""

from __future__ import annotations

import hmac
import os
import signal
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "AAPO_FAST_API_KEY"
END_WITH_PARENT = "AAPO_FAST_END_WITH_PARENT"
PATH = f"{__name__}.RequireKey"

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware: 401 unless the bearer token is the one in ``AAPO_FAST_API_KEY``. ``/health`` is open.

    Raises:
        RuntimeError: the variable is not set. A guard without a key would let everybody in.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set; set it, or start the server with `aapo-fast serve`")
        self._expected = f"Bearer {key}".encode()
        if os.environ.get(END_WITH_PARENT):
            threading.Thread(target=_end_with_parent, daemon=True).start()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b'{"error": "wrong or missing key"}'})
                return
        await self._app(scope, receive, send)


def _end_with_parent() -> None:
    """End this server when its standard input closes: a trainer that is killed must not leave servers on its GPUs."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would abort an interpreter that ends otherwise
        pass
    os.kill(os.getpid(), signal.SIGTERM)
