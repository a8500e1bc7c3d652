"""Runs that are killed and resumed, again and again, end as the one that was left alone: the same bits."""

import itertools
import signal

import fork_runs
import pytest
import support
from fork_runs import kill_often, left_behind


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    started = fork_runs.Forks(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


def make_tree(folder, tiny_model, **changes):
    folder.mkdir()
    changes = {
        "train__steps": 72, "train__schedule": "linear", "train__learning_rate": 3e-3, "rollout__max_tokens": 4,
        "rewards": [{"function": "reward_functions:late_letters"}], "scoring__max_failure_share": 0.9,
        "eval__every": 5, "eval__correct_at": 0.5, "checkpoint__every": 2, "run__resume": True,
    } | changes  # fmt: skip
    return support.tiny_run(folder, tiny_model, **changes)


def check_equal(one, other):
    assert left_behind(one)[1] == left_behind(other)[1]
    assert left_behind(one)[0] == left_behind(other)[0]


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({}, 20),
        ({"reference__mode": "online", "train__steps": 30}, 5),
        ({"rollout__engine": "vllm_server", "rollout__max_staleness": 1, "train__steps": 40}, 8),
    ],
    ids=["cached reference", "online reference", "drawn ahead"],
)
def test_killed_at_any_moment(forks, tmp_path, tiny_model, changes, kills):
    ahead = "rollout__max_staleness" in changes
    code, output = forks.run(make_tree(tmp_path / "alone", tiny_model, **changes), ahead)
    assert code == 0, output
    tree = make_tree(tmp_path / "killed", tiny_model, **changes)
    assert kill_often(forks, tree, tmp_path / "killed", kills, ahead) == kills * [-signal.SIGKILL]
    code, output = forks.run(tree, ahead)
    assert code == 0, output
    check_equal(tmp_path / "alone", tmp_path / "killed")
    records = left_behind(tmp_path / "alone")[1]
    assert any(r["updated"] for r in records["metrics.jsonl"])
    assert sum(r["reward_failures"] for r in records["metrics.jsonl"]) > 0  # rewards that no file has were restored
    assert max(r["staleness"] for r in records["metrics.jsonl"]) == ahead
    assert not any((tmp_path / "killed" / "run").rglob(".*"))  # nothing unfinished is left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_first(forks, tmp_path, tiny_model, number):
    """Without any other checkpoint; the evaluation that was due after that step is made up for."""
    changes = {"checkpoint__every": 0, "eval__every": 1, "train__steps": 8}
    assert forks.run(make_tree(tmp_path / "alone", tiny_model, **changes))[0] == 0
    tree = make_tree(tmp_path / "stopped", tiny_model, **changes)
    for attempt in itertools.count(1):
        fork = forks.start(tree)
        if attempt < 3 and fork.until(lambda fork=fork: "\nstep " in fork.output):
            fork.kill(number)
        code = fork.wait()
        if code == 0:
            break
        assert code == 130, fork.output
        assert "is saved: --resume goes on from it" in fork.output
        assert "aapo-fast train CONFIG.toml --resume" in fork.output
        assert len(list((tmp_path / "stopped" / "run" / "checkpoints").iterdir())) == attempt
    assert attempt == 3 and "resuming after step" in fork.output
    check_equal(tmp_path / "alone", tmp_path / "stopped")
