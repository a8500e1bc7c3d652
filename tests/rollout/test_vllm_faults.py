"""A run on two real vLLM servers, of which one is killed, then one hangs, then one refuses: no sample is lost by it."""

import http.server
import os
import signal
import threading
from collections import Counter

import pytest
import resume_support
import support
import vllm_support

from aapo_fast import config
from aapo_fast.rollout.vllm import process
from aapo_fast.trainer import loop, setup
from aapo_fast.trainer.records import read_lines

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(900)]

LIMIT = 400.0


@pytest.fixture
def refusing():
    """The address of a server that is too busy for anything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # the standard library's name
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Harms(resume_support.Notes):
    """Does something to a server at the end of some steps."""

    def __init__(self, harms):
        super().__init__()
        self.harms = harms

    def step(self, record, steps):
        self.harms.get(record["step"], lambda: None)()


def test_a_run_whose_servers_fail_in_turn_loses_no_sample(tmp_path, monkeypatch, refusing):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    tree = support.tiny_run(
        tmp_path, folder, rollout__engine="vllm_server", vllm__num_servers=2, vllm__time_limit_seconds=LIMIT,
        vllm__cpu_kv_cache_gib=1, vllm__weights_folder=str(tmp_path / "weights"), data__max_prompt_tokens=64,
        train__steps=8, train__learning_rate=3e-3, run__samples_kept=32,
    )  # fmt: skip
    engines, real = [], setup.make_engine

    def kept(*arguments):
        engines.append(real(*arguments))
        return engines[0]

    def on_next_request(number, harm):
        """The server has a request then, which it cannot have answered."""
        server = engines[0]._servers[number]
        complete, once = server.client.complete, threading.Lock()

        def harmed(*arguments):
            if once.acquire(blocking=False):
                harm(server)
            return complete(*arguments)

        server.client.complete = harmed

    def kill(server):
        os.killpg(server.process.pid, signal.SIGSTOP)
        threading.Timer(0.3, os.killpg, [server.process.pid, signal.SIGKILL]).start()

    def hang(server):
        server.client._limit = 5.0
        os.killpg(server.process.pid, signal.SIGSTOP)

    def refuse(server):
        server.client.url = refusing

    monkeypatch.setattr(process, "TERMINATE_SECONDS", 1.0)  # a server that was stopped cannot end politely
    monkeypatch.setattr(setup, "make_engine", kept)
    harms = Harms({2: lambda: on_next_request(0, kill), 4: lambda: on_next_request(1, hang),
                   6: lambda: on_next_request(0, refuse)})  # fmt: skip
    assert loop.train(config.parse(tree), harms)["status"] == "finished"
    for said in ("ended with -9", "no answer within 5 s", "/v1/completions answered 503"):
        assert said in harms.text

    records, lines = (read_lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "samples"))
    assert [r["step"] for r in records if r.get("engine_server_failures")] == [3, 5, 7]
    assert sum(r.get("engine_server_restarts", 0) for r in records) >= 2  # the last one's is perhaps still to come
    schedule = {step: Counter() for step in range(1, 9)}
    for line in lines:
        schedule[line["step"]][line["prompt"]] += 1
        assert line["reward"] == line["completion"].startswith("x")  # and no zero for want of an answer
    assert all(sorted(counts.values()) == [8] * 4 for counts in schedule.values())  # each once, all of them
    assert all(r["reward_failures"] == 0 for r in records)
    trained = [r for r in records if r["updated"]]
    assert len(trained) >= 6 and all(r["rollout_mean_gap"] < 1e-4 for r in trained)  # of the weights of their step
    versions = {line["step"]: line["weight_version"] for line in lines}
    assert versions == {r["step"]: sum(e["updated"] for e in records[: r["step"] - 1]) for r in records}
