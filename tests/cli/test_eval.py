"""`aapo-fast eval` on a tiny model: held-out problems, files, benchmarks; killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time

import datasets
import pytest
import support
from resume_support import room_for

from aapo_fast import cli, config

ROWS = {
    "aime24": [{"id": 60, "problem": "say a:", "solution": "s", "answer": "204", "url": "u", "year": "2024"}],
    "math500": [{"problem": "say b:", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"}],
    "amc23": [{"id": 0, "problem": "say c:", "answer": 27.0, "url": "u"}],
    "minerva": [{"problem": "say d:", "solution": r"So $\boxed{4.5e33}$ erg/s.", "type": "t", "idx": 0}],
    "olympiadbench": [{"question": "say e:", "answer": "$2^{1009}$"}],
}


@pytest.fixture
def chat_model(tmp_path_factory, tiny_model):
    """The tiny model, with a chat template, and positions for the instructions of benchmarks."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    support.save_tiny_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 1024}))
    tokenizer = support.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}a:"
    tokenizer.save_pretrained(folder)
    return folder


def write(tmp_path, model, **changes):
    path = tmp_path / "config.toml"
    path.write_text(support.toml(support.tiny_run(tmp_path, model, **changes)))
    return str(path)


def results(folder):
    return {found["name"]: found for found in (json.loads(p.read_text()) for p in sorted(folder.glob("*.json")))}


def test_held_out_problems_of_a_file_that_has_no_others(tmp_path, tiny_model, capsys):
    path = write(tmp_path, tiny_model)
    assert cli.main(["eval", path, "--data.held_out", "12", "--eval.samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "held-out (12)" in out and "greedy" in out and "pass@1" in out and "pass@3" in out and "95% interval" in out
    found = results(tmp_path / "run" / "evals")["held-out"]
    assert found["problems"] == 12 and found["completions"] == 48 and list(found["pass_at"]) == ["1", "2", "3"]
    assert found["interval"] == "95% percentile bootstrap over problems, 10000 resamples"
    assert cli.main(["eval", path, "--data.held_out", "12", "--eval.samples", "3"]) == 0
    assert "12 problems, 12 of them there already" in capsys.readouterr().out
    assert results(tmp_path / "run" / "evals")["held-out"] == found


def test_every_row_and_another_folder(tmp_path, tiny_model, capsys):
    rows = support.write_jsonl(tmp_path / "test.jsonl", [{"question": "say:", "answer": "x"}] * 5)
    path = write(tmp_path, tiny_model)
    assert cli.main(["eval", path, "--all", "--data.source", str(rows), "--output", str(tmp_path / "out")]) == 0
    assert "all (5)" in capsys.readouterr().out and results(tmp_path / "out")["all"]["problems"] == 5


def test_reasoning_gym(tmp_path, tiny_model, capsys):
    path = write(tmp_path, tiny_model, rewards=[{"function": "reasoning_gym"}])
    arguments = ["eval", path, "--data.source", "reasoning_gym:spell_backward", "--data.max_prompt_tokens", "4096"]
    assert cli.main([*arguments, "--data.held_out", "6"]) == 0
    assert "held-out (6)" in capsys.readouterr().out
    assert cli.main([*arguments, "--all"]) == 2
    assert "data.source='reasoning_gym:spell_backward' has no last problem" in capsys.readouterr().err


def test_killed_and_started_again(tmp_path, tiny_model):
    path = write(tmp_path, tiny_model, rewards=[{"function": "reward_functions:starts_with_answer_slowly"}])
    arguments = ["eval", path, "--data.held_out", "12", "--rollout.max_batch_size", "4"]
    assert cli.main([*arguments, "--output", str(tmp_path / "alone")]) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "aapo_fast.cli", *arguments, "--output", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while sum(p.read_bytes().count(b"\n") for p in (tmp_path / "killed").glob("*.jsonl")) < 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    [partial], [alone] = ((tmp_path / name).glob("*.jsonl") for name in ("killed", "alone"))
    assert 8 <= partial.read_bytes().count(b"\n") < 24 and not list((tmp_path / "killed").glob("*.json"))
    assert cli.main([*arguments, "--output", str(tmp_path / "killed")]) == 0
    assert partial.name == alone.name and partial.read_bytes() == alone.read_bytes()
    assert results(tmp_path / "killed") == results(tmp_path / "alone")


def test_a_disk_that_is_full(tmp_path, tiny_model, capsys):
    """While completions are written, or their result; with room again it goes on."""
    command = ["eval", write(tmp_path, tiny_model), "--data.held_out", "12", "--rollout.max_batch_size", "4"]
    assert cli.main([*command, "--output", str(tmp_path / "alone")]) == 0
    result = next((tmp_path / "alone").glob("*.json"))
    for folder, file in (("run/evals", f"{result.stem}.jsonl"), ("alone", result.name)):
        capsys.readouterr()
        with room_for(1000):
            assert cli.main([*command, "--output", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert f"{file} cannot be written: File too large; make room, and give the command again" in error
        assert error.count("\n") == 1
        assert cli.main([*command, "--output", str(tmp_path / folder)]) == 0
    assert results(tmp_path / "run" / "evals") == results(tmp_path / "alone")


def test_the_five_benchmarks_from_copies(tmp_path, chat_model, capsys):
    assert list(ROWS) == config.benchmark_names()
    wanted = []
    for name, rows in ROWS.items():
        split = "test" if name == "math500" else "train"
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / f"{split}.parquet")
        wanted.append(f"{name}=hub:{tmp_path / name}")
    wanted[0] = f"aime24={support.write_jsonl(tmp_path / 'aime.jsonl', ROWS['aime24'])}"
    path = write(tmp_path, chat_model)
    arguments = ["--rollout.max_tokens", "4", "--eval.samples", "2"]
    assert cli.main(["eval", path, "--benchmarks", ",".join(wanted), *arguments]) == 0
    out = capsys.readouterr().out
    assert "average of 5 benchmarks, pass@1: 0.000" in out and "olympiadbench (1)" in out
    found = results(tmp_path / "run" / "evals")
    assert list(found) == sorted(ROWS)
    for result in found.values():
        assert result["sampling"] == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 4, "stop": []}
        assert result["rewards"][0]["function"] == "math_verify" and result["completions"] == 3
    [lines] = (tmp_path / "run" / "evals").glob("olympiadbench-*.jsonl")
    prompt = json.loads(lines.read_text().splitlines()[0])["prompt"]
    assert prompt.startswith(
        "Solve the following math problem efficiently and clearly.  The last line of your response"
    )
    assert r"the final answer is: $\boxed{ANSWER}$. I hope it is correct' (without quotes)" in prompt
    assert prompt.endswith("Think step by step before answering.\n\nsay e:\na:")


def test_benchmarks_share_one_engine():
    """They differ in nothing that the engine is started with."""
    from aapo_fast.cli import QUICKSTART

    loaded = [config.load(QUICKSTART, (), name) for name in config.benchmark_names()]
    assert all(c.rollout == loaded[0].rollout and c.rewards == loaded[0].rewards for c in loaded)
    assert all(c.data.max_prompt_tokens == loaded[0].data.max_prompt_tokens for c in loaded)
    assert loaded[0].rollout.prompts_per_step == 8  # the config's own
    assert loaded[0].data.options == {"split": "train"}  # none of the config's


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("aime24", r"the final answer is: $\boxed{204}$. I hope it is correct", 1.0),
        ("aime24", r"the final answer is: $\boxed{205}$. I hope it is correct", 0.0),
        ("aime24", "I do not know", 0.0),
        ("math500", r"$\boxed{0.5}$", 1.0),
        ("math500", r"first $\frac{1}{2}$, but $\boxed{2}$", 0.0),
        ("amc23", r"$\boxed{27}$", 1.0),
        ("amc23", r"$\boxed{27.1}$", 0.0),
        ("minerva", r"$\boxed{4.5 \times 10^{33}}$", 1.0),
        ("olympiadbench", r"$\boxed{2^{1009}}$", 1.0),
        ("olympiadbench", r"$\boxed{2^{1008}}$", 0.0),
    ],
)
def test_graders_on_rows_of_each_benchmark(name, text, value):
    from aapo_fast.cli import QUICKSTART
    from aapo_fast.rewards.functions import call, load

    settings = config.load(QUICKSTART, (), name)
    row = ROWS[name][0]
    columns = {**row, "answer": row[settings.data.answer_column]}
    [reward] = settings.rewards
    assert call(load(reward), reward, "", text, columns) == value


