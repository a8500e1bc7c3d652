"""The truth against autograd in float64, the error measures on errors that are known, the inputs' promises."""

import math
from dataclasses import replace

import pytest
import torch
from bench_support import CPU, TINY

from aapo_fast.bench import inputs
from aapo_fast.bench.shapes import MODEL_ENTROPY, Head
from aapo_fast.bench.truth import gradient_errors, truth, vector_errors


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_truth_is_autograd_s(softcap, weighted, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 211 * 8 * 10)  # blocks of ten rows, the last one shorter
    case = replace(TINY, head=Head("capped", 16, 211, softcap), dtype="float64")
    problem = inputs.make_problem(case, CPU)
    z = inputs.soft_capped(problem.hidden @ problem.weight.t(), softcap)
    log_p = z.log_softmax(1)
    logps = log_p.gather(1, problem.targets[:, None]).squeeze(1)
    weights = problem.token_weights if weighted else torch.ones(64)
    (-(weights.double() * logps).sum() / 64).backward()
    found = truth(problem, weighted)
    assert gradient_errors(problem.hidden.grad, found.d_hidden)["error"] < 1e-13
    assert gradient_errors(problem.weight.grad, found.d_weight)["error"] < 1e-13
    torch.testing.assert_close(found.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(1).detach(), rtol=1e-12, atol=1e-12)


def test_error_measures():
    true = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = gradient_errors(true * 1.01, true)
    assert large == pytest.approx({"error": 0.01, "one_minus_cosine": 0, "worst_row": 0.01, "bias": 0.01}, abs=1e-9)
    assert gradient_errors(-true, true) == pytest.approx(
        {"error": 2, "one_minus_cosine": 2, "worst_row": 2, "bias": -2}
    )
    zero = gradient_errors(true * 0, true)
    assert zero["error"] == 1 and zero["bias"] == -1
    one_row = true.clone()
    one_row[3] = 0
    assert gradient_errors(one_row, true)["worst_row"] == 1
    assert math.isnan(gradient_errors(true * float("nan"), true)["error"])
    assert vector_errors(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))["bias"] == 0.5


def test_inputs_are_what_they_say():
    case = replace(TINY, rows=256, head=Head("wide", 512, 5003))
    model = inputs.describe(inputs.make_problem(case, CPU))
    assert model["mean_entropy_nats"] == pytest.approx(MODEL_ENTROPY, abs=0.05)
    other = inputs.describe(inputs.make_problem(replace(case, distribution="4 nats"), CPU))
    assert other["mean_entropy_nats"] == pytest.approx(4, abs=0.05)
    capped = replace(case, head=Head("capped", 512, 5003, 30.0))
    assert inputs.describe(inputs.make_problem(capped, CPU))["mean_entropy_nats"] == pytest.approx(1.66, abs=0.3)
    for each in (case, capped):
        peaked = inputs.describe(inputs.make_problem(replace(each, distribution="peaked"), CPU))
        assert peaked["share_of_rows_above_0.999"] > 0.9
        flat = inputs.describe(inputs.make_problem(replace(each, distribution="flat"), CPU))
        assert flat["mean_entropy_nats"] > 0.99 * math.log(5003)


def test_inputs_belong_to_their_seed():
    first, again, other = (inputs.make_problem(TINY, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.hidden, again.hidden) and torch.equal(first.targets, again.targets)
    assert torch.equal(first.advantages, again.advantages) and not torch.equal(first.hidden, other.hidden)
    assert first.rectangular and (first.advantages < 0).any() and (first.advantages > 0).any()


def test_targets_are_drawn_from_the_policy():
    problem = inputs.make_problem(replace(TINY, rows=4096), CPU)
    found = truth(problem)
    # The mean log-probability of a sample is minus the mean entropy.
    assert found.logps.mean().item() == pytest.approx(-found.entropy.mean().item(), abs=0.1)
