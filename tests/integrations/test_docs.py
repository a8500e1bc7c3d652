"""The code of these pages runs as it stands there, but for model, two steps and device. Other pages: test_pages.py."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "integrations"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("page", ["transformers.md", "trl.md"])
def test_code_of(page, tmp_path, tiny_model, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks)
    assert blocks and code.count(MODEL) == 1 and "max_steps=200" in code
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    short = code.replace(MODEL, str(tiny_model)).replace("max_steps=200", "max_steps=2, use_cpu=True")
    exec(compile(short, page, "exec"), names)
    assert names["trainer"].state.global_step == 2
