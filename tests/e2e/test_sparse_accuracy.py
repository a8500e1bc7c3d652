"""Errors of sparse gradient rows, synthetic and of a real model's own samples, beside dense rows rounded to bf16."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import aapo_fast as af
from aapo_fast.bench.inputs import make_problem
from aapo_fast.bench.shapes import Case, Head
from aapo_fast.config import load as load_config
from aapo_fast.data.packing import Weighted
from aapo_fast.ops.linear_policy import rows_native, sparse
from aapo_fast.rollout.hf import HFEngine
from aapo_fast.trainer.policy import Policy
from aapo_fast.types import SamplingParams

QUICKSTART = Path(af.__file__).parent / "cli" / "quickstart.toml"
DRAWS = 4


class Rows(NamedTuple):
    """In float64: (N, H) hidden states, (V, H) head, (N,) tokens, (N,) coefficients, and what comes of them exactly."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    coefficients: torch.Tensor
    probabilities: torch.Tensor  # (N, V)
    exact: tuple[torch.Tensor, torch.Tensor]  # dX, dW
    dense: tuple[float, float]  # the errors of dX and dW where gradient rows are rounded to bf16


@pytest.fixture(scope="module")
def policy():
    return Policy.from_config(load_config(QUICKSTART).model, temperature=1.0)


def rows_of(hidden, weight, targets):
    hidden, weight, n = hidden.detach().double(), weight.detach().double(), targets.numel()
    coefficients = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / n
    probabilities = (hidden @ weight.t()).softmax(1)
    rows = probabilities * coefficients[:, None]
    rows[torch.arange(n), targets] -= coefficients
    exact = (rows @ weight, rows.t() @ hidden)
    rounded = rows.bfloat16().double()
    dense = errors_of((rounded @ weight, rounded.t() @ hidden), exact)
    assert 1e-4 < min(dense) < max(dense) < 1e-2
    return Rows(hidden, weight, targets, coefficients, probabilities, exact, dense)


def sampled(policy, prompts, **sampling):
    tokens = [policy.tokenizer(text).input_ids for text in prompts]
    drawn = HFEngine(policy.model, policy.tokenizer).generate(
        tokens, n=2, sampling=SamplingParams(**sampling), seeds=range(len(prompts))
    )
    with torch.no_grad():
        batch = policy.batch([Weighted(sample, 1.0) for group in drawn for sample in group])
        return rows_of(policy.hidden_states(batch), policy.head.weight, batch.targets)


@pytest.fixture(scope="module")
def model_like():
    """The benchmarks' synthetic rows of 1.66 nats."""
    problem = make_problem(Case(Head("smollm2-135m", 576, 49_152), 128, "float32", "model-like"), torch.device("cpu"))
    return rows_of(problem.hidden, problem.weight, problem.targets)


@pytest.fixture(scope="module")
def sums(policy):
    """The quickstart's task: 209 tokens of 1.8 nats."""
    prompts = [f"Question: What is {7 * i % 90 + 3} + {11 * i % 80 + 5}?\nAnswer:" for i in range(24)]
    return sampled(policy, prompts, max_tokens=6, stop=("\n",))


@pytest.fixture(scope="module")
def texts(policy):
    """Text of three kinds: 81 tokens of 2.3 nats."""
    return sampled(policy, ("The sea is", "Question: What is 7 + 5?\nAnswer:", "def f(x):"), max_tokens=16)


def errors_of(found, exact):
    return tuple(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


@pytest.fixture(autouse=True)
def no_block_is_dense(monkeypatch):
    for kernels in (sparse, rows_native):
        monkeypatch.setattr(kernels, "DENSE_SHARE", 10.0)


def gradients(rows, dtype=torch.float64, **options):
    x, w = rows.hidden.to(dtype, copy=True).requires_grad_(), rows.weight.to(dtype, copy=True).requires_grad_()
    objective = af.SFT(1.0, weights=rows.coefficients)
    af.linear_policy_loss(x, w, rows.targets, objective, **options).loss.backward()
    return x.grad.double(), w.grad.double()


def sparse_errors(rows, eps, dtype=torch.float64):
    """The mean errors of dX and dW over draws, and the errors of the draws' mean."""
    draws = [gradients(rows, dtype, backward="sparse", sparsity_threshold=eps, seed=s) for s in range(DRAWS)]
    each = [errors_of(draw, rows.exact) for draw in draws]
    mean = [sum(parts) / DRAWS for parts in zip(*draws, strict=True)]
    return tuple(sum(e) / DRAWS for e in zip(*each, strict=True)), errors_of(mean, rows.exact)


def derived_errors(rows, eps):
    """What entries drawn independently of each other would have: an entry p < eps has the variance eps p - p^2."""
    dust = torch.where(rows.probabilities < eps, rows.probabilities, 0)
    variance = (eps * dust - dust.square()) * rows.coefficients.square()[:, None]
    of_dx = (variance.sum(0) @ rows.weight.square().sum(1)).sqrt() / rows.exact[0].norm()
    of_dw = (variance.sum(1) @ rows.hidden.square().sum(1)).sqrt() / rows.exact[1].norm()
    return of_dx.item(), of_dw.item()


KINDS = pytest.mark.parametrize("kind", ["model_like", "sums", "texts"])


@KINDS
def test_exact_rows(kind, request):
    rows = request.getfixturevalue(kind)
    assert max(errors_of(gradients(rows), rows.exact)) < 1e-12


def test_one_draw_of_model_like_rows_is_no_further_off_than_bfloat16(model_like):
    one, _ = sparse_errors(model_like, 2**-13)
    assert all(sparse <= dense for sparse, dense in zip(one, model_like.dense, strict=True))


@pytest.mark.parametrize("kind", ["sums", "texts"])
def test_one_draw_of_a_models_own_rows_is_no_further_off_than_bfloat16_at_half_the_threshold(kind, request):
    """At 2^-13 it is up to 1.4 times as far off, by the variance that the next test finds (docs/accuracy.md)."""
    rows = request.getfixturevalue(kind)
    one, _ = sparse_errors(rows, 2**-14)
    assert all(sparse <= dense for sparse, dense in zip(one, rows.dense, strict=True))


@KINDS
@pytest.mark.parametrize("eps", [2**-13, 2**-14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_error_is_the_derived_one(kind, eps, dtype, request):
    """Of PyTorch's rows (fp64) and of the fastest here (fp32). dW, whose rows are sums over tokens, has the error of
    independent entries; dX has less where neighbours in the vocabulary are alike, for what one entry adds is missing
    near by. The mean of four unbiased draws is twice as near.
    """
    rows = request.getfixturevalue(kind)
    one, mean = sparse_errors(rows, eps, dtype)
    of_dx, of_dw = derived_errors(rows, eps)
    assert 0.6 * of_dx < one[0] < 1.05 * of_dx
    assert one[1] == pytest.approx(of_dw, rel=0.05)
    assert all(m == pytest.approx(e / DRAWS**0.5, rel=0.1) for m, e in zip(mean, one, strict=True))
