"""Whole runs on vLLM: a tiny model learns as it does on the other engine; weights that do not arrive stop the run."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import resume_support
import support
import torch
import vllm_support
from safetensors.torch import load_file
from vllm_support import PROMPTS, gap, move, same_greedy

from aapo_fast import config
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.rollout.vllm import local, servers
from aapo_fast.rollout.vllm.client import ServerClient, ServerError
from aapo_fast.rollout.vllm.process import free_port
from aapo_fast.rollout.vllm.servers import Server, VLLMServersEngine
from aapo_fast.rollout.vllm.transport import FolderTransport
from aapo_fast.rollout.vllm.weights import named_weights
from aapo_fast.trainer import loop, sampling, setup
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import SamplingParams, UserError

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(600)]


@pytest.fixture
def tree(tmp_path):
    folder = vllm_support.save_model(tmp_path / "model", tied=True)
    return support.tiny_run(
        tmp_path, folder, rollout__engine="vllm", data__max_prompt_tokens=64, vllm__cpu_kv_cache_gib=1,
        train__steps=25, train__learning_rate=3e-3, rollout__group_size=16, loss__max_importance_weight=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_tiny_model_learns_on_vllm(tmp_path, tree, mode):
    tree["reference"]["mode"] = mode
    summary = loop.train(config.parse(tree), Display(quiet=True))
    assert summary["accuracy_before"] <= 0.25 and summary["accuracy_after"] == 1.0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(r["reference_reward"] for r in records) < 0.3
    trained = [r for r in records if r["updated"]]
    assert trained and all(r["rollout_mean_gap"] < 1e-4 for r in trained)
    assert all(0.99 < r["rollout_ratio_mean"] < 1.01 and r["rollout_clipped_share"] == 0 for r in trained)
    assert all(r["engine_sync_bytes"] > 0 and r["seconds"]["sync"] > 0 for r in trained)
    assert all(r["engine_sync_seconds"] > 0 for r in trained)
    assert all(r["generation_tokens_per_second"] > 0 for r in records)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, tree, monkeypatch):
    """The engine of the resumed run starts with the first weights: those of the checkpoint have to reach it."""
    tree["train"]["steps"], tree["checkpoint"] = 8, {"every": 3}
    left_alone, killed = copy.deepcopy(tree), tree
    left_alone["run"]["folder"] = str(tmp_path / "left_alone")
    loop.train(config.parse(left_alone), Display(quiet=True))
    resume_support.crash(killed, monkeypatch, at=5)
    killed["run"]["resume"] = True
    loop.train(config.parse(killed), Display(quiet=True))
    resumed, alone = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "left_alone"))
    assert all(torch.equal(resumed[name], alone[name]) for name in alone)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9)) and all(r["rollout_mean_gap"] < 1e-4 for r in records)


def test_weights_that_do_not_arrive_stop_the_run(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(local.LocalLLM, "load", lambda self, weights: None)
    with pytest.raises(UserError, match=r"differ from the trainer's by .* nats on average"):
        loop.train(config.parse(tree), Display(quiet=True))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) >= 1 and (tmp_path / "run" / "model").exists()  # what was reached is kept


def test_weights_that_do_not_arrive_stop_a_run_below_a_top_p_of_one(tmp_path, tree, monkeypatch):
    """Its samples say nothing of the weights, so that a few more are drawn of the whole distribution."""
    tree["rollout"]["top_p"] = 0.8
    monkeypatch.setattr(local.LocalLLM, "load", lambda self, weights: None)
    with pytest.raises(UserError, match=r"differ from the trainer's by .* nats on average"):
        loop.train(config.parse(tree), Display(quiet=True))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(records) < 25 and records[-1]["updated"] and (tmp_path / "run" / "model").exists()


def test_a_nucleus_is_no_gap(tmp_path, tree):
    """Log-probabilities of a nucleus differ from the policy's by far more than the limit."""
    tree["rollout"]["top_p"], tree["train"]["steps"] = 0.8, 3
    assert loop.train(config.parse(tree), Display(quiet=True))["status"] == "finished"
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    trained = [r for r in records if r["updated"]]
    assert len(records) == 3 and trained and all(r["rollout_mean_gap"] > 0.05 for r in trained)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_an_engine_that_holds_other_weights_is_seen_without_a_step(tree, top_p):
    """What is done before the reference is drawn, and after a sync where no step's samples can be compared."""
    tree["rollout"]["top_p"] = top_p
    with setup.prepare(config.parse(tree), Display(quiet=True)) as run:
        sampling.verify_engine(run, run.schedule[0], 0)
        move(run.policy.model)
        with pytest.raises(UserError, match="differ from the trainer's by"):
            sampling.verify_engine(run, run.schedule[0], 1)
        run.engine.sync_weights(1)
        sampling.verify_engine(run, run.schedule[0], 1)


