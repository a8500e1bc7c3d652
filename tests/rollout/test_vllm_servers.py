"""Real vLLM servers over HTTP: what Hugging Face generates, before and after a sync; servers that die or hang."""

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import requests
import safetensors.torch
import torch
import vllm_support
from vllm_support import PROMPTS, gap, move, same_greedy

from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm import client as clients
from aapo_fast.rollout.vllm import process as processes
from aapo_fast.rollout.vllm import servers
from aapo_fast.rollout.vllm.client import CONTROL_SECONDS, ServerClient, ServerError
from aapo_fast.rollout.vllm.process import ServerProcess, free_port
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transport import FolderTransport
from aapo_fast.rollout.vllm.weights import named_weights
from aapo_fast.types import SamplingParams, UserError

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(900)]

KEY = "a key of the tests"
LIMIT = 120.0
MANY = [[2 + i % 40, 3, 4] for i in range(24)]
SLOW = SamplingParams(max_tokens=400)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two servers of an untied model, as the engine of a run starts them."""
    folder = tmp_path_factory.mktemp("servers")
    vllm_support.save_model(folder / "model", tied=False)
    model, tokenizer = vllm_support.load(folder / "model")
    settings = vllm_support.settings(folder / "model")
    servers = [Server(None, ServerProcess(settings, KEY, folder / f"vllm-{i}.log")) for i in range(2)]
    notes = []
    transport = FolderTransport(Path(tmp_path_factory.mktemp("weights")))
    engine = VLLMServersEngine(model, tokenizer, servers, transport, LIMIT, torch.float32, note=notes.append)
    yield engine, notes, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A server ends with the trainer, whatever ended that: its standard input closes.
    servers[0].process._process.stdin.close()
    assert servers[0].process.exit_code(CONTROL_SECONDS) is not None
    assert servers[1].process.exit_code() is None
    engine.close()
    assert not any(server.process.pid for server in servers)


@pytest.fixture
def engine(started):
    """Both servers up with the first weights, whatever the test before did to them."""
    engine, notes, first = started
    for server in engine._servers:
        server.restarts = 0
    engine._mend()
    engine.model.load_state_dict(first)
    for server in engine._servers:
        server.holds = ""
    engine.sync_weights(0)
    engine.metrics()
    notes.clear()
    engine.notes = notes
    return engine


@pytest.fixture(autouse=True)
def _stopped_servers_get_no_patience(monkeypatch):
    """They cannot end politely, so that waiting for it is all that the tests would do."""
    monkeypatch.setattr(processes, "TERMINATE_SECONDS", 1.0)


def everything(engine, sampling=SLOW, n=2):
    return engine.generate(MANY, n=n, sampling=sampling, seeds=range(len(MANY)))


def over(engine, *servers):
    """The engine over these servers alone."""
    found = VLLMServersEngine.__new__(VLLMServersEngine)
    found.__dict__ = engine.__dict__ | {"_servers": [*servers]}
    return found


def gap_of(engine, server):
    """Between what this server alone samples from and the trainer's model."""
    sampling = SamplingParams(max_tokens=6)
    return gap(engine.model, over(engine, server).generate(PROMPTS, n=2, sampling=sampling, seeds=[1, 2, 3]))


def test_tokens_and_logprobs_are_hugging_faces_before_and_after_a_sync(engine):
    truth = HFEngine(engine.model, engine.tokenizer)
    assert same_greedy(engine, truth)
    move(engine.model)
    assert not same_greedy(engine, truth)
    engine.sync_weights(1)
    assert same_greedy(engine, truth)
    assert engine.metrics()["sync_bytes"] > 1e5
    drawn = engine.generate(MANY, n=2, sampling=SamplingParams(temperature=0.7, max_tokens=6), seeds=range(24))
    found = engine.metrics()
    assert found["generation_tokens"] == sum(len(sample.token_ids) for group in drawn for sample in group)
    assert found["generation_seconds"] > 0
    assert gap(engine.model, drawn, temperature=0.7) < 1e-4
    assert {s.weight_version for group in drawn for s in group} == {1}
    assert [server.client.weight_version() for server in engine._servers] == ["1", "1"]


def test_the_reference_stays_frozen(engine):
    sampling = SamplingParams(max_tokens=6)
    engine.keep_reference()
    first = everything(engine, sampling)
    move(engine.model)
    engine.sync_weights(1)
    assert engine.generate(MANY, n=2, sampling=sampling, seeds=range(24), weights="reference") == first
    assert gap(engine.model, everything(engine, sampling)) < 1e-4


def test_both_servers_work(engine):
    """Nobody is answered until all is asked: else the quicker one gets more, and one may still compile its kernels."""
    asked, lock, all_asked = {server.name: 0 for server in engine._servers}, threading.Lock(), threading.Event()
    for server in engine._servers:
        complete = server.client.complete

        def counted(*arguments, name=server.name, complete=complete):
            with lock:
                asked[name] += 1
            if sum(asked.values()) == len(MANY):
                all_asked.set()
            assert all_asked.wait(60)
            return complete(*arguments)

        server.client.complete = counted
    everything(engine)
    assert sum(asked.values()) == len(MANY) and min(asked.values()) > len(MANY) // 4


