"""Weights by CUDA IPC as far as a CPU goes: real servers, the driver's two calls stood in for; and who is refused."""

import contextlib
import itertools
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import vllm_ipc_stand_in as stand_in
import vllm_support
from vllm_support import PROMPTS, gap, move, same_greedy

from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm import process, servers
from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.process import ServerProcess
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transfer import IPCTransport
from aapo_fast.rollout.vllm.weights import named_weights
from aapo_fast.types import SamplingParams, UserError

pytestmark = [vllm_support.needs_vllm, pytest.mark.timeout(600)]

KEY, LIMIT = "a key of the tests", 120.0
GPU = torch.device("cuda", 0)
A_SYNC = [
    "/pause",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/resume",
]


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    """This process as a trainer with a GPU."""
    from vllm.distributed.weight_transfer import ipc_engine

    monkeypatch.setenv(stand_in.FOLDER, str(tmp_path))
    monkeypatch.setattr(ipc_engine, "reduce_tensor", stand_in.export)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", stand_in.gpu)
    for name in ("set_device", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


def server_process(folder, monkeypatch):
    """A server as a run starts it, with the stand-in in its worker."""
    settings = vllm_support.settings(folder / "model", weight_transfer="ipc")
    line = process.command
    extension = ["--worker-extension-cls", "vllm_ipc_stand_in.Worker"]
    monkeypatch.setattr(process, "command", lambda *given: [*line(*given), *extension])
    path = os.pathsep.join([str(Path(stand_in.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return ServerProcess(settings, KEY, folder / "vllm.log", extra_environment={"PYTHONPATH": path})


@vllm_support.needs_engine
def test_weights_arrive_in_the_order_of_every_sync_and_a_stale_head_shows(tmp_path, monkeypatch, without_gpu):
    vllm_support.save_model(tmp_path / "model", tied=True)
    model, tokenizer = vllm_support.load(tmp_path / "model")
    ours = server_process(tmp_path, monkeypatch)
    server = Server(None, ours)
    engine = VLLMServersEngine(model, tokenizer, [server], IPCTransport([ours], GPU), LIMIT, torch.float32)
    with contextlib.closing(engine):
        truth = HFEngine(model, tokenizer)
        assert same_greedy(engine, truth)
        for version in (1, 2):
            move(model, seed=version)
            assert not same_greedy(engine, truth)
            asked = []
            listen(server.client, asked, monkeypatch)
            engine.sync_weights(version)
            assert asked == A_SYNC
            assert same_greedy(engine, truth) and server.client.weight_version() == str(version)
        ours.stop()  # what is published outlives a server, and the policy's next step
        assert same_greedy(engine, truth) and engine.metrics()["server_restarts"] == 1
        move(model, seed=3)
        monkeypatch.setattr(servers, "named_weights", without_head)
        engine.sync_weights(3)
        drawn = engine.generate(PROMPTS * 8, n=2, sampling=SamplingParams(max_tokens=6), seeds=range(24))
        assert gap(model, drawn) > 0.05


def test_memory_that_cannot_be_shared_is_no_fault_of_the_server(monkeypatch, without_gpu):
    """The run stops, where a server that failed would be started again and again."""
    from vllm.distributed.weight_transfer import ipc_engine

    def refuse(tensor):
        raise RuntimeError("pidfd_open is not supported")

    monkeypatch.setattr(ipc_engine, "reduce_tensor", refuse)
    monkeypatch.setattr(ServerClient, "_call", lambda *_, **__: None)
    transport = IPCTransport([], GPU)
    transport.publish("policy-1", [("a", torch.ones(2))])
    with pytest.raises(UserError, match=r"could not be shared \(pidfd_open.*expandable segments.*use 'file'") as error:
        transport.load(ServerClient("http://127.0.0.1:1", KEY, 1.0), "policy-1")
    assert not isinstance(error.value, ServerError)


def test_what_is_published_is_a_copy_and_one_policy_at_a_time(without_gpu):
    transport, weight = IPCTransport([], GPU), torch.ones(3)
    transport.publish("reference", [("a", weight)])
    for version in (1, 2):
        transport.publish(f"policy-{version}", [("a", weight)])
        weight += 1
    assert {name: pairs[0][1].tolist() for name, pairs in transport._published.items()} == {
        "reference": [1.0] * 3,
        "policy-2": [2.0] * 3,
    }


def test_a_server_of_somebody_elses_gets_no_handles_and_is_left_as_it_is(tmp_path):
    """On this host, with our key, answering everything: it is not even paused."""
    vllm_support.save_model(tmp_path / "model", tied=False)
    model, tokenizer = vllm_support.load(tmp_path / "model")
    ours = ServerProcess(vllm_support.settings(tmp_path / "model"), KEY, tmp_path / "vllm.log")
    ours.url = "http://127.0.0.1:1"
    with answering_everything() as (url, asked):
        theirs = Server(ServerClient(url, KEY, LIMIT), None)
        with pytest.raises(UserError, match=rf"{url} was not started by this run.*use 'nccl' or 'file'") as refused:
            VLLMServersEngine(model, tokenizer, [theirs], IPCTransport([ours], GPU), LIMIT, torch.float32)
    assert "\n" not in str(refused.value)
    assert asked == ["/health", "/v1/models", "/is_paused"]


def test_there_is_no_ipc_without_a_gpu():
    with pytest.raises(UserError, match="shares a GPU's memory, and the policy is on cpu; use 'file'"):
        IPCTransport([], torch.device("cpu"))


def test_servers_of_our_own_alone_read_pickles(tmp_path, monkeypatch):
    """``aapo-fast serve`` may listen on any address: what starts that never sets the variable."""
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    started = []

    def popen(line, env, **_):
        started.append((line, env.get("VLLM_ALLOW_INSECURE_SERIALIZATION")))
        raise KeyboardInterrupt

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    for way in ("", "nccl", "ipc"):
        settings = vllm_support.settings(tmp_path, weight_transfer=way)
        with pytest.raises(KeyboardInterrupt):
            ServerProcess(settings, KEY, tmp_path / "vllm.log").start(LIMIT)
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in process.environment(settings, KEY)
    assert [insecure for _, insecure in started] == [None, None, "1"]
    for (line, _), backend in zip(started, ([], ['{"backend": "nccl"}'], ['{"backend": "ipc"}']), strict=True):
        assert [after for option, after in itertools.pairwise(line) if "weight-transfer" in option] == backend
        assert line[line.index("--host") + 1] == "127.0.0.1"


def listen(client, asked, monkeypatch):
    """Write down the routes that are posted to."""
    call = ServerClient._call

    def listening(method, path, *more, **arguments):
        asked.append(path)
        return call(client, method, path, *more, **arguments)

    monkeypatch.setattr(client, "_call", listening)


def without_head(*given):
    return ((name, tensor) for name, tensor in named_weights(*given) if name != "lm_head.weight")


@contextlib.contextmanager
def answering_everything():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.partition("?")[0])
            body = b'{"data": [{"id": "m", "max_model_len": 512}], "success": true}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
