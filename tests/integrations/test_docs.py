"""The code of these pages runs as it stands there, but for model, two steps and device; and so do the lines to type,
in a fresh copy of the repository with an environment of its own, where nothing is installed but what they install.

Other pages: test_pages.py. verl and vLLM have environments of their own (requirements/).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "integrations"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NEXT_BLOCK = "=== next block ==="


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def short_code(page, model):
    """The page's Python in one piece, with a small model, two steps and no GPU."""
    code = "\n".join(blocks(page, "python"))
    assert code.count(MODEL) == 1 and "max_steps=200" in code
    return code.replace(MODEL, str(model)).replace("max_steps=200", "max_steps=2, use_cpu=True")


@pytest.mark.parametrize("page", ["transformers.md", "trl.md"])
def test_code_of(page, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    exec(compile(short_code(page, tiny_model), page, "exec"), names)
    assert names["trainer"].state.global_step == 2


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """What git tracks, copied: nothing that was built here, and no file that was forgotten in a commit."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip(f"which files are the repository's, git has to say: {tracked.stderr.strip()}")
    folder = tmp_path_factory.mktemp("clean")
    # What the build of aapo-fast fetches first; the cache would answer without a network.
    fetch = ["download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "1", "--dest", folder, "setuptools>=77"]
    fetched = subprocess.run([sys.executable, "-m", "pip", *fetch], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"pip reaches no package index: {fetched.stderr.strip().splitlines()[-1]}")
    for name in tracked.stdout.split("\0")[:-1]:
        copy = folder / "aapo-fast" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    python = folder / "bin" / "python3"  # the Python of this environment, but not this environment
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys._base_executable)} "$@"\n')
    python.chmod(0o755)
    yield folder / "aapo-fast"
    shutil.rmtree(folder)  # a gigabyte


def type_lines(checkout, *shell_blocks):
    """Types the blocks one after the other, into one shell that stops at the first failure; what each printed."""
    ours = ("AAPO_FAST", "PYTHON", "TRITON", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    path = [folder for folder in environment["PATH"].split(":") if Path(folder) != Path(sys.executable).parent]
    environment["PIP_NO_COMPILE"] = "no"  # means yes (pip documents it): what is never imported is not compiled
    environment["PATH"] = ":".join([str(checkout.parent / "bin"), *path])
    script = "".join(f"echo '{NEXT_BLOCK}'\n{block}\n" for block in shell_blocks)
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.split(f"{NEXT_BLOCK}\n")[1:]


@pytest.fixture(scope="session")
def examples(checkout):
    """What the lines of the examples' page print, and the kernels that were built on the way.

    Leaves the environment with torch alone, in ``checkout.parent / "torch"``.
    """
    report = "cd ..; python -c 'from aapo_fast.ops import native; print(native.__file__, native.describe())'"
    uninstall = "pip uninstall --quiet --yes aapo-fast"
    _, *printed, kernels, _ = type_lines(checkout, *blocks("examples.md", "sh"), report, uninstall)
    (checkout / ".venv").rename(checkout.parent / "torch")
    return printed, kernels


def words(text):
    """The lines but for their figures."""
    return [re.sub(r"[\d.]+", "#", line) for line in text.splitlines() if line != "..."]


def figures(name, text):
    return [float(number) for number in re.findall(rf"{name} ([\d.]+)", text)]


@pytest.mark.timeout(900)  # torch is downloaded where pip has not cached it, and the kernels are compiled
def test_lines_of_the_examples(checkout, examples):
    (loop, one_rank, two_ranks), kernels = examples
    shown_loop, shown_ranks = blocks("examples.md", "text")
    assert str(checkout / ".venv") in kernels
    if shutil.which("g++"):
        assert "native kernels: for CPUs" in kernels

    assert set(words(loop)) == set(words(shown_loop)) and len(figures("reward", loop)) == 16
    reward, reference = figures("reward", loop), figures("reference", loop)
    assert reward[0] < 0.1 and min(reward[-3:]) > 0.6 and max(reference) < 0.15

    assert set(words(one_rank)) == set(words(shown_ranks))
    assert len(figures("loss", one_rank)) == len(figures("loss", two_ranks)) == 20
    for name in ("loss", "grad"):
        one, two, shown = (figures(name, text) for text in (one_rank, two_ranks, shown_ranks))
        assert two == pytest.approx(one, rel=1e-3, abs=2e-5)  # five digits are printed
        assert [*one[:3], one[-1]] == pytest.approx(shown, rel=1e-2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ["transformers.md", "trl.md"])
def test_lines_and_code_of(page, checkout, examples, tiny_model):
    """Each page begins with torch alone, so that no page lives on what another installed."""
    environment = checkout / ".venv"
    shutil.rmtree(environment, ignore_errors=True)
    # Under the same path, so its scripts work; as hard links, which pip replaces and never writes to.
    shutil.copytree(checkout.parent / "torch", environment, symlinks=True, copy_function=os.link)
    code = checkout.parent / "page.py"
    code.write_text(short_code(page, tiny_model) + "\nprint('steps', trainer.state.global_step)\n")
    *_, printed = type_lines(checkout, *blocks(page, "sh"), f"cd ..; python {code.name}")
    assert printed.endswith("steps 2\n")
