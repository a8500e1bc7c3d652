"""Evaluations of a tiny model: what they count, what they leave out, what is left of them after a kill."""

import json
import math
import resource
from contextlib import contextmanager

import pytest
import support

from aapo_fast import config
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.trainer.benchmark import Benchmark, Scored, as_json, identify
from aapo_fast.trainer.estimators import pass_at_k
from aapo_fast.types import UserError


@contextmanager
def silent(_):
    yield lambda done, total: None


class Counting(HFEngine):
    """The real engine; counts prompts, and is interrupted after some."""

    def __init__(self, interrupted_after=math.inf):
        super().__init__(support.tiny(), support.tokenizer(), 4)
        self.prompts, self.left = 0, interrupted_after

    def generate(self, prompts, **more):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.prompts += len(prompts)
        return super().generate(prompts, **more)


def make(tmp_path, reward="reward_functions:starts_with_answer", **changes):
    tree = support.tiny_run(tmp_path, "unused", rewards=[{"function": reward}], **changes)
    tree["rollout"] |= {"max_batch_size": 4, "max_tokens": 3}
    problems = [support.problem(f"say {i}:", "abcdefgh"[i % 8], row=f"row {i}") for i in range(10)]
    return problems, config.parse({**tree, "eval": {"samples": 4}})


def run(problems, settings, file, engine=None):
    benchmark = Benchmark(problems, settings, file)
    with Scorer(settings.rewards, settings.scoring) as scorer:
        return benchmark.run(engine or Counting(), scorer, silent)


def test_the_summary_is_that_of_the_completions_in_the_file(tmp_path):
    problems, settings = make(tmp_path)
    summary = run(problems, settings, tmp_path / "e.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [(line["pass"], line["problem"]) for line in lines] == [
        (name, i) for name in ("greedy", "sampled") for i in range(10)
    ]
    assert lines[3]["row"] == "row 3" and lines[3]["prompt"] == "say 3:" and lines[3]["answer"] == "d"
    right = [
        [float(c["text"].startswith(line["answer"])) for c in line["completions"]] for line in lines[10:]
    ]  # fmt: skip
    assert any(map(any, right)) and [[c["value"] for c in line["completions"]] for line in lines[10:]] == right
    for k in (1, 2, 4):
        expected = sum(pass_at_k(4, int(sum(values)), k) for values in right) / 10
        assert summary.pass_at[k].value == pytest.approx(expected) and summary.pass_at[k].problems == 10
    sampled = [c for line in lines[10:] for c in line["completions"]]
    assert summary.mean_tokens == sum(c["tokens"] for c in sampled) / 40
    assert summary.truncated_share == sum(c["finish_reason"] == "length" for c in sampled) / 40
    assert summary.completions == 50 and not summary.failures
    assert json.loads(json.dumps(as_json(summary)))["pass_at"]["2"]["value"] == summary.pass_at[2].value


@pytest.mark.parametrize("calls", [0, 1, 4, 7, 11])
def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, calls):
    problems, settings = make(tmp_path)
    alone = run(problems, settings, tmp_path / "alone.jsonl")
    cut = Counting(calls)
    with pytest.raises(KeyboardInterrupt):
        run(problems, settings, tmp_path / "cut.jsonl", cut)
    rest = Counting()
    assert run(problems, settings, tmp_path / "cut.jsonl", rest) == alone
    assert cut.prompts + rest.prompts == 20  # none was drawn twice
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    again = Counting()
    assert run(problems, settings, tmp_path / "cut.jsonl", again) == alone and again.prompts == 0


def test_half_a_line_is_drawn_again(tmp_path):
    problems, settings = make(tmp_path)
    file = tmp_path / "e.jsonl"
    alone = run(problems, settings, file)
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) - 40, 30):
        file.write_bytes(whole[:size])
        assert run(problems, settings, file) == alone and file.read_bytes() == whole