def in_mid_generation(engine, victim, action):
    """Draw while something happens to a server that has a request under way, which it cannot have answered yet."""
    pid, complete = victim.process.pid, victim.client.complete
    timer = threading.Timer(0.5, action, [pid])
    first = threading.Lock()

    def stopped_first(*arguments):
        if first.acquire(blocking=False):  # and never released
            os.killpg(pid, signal.SIGSTOP)
            timer.start()
        return complete(*arguments)

    victim.client.complete = stopped_first
    return everything(engine)


def test_a_server_that_is_killed_is_started_again_and_nothing_is_lost(engine):
    move(engine.model)
    engine.sync_weights(1)
    before = everything(engine)
    victim = engine._servers[0]
    after = in_mid_generation(engine, victim, lambda pid: os.killpg(pid, signal.SIGKILL))
    assert [[s.token_ids for s in group] for group in after] == [[s.token_ids for s in group] for group in before]
    assert "ended with -9" in engine.notes[0] and "log:" in engine.notes[0]
    engine.generate(PROMPTS, n=1, sampling=SLOW, seeds=[0] * 3)  # mends what is still broken
    assert any("starting a server again (1 of 3)" in note for note in engine.notes)
    assert not victim.fault and victim.client.weight_version() == "1"  # and it has the weights that the other has
    assert gap_of(engine, victim) < 1e-4
    found = engine.metrics()
    assert found["server_failures"] == 1 and found["server_restarts"] == 1


def test_a_server_that_hangs_is_given_up_within_the_time_limit(engine, caplog):
    caplog.set_level(logging.DEBUG, "urllib3.connectionpool")
    before = everything(engine)
    victim = engine._servers[1]
    for server in engine._servers:
        server.client._limit = 8.0
    try:
        start = time.monotonic()
        after = in_mid_generation(engine, victim, lambda pid: None)
        seconds = time.monotonic() - start
    finally:
        for server in engine._servers:
            server.client._limit = LIMIT
    assert [[s.token_ids for s in group] for group in after] == [[s.token_ids for s in group] for group in before]
    assert "no answer within 8 s" in engine.notes[0] and seconds < 150
    # The other server was idle meanwhile, and kept its connections: else a request may be sent on one that just ends.
    assert "Resetting dropped connection" not in caplog.text


SYNC_LIMIT = 4.0


def harmed_at(path, client, pid, kills):
    """Have a server killed, or stopped for good, when it has been sent a request that it cannot have answered yet; the
    list that is returned gets the seconds until the request was given up.
    """
    call, waited = client._call, []

    def harmed(method, asked, *rest, **more):
        if asked != path:
            return call(method, asked, *rest, **more)
        os.killpg(pid, signal.SIGSTOP)
        if kills:
            threading.Timer(0.3, os.killpg, [pid, signal.SIGKILL]).start()
        start = time.monotonic()
        try:
            return call(method, asked, *rest, **more)
        finally:
            waited.append(time.monotonic() - start)

    client._call, client._limit = harmed, SYNC_LIMIT
    return waited


@pytest.mark.parametrize(
    "harms",
    [[("/pause", True), ("/collective_rpc", True)], [("/resume", True), ("/collective_rpc", False)]],
    ids=["killed before and in the load", "killed after it and hanging in it"],
)
def test_servers_that_fail_in_a_sync_are_started_again_with_the_weights_in_full(engine, monkeypatch, harms):
    monkeypatch.setattr(clients, "CONTROL_SECONDS", SYNC_LIMIT)
    move(engine.model)
    before = [server.process.pid for server in engine._servers]
    waited = [
        harmed_at(path, server.client, server.process.pid, kills)
        for server, (path, kills) in zip(engine._servers, harms, strict=True)
    ]
    engine.sync_weights(1)
    said = "\n".join(engine.notes)
    for [seconds], (path, kills) in zip(waited, harms, strict=True):
        assert seconds < SYNC_LIMIT if kills else SYNC_LIMIT <= seconds < SYNC_LIMIT + 2
        assert ("ended with -9" if kills else f"{path} gave no answer within 4 s") in said
    assert not any(server.fault for server in engine._servers)
    assert not {server.process.pid for server in engine._servers} & set(before)
    assert [server.client.weight_version() for server in engine._servers] == ["1", "1"]
    assert max(gap_of(engine, server) for server in engine._servers) < 1e-4
    found = engine.metrics()
    assert found["server_failures"] == found["server_restarts"] == 2


