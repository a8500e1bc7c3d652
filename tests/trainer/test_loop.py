"""Whole runs of a tiny model: it learns, it records, it fails with one line and loses nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import support
import torch
import transformers
from safetensors.torch import load_file

from aapo_fast import config
from aapo_fast.ops.linear_policy import rows_native, sparse
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.trainer import loop, report, sampling, setup
from aapo_fast.trainer.ahead import Rollouts
from aapo_fast.trainer.display import Display
from aapo_fast.trainer.records import RunFolder, read_lines
from aapo_fast.types import DataError, UserError


def run(tree):
    return loop.train(config.parse(tree), Display(quiet=True))


def metrics(tmp_path):
    return read_lines(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize("mode", ["cached", "online", "none"])
def test_a_tiny_model_learns_a_trivial_task(tmp_path, tiny_model, mode):
    """Random weights, reward for a first letter x: from one in forty to nearly always."""
    tree = support.tiny_run(
        tmp_path,
        tiny_model,
        train__steps=25,
        train__learning_rate=3e-3,
        rollout__group_size=16,
        reference__mode=mode,
        reference__pairing="mean",
    )
    summary = run(tree)
    assert summary["status"] == "finished" and summary["steps"] == 25
    assert summary["accuracy_before"] <= 0.25
    assert summary["accuracy_after"] == 1.0
    assert metrics(tmp_path)[-1]["reward"] > 0.8
    reference = [m["reference_reward"] for m in metrics(tmp_path)]
    # the frozen reference has not learned
    assert all(r is None for r in reference) if mode == "none" else max(reference) < 0.3


def test_it_learns_with_sparse_gradient_rows_too(tmp_path, tiny_model, monkeypatch):
    for rows in (sparse, rows_native):
        monkeypatch.setattr(rows, "DENSE_SHARE", 10.0)  # a vocabulary of 45 would always be dense
    tree = support.tiny_run(
        tmp_path, tiny_model, train__steps=25, train__learning_rate=3e-3, rollout__group_size=16,
        loss__backward="sparse", loss__sparsity_threshold=2**-6,
    )  # fmt: skip
    assert run(tree)["accuracy_after"] == 1.0


def test_it_learns_in_bfloat16_with_layers_computed_again(tmp_path, tiny_model):
    """Products and activations in 16 bits, in rollouts too; the weights and what is saved stay float32."""
    tree = support.tiny_run(
        tmp_path, tiny_model, train__steps=25, train__learning_rate=3e-3, rollout__group_size=16,
        model__precision="bfloat16", model__activation_checkpointing="selective",
    )  # fmt: skip
    assert run(tree)["accuracy_after"] == 1.0
    gaps = [m["rollout_mean_gap"] for m in metrics(tmp_path) if m["updated"]]
    assert 1e-5 < max(gaps) < 0.05  # the model that samples is the one that is trained, but for rounding
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_what_a_run_leaves_behind(tmp_path, tiny_model):
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=3, eval__every=2, run__tensorboard=True)
    summary = run(tree)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"accuracy_before", "accuracy_after", "steps", "wall_seconds", "seconds_per_step"} <= summary.keys()
    assert config.parse(json.loads((folder / "config.json").read_text())) == config.parse(tree)
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        assert record["seconds"].keys() == {"rollout", "reward", "reference", "train", "sync"}
        for key in (
            "reward", "reference_reward", "zero_weight_token_share", "zero_advantage_group_share", "advantage_mean",
            "advantage_std", "rollout_entropy", "completion_length", "truncated_share", "grad_norm", "learning_rate",
            "tokens_per_second", "generation_tokens_per_second", "peak_memory_bytes", "saved_token_share",
            "microbatch_tokens",
        ):  # fmt: skip
            assert isinstance(record[key], (int, float)) and math.isfinite(record[key]), key
    second = records[1]  # before which nothing but its own completions was drawn
    assert second["engine_generation_tokens"] == round(4 * 8 * second["completion_length"])
    assert 0 < second["engine_generation_seconds"] < second["seconds"]["rollout"]
    speed = second["engine_generation_tokens"] / second["engine_generation_seconds"]
    assert second["generation_tokens_per_second"] == pytest.approx(speed)
    assert [e["step"] for e in read_lines(folder / "evaluations.jsonl")] == [0, 2, 3]
    samples = read_lines(folder / "samples.jsonl")
    assert len(samples) == 3 * 8 and {"prompt", "completion", "reward", "advantage"} <= samples[0].keys()
    assert len({s["prompt"] for s in samples if s["step"] == 1}) == 4
    assert any("tfevents" in p.name for p in folder.iterdir())
    assert not any("tensorboard" in type(thread).__module__ for thread in threading.enumerate())  # its writer is closed
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert transformers.AutoTokenizer.from_pretrained(folder / "model")("x").input_ids
    assert model.num_parameters() > 0


def test_same_seed_same_run(tmp_path, tiny_model):
    """Up to the seconds. The second run finds the first one's reference rewards and draws none."""
    records = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        tree = support.tiny_run(tmp_path / attempt, tiny_model, train__steps=3)
        tree["reference"]["cache"] = str(tmp_path / "shared.sqlite")
        summary = run(tree)
        records.append([
            {k: v for k, v in r.items() if k not in support.TIMES} for r in metrics(tmp_path / attempt)
        ])  # fmt: skip
    assert records[0] == records[1]
    assert summary["reference_seconds"] < 0.5