def test_a_disk_that_fills_up_says_where_and_what_is_there_is_kept(tmp_path):
    problems, settings = make(tmp_path)
    file = tmp_path / "e.jsonl"
    alone = run(problems, settings, file)
    size = file.stat().st_size
    file.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"e.jsonl cannot be written: File too large; make room"):
            run(problems, settings, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.stat().st_size == size // 2
    assert run(problems, settings, file) == alone and file.stat().st_size == size


def test_failures_are_counted_and_left_out_and_never_wrong(tmp_path):
    problems, settings = make(tmp_path, reward="reward_functions:fails_on_some")  # 1.0, or an error
    summary = run(problems, settings, tmp_path / "e.jsonl")
    [(failure, count)] = summary.failures.items()
    assert failure == "reward reward_functions:fails_on_some raised ValueError: not this one" and 0 < count < 50
    assert summary.greedy.value == summary.pass_at[1].value == 1.0
    assert summary.pass_at[4].problems < summary.pass_at[1].problems <= 10
    # Kept as failures, too: what is read back counts them again.
    assert Benchmark(problems, settings, tmp_path / "e.jsonl").summary() == summary


def test_a_grader_that_always_fails_gives_no_accuracy(tmp_path):
    problems, settings = make(tmp_path, reward="reward_functions:always_raises")
    summary = run(problems, settings, tmp_path / "e.jsonl")
    assert math.isnan(summary.greedy.value) and math.isnan(summary.pass_at[1].value)
    assert sum(summary.failures.values()) == 50
    assert as_json(summary)["greedy"] == {"value": None, "low": None, "high": None, "problems": 0}


def test_without_samples_there_is_greedy_alone(tmp_path):
    problems, settings = make(tmp_path)
    settings = config.parse({**config.to_dict(settings), "eval": {"samples": 0}})
    summary = run(problems, settings, tmp_path / "e.jsonl")
    assert summary.pass_at == {} and summary.completions == 10 and summary.mean_tokens > 0


@pytest.mark.parametrize("line", ['{"step": 3}', '{"pass": "other", "problem": 0, "completions": []}', "[1]"])
def test_another_file_is_refused(tmp_path, line):
    problems, settings = make(tmp_path)
    (tmp_path / "e.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"e.jsonl holds no completions of an evaluation; move it away"):
        Benchmark(problems, settings, tmp_path / "e.jsonl")


def test_what_decides_the_completions_decides_the_name(tmp_path):
    problems, settings = make(tmp_path)

    def name(problems=problems, model="m", engine="", rewards="r", **changes):
        tree = config.to_dict(settings)
        for key, value in changes.items():
            layer, option = key.split("__")
            tree[layer][option] = value
        return identify(problems, config.parse(tree), model, engine, rewards)

    assert name() == name(train__steps=7, rollout__max_batch_size=64, eval__correct_at=0.5)
    others = [
        name(problems[:9]),
        name(model="n"),
        name(engine=" by vLLM"),
        name(rewards="s"),
        name(rollout__temperature=0.5),
        name(rollout__max_tokens=4),
        name(eval__samples=5),
    ]
    assert len({name(), *others}) == 8


def test_right_is_what_the_config_calls_right(tmp_path):
    problems, settings = make(tmp_path)
    benchmark = Benchmark(problems[:2], settings, tmp_path / "e.jsonl")
    values = [[1.0, 0.4, None, 0.0], [0.0, 0.0, 0.0, 0.0]]
    benchmark.drawn["sampled"] = {
        i: [Scored("", v, None if v is not None else "broken", 1, "stop") for v in row] for i, row in enumerate(values)
    }
    found = benchmark.summary().pass_at
    assert found[1].value == pytest.approx((1 / 3 + 0) / 2) and found[1].problems == 2
    assert found[2].value == pytest.approx((2 / 3 + 0) / 2)
    assert found[4].value == 0.0 and found[4].problems == 1  # of three scored completions there is no pass@4