@pytest.mark.parametrize("path", ["/pause", "/resume"])
def test_somebody_elses_server_that_hangs_in_a_sync_is_left_out(engine, monkeypatch, path):
    monkeypatch.setattr(clients, "CONTROL_SECONDS", SYNC_LIMIT)
    move(engine.model)
    working, hanging = (Server(ServerClient(server.name, KEY, LIMIT), None) for server in engine._servers)
    working.client.check()
    theirs, pid = over(engine, working, hanging), engine._servers[1].process.pid
    waited = harmed_at(path, hanging.client, pid, kills=False)
    try:
        theirs.sync_weights(1)
        assert f"{path} gave no answer within 4 s" in hanging.fault and SYNC_LIMIT <= waited[0] < SYNC_LIMIT + 2
        assert gap(theirs.model, everything(theirs, SamplingParams(max_tokens=6))) < 1e-4  # of the other one alone
        working.fault = "gone, too"
        with pytest.raises(
            ServerError, match=f"^no vLLM server is left: gone, too; {hanging.name}{path} gave no answer"
        ):
            everything(theirs)
    finally:
        os.killpg(pid, signal.SIGCONT)


def test_a_prompt_that_is_too_long_is_the_prompts_fault(engine):
    with pytest.raises(UserError, match="600"):
        engine.generate([[2], [3] * 600], n=1, sampling=SamplingParams(max_tokens=4), seeds=[1, 2])
    assert not engine.notes and not any(server.fault for server in engine._servers)


def test_servers_want_the_key_on_every_route(engine):
    url = engine._servers[0].name
    for path in ("/v1/models", "/pause", "/collective_rpc", "/reset_prefix_cache", "/metrics"):
        assert requests.post(url + path, timeout=10).status_code == 401
    assert requests.get(url + "/health", timeout=10).status_code == 200
    with pytest.raises(ServerError, match="refused our key; set AAPO_FAST_API_KEY"):
        ServerClient(url, "wrong", LIMIT).check()


def test_servers_of_others_must_be_there_and_get_our_weights_first(engine, tmp_path):
    def other(url):
        server = Server(ServerClient(url, KEY, LIMIT), None)
        folder = FolderTransport(tmp_path / "w")
        return VLLMServersEngine(engine.model, engine.tokenizer, [server], folder, LIMIT, torch.float32)

    with pytest.raises(ServerError, match=r"no connection \(.*refused.*is the server running"):
        other(f"http://127.0.0.1:{free_port()}")
    engine.sync_weights(3)
    move(engine.model)  # another run, of another model of the same shape
    theirs = other(engine._servers[0].name)
    assert same_greedy(theirs, HFEngine(engine.model, engine.tokenizer))
    assert theirs._servers[0].client.weight_version() == "0"
    theirs.close()
    assert engine._servers[0].process.exit_code() is None  # it is not ours to end


def test_an_interrupted_run_does_not_wait_for_what_is_under_way(engine):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(MANY, n=2, sampling=SLOW, seeds=range(len(MANY)), progress=interrupt)
    assert len(everything(engine)) == len(MANY)  # and nothing of it comes out of the next call


def test_when_nobody_is_left_the_run_says_what_each_did(engine, tmp_path):
    """A server of somebody else's that is gone cannot be started again."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    lost = over(engine, Server(ServerClient(url, KEY, LIMIT), None))
    with pytest.raises(ServerError, match=f"no vLLM server is left: {url}/v1/completions: no connection"):
        lost.generate(PROMPTS, n=1, sampling=SLOW, seeds=[0] * 3)
    listener.close()


def test_nothing_is_drawn_from_weights_that_were_half_loaded(engine, tmp_path, monkeypatch):
    """Servers that break off in the middle of them stay paused, and the run stops where none may be started again."""
    monkeypatch.setattr(servers, "MAX_RESTARTS", 0)
    move(engine.model)
    broken = dict(named_weights(engine.model)) | {"z": torch.zeros(1)}  # which the model has not: the last of them
    safetensors.torch.save_file(broken, tmp_path / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(engine._transport, "path", lambda name: tmp_path)
        with pytest.raises(ServerError, match=r"^no vLLM server is left: .*/collective_rpc answered 500") as caught:
            engine.sync_weights(1)
    assert "\n" not in str(caught.value)
    for server in engine._servers:
        assert server.client._json("GET", "/is_paused", LIMIT) == {"is_paused": True}
        assert server.client.weight_version() == "0"
    with pytest.raises(ServerError, match="no vLLM server is left"):
        everything(engine)  # and leaves them so: the last test that wants them


def test_a_server_that_cannot_start_says_why(tmp_path):
    settings = vllm_support.settings(tmp_path / "nowhere")
    process = ServerProcess(settings, KEY, tmp_path / "server.log", start_limit_seconds=LIMIT)
    with pytest.raises(ServerError, match=r"ended with .* at its start: .*server\.log"):
        process.start(LIMIT)
    assert process.exit_code() is not None
    process.stop()
