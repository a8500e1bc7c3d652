"""What of the vLLM rollouts needs no vLLM: transport, client, guard, samples."""

import asyncio
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import support
import torch

from aapo_fast.rollout.requests import eos_token_ids
from aapo_fast.rollout.vllm import guard
from aapo_fast.rollout.vllm.client import CONNECTIONS, RequestError, ServerClient, ServerError
from aapo_fast.rollout.vllm.samples import Completion, make_sample, stream_seed
from aapo_fast.rollout.vllm.servers import together
from aapo_fast.rollout.vllm.settings import telling_line
from aapo_fast.rollout.vllm.transport import LOCK, PREFIX, FolderTransport
from aapo_fast.rollout.vllm.weights import frozen_copy, named_weights, size_bytes
from aapo_fast.types import SamplingParams, UserError

# --- weights and their transport -------------------------------------------------------------------------------------


def test_tied_heads_are_sent_under_both_names_and_frozen_copies_stay():
    model = support.tiny("llama tied")
    names = [name for name, _ in named_weights(model)]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    half = list(named_weights(model, torch.bfloat16))
    assert {t.dtype for _, t in half} == {torch.bfloat16} and size_bytes(half) * 2 == size_bytes(named_weights(model))
    frozen = dict(frozen_copy(model))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(frozen["lm_head.weight"] + 1, model.lm_head.weight)
    assert frozen["lm_head.weight"] is frozen["model.embed_tokens.weight"]


