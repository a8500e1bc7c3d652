"""The reference cache: what decides a reward is in its key, and a kill loses nothing that was committed."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import support

from aapo_fast.advantages import pair_references
from aapo_fast.rollout.reference import ReferenceCache
from aapo_fast.types import Problem, SamplingParams, UserError

COMMON = {"model": "m", "reward_version": "r", "sampling": SamplingParams(max_tokens=4), "samples": 2, "seed": 0}


def open_cache(path, **changes):
    return ReferenceCache(path, **(COMMON | changes))


def no_draw(problems, seeds):
    pytest.fail(f"drawn again: {problems}")


def test_each_problem_is_drawn_once_and_kept(tmp_path):
    cache = open_cache(tmp_path / "c.sqlite")
    problems = [support.problem("ab"), support.problem("cd"), support.problem("ab")]
    drawn = []

    def draw(problems, seeds):
        drawn.extend(zip((p.prompt for p in problems), seeds, strict=True))
        return [[1.0, 0.25] for _ in problems]

    with pytest.raises(KeyError, match="no reference rewards of test row 1"):
        cache.rewards(problems[0])
    cache.fill(problems, draw)
    assert [prompt for prompt, _ in drawn] == ["ab", "cd"] and drawn[0][1] != drawn[1][1]
    cache.close()
    again = open_cache(tmp_path / "c.sqlite")
    again.fill(problems, no_draw)
    assert again.rewards(problems[1]) == [1.0, 0.25]


def test_a_problem_that_comes_up_often_is_looked_up_once(tmp_path, monkeypatch):
    cache, real, asked = open_cache(tmp_path / "c.sqlite"), ReferenceCache._key, []
    monkeypatch.setattr(ReferenceCache, "_key", lambda self, problem: asked.append(problem) or real(self, problem))
    problems = [support.problem("ab"), support.problem("cd")]
    assert cache.missing(problems * 50) == problems and asked == problems


FILL_OWN = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from aapo_fast.rollout.reference import ReferenceCache
from aapo_fast.types import Problem, SamplingParams
cache = ReferenceCache(Path({file!r}), model="m", reward_version="r", sampling=SamplingParams(max_tokens=4),
                       samples=2, seed=0)
for i in range({first}, {first} + 100):
    problem = Problem("row", "p", (i,), {{"answer": i}})
    cache.fill([problem], lambda problems, seeds: [[float(i), 0.5]])
    assert cache.rewards(problem) == [float(i), 0.5]
"""


def test_processes_that_fill_it_at_once_and_leave_no_log(tmp_path):
    """Also after one that kept a write-ahead log, as earlier versions did, which a network disk may corrupt."""
    file = tmp_path / "c.sqlite"
    sqlite3.connect(file).execute("PRAGMA journal_mode=WAL").close()
    codes = [FILL_OWN.format(path=sys.path, file=str(file), first=100 * place) for place in range(4)]
    children = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert [child.wait(120) for child in children] == [0] * 4
    cache = open_cache(file)
    assert not cache.missing([Problem("row", "p", (i,), {"answer": i}) for i in range(400)])
    assert os.listdir(tmp_path) == ["c.sqlite"]


def test_a_failed_reward_serves_this_run_and_is_drawn_again_by_the_next(tmp_path):
    cache = open_cache(tmp_path / "c.sqlite")
    problem = support.problem("ab")
    cache.fill([problem], lambda p, s: [[1.0, math.nan]])
    cache.fill([problem], no_draw)
    assert cache.rewards(problem)[0] == 1.0 and math.isnan(cache.rewards(problem)[1])
    assert open_cache(tmp_path / "c.sqlite").missing([problem])


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"reward_version": "other"},
        {"sampling": SamplingParams(max_tokens=5)},
        {"sampling": SamplingParams(max_tokens=4, temperature=0.9)},
        {"sampling": SamplingParams(max_tokens=4, top_p=0.9)},
        {"sampling": SamplingParams(max_tokens=4, stop=("x",))},
        {"samples": 3},
        {"seed": 1},
    ],
    ids=str,
)
def test_never_used_for_anything_else(tmp_path, changes):
    problem = support.problem("ab", answer="c")
    open_cache(tmp_path / "c.sqlite").fill([problem], lambda p, s: [[1.0, 0.0]])
    assert open_cache(tmp_path / "c.sqlite").rewards(problem) == [1.0, 0.0]
    assert open_cache(tmp_path / "c.sqlite", **changes).missing([problem])
    for other in (support.problem("abc", answer="c"), support.problem("ab", answer="d"), support.problem("ab", x=1)):
        assert open_cache(tmp_path / "c.sqlite").missing([other])


FILL = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from aapo_fast.rollout.reference import ReferenceCache
from aapo_fast.types import Problem, SamplingParams
cache = ReferenceCache(Path({file!r}), model="m", reward_version="r", sampling=SamplingParams(max_tokens=4),
                       samples=2, seed=0)
print("start", flush=True)
for i in range(4000):
    cache.fill([Problem("row", "p", (i,), {{"answer": i}})], lambda problems, seeds: [[float(i), 0.5]])
"""


def test_a_kill_at_any_moment_leaves_a_usable_cache(tmp_path):
    """SIGKILL a process that is filling, six times; each successor finds whole entries and adds to them."""
    file = tmp_path / "c.sqlite"
    problems = [Problem("row", "p", (i,), {"answer": i}) for i in range(4000)]
    counts = []
    for kill in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", FILL.format(path=sys.path, file=str(file))], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        time.sleep(0.01 + 0.02 * kill)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        cache = open_cache(file)
        missing = {p.prompt_ids for p in cache.missing(problems)}
        for index, problem in enumerate(problems):
            assert problem.prompt_ids in missing or cache.rewards(problem) == [float(index), 0.5]
        counts.append(len(problems) - len(missing))
        cache.close()
    assert counts == sorted(counts) and 0 < counts[-1] < 4000


def test_two_runs_may_share_the_file(tmp_path):
    one, two = open_cache(tmp_path / "c.sqlite"), open_cache(tmp_path / "c.sqlite")
    one.fill([support.problem("ab")], lambda p, s: [[1.0, 0.0]])
    two.fill([support.problem("ab"), support.problem("cd")], lambda p, s: [[2.0, 0.0] for _ in p])
    assert two.rewards(support.problem("ab")) == [1.0, 0.0] and one.rewards(support.problem("cd")) == [2.0, 0.0]


def test_files_that_are_no_cache(tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("this is not a database, however long it is made to look" * 50)
    with pytest.raises(UserError, match=r"reference.cache=.*text.sqlite cannot be used: file is not a database"):
        open_cache(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="cannot be used"):
        open_cache(folder)
    newer = tmp_path / "newer.sqlite"
    cache = open_cache(newer)
    cache._db.execute("PRAGMA user_version=99")
    cache.close()
    with pytest.raises(UserError, match="has format 99, want 1"):
        open_cache(newer)


def test_pairing():
    assert pair_references([1.0, 2.0, 3.0], 5, "paired") == [1.0, 2.0, 3.0, 1.0, 2.0]
    assert pair_references([1.0, math.nan, 3.0], 2, "mean") == [2.0, 2.0]
    assert all(map(math.isnan, pair_references([math.nan], 2, "mean")))