def test_a_gold_answer_that_cannot_be_read_is_refused_by_its_row(tmp_path, chat_model, capsys):
    rows = [*ROWS["aime24"], {"problem": "say:", "answer": "$"}]
    copy = support.write_jsonl(tmp_path / "aime.jsonl", rows)
    path = write(tmp_path, chat_model)
    assert cli.main(["eval", path, "--benchmarks", f"aime24={copy}", "--rollout.max_tokens", "4"]) == 2
    assert "aime.jsonl line 2: answer '$' cannot be parsed by math_verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", ","], "--benchmarks ',' names none"),
        (["--benchmarks", "math500, math500=x.jsonl"], "names one twice; give each once"),
        (["--rollout.temperature", "abc"], "rollout.temperature='abc'"),
        (["--rollout.temperature", "0"], "an evaluation is greedy besides (eval.samples=0: greedy alone)"),
        (["--benchmarks", "aime25"], "--benchmarks 'aime25' is not known; known are aime24, math500, amc23"),
        (["--benchmarks", "aime24"], "data.source='hub:HuggingFaceH4/aime_2024' with"),
        (["--benchmarks", "aime24"], "(without a network give a copy: hub:FOLDER, .parquet or .jsonl)"),
        (["--output", "/proc/x"], "--output /proc/x cannot be written: No such file"),
        (
            ["--rollout.max_tokens", "251"],
            "a prompt of 6 tokens: with rollout.max_tokens=251 that is beyond the model's",
        ),
        (["--data.held_out", "0"], "data.held_out=0: there is nothing to evaluate on; --all takes every row"),
        (["--data.held_out", "13"], "has only 12 different prompts; lower data.held_out=13"),
    ],
)
def test_refusals(tmp_path, tiny_model, arguments, message, capsys):
    assert cli.main(["eval", write(tmp_path, tiny_model), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
