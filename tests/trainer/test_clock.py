"""A wall clock that jumps: nothing here is measured or ordered by it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from resume_support import folder_of, make_tree, run, steps, weights

from aapo_fast.trainer.records import read_lines

PACKAGE = Path(__file__).parents[2] / "aapo_fast"

JUMPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long calls, hours[] = {0, 1, -1, 9000, -9000, 24};
static long jump(void) { return 3600 * hours[__sync_fetch_and_add(&calls, 1) % 6]; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec, now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *into) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (into) *into = found.tv_sec;
    return found.tv_sec;
}
"""
"""For LD_PRELOAD: the clock of the day is an hour ahead at one reading, a year behind at the next."""

TRAIN = """
import time
from aapo_fast import config
from aapo_fast.cli import commands
readings = [time.time() for _ in range(12)]
print("jumps of", max(readings) - min(readings))
commands.train(config.parse({tree!r}), "CONFIG.toml")
"""


@pytest.fixture(scope="module")
def jumping(tmp_path_factory):
    """The environment of a process whose wall clock jumps, with those that it starts."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumps.c").write_text(JUMPS)
    command = [compiler, "-shared", "-fPIC", "-o", folder / "jumps.so", folder / "jumps.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return os.environ | {"LD_PRELOAD": str(folder / "jumps.so"), "PYTHONPATH": path}


def test_a_run_under_a_clock_that_jumps_is_the_same_run(tmp_path, tiny_model, jumping, weights_alone):
    tree = make_tree(tmp_path, tiny_model, checkpoint__background=True, run__tensorboard=True)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(tree=tree)], env=jumping, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split("jumps of ")[1].split()[0]) > 1e7  # seconds
    assert weights(tmp_path) == weights_alone and steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    seconds = [s for record in read_lines(tmp_path / "run" / "metrics.jsonl") for s in record["seconds"].values()]
    assert all(0 <= s < 60 for s in seconds) and 0 < sum(seconds) < 100


def test_time_limits_are_kept_under_a_clock_that_jumps(jumping):
    """That of a reward which hangs: neither at once nor never, five times."""
    code = (
        "import time; from aapo_fast.config import RewardConfig, ScoringConfig; import support\n"
        "from aapo_fast.rewards.scorer import Scorer\n"
        "with Scorer([RewardConfig('reward_functions:hangs')], ScoringConfig(time_limit_seconds=0.4)) as scorer:\n"
        "    for _ in range(5):\n"
        "        assert scorer.score(support.problem(), 'good').reward == 1.0\n"
        "        start = time.perf_counter()\n"
        "        assert 'took longer' in scorer.score(support.problem(), 'bad').failure\n"
        "        assert 0.3 < time.perf_counter() - start < 5.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=jumping, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_checkpoints_are_ordered_by_their_steps_not_by_their_times(tmp_path, crashed, weights_alone):
    """The later one seems to be a year older."""
    for path in [folder_of(tmp_path, 4), *folder_of(tmp_path, 4).iterdir()]:
        os.utime(path, (0, 0))
    _, said = run(crashed, run={"resume": True})
    assert "resuming after step 4 of 6" in said and weights(tmp_path) == weights_alone


def test_no_duration_is_taken_from_the_wall_clock():
    """Nor anything else: the date of a benchmark's machine is the only reading."""
    forbidden = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "today"), ("date", "today")}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                if (owner, node.attr) in forbidden:
                    found.append(str(path.relative_to(PACKAGE)))
            elif isinstance(node, ast.ImportFrom) and node.module == "time":
                found += [str(path) for name in node.names if name.name in ("time", "time_ns")]
    assert found == ["bench/machine.py"]