class Served:
    """`aapo-fast serve` as a user starts it, at one address however often it is started."""

    def __init__(self, folder):
        self.port, self.process = free_port(), None
        self.url, self.config = f"http://127.0.0.1:{self.port}", folder / "config.toml"
        model = vllm_support.save_model(folder / "model", tied=True)
        self.config.write_text(
            f'[model]\npath = "{model}"\n[data]\nmax_prompt_tokens = 64\n[vllm]\ncpu_kv_cache_gib = 1\n'
        )

    def start(self):
        command = [sys.executable, "-m", "aapo_fast.cli", "serve", str(self.config), "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, env=os.environ | {"AAPO_FAST_API_KEY": "the key"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        client, deadline = ServerClient(self.url, "the key", 60), time.monotonic() + 200
        while True:
            try:
                return client.check()
            except ServerError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.process.stdout.read1().decode()
                time.sleep(0.5)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def served_tree(tmp_path, tree, served, monkeypatch):
    """A run on that server."""
    monkeypatch.setenv("AAPO_FAST_API_KEY", "the key")
    tree["rollout"]["engine"] = "vllm_server"
    tree["vllm"] |= {"servers": [served.url], "weights_folder": str(tmp_path / "weights")}
    return tree


def test_a_server_of_aapo_fast_serve_and_rollouts_one_step_ahead(tmp_path, served_tree):
    """Its key in the environment, and a run that draws while it trains."""
    served_tree["rollout"]["max_staleness"] = 1
    summary = loop.train(config.parse(served_tree), Display(quiet=True))
    assert summary["accuracy_after"] == 1.0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["staleness"] for r in records[:3]] == [0, 1, 1] and max(r["staleness"] for r in records) == 1
    assert not any((tmp_path / "weights").iterdir())  # nothing is left behind


def test_a_tied_head_arrives_over_http(tmp_path, served, monkeypatch):
    """It is sent under its own name besides: without that the server goes on with the old one, which the gap shows."""
    model, tokenizer = vllm_support.load(served.config.parent / "model")
    server = Server(ServerClient(served.url, "the key", 60), None)
    transport = FolderTransport(tmp_path / "weights")
    engine = VLLMServersEngine(model, tokenizer, [server], transport, 60, torch.float32)
    truth = HFEngine(model, tokenizer)
    assert same_greedy(engine, truth)
    move(model)
    engine.sync_weights(1)
    assert same_greedy(engine, truth)
    move(model, seed=2)
    monkeypatch.setattr(servers, "named_weights", lambda *given: without_head(*given))
    engine.sync_weights(2)
    drawn = engine.generate(PROMPTS, n=16, sampling=SamplingParams(max_tokens=6), seeds=range(3))
    assert gap(model, drawn) > 0.05


def without_head(*given):
    return ((name, tensor) for name, tensor in named_weights(*given) if name != "lm_head.weight")


def test_a_run_whose_only_server_was_killed_goes_on_from_its_checkpoint(tmp_path, served_tree, served, monkeypatch):
    """It says so in one line, and once there is a server again it ends as the run that was left alone."""
    del served_tree["loss"]  # whose correction is by log-probabilities that depend on what a server batches together
    served_tree["train"]["steps"], served_tree["checkpoint"] = 8, {"every": 2}
    served_tree["run"]["samples_kept"] = 4 * 16
    alone = copy.deepcopy(served_tree)
    alone["run"]["folder"] = str(tmp_path / "alone")
    loop.train(config.parse(alone), Display(quiet=True))

    complete, asked, killed = ServerClient.complete, threading.Lock(), []

    def stopped_first(*arguments):
        """The first request of step 6 is at the server, which cannot have answered it when it is killed."""
        if len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5 and asked.acquire(blocking=False):
            os.killpg(served.process.pid, signal.SIGSTOP)
            threading.Timer(0.3, lambda: killed.append(time.monotonic()) or served.kill()).start()
        return complete(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ServerClient, "complete", stopped_first)
        with pytest.raises(ServerError, match="^no vLLM server is left: .*/v1/completions: no connection") as caught:
            loop.train(config.parse(served_tree), Display(quiet=True))
    assert time.monotonic() - killed[0] < 20 and "\n" not in str(caught.value)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5 and (tmp_path / "run" / "model").exists()

    served.start()
    summary, said = resume_support.run(served_tree, run={"resume": True})
    assert "resuming after step 4 of 8" in said and summary["status"] == "finished"
    ended, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(ended[name], whole[name]) for name in whole)
    samples, undisturbed = (read_lines(tmp_path / name / "samples.jsonl") for name in ("run", "alone"))
    assert samples == undisturbed and len(samples) == 8 * 4 * 16