def test_a_run_that_failed_at_its_start_can_be_repeated(tmp_path, tiny_model):
    good = support.tiny_run(tmp_path, tiny_model, train__steps=1)
    with pytest.raises(UserError):
        run({**good, "rewards": [{"function": "reward_functions:no_such_function"}]})
    assert run(good)["steps"] == 1


def test_an_edited_reward_function_is_not_taken_from_the_cache(tmp_path, tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    references = []
    for value in (0.25, 0.75):
        (tmp_path / "edited_reward.py").write_text(f"def f(completions, prompts, **columns): return [{value}]")
        tree = support.tiny_run(tmp_path, tiny_model, train__steps=1, rewards=[{"function": "edited_reward:f"}])
        tree["run"]["overwrite"] = True
        run(tree)
        references.append(metrics(tmp_path)[0]["reference_reward"])
    assert references == [0.25, 0.75]


@pytest.mark.parametrize(
    "mistake",
    [
        {"model": {"path": "nowhere"}},
        {"data": {"source": "nowhere.jsonl"}},
        {"rewards": [{"function": "reward_functions:no_such_function"}]},
        {"rollout": {"prompts_per_step": 9}},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_run_is_replaced_when_everything_is_loaded(tmp_path, tiny_model, mistake):
    """Not before: a misspelt name would cost what was trained. Then its model goes, which is not this run's."""
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=1, run__overwrite=True, checkpoint__every=1)
    run(tree)
    before = everything_in(tmp_path / "run")
    assert {"model", "checkpoints", "config.json", "metrics.jsonl"} <= {path.parts[0] for path in before}
    with pytest.raises(UserError):
        run({**tree, **mistake})
    assert everything_in(tmp_path / "run") == before
    with setup.prepare(config.parse(tree), Display(quiet=True)):
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "lock", "metrics.jsonl"}


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model/network.py", "mine"),
        ("checkpoints/best.pt", "mine"),
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", "[]"),
        ("samples.jsonl", "{}"),
        ("metrics.jsonl", "{}"),
    ],
)
def test_what_no_run_has_left_is_never_replaced(tmp_path, tiny_model, name, content, overwrite):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text(content)
    with pytest.raises(UserError) as refusal:
        run(support.tiny_run(tmp_path, tiny_model, run__overwrite=overwrite))
    assert f"is not the folder of a run, and this one would replace {name.split('/')[0]} in it" in str(refusal.value)
    assert mine.read_text() == content


