"""Data that ends; prompts and completions of any length: none at all, beyond a budget, beyond what a model takes."""

import json
from collections import Counter

import pytest
import support
import torch
import transformers
from resume_support import crash, make_tree, run, weights

from aapo_fast.models.load import max_positions
from aapo_fast.trainer.records import read_lines
from aapo_fast.types import DataError


def drawn(folder):
    """How often each prompt came up."""
    counts = Counter(line["prompt"] for line in read_lines(folder / "run" / "samples.jsonl"))
    assert all(count % 8 == 0 for count in counts.values())
    return {prompt: count // 8 for prompt, count in counts.items()}


def test_a_data_set_that_ends_is_gone_through_again(tmp_path, tiny_model, monkeypatch):
    """Eight problems, three a step: passes end within steps. Each comes up as often as any other, after a kill too."""
    changes = {"rollout__prompts_per_step": 3, "train__steps": 8, "run__samples_kept": 24}
    (tmp_path / "alone").mkdir()
    _, said = run(make_tree(tmp_path / "alone", tiny_model, **changes))
    assert "8 training problems for 24 draws: gone through 3 times, reshuffled" in said
    assert drawn(tmp_path / "alone") == {f"say {i}:": 3 for i in range(4, 12)}
    tree = make_tree(tmp_path, tiny_model, **changes)
    crash(tree, monkeypatch, at=4)  # in the second pass
    run(tree, run={"resume": True})
    assert drawn(tmp_path) == drawn(tmp_path / "alone") and weights(tmp_path) == weights(tmp_path / "alone")


def test_a_data_set_that_suffices_is_not_said_to_end(tmp_path, tiny_model):
    assert "reshuffled" not in run(make_tree(tmp_path, tiny_model, train__steps=2))[1]


def with_rows(tree, *questions):
    with open(tree["data"]["source"], "a") as file:
        file.writelines(json.dumps({"question": question, "answer": "x"}) + "\n" for question in questions)
    return tree


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "line 13 makes an empty prompt; look at data.template='{question}'"),
        ("a" * 513, "line 13 makes a prompt of 513 tokens, over data.max_prompt_tokens=512"),
        ("a" * 253, "line 13 makes a prompt of 253 tokens: with rollout.max_tokens=4 that is beyond"),
    ],
    ids=["empty", "over the limit", "beyond the model"],
)  # fmt: skip
def test_prompts_that_cannot_be_are_refused_by_their_row(tmp_path, tiny_model, question, message):
    with pytest.raises(DataError, match=message):
        run(with_rows(make_tree(tmp_path, tiny_model, data__max_prompt_tokens=512), question))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # nothing has begun


def test_the_longest_prompt_that_the_model_takes_is_taken(tmp_path, tiny_model):
    tree = make_tree(tmp_path, tiny_model, rollout__prompts_per_step=9, train__steps=1)
    run(with_rows(tree, "a" * 252))
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["updated"]


def test_positions_of_models():
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    nested = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for parameters, limit in ((None, 256), (scaled, float("inf")), (nested, float("inf"))):
        model = support.tiny()
        model.config.rope_parameters = parameters or model.config.rope_parameters
        assert max_positions(model) == limit
    learned = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=32))
    assert max_positions(learned) == 32


def test_prompts_over_the_budget_of_a_microbatch_travel_alone(tmp_path, tiny_model):
    """A budget of one token: the same run, in as many pieces as there are completions."""
    for folder, budget in (("whole", 4096), ("cut", 1)):
        (tmp_path / folder).mkdir()
        run(make_tree(tmp_path / folder, tiny_model, train__max_microbatch_tokens=budget, train__steps=3))
    whole, cut = (read_lines(tmp_path / folder / "run" / "metrics.jsonl") for folder in ("whole", "cut"))
    assert [r["grad_norm"] for r in cut] == pytest.approx([r["grad_norm"] for r in whole], rel=1e-3)
    assert [r["reward"] for r in cut] == [r["reward"] for r in whole]
    assert all(r["saved_token_share"] <= 0 < s["saved_token_share"] for r, s in zip(cut, whole, strict=True))


def test_completions_of_no_text_are_completions(tmp_path, tiny_model):
    """A model that ends at once, nearly always: they are scored, have a weight, and the run goes on."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[0] *= 3.0
    model.save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    summary, _ = run(make_tree(tmp_path, tmp_path / "model", run__samples_kept=32))
    lines = read_lines(tmp_path / "run" / "samples.jsonl")
    empty = [line for line in lines if not line["completion"]]
    assert summary["status"] == "finished" and 10 < len(empty) < len(lines) == 6 * 32
    assert all(line["reward"] == 0 and line["finish_reason"] == "stop" for line in empty)
    assert any(line["advantage"] for line in empty)
