"""Reward functions in their worker: the built-in ones, and every way in which one can fail."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import support

from aapo_fast.config import RewardConfig, ScoringConfig
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.types import DataError, UserError


def scorer(*functions, limit=30.0, **options):
    rewards = [RewardConfig(function=f, **options) if isinstance(f, str) else f for f in functions]
    return Scorer(rewards, ScoringConfig(time_limit_seconds=limit))


def test_weighted_sum_and_columns_by_name():
    rewards = [
        RewardConfig("reward_functions:starts_with_answer", weight=2.0),
        RewardConfig("reward_functions:number", weight=-1.0),
        RewardConfig("format", pattern=r"c\d+", weight=10.0),
    ]
    with scorer(*rewards) as s:
        score = s.score(support.problem(answer="c"), "c12")
        assert score.reward == 2.0 - 0.5 + 10.0 and score.values == (1.0, 0.5, 1.0) and score.failure is None
        assert s.score(support.problem(answer="c"), "c12 and more").reward == 1.5


def test_extraction():
    problem = support.problem(answer="12")
    with scorer("reward_functions:starts_with_answer", extract=r"-?\d+") as s:
        assert [s.score(problem, t).reward for t in ("so: 12!", "13 or 12", "-12", "none")] == [1.0, 0.0, 0.0, 0.0]
    with scorer("reward_functions:starts_with_answer", extract=r"<a>(.*?)</a>") as s:
        assert s.score(problem, "no 3 <a>12\n</a> 4").reward == 1.0


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("sometimes_raises", "raised KeyError: 'no such thing'"),
        ("fills_its_memory", "raised MemoryError: "),
        ("ends_the_process", "ended its process (exit code 7)"),
    ],
)
def test_a_failure_is_a_missing_reward_and_the_next_one_is_scored(function, failure):
    name = f"reward_functions:{function}"
    with scorer("reward_functions:number", name) as s:
        score = s.score(support.problem(), "bad")
        assert math.isnan(score.reward) and score.values[0] == 0.5 and math.isnan(score.values[1])
        assert score.failure == f"reward {name} {failure}"
        assert s.score(support.problem(), "good").reward == 1.5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_a_reward_that_dies_by_a_signal_is_missing_and_the_next_one_is_scored(number):
    """SIGKILL is also how the system ends a process for the memory that it takes."""
    with scorer("reward_functions:dies_by") as s:
        score = s.score(support.problem(number=int(number)), "bad")
        assert math.isnan(score.reward)
        assert score.failure == f"reward reward_functions:dies_by ended its process (exit code {-number})"
        assert s.score(support.problem(number=int(number)), "good").reward == 1.0


@pytest.mark.parametrize("busy", [False, True])
def test_a_sigterm_from_outside_costs_no_reward(busy):
    """As a batch system sends it to every process of a job that is to save and end."""
    with scorer("reward_functions:starts_with_answer_slowly") as s:
        assert s.score(support.problem(answer="c"), "c").reward == 1.0
        first = s._process.pid
        timer = threading.Timer(0.02 if busy else 0.0, os.kill, (first, signal.SIGTERM))
        timer.start()
        if not busy:
            timer.join()
            s._process.wait()
        assert s.score(support.problem(answer="c"), "c").reward == 1.0 and s._process.pid != first


@pytest.mark.parametrize(
    ("value", "failure"),
    [
        ("[math.nan]", "returned nan, no finite number"),
        ("[math.inf]", "returned inf, no finite number"),
        ("[-math.inf]", "returned -inf, no finite number"),
        ("[None]", "returned None, no finite number"),
        ("['good']", "returned 'good', no finite number"),
        ("['5']", "returned '5', no finite number"),
        ("[b'5']", "returned b'5', no finite number"),
        ("[1j]", "returned 1j, no finite number"),
        ("[[1.0]]", "returned [1.0], no finite number"),
        ("[{'score': 1.0}]", "returned {'score': 1.0}, no finite number"),
        ("None", "returned None, no finite number"),
        ("'5'", "returned '5', no finite number"),
        ("[10**400]", "no finite number"),
        ("[]", "returned 0 values for one completion"),
        ("[1.0, 2.0, 3.0]", "returned 3 values for one completion"),
        ("{'a': 1.0, 'b': 2.0}", "returned 2 values for one completion"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("__import__('sys').exit(3)", "raised SystemExit: 3"),
    ],
)
def test_what_is_not_one_finite_number_is_a_missing_reward(value, failure):
    with scorer("reward_functions:gives_what_it_is_told") as s:
        score = s.score(support.problem(value=value), "x")
        assert math.isnan(score.reward) and failure in score.failure
        assert s.score(support.problem(value="0.25"), "x").reward == 0.25


def test_a_reward_beyond_float32_is_a_missing_one():
    """Advantages are computed in float32, where it would be infinite."""
    with scorer("reward_functions:gives_what_it_is_told") as s:
        for value in ("1e+39", "-3.5e+38"):
            score = s.score(support.problem(value=f"[{value}]"), "x")
            assert math.isnan(score.reward) and f"returned {value}, no finite number in float32" in score.failure
        assert s.score(support.problem(value="3.4e38"), "x").reward == 3.4e38
    with scorer("reward_functions:gives_what_it_is_told", weight=10.0) as s:
        score = s.score(support.problem(value="3.4e38"), "x")
        assert math.isnan(score.reward) and "3.4e+39 in all are beyond float32" in score.failure


def test_a_reward_that_forks_and_returns_twice_answers_once():
    """The child's answer would be taken for that of the next completion, and so on for ever."""
    with scorer("reward_functions:forks_and_both_return") as s:
        assert [s.score(support.problem(), "x" * n).reward for n in range(1, 6)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_memory_that_runs_out_takes_the_reward_process_first():
    with scorer("reward_functions:number") as s:
        s.score(support.problem(), "x")
        worker, trainer = (Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in (s._process.pid, "self"))
        assert int(worker) == 1000 > int(trainer)


def test_a_hanging_reward_ends_at_its_time_limit_and_the_next_one_is_scored():
    with scorer("reward_functions:hangs", limit=0.5) as s:
        s.score(support.problem(), "good")
        start = time.perf_counter()
        score = s.score(support.problem(), "bad")
        assert 0.4 < time.perf_counter() - start < 3.0
        assert math.isnan(score.reward)
        assert score.failure == "reward reward_functions:hangs took longer than scoring.time_limit_seconds=0.5"
        assert s.score(support.problem(), "good").reward == 1.0


def test_a_hanging_rewards_own_processes_end_with_it(tmp_path):
    with scorer("reward_functions:starts_a_process_and_hangs", limit=0.5) as s:
        s.score(support.problem(file=str(tmp_path / "pid")), "x")
        assert_dead(int((tmp_path / "pid").read_text()))


def test_processes_that_a_reward_left_behind_end_with_the_run(tmp_path):
    with scorer("reward_functions:leaves_a_process_behind") as s:
        assert s.score(support.problem(file=str(tmp_path / "pid")), "x").reward == 1.0
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
    assert_dead(pid)


def assert_dead(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and waiting for a parent that does not collect
            return
        time.sleep(0.02)
    pytest.fail("the reward's child is alive")


def test_a_row_that_cannot_be_handed_over_is_a_missing_reward():
    with scorer("reward_functions:number") as s:
        score = s.score(support.problem(thing=lambda: None), "x")
        assert math.isnan(score.reward) and "cannot be given test row 1" in score.failure
        assert s.score(support.problem(), "x").reward == 0.5


def test_imports_do_not_count_against_the_time_limit():
    entry = {"metadata": {"source_dataset": "basic_arithmetic"}}
    with scorer("reasoning_gym", "math_verify", limit=0.3) as s:
        assert s.score(support.problem(answer="5", **entry), "5").failure is None


def test_printing_does_not_disturb_the_answers():
    with scorer("reward_functions:prints") as s:
        assert [s.score(support.problem(), "x").reward for _ in range(3)] == [1.0] * 3


@pytest.mark.parametrize(
    ("function", "match"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("reward_functions:no_such_function", "no attribute 'no_such_function'"),
    ],
)
def test_functions_that_cannot_be_loaded(function, match):
    with scorer(function) as s, pytest.raises(UserError, match=match):
        s.score(support.problem(), "x")


def test_math_verify():
    with scorer("math_verify") as s:
        half = support.problem(answer=r"\frac{1}{2}")
        assert s.score(half, r"The answer is $\frac{2}{4}$.").reward == 1.0
        assert s.score(half, "The answer is 0.5").reward == 1.0
        assert s.score(half, "The answer is 2").reward == 0.0
        assert s.score(half, "I do not know").reward == 0.0
        s.check([half])
        with pytest.raises(DataError, match=r"gsm.jsonl line 3: answer '' cannot be parsed by math_verify"):
            s.check([half, support.problem(answer="", row="gsm.jsonl line 3")])


def test_math_verify_takes_what_is_in_the_box():
    with scorer("math_verify") as s:
        problem = support.problem(answer="42")
        assert s.score(problem, r"The answer is $\boxed{42}$. So the final answer is $7$.").reward == 1.0
        assert s.score(problem, r"The answer is $\boxed{7}$. So the final answer is $42$.").reward == 0.0


def test_a_gold_solution_is_read_for_its_box():
    solution = r"Let $x = 5$, so that $y = 7$ and the point is $\boxed{\left(3, \frac{\pi}{2}\right)}$."
    with scorer("math_verify") as s:
        problem = support.problem(answer=solution)
        s.check([problem])
        assert s.score(problem, r"\boxed{(3, \pi/2)}").reward == 1.0
        assert s.score(problem, r"\boxed{5}").reward == s.score(problem, r"\boxed{7}").reward == 0.0


def test_e_notation_is_a_number():
    with scorer("math_verify") as s:
        problem = support.problem(answer=r"\boxed{4.5e33}")
        right = (r"\boxed{4.5 \times 10^{33}}", "$4.5e33$", "$4.5E+33$")
        assert [s.score(problem, text).reward for text in right] == [1.0] * 3
        assert s.score(problem, r"\boxed{4.5 \times 10^{32}}").reward == 0.0
        assert s.score(support.problem(answer="3e-05"), r"\boxed{0.00003}").reward == 1.0
        assert s.score(support.problem(answer="2e^{3}"), r"\boxed{2e^3}").reward == 1.0


def cosine(max_length=10, correct=(1.0, 0.5), wrong=(0.0, -0.5)):
    options = {"max_length": max_length, "correct": list(correct), "wrong": list(wrong)}
    return RewardConfig("cosine", options=options)


def test_cosine_scales_with_the_length_from_one_end_to_the_other():
    problem = support.problem(answer="4")
    with scorer(cosine()) as s:
        rewards = [s.score(problem, "4".rjust(n)).reward for n in (1, 5, 10, 11, 1000)]
        assert rewards == pytest.approx([0.75 + 0.25 * math.cos(math.pi / 10), 0.75, 0.5, 0.5, 0.5])
        rewards = [s.score(problem, "5".rjust(n)).reward for n in (1, 5, 10, 11)]
        assert rewards == pytest.approx([-0.25 + 0.25 * math.cos(math.pi / 10), -0.25, -0.5, -0.5])
        assert s.score(problem, "").reward == 0.0  # no answer is a wrong one, of length 0


def test_cosine_refuses_a_gold_answer_that_it_cannot_read():
    with scorer(cosine()) as s, pytest.raises(DataError, match=r"test row 1: answer '' cannot be parsed"):
        s.check([support.problem(answer="")])


def test_reasoning_gym():
    entry = {"question": "2 + 3", "metadata": {"source_dataset": "basic_arithmetic"}}
    with scorer("reasoning_gym", extract=r"-?\d+") as s:
        assert s.score(support.problem(answer="5", **entry), " 5\n").reward == 1.0
        assert s.score(support.problem(answer="5", **entry), "6").reward == 0.0
        with pytest.raises(DataError, match=r"row 1: there is no metadata.source_dataset"):
            s.check([support.problem(answer="5")])


def test_versions_tell_rewards_apart():
    with scorer("reward_functions:number") as one, scorer("reward_functions:number", weight=2.0) as two:
        assert one.version() != two.version()


OWN = "def mine(completions, prompts, **columns):\n    return [{0}]\n"
ASK = """
from aapo_fast.config import RewardConfig, ScoringConfig
from aapo_fast.rewards.scorer import Scorer
with Scorer([RewardConfig("own_rewards:mine")], ScoringConfig()) as scorer:
    print(scorer.version())
"""


def test_a_changed_file_in_the_current_folder_is_another_version(tmp_path):
    """As the installed command runs: its own process does not look for modules in the current folder (-P)."""

    def version_with(value):
        (tmp_path / "own_rewards.py").write_text(OWN.format(value))
        command = [sys.executable, "-P", "-c", ASK] if sys.version_info >= (3, 11) else [sys.executable, "-c", ASK]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    first, changed, again = version_with(1.0), version_with(2.0), version_with(1.0)
    assert first == again != changed


def test_a_file_that_is_changed_under_a_run_is_refused_when_its_process_starts_anew(tmp_path, monkeypatch):
    file = tmp_path / "own_rewards.py"
    file.write_text(OWN.format("1.0 if completions[0] == 'good' else __import__('os')._exit(3)"))
    monkeypatch.syspath_prepend(tmp_path)
    with scorer("own_rewards:mine") as s:
        before = s.version()
        assert s.score(support.problem(), "good").reward == 1.0
        assert math.isnan(s.score(support.problem(), "bad").reward)
        assert s.score(support.problem(), "good").reward == 1.0  # a new process, the same file
        file.write_text(OWN.format("2.0"))
        assert s.score(support.problem(), "good").reward == 1.0 and s.version() == before
        assert math.isnan(s.score(support.problem(), "bad").reward)
        with pytest.raises(UserError, match=r"own_rewards:mine\) are not those that this run began with"):
            s.score(support.problem(), "good")
