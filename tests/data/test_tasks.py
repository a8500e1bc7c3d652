"""Problems from every kind of source, and every row that is refused, by its message."""

import dataclasses

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import support

from aapo_fast.config import DataConfig
from aapo_fast.data.tasks import load_problems, order
from aapo_fast.types import DataError

ADDITION = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+"]}
SUMS = DataConfig(
    options={**ADDITION, "allow_parentheses": False}, template="what is {expression}?", size=200, held_out=64
)


def load(seed=0, **changes):
    return load_problems(dataclasses.replace(DataConfig(**{"held_out": 2}), **changes), support.tokenizer(), seed)


def test_reasoning_gym_sets_problems_aside_that_training_never_sees():
    problems = load_problems(SUMS, support.tokenizer(), 0)
    held_out = {p.prompt for p in problems.held_out}
    assert len(problems.held_out) == len(held_out) == 64 and len(problems.train) > 150
    assert not held_out & {p.prompt for p in problems.train}
    first = problems.train[0]
    a, b = first.prompt.removeprefix("what is ").removesuffix("?").split(" + ")
    assert first.columns["answer"] == str(int(a) + int(b))
    assert first.prompt_ids == tuple(support.tokenizer()(first.prompt).input_ids)
    assert first.columns["metadata"]["source_dataset"] == "basic_arithmetic"


def test_held_out_problems_are_the_same_for_every_seed_and_training_ones_are_not():
    one, two = (load_problems(SUMS, support.tokenizer(), seed) for seed in (0, 1))
    assert [p.prompt for p in one.held_out] == [p.prompt for p in two.held_out]
    assert [p.prompt for p in one.train] != [p.prompt for p in two.train]


def test_files_and_the_hub_library(tmp_path):
    rows = [{"problem": f"p{i % 5}", "solution": str(i)} for i in range(9)]
    jsonl = support.write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    for source in (str(jsonl), str(parquet), f"hub:{tmp_path / 'hub'}"):
        problems = load(source=source, template="q {problem}", answer_column="solution")
        assert [p.prompt for p in problems.held_out] == ["q p0", "q p1"]
        assert [p.prompt for p in problems.train] == ["q p2", "q p3", "q p4", "q p2", "q p3"]
        assert [p.columns["answer"] for p in problems.train] == ["2", "3", "4", "7", "8"]
    assert problems.train[0].row.endswith("train row 2")
    one = load(source=str(jsonl), template="{problem}", answer_column="solution", size=1).train
    assert [p.columns["answer"] for p in one] == ["2"]


def test_chat_template(tmp_path):
    rows = support.write_jsonl(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(4)])
    tokenizer = support.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    problems = load_problems(DataConfig(source=str(rows), held_out=1, chat_template=True), tokenizer, 0)
    assert problems.held_out[0].prompt == "user: q0\na:"
    config = DataConfig(source=str(rows), held_out=1, chat_template=True, system_prompt="be brief")
    assert load_problems(config, tokenizer, 0).held_out[0].prompt == "system: be brief\nuser: q0\na:"


def test_a_chat_template_that_refuses_its_messages_says_so_with_the_row(tmp_path):
    """Gemma's takes no system message; a template may also fail like any other program."""
    rows = support.write_jsonl(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(4)])
    config = DataConfig(source=str(rows), held_out=1, chat_template=True, system_prompt="be brief")
    tokenizer = support.make_tokenizer()
    for template, reason in (
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ no_such.thing }}", "'no_such' is undefined"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(DataError) as refusal:
            load_problems(config, tokenizer, 0)
        said = str(refusal.value)
        assert said.startswith(f"rows.jsonl line 1 does not fit the tokenizer's chat template: {reason}")
        assert "data.system_prompt" in said and "\n" not in said


