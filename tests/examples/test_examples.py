"""The examples do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_plain_loop_learns():
    rewards = [float(r) for r in re.findall(r"reward ([\d.]+)", run(EXAMPLES / "plain_loop.py", "--steps", "111"))]
    assert len(rewards) == 12 and rewards[0] < 0.1
    assert sum(rewards[-3:]) / 3 > 0.6


def test_two_ranks_of_fsdp_are_one():
    found = []
    for ranks in ("1", "2"):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
        lines = re.findall(r"loss ([\d.]+)  grad ([\d.]+)", run(*launch, EXAMPLES / "fsdp2.py", "--steps", "4"))
        found.append([float(number) for line in lines for number in line])
    one, two = found
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-4)
    assert one[6] < 0.7 * one[0]