def test_a_model_without_steps_beside_it_is_a_run_too(tmp_path, tiny_model):
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=1, checkpoint__every=0)
    run(tree)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds an earlier run"):
        run(tree)
    assert (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("key", "place"),
    [("model", "run"), ("model", "run/model"), ("data", "run/model/data.jsonl"), ("data", "run/samples.jsonl")],
)
def test_what_a_run_is_made_from_is_never_replaced(tmp_path, tiny_model, key, place):
    """Not even where an earlier run may be: its model is what this one would begin with."""
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=1, run__overwrite=True)
    run(tree)
    source = tmp_path / place
    if key == "data":
        shutil.copy(tree["data"]["source"], source)
        tree["data"]["source"] = str(source)
    else:
        shutil.copytree(tiny_model, source, dirs_exist_ok=True)
        tree["model"]["path"] = f"{tmp_path}/run/../{place}"
    before = everything_in(tmp_path / "run")
    with pytest.raises(UserError, match=f"the run would replace {key}.*{place}' in it; name another folder"):
        run(tree)
    assert everything_in(tmp_path / "run") == before


@pytest.mark.parametrize("overwrite", [False, True])  # as the quickstart's config has it
def test_a_run_repeated_for_want_of_a_checkpoint_keeps_its_model_until_there_is_another(
    tmp_path, tiny_model, overwrite
):
    tree = support.tiny_run(tmp_path, tiny_model, run__overwrite=overwrite, checkpoint__every=0)
    run(tree)
    (tmp_path / "run" / "summary.json").unlink()  # as after an error
    tree["run"]["resume"] = True
    tree["train"]["max_microbatch_tokens"] = 2048  # as the error may have advised: the same run
    model = tmp_path / "run" / "model" / "model.safetensors"
    before = model.read_bytes()
    model.with_name("of_the_first").touch()
    with setup.prepare(config.parse(tree), Display(quiet=True)):
        assert model.read_bytes() == before and not metrics(tmp_path)
    assert run(tree)["status"] == "finished"
    assert model.read_bytes() == before and not model.with_name("of_the_first").exists()


def test_a_resumed_run_does_not_keep_the_model_of_another_that_it_replaces(tmp_path, tiny_model):
    tree = support.tiny_run(tmp_path, tiny_model, run__overwrite=True, run__resume=True, checkpoint__every=0)
    run(tree)
    with setup.prepare(config.parse({**tree, "run": {**tree["run"], "seed": 1}}), Display(quiet=True)):
        assert not (tmp_path / "run" / "model").exists()


def test_records_survive_odd_line_separators_and_a_cut_last_line(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    lines = [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 2, "text": "d", "value": math.nan}]
    for line in lines:
        folder.append("metrics.jsonl", line)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "te')
    assert metrics(tmp_path) == [lines[0], {**lines[1], "value": None}]


def test_reference_samples_are_drawn_before_the_policy_moves_and_only_once(tmp_path, tiny_model, monkeypatch):
    calls = []
    real = HFEngine.generate

    def spy(self, prompts, **options):
        calls.append((options.get("weights", "policy"), self.weight_version, len(prompts)))
        return real(self, prompts, **options)

    monkeypatch.setattr(HFEngine, "generate", spy)
    run(support.tiny_run(tmp_path, tiny_model, train__steps=6))
    drawn = [c for c in calls if c[0] == "reference"]
    assert drawn and all(version == 0 for _, version, _ in drawn)
    assert sum(count for *_, count in drawn) == 8  # the eight training problems, though 6 steps x 4 used them


def test_online_reference_uses_the_frozen_weights(tmp_path, tiny_model):
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=4, train__learning_rate=0.05, reference__mode="online")
    with setup.prepare(config.parse(tree), Display(quiet=True)) as prepared:
        sampling.before_the_first_step(prepared, threading.Event())
        frozen = prepared.policy.fingerprint()
        for step in (1, 2, 3):
            loop.train_step(prepared, step, report.Totals(), Rollouts(prepared))
        assert prepared.policy.fingerprint() != frozen
        reference = type(prepared.policy)(prepared.engine._reference, prepared.policy.tokenizer, 1.0)
        assert reference.fingerprint() == frozen


