"""The scripts for machines with a GPU, as far as they can be tried without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("gpu_suite.sh", "fetch_peer_wheels.sh")

STUB = f"""#!/bin/bash
echo "$@" >> "$CALLS"
case "$*" in
  "-c "*) exit 0 ;;
  *"pytest --version") exit 0 ;;
  *"pytest tests/gpu"*) echo "1 failed"; exit 1 ;;
  *"bench head"*) exec {sys.executable} -m aapo_fast.cli bench head --device cpu --shape 64,16,211 --rounds 1 \
    --method 1G --output "$OUT" --note "${{STUB_NOTE:?}}" ;;
  *"bench accuracy"*) exit 1 ;;
  *gpu_train_step*) echo "| a step |"; exit 1 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    path = ROOT / "benchmarks" / name
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_without_cuda_one_line(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PEER_WHEELS": "/nowhere"}
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh"],
        env={**environment, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_red_tests_mark_every_table(tmp_path):
    """With a python that plays the GPU machine: the note reaches the measurements, tables come last, status 1."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(stub),
        "CALLS": str(tmp_path / "calls"),
        "OUT": str(tmp_path / "out"),
        "PEER_WHEELS": str(tmp_path / "none"),
        "STUB_NOTE": "GPU TESTS",
    }
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    calls = (tmp_path / "calls").read_text()
    [head] = [line for line in calls.splitlines() if "bench head" in line]
    assert "--note GPU TESTS" in head and "8192,4096,151936 4096,4096,128256 16384,2048,248320" in head
    tail = result.stdout[result.stdout.index("== tests:") :]
    assert tail.index("**GPU TESTS**") < tail.index("Time, of 3G") < tail.index("| 3G |")