def test_a_folder_holds_the_policys_last_weights_and_the_references(tmp_path):
    model = support.tiny("llama tied")
    transport = FolderTransport.within(tmp_path)
    for name in ("reference", "policy-0", "policy-1"):
        transport.publish(name, named_weights(model))
    [folder] = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [LOCK, "policy-1", "reference"]
    held = safetensors.torch.load_file(folder / "policy-1" / "model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in named_weights(model))
    transport.close()
    assert not any(tmp_path.iterdir())


HOLD = """
import pathlib, sys, time
from aapo_fast.rollout.vllm.transport import FolderTransport
transport = FolderTransport.within(pathlib.Path(sys.argv[1]))
print("made", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_trainer(tmp_path):
    """Another process with a folder in ``tmp_path``, and that folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"made\n"
            [folder] = tmp_path.iterdir()
            yield process, folder
        finally:
            process.kill()


def test_what_a_killed_run_left_is_cleared_away(tmp_path, other_trainer):
    process, folder = other_trainer
    process.kill()
    process.wait()
    left = folder.rename(tmp_path / f"{PREFIX}{os.getpid()}-x")  # in a container every trainer may have the same number
    other = tmp_path / "something"
    other.mkdir()
    first, second = FolderTransport.within(tmp_path), FolderTransport.within(tmp_path)
    assert not left.exists() and other.exists() and len(list(tmp_path.iterdir())) == 3
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == [other]


def test_what_a_living_trainer_has_stays_whatever_its_number_is_here(tmp_path, other_trainer):
    """In another container or on another host its number is none of a process here."""
    _, folder = other_trainer
    theirs = folder.rename(tmp_path / f"{PREFIX}999999999-x")
    half_made = tmp_path / f"{PREFIX}999999998-x"
    half_made.mkdir()
    FolderTransport.within(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == [half_made, theirs]


def test_a_full_disk_names_the_option(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*policy-1.* vllm.weights_folder"):
            FolderTransport.within(tmp_path).publish("policy-1", [("a", torch.zeros(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"vllm.weights_folder='.*file/below' cannot be used"):
        FolderTransport.within(tmp_path / "file" / "below")


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (Completion([], [], "stop"), "after 0 tokens"),
        (Completion([2], [-1.0], "abort"), "finish_reason='abort'"),
        (Completion([2], [-1.0], None), "finish_reason=None"),
        (Completion([2, 3], [-1.0], "stop"), "1 finite log-probabilities for 2 tokens"),
        (Completion([2, 3], [-1.0, float("nan")], "length"), "1 finite log-probabilities for 2 tokens"),
    ],
)
def test_completions_that_are_not_whole_are_refused(completion, message):
    with pytest.raises(UserError, match=message):
        make_sample(support.tokenizer(), [2], completion, 0)


def test_a_whole_completion():
    sample = make_sample(support.tokenizer(), [2, 3], Completion([4, 0], [-1.0, -2.0], "stop"), 7)
    assert (sample.text, sample.prompt_ids, sample.weight_version) == ("c", (2, 3), 7)


def test_neighbouring_seeds_share_no_stream():
    seeds = [stream_seed(seed) for seed in range(200)]
    assert min(abs(a - b) for i, a in enumerate(seeds) for b in seeds[:i]) > 1000 and max(seeds) < 2**63


def test_what_ends_a_completion():
    model = support.tiny()
    model.generation_config.eos_token_id = [3, 5]
    assert eos_token_ids(model, support.tokenizer()) == {0, 3, 5}


# --- a server that is none -------------------------------------------------------------------------------------------

COMPLETION = {"index": 0, "token_ids": [2], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}


@pytest.fixture
def answering(monkeypatch):
    """A client of a server on loopback that answers as the test says, with a proxy in the environment."""
    answers = {
        "/health": "{}",
        "/v1/models": json.dumps({"data": [{"id": "m", "max_model_len": 100}]}),
        "/is_paused": "{}",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # the standard library's name
            body = answers.get(self.path)
            if isinstance(body, int):
                self.send_error(body)
                return
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answers, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def complete(url, n=1):
    return ServerClient(url, "key", 5.0).complete([2], n, SamplingParams(max_tokens=3), 1, [0])


def test_no_proxy_stands_between(answering):
    answers, url = answering
    ServerClient(url, "key", 5.0).check()
    answers["/v1/completions"] = json.dumps({"choices": [COMPLETION]})
    assert complete(url) == [Completion([2], [-1.0], "stop")]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://elsewhere"])
def test_connections_are_kept_for_all_requests_under_way(url):
    adapter = ServerClient(url, "key", 5.0)._session.get_adapter(f"{url}/v1/completions")
    assert adapter.poolmanager.connection_from_url(url).pool.maxsize == CONNECTIONS


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", "<html>", "not JSON|else than JSON"),
        ("/v1/models", "[]", "answered with list"),
        ("/v1/models", "{}", "it has no model to name"),
        ("/v1/models", json.dumps({"data": [{"id": "m", "max_model_len": 8}]}), "takes 8 tokens .* are 50"),
        ("/is_paused", None, "/is_paused does not exist; start the server with `aapo-fast serve`"),
    ],
)
def test_servers_that_cannot_be_used_say_why(answering, path, answer, message):
    answers, url = answering
    answers[path] = answer
    with pytest.raises(ServerError, match=message):
        ServerClient(url, "key", 5.0, min_model_len=50).check()


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([COMPLETION | {"logprobs": None}], RequestError, "without tokens or log-probabilities"),
        ([{"index": 0, "text": "a"}], RequestError, "without tokens or log-probabilities"),
        ([], ServerError, "0 whole completions of 1"),
        ([COMPLETION | {"finish_reason": "abort"}], ServerError, "0 whole completions of 1 .*'abort'"),
    ],
)
def test_answers_that_are_not_whole(answering, choices, error, message):
    answers, url = answering
    answers["/v1/completions"] = json.dumps({"choices": choices})
    with pytest.raises(error, match=message) as caught:
        complete(url)
    assert type(caught.value) is error  # an aborted request is drawn again, one that nobody can answer is not


@pytest.mark.parametrize(
    ("status", "error"),
    [*((status, ServerError) for status in (429, 500, 502, 503)), *((s, RequestError) for s in (400, 413, 422))],
)
def test_servers_that_refuse(answering, status, error):
    answers, url = answering
    answers["/v1/completions"] = status
    with pytest.raises(error, match=f"/v1/completions answered {status}") as caught:
        complete(url)
    assert type(caught.value) is error  # the one is asked of another server, the other ends the run


def test_the_guard_lets_in_who_has_the_key(monkeypatch):
    monkeypatch.setenv(guard.KEY_VARIABLE, "secret")
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    door = guard.RequireKey(app)
    for path, header in (("/a", b"Bearer secret"), ("/b", b"Bearer wrong"), ("/c", None), ("/health", None)):
        headers = [] if header is None else [(b"authorization", header)]
        asyncio.run(door({"type": "http", "path": path, "headers": headers}, None, send))
    assert passed == ["/a", "/health"] and [m["status"] for m in sent if "status" in m] == [401, 401]
    monkeypatch.delenv(guard.KEY_VARIABLE)
    with pytest.raises(RuntimeError, match="AAPO_FAST_API_KEY is not set"):
        guard.RequireKey(app)


# --- small parts -----------------------------------------------------------------------------------------------------


def test_the_line_that_says_most():
    log = "loading\nValueError: too long\nRuntimeError: Engine core failed. See root cause above.\nbye\n"
    assert telling_line(log) == "ValueError: too long"
    assert telling_line("1 validation error\n  Value error, no\nFor further information visit x") == "Value error, no"
    assert telling_line("bye\n") == "bye" and telling_line("") == "no output"


def test_together_raises_what_went_wrong_after_all_are_done():
    done = []

    def fail():
        raise ServerError("no")

    with pytest.raises(ServerError, match="no"):
        together([fail, lambda: done.append(1), lambda: done.append(2)])
    assert sorted(done) == [1, 2]
