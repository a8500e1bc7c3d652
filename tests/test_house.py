"""The rules of the house: who imports whom, what importing costs, pins that must agree."""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_layers():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom aapo_fast.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'rich', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"
    assert "--train.learning_rate" in result.stdout
    assert time.perf_counter() - start < 1.0


def test_importing_the_package_imports_no_torch():
    code = "import sys, aapo_fast; assert 'torch' not in sys.modules; aapo_fast.AAPO; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pins_agree():
    """ruff and mypy are named in pyproject.toml, constraints.txt and the pre-commit hooks."""
    files = ("pyproject.toml", "requirements/constraints.txt", ".pre-commit-config.yaml")
    pins = {tool: set() for tool in ("ruff", "mypy")}
    for file in files:
        for tool, version in re.findall(r"\b(ruff|mypy)==([\d.]+)", (ROOT / file).read_text()):
            pins[tool].add(version)
    assert all(len(versions) == 1 for versions in pins.values()), pins


def test_version_is_in_the_changelog():
    import aapo_fast

    assert f"## {aapo_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
