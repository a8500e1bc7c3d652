"""Runs on one real server of `aapo-fast serve`: on two ranks, and killed again and again while they draw ahead."""

import contextlib
import signal
from collections import Counter

import fork_runs
import pytest
import ranks_support
import requests
import support
import vllm_support
from fork_runs import kill_often, left_behind
from ranks_support import Raised, check_same, on_ranks, results
from torch import distributed as dist

from aapo_fast.trainer.records import read_lines

pytestmark = [vllm_support.needs_engine, pytest.mark.timeout(600)]

KEY = "a key of the tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LATE_LETTERS = {"rewards": [{"function": "reward_functions:late_letters"}], "scoring__max_failure_share": 0.9}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's client, and the folder of its model."""
    folder = tmp_path_factory.mktemp("served")
    model = vllm_support.save_model(folder / "model", tied=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AAPO_FAST_API_KEY", KEY)
        with vllm_support.serving(folder, model, KEY) as client:
            yield client, model


def make_tree(folder, server, **changes):
    client, model = server
    folder.mkdir(exist_ok=True)
    changes = {
        "rollout__engine": "vllm_server", "vllm__servers": [client.url], "data__max_prompt_tokens": 64,
        "vllm__weights_folder": str(folder / "weights"), "train__learning_rate": 3e-3,
    } | changes  # fmt: skip
    return support.tiny_run(folder, model, **changes)


# --- two ranks ------------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@needs_gloo
def test_two_ranks_are_one_run(tmp_path, server):
    """Five prompts of eight completions a step; the server draws for both ranks, and the first alone speaks to it."""
    changes = LATE_LETTERS | {
        "train__steps": 6, "rollout__prompts_per_step": 5, "rollout__max_tokens": 4, "train__max_microbatch_tokens": 80,
        "run__samples_kept": 40, "eval__every": 2,
    }  # fmt: skip
    alone, *_ = results(1, ranks_support.train_on_server, make_tree(tmp_path / "one", server, **changes))
    first, second = results(2, ranks_support.train_on_server, make_tree(tmp_path / "two", server, **changes))
    check_same(tmp_path / "one", tmp_path / "two", server[1])

    records = read_lines(tmp_path / "two" / "run" / "metrics.jsonl")
    updates = sum(r["updated"] for r in records)
    assert updates == 6 and all(r["rollout_mean_gap"] < 1e-4 for r in records)
    assert first[0] == alone[0] == list(range(updates + 1)) and second[0] == []  # once at the start and once a step
    assert server[0].weight_version() == str(updates)
    assert first[1] == alone[1] and second[1] == 0
    for step in range(6):
        shares = [Counter(rank[2][step]) for rank in (alone, first, second)]
        assert shares[0] == shares[1] + shares[2] and all(shares)
    drawn = Counter(line["step"] for line in read_lines(tmp_path / "two" / "run" / "samples.jsonl"))
    assert drawn == dict.fromkeys(range(1, 7), 40)


@needs_gloo
def test_weights_that_do_not_arrive_stop_both_ranks(tmp_path, server):
    tree = make_tree(tmp_path, server, train__steps=6, **LATE_LETTERS, rollout__max_tokens=4)
    found = on_ranks(2, ranks_support.train_on_server, tree, True)
    assert all(isinstance(rank, Raised) and rank[0] == "UserError" for rank in found)
    assert all("differ from the trainer's by" in rank[1] for rank in found)


# --- kills ----------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_while_drawing_ahead(tmp_path, server):
    """The server still works on what a killed run had asked for, and may have been left paused in a sync."""
    kills, steps = 6, 30
    changes = LATE_LETTERS | {
        "train__steps": steps, "rollout__max_tokens": 4, "train__schedule": "linear", "rollout__max_staleness": 1,
        "run__samples_kept": 32, "run__resume": True, "checkpoint__every": 2, "eval__every": 5, "eval__correct_at": 0.5,
    }  # fmt: skip
    with contextlib.closing(fork_runs.Forks(tmp_path)) as forks:
        code, output = forks.run(make_tree(tmp_path / "alone", server, **changes))
        assert code == 0, output
        tree = make_tree(tmp_path / "killed", server, **changes)
        assert kill_often(forks, tree, tmp_path / "killed", kills) == kills * [-signal.SIGKILL]
        requests.post(f"{server[0].url}/pause", params={"mode": "keep"}, headers=HEADERS, timeout=60).raise_for_status()
        code, output = forks.run(tree)
        assert code == 0, output
    (truth, alone), (found, killed) = left_behind(tmp_path / "alone"), left_behind(tmp_path / "killed")
    assert found == truth
    assert (
        killed["samples.jsonl"] == alone["samples.jsonl"] and killed["evaluations.jsonl"] == alone["evaluations.jsonl"]
    )
    assert Counter(line["step"] for line in killed["samples.jsonl"]) == dict.fromkeys(range(1, steps + 1), 32)
    for a, b in zip(alone["metrics.jsonl"], killed["metrics.jsonl"], strict=True):
        # The engine's own log-probabilities may round otherwise in another batch; nothing is computed with them here.
        assert a == b | of_engine(a) and of_engine(a) == pytest.approx(of_engine(b), abs=1e-5)
    records = killed["metrics.jsonl"]
    assert [r["step"] for r in records] == list(range(1, steps + 1)) and max(r["staleness"] for r in records) == 1
    assert not any((tmp_path / "killed" / "weights").iterdir())  # of those killed, too


def of_engine(record):
    return {key: value for key, value in record.items() if key.startswith("rollout_")}
