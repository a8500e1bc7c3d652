"""TRL under data parallelism: two ranks on the CPU, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import support

TESTS = Path(__file__).parents[1]


def test_two_ranks(tmp_path):
    """``fuse`` against TRL's own run, AAPO against its loss written out over the tokens of both ranks."""
    support.save_tiny_model(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(TESTS / "trl_ranks.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("as on one rank") == 2
