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
  "-c import json, sys; print"*) exit 0 ;;
  "-c import json"*) exec {sys.executable} "$@" ;;
  "-c "*) exit 0 ;;
  *"pytest --version") exit 0 ;;
  *"pytest tests/gpu/test_run.py tests/gpu/test_training.py "*) echo "$STUB_TESTS"; exit "$STUB_TESTS_STATUS" ;;
  *"bench head"*) {sys.executable} -m aapo_fast.cli bench head --device cpu --shape 64,16,211 --rounds 1 \
    --method 1G --output "$OUT" --note "${{STUB_NOTE:?}}"; exit "$STUB_HEAD" ;;
  *"bench accuracy"*) [ -z "$STUB_ACCURACY_JSON" ] || echo "$STUB_ACCURACY_JSON" > "$OUT/accuracy.json"
    exit "$STUB_ACCURACY" ;;
  *gpu_train_step*) echo "| a step |"; exit 1 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
GREEN = "tests/gpu/test_loss.py ..s.. [ 50%]\ntests/gpu/test_variants.py ssF.s [100%]\n6 passed"
WRONG = """{"cases": [{"rows": [{"kind": "KIND", "status": "wrong gradient"}]}]}"""


def suite(tmp_path, **changes):
    """Run with a python that plays the GPU machine."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {
        "PYTHON": str(stub), "CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out"),
        "PEER_WHEELS": str(tmp_path / "none"), "STUB_NOTE": "no note", "STUB_TESTS": GREEN, "STUB_TESTS_STATUS": "0",
        "STUB_HEAD": "0", "STUB_ACCURACY": "0", "STUB_ACCURACY_JSON": "",
    }  # fmt: skip
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh"],
        env={**os.environ, **environment, **changes},
        capture_output=True,
        text=True,
        check=False,
    )


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
    """The note reaches the measurements, tables come last, status 1."""
    result = suite(tmp_path, STUB_TESTS="1 failed", STUB_TESTS_STATUS="1", STUB_NOTE="GPU TESTS")
    assert result.returncode == 1, result.stderr
    calls = (tmp_path / "calls").read_text()
    [head] = [line for line in calls.splitlines() if "bench head" in line]
    assert "--note GPU TESTS" in head and "8192,4096,151936 4096,4096,128256 16384,2048,248320" in head
    tail = result.stdout[result.stdout.index("== tests:") :]
    assert tail.index("**GPU TESTS**") < tail.index("Time, of 3G") < tail.index("| 3G |")


def test_green(tmp_path):
    """Every file of tests once; what remains is what cannot be made again."""
    result = suite(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "== tests: green" in result.stdout and "GPU TESTS" not in result.stdout
    assert f"== no wheels in {tmp_path / 'none'}" in result.stdout
    [tests] = [line.split() for line in (tmp_path / "calls").read_text().splitlines() if "pytest tests/gpu" in line]
    assert sorted(t for t in tests if t.startswith("tests/")) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["head.json", "tests.log", "train_step.log"]


@pytest.mark.parametrize("file", ["test_loss.py", "test_variants.py"])
def test_what_is_skipped_is_not_green(tmp_path, file):
    """Though others pass: of this one all are skipped."""
    tests = "\n".join(line if file not in line else f"tests/gpu/{file} sss [ 99%]" for line in GREEN.splitlines())
    result = suite(tmp_path, STUB_TESTS=tests)
    assert result.returncode == 1 and f"GPU TESTS NOT RUN: nothing passed in {file}" in result.stdout


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"STUB_HEAD": "1"}, 1, "WRONG OR FAILED: bench head"),
        ({"STUB_HEAD": "1", "STUB_ACCURACY": "1"}, 1, "WRONG OR FAILED: bench head, bench accuracy"),
        ({"STUB_HEAD": "130", "STUB_ACCURACY": "124"}, 0, "bench accuracy: out of time"),
        ({"STUB_ACCURACY": "137", "STUB_ACCURACY_JSON": WRONG.replace("KIND", "peer")}, 0, "accuracy: out of time"),
        ({"STUB_ACCURACY": "137", "STUB_ACCURACY_JSON": WRONG.replace("KIND", "ours")}, 1, "FAILED: bench accuracy"),
    ],
    ids=["wrong head", "both wrong", "out of time", "a wrong peer", "out of time, and wrong before"],
)
def test_a_wrong_gradient_is_status_one_and_want_of_time_is_not(tmp_path, changes, status, said):
    result = suite(tmp_path, **changes)
    assert result.returncode == status and said in result.stdout, result.stdout + result.stderr
