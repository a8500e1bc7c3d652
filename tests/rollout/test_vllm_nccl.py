"""Weights by NCCL as far as a CPU goes: senders that hang and fail, and the servers that come after them."""

import threading
import time
from contextlib import nullcontext

import pytest
import support
import torch
import vllm_support

from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transfer import NCCLTransport

pytestmark = vllm_support.needs_vllm

LIMIT = 2.0
NAMES = ["a", "b"]


class Senders:
    """In the place of vLLM's, whose ``trainer_init`` and ``send_weights`` do for each server what ``doing`` says."""

    def __init__(self):
        self.doing, self.made, self.sent, self.shut = {}, [], [], []
        self.released, self.woken = threading.Event(), threading.Event()

    def trainer_init(self, init_info, *, client, source):
        self.made.append(client.url)
        self.act(client, "trainer_init")
        return Sender(self, client, source)

    def act(self, client, where):
        self.doing.get((client.url, where), lambda: None)()

    def hang(self):
        self.released.wait()
        self.woken.set()


class Sender:
    def __init__(self, senders, client, source):
        self.senders, self.client, self.source = senders, client, source

    def send_weights(self):
        self.senders.act(self.client, "send_weights")
        self.senders.sent.append((self.client.url, [name for name, _ in self.source]))

    def shutdown(self):
        self.senders.shut.append(self.client.url)


@pytest.fixture
def senders(monkeypatch):
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    found = Senders()
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", found.trainer_init)
    monkeypatch.setattr(ServerClient, "world_size", lambda self: 1)
    yield found
    found.released.set()  # no thread of a test outlives it


@pytest.fixture
def transport():
    made = NCCLTransport("127.0.0.1", time_limit_seconds=LIMIT)
    made.publish("policy-1", [(name, torch.ones(2)) for name in NAMES])
    return made


def client_of(name):
    return ServerClient(f"http://{name}", "", 1.0)


@pytest.mark.parametrize("where", ["trainer_init", "send_weights"])
def test_a_server_that_hangs_costs_the_others_nothing_but_its_limit(senders, transport, where):
    hanging, slow = client_of("hanging"), client_of("slow")
    has_begun, errors = threading.Event(), []

    def hang():
        has_begun.set()
        senders.hang()

    def load(client):
        try:
            transport.load(client, "policy-1")
        except ServerError as error:
            errors.append(str(error))

    # The slow one waits for the hanging one's whole limit, and needs a good part of its own.
    senders.doing = {(hanging.url, where): hang, (slow.url, "send_weights"): lambda: time.sleep(LIMIT / 3)}
    start = time.monotonic()
    first = threading.Thread(target=load, args=(hanging,), daemon=True)
    first.start()
    assert has_begun.wait(30)
    load(slow)
    first.join(30)
    assert errors == ["http://hanging: weights were not transferred within 2 s; restart the server"]
    assert senders.sent == [(slow.url, NAMES)]
    assert LIMIT <= time.monotonic() - start < 30 and not senders.woken.is_set()

    senders.doing = {}
    again = client_of("hanging")  # it was started again
    for client in (again, slow):
        transport.load(client, "policy-1")
    assert senders.sent[1:] == [(again.url, NAMES), (slow.url, NAMES)]
    assert senders.made == [hanging.url, slow.url, again.url]
    senders.released.set()
    assert senders.woken.wait(30)
    transport.load(slow, "policy-1")  # what wakes up late is in nobody's way
    assert set(transport._senders) == {again, slow}


@pytest.mark.parametrize("where", ["trainer_init", "send_weights"])
def test_a_sender_that_fails_says_why_and_is_made_anew(senders, transport, where):
    client = client_of("failing")

    def fail():
        raise RuntimeError("NCCL error: unhandled system error")

    senders.doing = {(client.url, where): fail}
    with pytest.raises(ServerError, match=r"failing: weights could not be transferred: NCCL error: unhandled") as error:
        transport.load(client, "policy-1")
    assert isinstance(error.value.__cause__, RuntimeError)
    senders.doing = {}
    transport.load(client, "policy-1")
    assert senders.made == [client.url] * 2 and senders.sent == [(client.url, NAMES)]


def test_a_later_transfer_that_fails_leaves_no_communicator(senders, transport):
    client = client_of("failing")
    transport.load(client, "policy-1")

    def fail():
        raise RuntimeError("NCCL error: remote process exited")

    senders.doing = {(client.url, "send_weights"): fail}
    with pytest.raises(ServerError, match="remote process exited"):
        transport.load(client, "policy-1")
    assert senders.shut == [client.url] and not transport._senders


class Process:
    """In the place of a server of ours: every start has another port."""

    def __init__(self):
        self.starts = 0

    def start(self, limit):
        self.starts += 1
        return client_of(f"start-{self.starts}")

    def exit_code(self, seconds=0.0):
        return None

    def stop(self):
        pass


def test_a_server_that_is_started_again_leaves_no_communicator(senders, monkeypatch):
    """Of its first process; it would keep its memory on the GPU until the run ends."""
    monkeypatch.setattr(ServerClient, "replacing_weights", lambda self, version: nullcontext())
    transport, server = NCCLTransport("127.0.0.1", time_limit_seconds=LIMIT), Server(None, Process())
    engine = VLLMServersEngine(support.tiny(), support.tokenizer(), [server], transport, LIMIT, torch.float32)
    engine.sync_weights(1)
    assert senders.made == ["http://start-1"] and senders.shut == []
    engine._failed(server, ServerError("it is gone"))
    engine._mend()
    assert senders.made == ["http://start-1", "http://start-2"] and senders.shut == ["http://start-1"]
    assert list(transport._senders) == [server.client] and server.client.url == "http://start-2"
    engine.close()
    assert senders.shut == ["http://start-1", "http://start-2"]
