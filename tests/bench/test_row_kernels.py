"""benchmarks/row_kernels.py runs: every kernel has a time and a floor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aapo_fast.ops import native

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_a_small_chunk(tmp_path):
    written = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/row_kernels.py"), "--shape", "16,32,4096", "--rounds", "1"]
    subprocess.run([*command, "--output", str(written)], check=True, capture_output=True, text=True, cwd=ROOT)
    kernels = json.loads(written.read_text())["kernels"]
    assert len(kernels) >= 5 and all(k["milliseconds"] > 0 and k["floor_milliseconds"] > 0 for k in kernels.values())
