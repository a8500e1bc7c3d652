"""The documentation: the site builds without a warning, links lead somewhere, code blocks are code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from aapo_fast.bench import report, results, sync

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.timeout(300)
def test_the_site_builds_and_its_links_and_anchors_are_there(tmp_path):
    """`make docs`; a broken link, a page that is in no menu, a name that does not exist: each is an error."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert all(f'id="aapo_fast.{name}"' in reference for name in ("objectives.AAPO", "advantages.aapo_advantages"))
    settings = (tmp_path / "site" / "config" / "index.html").read_text()
    assert "activation_checkpointing" in settings and "<!-- settings -->" not in settings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, str(page), "exec")


INJECT = (
    "rollout/test_vllm_faults.py",
    *(f"trainer/test_{name}.py" for name in ("clock", "full_disk", "kills", "nonfinite")),
)
"""Files all of whose tests are in the table of faults."""


@pytest.mark.timeout(180)
def test_the_table_of_faults_names_tests_with_the_cases_that_it_counts():
    rows = [line.split(" | ") for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if "::" in line]
    named = [re.findall(r"`([\w/]+\.py)::(\w+)`", tests) for _, tests, *_ in rows]
    assert len(rows) > 50 and all(named) and {len(row) for row in rows} == {5}
    for file, test in (pair for pairs in named for pair in pairs):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test
    here = {
        file for pairs in named for file, _ in pairs if not file.startswith("gpu/")
    }  # others need a GPU to be listed
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", *sorted(f"tests/{file}" for file in here | set(INJECT))]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = Counter(re.findall(r"^tests/([\w/]+\.py)::(\w+)", listed, re.MULTILINE))
    for pairs, (fault, _, times, *_) in zip(named, rows, strict=True):
        known = sum(cases[pair] or 1 for pair in pairs)
        assert re.fullmatch(rf"(\d+ in )?{known}", times), f"{fault}: {times}, and there are {known} cases"
    assert {pair for pair in cases if pair[0] in INJECT} <= {pair for pairs in named for pair in pairs}


@pytest.mark.parametrize("page", ["benchmarks.md", "accuracy.md"])
def test_the_pages_of_results_are_those_of_the_results(page, tmp_path):
    """What `aapo-fast bench report benchmarks/results --docs docs` would write is what is there."""
    shutil.copy(ROOT / "docs" / page, tmp_path)
    report.write_docs(list(results.find([ROOT / "benchmarks" / "results"])), tmp_path)
    assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()


def test_every_variable_of_the_environment_is_on_the_page_of_installation():
    code = [ROOT / "setup.py", *(ROOT / "aapo_fast").rglob("*.py")]
    names = {name for path in code for name in re.findall(r"AAPO_FAST_[A-Z_]+", path.read_text())}
    internal = {"AAPO_FAST_END_WITH_PARENT"}  # between a run and the servers that it starts
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"`(AAPO_FAST_[A-Z_]+)`", page)) == names - internal


def test_the_page_on_vllm_has_the_figures_of_its_results():
    """The tables are what `aapo-fast bench sync` printed; the sentences are of `benchmarks/quickstart.py`."""
    page = (ROOT / "docs" / "vllm.md").read_text()
    cost, run, other = (
        json.loads((ROOT / "benchmarks" / "results" / "cpu" / name).read_text())
        for name in ("sync/sync.json", "quickstart_vllm.json", "quickstart_hf.json")
    )
    assert sync.table(cost) in page
    sentence = (
        f"held-out accuracy from {run['accuracy_before']:.2f} to {run['accuracy_after']:.2f} in {run['steps']} steps "
        f"and {run['wall_seconds'] / 60:.1f} minutes, {run['generation_tokens_per_second']:.0f} tokens a second of "
        f"generation and {run['syncs']} syncs of {run['sync_seconds']:.2f} s (medians), and the largest mean gap of a "
        f"step {run['largest_mean_gap']:.1e} nats. On the Hugging Face engine: from {other['accuracy_before']:.2f} to "
        f"{other['accuracy_after']:.2f} in {other['wall_seconds'] / 60:.1f} minutes, "
        f"{other['generation_tokens_per_second']:.0f} tokens a second"
    )
    assert sentence in " ".join(page.split())