def test_order_passes_over_all_problems_before_it_repeats():
    drawn = order(5, 13, seed=0)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and len(drawn) == 13
    assert drawn == order(5, 13, seed=0) != order(5, 13, seed=1)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ('{"question": "a"}\n', {}, "rows.jsonl line 1 has no 'answer'; it has question"),
        ('\n{"question": "a", "answer": null}\n', {}, "rows.jsonl line 2 has no 'answer'"),
        ('{"q": "a", "answer": "b"}\n', {}, "data.template='{question}': KeyError('question'); it has answer, q"),
        ('{"question": "a", "answer": "b"}\n', {"template": "{question[x]}"}, "fit data.template='{question[x]}'"),
        ('{"question": "a", "answer": "b"}\n', {"chat_template": True}, "data.chat_template=true, but"),
        ("{not json}\n", {}, "rows.jsonl line 1 is not JSON"),
        ("[1, 2]\n", {}, "rows.jsonl line 1 is a JSON list; give an object a line"),
        ('{"question": "", "answer": "b"}\n', {}, "line 1 makes an empty prompt"),
        ('{"question": "abcd", "answer": "b"}\n', {"max_prompt_tokens": 3}, "4 tokens, over data.max_prompt_tokens=3"),
        ('{"question": "a", "answer": "b"}\n' * 5, {}, "has only 1 different prompts; lower data.held_out=2"),
        ('{"question": "a", "answer": 1}\n{"question": "b", "answer": 1}\n', {}, "no training problem beside the 2"),
        ("", {}, "has only 0 different prompts"),
    ],
)  # fmt: skip
def test_refused_rows(tmp_path, text, changes, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as refusal:
        load(source=str(path), **changes)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere.jsonl"}, "data.source='nowhere.jsonl' is no file"),
        ({"source": "reasoning_gym:no_such_task"}, "no_such_task"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
        ({"options": {"min_terms": 5, "max_terms": 2}}, "data.options={'min_terms': 5, 'max_terms': 2}"),
        ({"source": "hub:no/such"}, "data.source='hub:no/such'"),
    ],
)
def test_refused_sources(changes, message):
    with pytest.raises(DataError) as refusal:
        load(**changes)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_tasks_with_many_right_answers_have_none_to_show():
    problems = load(source="reasoning_gym:graph_color", size=3, max_prompt_tokens=10_000)
    assert problems.train[0].columns["answer"] is None


def test_a_task_that_fails_at_a_problem_names_it():
    """Its options are of a type that only drawing a number refuses."""
    with pytest.raises(DataError) as refusal:
        load(source="reasoning_gym:chain_sum", options={"min_digits": 1.5, "max_digits": 2})
    message = "data.options={'min_digits': 1.5, 'max_digits': 2}: held-out problem 0 cannot be made: "
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "template", "message"),
    [
        (
            r'{"question": "a\ud800", "answer": "b"}',
            "{question}",
            "rows.jsonl line 1, in data.template, has a character that is no Unicode",
        ),
        (
            r'{"question": "a", "answer": "\udfff"}',
            "{question}",
            "rows.jsonl line 1, in data.template, has a character that is no Unicode",
        ),
        (r'{"question": "a", "answer": "b"}', "\udcff", "rows.jsonl line 1, in data.template, has a character"),
    ],
)
def test_half_a_surrogate_pair_is_no_text(tmp_path, text, template, message):
    """Nor is what of the command line is not UTF-8, which Python keeps as such a half."""
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(DataError) as refusal:
        load(source=str(tmp_path / "rows.jsonl"), template=template)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_half_a_surrogate_pair_in_a_column_that_nobody_reads_is_nobodys_business(tmp_path):
    rows = [rf'{{"question": "{i}", "answer": "b", "source": "cut \ud83d"}}' for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert load(source=str(tmp_path / "rows.jsonl"), template="{question}").train


def test_surrogate_pairs_are_a_character(tmp_path):
    support.write_jsonl(
        tmp_path / "rows.jsonl", [{"question": f"{i} \N{GRINNING FACE}", "answer": "1"} for i in range(3)]
    )
    assert "\\ud83d" in (tmp_path / "rows.jsonl").read_text()
    assert load(source=str(tmp_path / "rows.jsonl")).train[0].prompt == "2 \N{GRINNING FACE}"


def test_files_that_cannot_be_read(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # a file that even root cannot read from its beginning
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load(source=str(tmp_path / name))


def test_refused_file_kinds(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"must end in .jsonl or .parquet"):
        load(source=str(tmp_path / "rows.csv"))
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": "a"}\n\xff\xfe')
    with pytest.raises(DataError, match="rows.jsonl line 1 has no 'answer'"):
        load(source=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="rows.jsonl line 1 is not JSON: 'utf-8' codec"):
        load(source=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="rows.parquet cannot be read"):
        load(source=str(tmp_path / "rows.parquet"))
