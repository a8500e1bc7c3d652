"""Whole runs on several ranks: records, checkpoints, interrupts and failures, and the launcher itself."""

import json
import os
import re
import subprocess
import sys

import pytest
import ranks_support
from ranks_support import Raised, check_same, on_ranks, results
from resume_support import folder_of, make_tree, steps
from safetensors.torch import load_file
from torch import distributed as dist

from aapo_fast import config
from aapo_fast.trainer.ranks import check_ranks
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import UserError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def in_folder(folder, tiny_model, **changes):
    """A run of five groups a step, which no number of ranks here divides."""
    folder.mkdir()
    tree = make_tree(folder, tiny_model, **({"rollout__prompts_per_step": 5, "eval__every": 2} | changes))
    return tree | {"train": tree["train"] | {"max_microbatch_tokens": 80}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """The folder of the run of one rank."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    tree = in_folder(folder, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AAPO_FAST_CACHE", str(folder / "cache"))
        results(1, ranks_support.train, tree)
    assert sum(record["updated"] for record in read_lines(folder / "run" / "metrics.jsonl")) == 6
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_is_the_same_on_any_number_of_ranks(tmp_path, tiny_model, alone, world):
    found = results(world, ranks_support.train, in_folder(tmp_path / "many", tiny_model))
    check_same(alone, tmp_path / "many", tiny_model)
    summary = json.loads((tmp_path / "many" / "run" / "summary.json").read_text())
    assert summary == found[0][0] and summary["status"] == "finished"
    assert summary["accuracy_after"] == json.loads((alone / "run" / "summary.json").read_text())["accuracy_after"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference__mode": "online"},
        {"reference__mode": "none", "lora": {"rank": 2}},
        {"rollout__engine": "vllm_server", "vllm__servers": ["http://localhost:1"], "vllm__max_logprob_gap": 0.005},
    ],
    ids=["online reference", "adapter", "an engine that the first rank asks for all"],
)
def test_other_runs(tmp_path, tiny_model, changes):
    servers = "rollout__engine" in changes
    for world, name in ((1, "one"), (2, "two")):
        tree = in_folder(tmp_path / name, tiny_model, train__steps=3, checkpoint__every=0, **changes)
        results(world, ranks_support.train, tree, 0, 0, servers)
    check_same(tmp_path / "one", tmp_path / "two", tiny_model)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then", "before", "after"),
    [(2, 1, False, False), (1, 2, False, False), (2, 3, False, False), (2, 3, False, True), (2, 1, True, False)],
)
def test_a_checkpoint_of_any_number_of_ranks_is_taken_up_by_any_other(
    tmp_path, tiny_model, alone, first, then, before, after
):
    """Whether embedding and head were, or will be, in pieces."""
    tree = in_folder(tmp_path / "run", tiny_model, model__vocabulary_parallel=before)
    died = on_ranks(first, ranks_support.train, tree, 6)
    assert all(result == Raised(("KeyboardInterrupt", "")) for result in died)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    tree["model"]["vocabulary_parallel"] = after
    resumed = results(then, ranks_support.train, {**tree, "run": tree["run"] | {"resume": True}})
    assert "resuming after step 4 of 6" in resumed[0][1]
    check_same(alone, tmp_path / "run", tiny_model)


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}], ids=["everything", "adapter"])
def test_what_two_ranks_write_in_the_background_is_of_its_step(tmp_path, tiny_model, changes):
    """Moments and step counts are those of its end, though the next step has been made meanwhile."""
    tree = in_folder(tmp_path / "run", tiny_model, checkpoint__background=True, checkpoint__keep=3, **changes)
    results(2, ranks_support.train_with_late_writing, tree)
    updates = 0
    for record in read_lines(tmp_path / "run" / "run" / "metrics.jsonl"):
        updates += record["updated"]
        if record["step"] % 2 == 0:
            moments = load_file(folder_of(tmp_path / "run", record["step"]) / "optimizer.safetensors")
            assert {int(count) for name, count in moments.items() if name.endswith(".step")} == {updates}
    assert updates == 6


def test_a_signal_on_one_rank_stops_all(tmp_path, tiny_model, alone):
    tree = in_folder(tmp_path / "run", tiny_model)
    found = results(2, ranks_support.train, tree, 0, 3)
    assert all(summary["status"] == "interrupted" and summary["steps"] == 3 for summary, _ in found)
    assert "a checkpoint of step 3 is saved" in found[0][1]
    results(2, ranks_support.train, {**tree, "run": tree["run"] | {"resume": True}})
    check_same(alone, tmp_path / "run", tiny_model)


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"device": "cuda:1"}}, "model.device='cuda:1': with 2 ranks each takes its own GPU"),
        ({"rollout": {"engine": "vllm"}}, "rollout.engine='vllm' is for one process, and there are 2 ranks; use"),
        ({"rollout": {"engine": "vllm_server"}}, "start the servers apart .* and name them in vllm.servers"),
        ({"rollout": {"engine": "vllm_server", "max_staleness": 1}, "vllm": {"servers": ["http://a"]}},
         "rollout.max_staleness=1 is for one rank"),
    ],
)  # fmt: skip
def test_what_several_ranks_cannot_do(changes, message):
    with pytest.raises(UserError, match=message):
        check_ranks(config.parse(changes), 2)


def test_a_head_in_pieces_wants_several_ranks():
    with pytest.raises(UserError, match="model.vocabulary_parallel=true is for several ranks, and there is one; start"):
        check_ranks(config.parse({"model": {"vocabulary_parallel": True}}), 1)


def torchrun(tmp_path, tree, world=2, module="aapo_fast.cli"):
    """The command itself; its exit code and everything it says."""
    path = tmp_path / "config.toml"
    path.write_text("")
    layers = {**tree, "rewards.0": tree["rewards"][0]}
    del layers["rewards"]
    settings = [f"--{layer}.{k}={json.dumps(v)}" for layer, table in layers.items() for k, v in table.items()]
    return torchrun_of(["-m", module, "train", str(path), *settings], world)


def torchrun_of(arguments, world=2):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("in_pieces", [False, True])
def test_torchrun(tmp_path, tiny_model, alone, in_pieces):
    how = {"model__vocabulary_parallel": True, "model__activation_checkpointing": "full"} if in_pieces else {}
    tree = in_folder(tmp_path / "run", tiny_model, **how)
    code, output = torchrun(tmp_path, tree)
    assert code == 0, output
    assert len(re.findall(r"^step \d/6", output, re.MULTILINE)) == 6  # one rank speaks
    check_same(alone, tmp_path / "run", tiny_model)


FIRST_TAKES_LONG = """
import time
from datetime import timedelta
from aapo_fast import config
from aapo_fast.trainer import ranks
ranks.TIME_LIMIT = timedelta(seconds=20)
def work():
    time.sleep(23)
    return "done"
with ranks.joined_ranks(config.parse({"model": {"device": "cpu"}})) as joined:
    assert joined.any(joined.first)
    assert joined.on_first(work) == "done"
    print("waited", flush=True)
"""


def test_work_of_the_first_rank_may_take_longer_than_a_step(tmp_path):
    (tmp_path / "first_takes_long.py").write_text(FIRST_TAKES_LONG)
    code, output = torchrun_of([str(tmp_path / "first_takes_long.py")])
    assert code == 0 and output.count("waited") == 2, output


BAD_REWARD = """
import os, signal
from pathlib import Path
if os.environ["RANK"] == "1" and {at_once}:
    raise ImportError("no grader here")
def f(completions, prompts, **columns):
    metrics = Path({metrics!r})
    if os.environ["RANK"] == "1" and metrics.exists() and metrics.read_text():  # after the first step
        os.kill(os.getppid(), signal.SIGKILL)
    return [float(len(completions[0]))]
"""


SLOW_TO_END = """
import os, signal, sys
from aapo_fast import cli
from aapo_fast.trainer import ranks
def slow(store, fails_first=ranks._fails_first):
    os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does, some time after another rank was killed
    return fails_first(store)
ranks._fails_first = slow
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("at_once", "message"),
    [
        (True, "rank 1: the reward functions .* cannot be loaded: ImportError: no grader here"),
        (False, "rank 0: another rank was killed, or did not answer within 6:00:00 .in a step 0:30:00.: "),
    ],
    ids=["its reward function cannot be loaded", "it is killed in a step"],
)
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path, tiny_model, monkeypatch, at_once, message):
    monkeypatch.syspath_prepend(tmp_path)
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    (tmp_path / "bad_reward.py").write_text(BAD_REWARD.format(at_once=at_once, metrics=str(metrics)))
    tree = in_folder(tmp_path / "run", tiny_model, rewards=[{"function": "bad_reward:f"}])
    (tmp_path / "slow_to_end.py").write_text(SLOW_TO_END)
    code, output = torchrun(tmp_path, tree, module="slow_to_end")
    assert code != 0 and len(re.findall("^aapo-fast: error:", output, re.MULTILINE)) == 1, output
    assert re.search(f"^aapo-fast: error: {message}", output, re.MULTILINE), output
    assert "aapo_fast" not in "".join(re.findall('  File "(.*)"', output)), output  # torchrun's is the only traceback
    assert (tmp_path / "run" / "run" / "model").exists() != at_once  # as it was after the last step