def test_missing_rewards_leave_their_completions_out(tmp_path, tiny_model):
    tree = support.tiny_run(
        tmp_path, tiny_model, rewards=[{"function": "reward_functions:fails_on_some"}], scoring__max_failure_share=0.9
    )
    run(tree)
    for record in metrics(tmp_path):
        assert 0 < record["reward_failures"] < 32
        assert record["reward"] == 1.0  # those that were scored; the failed ones are not zeros in the mean


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": [{"function": "reward_functions:always_raises"}]}, UserError,
         "have no reward, over scoring.max_failure_share=0.2; the first: data.jsonl line"),
        ({"rewards": [{"function": "no_such_module:f"}]}, UserError, "No module named 'no_such_module'"),
        ({"rewards": [{"function": "math_verify"}], "data__template": "{question}", "data__answer_column": "gold"},
         DataError, "data.jsonl line 1 has no 'gold'"),
        ({"rewards": [{"function": "reasoning_gym"}]}, DataError, "line 1: there is no metadata.source_dataset"),
        ({"rollout__prompts_per_step": 9}, UserError, "rollout.prompts_per_step=9 exceeds the 8 training problems"),
        ({"model__device": "cuda:7"}, UserError, "model.device='cuda:7': this machine has"),
        ({"run__folder": "/proc/no"}, UserError, "run.folder='/proc/no' cannot be written"),
        ({"model__path": "nowhere"}, UserError, "model.path='nowhere' cannot be loaded"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, tiny_model, changes, error, message):
    with pytest.raises(error) as refusal:
        run(support.tiny_run(tmp_path, tiny_model, **changes))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__seed": 2**64}, f"run.seed={2**64} is more than PyTorch takes; give one of at most 64 bits"),
        ({"run__seed": -(2**63) - 1}, "give one of at most 64 bits"),
        ({"run__folder": ""}, "run.folder is empty; name a folder"),
    ],
)
def test_seeds_and_folders_that_cannot_be(tmp_path, tiny_model, changes, message):
    with pytest.raises(UserError, match=message):
        run(support.tiny_run(tmp_path, tiny_model, **changes))


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path, tiny_model):
    tree = support.tiny_run(tmp_path, tiny_model, train__steps=1)
    run(tree)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds an earlier run; name another, or replace it with --run.overwrite true"):
        run(tree)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    tree["run"]["overwrite"] = True
    assert run(tree)["steps"] == 1


def test_a_run_that_diverges_stops_and_saves_the_last_good_weights(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(loop, "aapo_advantages", lambda rewards, *a: rewards * math.nan)
    with pytest.raises(UserError, match=r"step 3: loss or gradient was NaN or infinite 3 steps in a row"):
        run(support.tiny_run(tmp_path, tiny_model, train__steps=9))
    assert [r["updated"] for r in metrics(tmp_path)] == [False] * 3
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_a_usable_state(tmp_path, tiny_model, presses):
    """The real thing: a process, a signal. One Ctrl-C saves; two end at once, with the records still whole."""
    tree = support.tiny_run(
        tmp_path, tiny_model, train__steps=10_000, rewards=[{"function": "reward_functions:starts_with_answer_slowly"}]
    )
    tree["reference"]["mode"] = "none"
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from aapo_fast import config
from aapo_fast.cli import commands
sys.exit(commands.train(config.parse({tree!r}), "CONFIG.toml"))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline and child.poll() is None, child.communicate()[0]
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    output = ""
    if presses == 2:
        # Two signals that nobody has looked at yet are one; the second comes once the first was heard.
        while "finishing what is under way" not in output:
            line = child.stdout.readline()
            assert line, output
            output += line
        os.kill(child.pid, signal.SIGINT)
    output += child.communicate(timeout=60)[0]
    records = read_lines(path)
    assert len(records) == len(path.read_text().splitlines())
    if presses == 1:
        assert child.returncode == 130, output
        assert "finishing what is under way, then saving" in output
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "interrupted" and summary["steps"] == len(records)
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert (tmp_path / "run" / "curve.png").exists()
    else:
        assert child.returncode != 0 and "KeyboardInterrupt" in output
        assert not (tmp_path / "run" / "summary.json").exists()
