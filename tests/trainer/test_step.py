"""The optimizer step: one gradient however it is cut up, the guard, the schedule."""

import dataclasses
import itertools
import math
import random

import pytest
import support
import torch

from aapo_fast.config import LossConfig, TrainConfig
from aapo_fast.data.packing import Weighted
from aapo_fast.models import attention
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.trainer.step import learning_rate, make_optimizer, optimizer_step
from aapo_fast.types import UserError

# The model is in float64, but Transformers computes its norms and rotary angles in fp32.
ROUNDING = 1e-6
CONFIG = TrainConfig(max_grad_norm=0.0, weight_decay=0.0)


def make_policy(**loss):
    model = support.tiny(dtype=torch.float64)
    model.set_attn_implementation(attention.NAME)
    return Policy(model, support.tokenizer(), 1.0, LossConfig(**loss))


def make_samples(zero_every=3):
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 40) for _ in range(n)] for n in (4, 7, 5)]
    samples = []
    for index in range(18):
        completion = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 7))]
        advantage = 0.0 if index % zero_every == 0 else rng.uniform(-2, 2)
        samples.append(Weighted(support.sample(prompts[index % 3], completion), advantage))
    return samples


def gradient_of(samples, loss=None, **changes):
    """What the optimizer is handed."""
    policy = make_policy(**(loss or {}))
    optimizer = make_optimizer(policy, CONFIG)
    taken = []
    optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    result = optimizer_step(policy, optimizer, samples, dataclasses.replace(CONFIG, **changes), 1e-3)
    return taken[0], result


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("budget", [1, 9, 25, 60])
def test_every_microbatch_cut_gives_the_gradient_and_the_loss_of_one_batch(budget):
    whole, one = gradient_of(make_samples(), max_microbatch_tokens=100_000)
    cut, many = gradient_of(make_samples(), max_microbatch_tokens=budget)
    assert relative(cut, whole) < ROUNDING
    assert many.loss == pytest.approx(one.loss, rel=1e-6) and many.entropy == pytest.approx(one.entropy, rel=1e-6)
    assert many.trained_tokens == one.trained_tokens


@pytest.mark.parametrize("budget", [1, 25, 60, 100_000])
def test_padded_microbatches_stay_within_the_budget_and_give_the_gradient_of_packed_ones(budget, monkeypatch):
    whole, one = gradient_of(make_samples())
    policy, shapes, taken = make_policy(), [], []
    policy.packed = False
    real = policy.loss
    monkeypatch.setattr(policy, "loss", lambda batch, *a: shapes.append(batch.input_ids.shape) or real(batch, *a))
    optimizer = make_optimizer(policy, CONFIG)
    optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    result = optimizer_step(
        policy, optimizer, make_samples(), dataclasses.replace(CONFIG, max_microbatch_tokens=budget), 1e-3
    )
    assert relative(taken[0], whole) < ROUNDING and result.loss == pytest.approx(one.loss, rel=1e-6)
    assert all(shape[0] == 1 or shape.numel() <= budget for shape in shapes)
    assert sum(shape[0] for shape in shapes) == 12


def test_a_policy_without_anything_to_train_is_refused():
    policy = make_policy()
    policy.model.requires_grad_(False)
    with pytest.raises(UserError, match=r"the policy has no parameter to train: all .* requires_grad=False"):
        make_optimizer(policy, CONFIG)


def full_memory(policy, monkeypatch, tokens):
    """As if the memory held microbatches of ``tokens``, and ran out in the backward pass of larger ones, which has
    changed the gradient by then.
    """
    real = policy.loss

    def loss(batch, *arguments):
        out = real(batch, *arguments)
        if batch.input_ids.numel() > tokens:
            out.loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return out

    monkeypatch.setattr(policy, "loss", loss)


def test_a_step_that_runs_out_of_memory_is_done_in_smaller_microbatches(monkeypatch):
    truth, one = gradient_of(make_samples(), max_microbatch_tokens=100)
    policy = make_policy()
    full_memory(policy, monkeypatch, 30)
    optimizer, taken = make_optimizer(policy, CONFIG), []
    optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    config = dataclasses.replace(CONFIG, max_microbatch_tokens=100)
    result = optimizer_step(policy, optimizer, make_samples(), config, 1e-3)
    assert relative(taken[0], truth) < ROUNDING and result.loss == pytest.approx(one.loss, rel=1e-6)
    assert (one.microbatch_tokens, one.ran_out_of_memory) == (100, False)
    assert (result.microbatch_tokens, result.ran_out_of_memory) == (25, True)
    again = optimizer_step(policy, optimizer, make_samples(), config, 1e-3)  # which knows by now
    assert (again.microbatch_tokens, again.ran_out_of_memory) == (25, False)


def test_one_completion_that_does_not_fit_is_an_error_with_the_remedy(monkeypatch):
    policy = make_policy()
    full_memory(policy, monkeypatch, 5)
    optimizer = make_optimizer(policy, CONFIG)
    before = [p.detach().clone() for p in policy.model.parameters()]
    with pytest.raises(UserError, match=r"out of memory, with one completion at a time \(the longest has 13 tokens"):
        optimizer_step(policy, optimizer, make_samples(), CONFIG, 1e-3)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, policy.model.parameters(), strict=True))


def test_ranks_whose_memory_runs_out_say_what_to_lower(monkeypatch):
    """Their passes go together, so that none can begin anew alone."""
    policy = make_policy()
    policy.ranks = Ranks(0, 2)
    full_memory(policy, monkeypatch, 5)
    with pytest.raises(UserError, match="with 2 ranks a step is not begun anew: lower train.max_microbatch_tokens="):
        optimizer_step(policy, make_optimizer(policy, CONFIG), make_samples(), CONFIG, 1e-3)
    assert all(p.grad is None for p in policy.model.parameters())


def test_shared_prompts_are_in_the_figures():
    samples = [Weighted(support.sample([1, 2, 3, 4], [5, 6]), 1.0) for _ in range(4)]
    _, shared = gradient_of(samples)
    assert shared.saved_token_share == pytest.approx(1 - (4 + 4) / (4 * 5))
    apart = [Weighted(support.sample([1, 2, 3, 4 + i], [5, 6]), 1.0) for i in range(4)]
    assert gradient_of(apart)[1].saved_token_share == 0.0


def test_order_of_the_samples_does_not_matter():
    whole, _ = gradient_of(make_samples())
    shuffled, _ = gradient_of(random.Random(1).sample(make_samples(), 18))
    assert relative(shuffled, whole) < ROUNDING


def test_the_denominator_counts_tokens_without_weight_too():
    with_zeros, result = gradient_of(make_samples())
    live = [w for w in make_samples() if w.advantage]
    without, _ = gradient_of(live)
    ratio = sum(len(w.sample.token_ids) for w in live) / sum(len(w.sample.token_ids) for w in make_samples())
    assert relative(with_zeros, without * ratio) < ROUNDING
    assert result.trained_tokens == sum(len(w.sample.token_ids) for w in live)


@pytest.mark.parametrize("budget", [9, 100_000])
def test_entropy_bonus_and_z_loss_reach_every_completion_token(budget):
    """Their gradients by finite differences of the materialised regularizer, along the gradient itself."""
    loss = {"entropy_bonus": 0.3, "z_loss": 0.02}
    plain, _ = gradient_of(make_samples())
    regularized, result = gradient_of(make_samples(), loss, max_microbatch_tokens=budget)
    tokens = sum(len(w.sample.token_ids) for w in make_samples())
    assert result.trained_tokens == tokens
    policy = make_policy()

    def regularizer():
        total = 0.0
        for w in make_samples():
            ids = torch.tensor([[*w.sample.prompt_ids, *w.sample.token_ids]])
            logits = policy.model(ids).logits[0, len(w.sample.prompt_ids) - 1 : -1].double()
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            total = total + (0.02 * logits.logsumexp(-1).square() - 0.3 * entropy).sum()
        return total / tokens

    regularizer().backward()
    truth = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert relative(regularized - plain, truth) < 10 * ROUNDING


def test_nothing_to_learn_leaves_the_weights():
    policy = make_policy()
    before = policy.fingerprint()
    samples = [dataclasses.replace(w, advantage=0.0) for w in make_samples()]
    result = optimizer_step(policy, make_optimizer(policy, CONFIG), samples, CONFIG, 1.0)
    assert not result.updated and result.finite and policy.fingerprint() == before
    assert optimizer_step(policy, make_optimizer(policy, CONFIG), [], CONFIG, 1.0).trained_tokens == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nonfinite_gradient_is_skipped_and_leaves_no_trace(poison):
    policy = make_policy()
    optimizer = make_optimizer(policy, CONFIG)
    before = policy.fingerprint()
    samples = make_samples()
    samples[1] = dataclasses.replace(samples[1], advantage=poison)
    result = optimizer_step(policy, optimizer, samples, CONFIG, 1e-3)
    assert not result.updated and not result.finite and policy.fingerprint() == before
    assert all(p.grad is None for p in policy.model.parameters()) and not optimizer.state
    assert optimizer_step(policy, optimizer, make_samples(), CONFIG, 1e-3).updated


def drawn_by(policy, samples, shift):
    """The samples with log-probabilities as an engine gives them that is off by ``shift`` nats a token."""
    found = []
    for w in samples:
        ids = torch.tensor([[*w.sample.prompt_ids, *w.sample.token_ids]])
        with torch.no_grad():
            logps = policy.model(ids).logits[0, len(w.sample.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logps.gather(1, torch.tensor(w.sample.token_ids)[:, None]).squeeze(1)
        logprobs = tuple((own + shift(torch.arange(len(own)))).tolist())
        found.append(dataclasses.replace(w, sample=dataclasses.replace(w.sample, logprobs=logprobs)))
    return found


@pytest.mark.parametrize("budget", [9, 100_000])
def test_the_mismatch_with_the_engine_is_measured(budget):
    policy = make_policy()
    samples = drawn_by(policy, make_samples(), lambda t: torch.where(t == 0, -1.0, 0.25))
    config = dataclasses.replace(CONFIG, max_microbatch_tokens=budget)
    found = optimizer_step(policy, make_optimizer(policy, CONFIG), samples, config, 0.0).mismatch
    live = [len(w.sample.token_ids) for w in samples if w.advantage]
    first = len(live) / sum(live)
    assert found.mean_gap == pytest.approx(first + 0.25 * (1 - first), rel=1e-5)
    assert found.max_gap == pytest.approx(1, rel=1e-5) and found.ratio_max == pytest.approx(math.e, rel=1e-5)
    assert found.ratio_mean == pytest.approx(first * math.e + (1 - first) * math.exp(-0.25), rel=1e-5)
    assert found.clipped_share == 0

    policy = make_policy(max_importance_weight=2.0)
    found = optimizer_step(policy, make_optimizer(policy, CONFIG), samples, config, 0.0).mismatch
    assert found.clipped_share == pytest.approx(first)


def test_truncated_importance_weights_weigh_the_tokens():
    """A gradient by hand: each token times min(pi / rollout, bound)."""
    policy = make_policy()
    samples = drawn_by(policy, make_samples(), lambda t: torch.where(t == 0, -1.0, 0.25))
    found, _ = gradient_of(samples, {"max_importance_weight": 2.0})
    tokens = sum(len(w.sample.token_ids) for w in samples)
    loss = 0.0
    for w in samples:
        ids = torch.tensor([[*w.sample.prompt_ids, *w.sample.token_ids]])
        logps = policy.model(ids).logits[0, len(w.sample.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logps.gather(1, torch.tensor(w.sample.token_ids)[:, None]).squeeze(1)
        weight = torch.where(torch.arange(len(own)) == 0, 2.0, math.exp(-0.25))
        loss = loss - w.advantage * (weight * own).sum() / tokens
    loss.backward()
    truth = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    plain, _ = gradient_of(samples)
    assert relative(found, truth) < 10 * ROUNDING < 0.1 < relative(plain, truth)


def test_samples_of_other_weights_stop_the_run_before_they_teach():
    policy = make_policy()
    optimizer = make_optimizer(policy, CONFIG)
    samples = drawn_by(policy, make_samples(), lambda t: torch.full(t.shape, 0.02))
    before = policy.fingerprint()
    with pytest.raises(UserError, match=r"by 0.02 nats on average .* beyond vllm.max_logprob_gap=0.01. Likely causes"):
        optimizer_step(policy, optimizer, samples, CONFIG, 1e-3, max_logprob_gap=0.01)
    assert policy.fingerprint() == before and all(p.grad is None for p in policy.model.parameters())
    assert optimizer_step(policy, optimizer, samples, CONFIG, 1e-3, max_logprob_gap=0.03).updated


def test_clipping():
    free, result = gradient_of(make_samples())
    assert result.grad_norm == pytest.approx(free.norm().item(), rel=1e-6)
    clipped, result = gradient_of(make_samples(), max_grad_norm=0.01)
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert result.grad_norm == pytest.approx(free.norm().item(), rel=1e-6)


def test_a_step_moves_the_policy_towards_rewarded_tokens():
    policy = make_policy()
    optimizer = make_optimizer(policy, CONFIG)
    good, bad = support.sample([1, 2], [3]), support.sample([1, 2], [4])

    def gap():
        logits = policy.model(torch.tensor([[1, 2]])).logits[0, -1]
        return (logits[3] - logits[4]).item()

    before = gap()
    for _ in range(5):
        optimizer_step(policy, optimizer, [Weighted(good, 1.0), Weighted(bad, -1.0)], CONFIG, 1e-3)
    assert gap() > before + 0.1


def test_schedules():
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=3.0, min_learning_rate_ratio=0.1)
    for schedule in ("constant", "linear", "cosine"):
        rates = [learning_rate(s, dataclasses.replace(config, schedule=schedule)) for s in range(11)]
        assert rates[:3] == pytest.approx([1.0, 2.0, 3.0])
        assert rates[10] == pytest.approx(3.0 if schedule == "constant" else 0.3)
        assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    assert learning_rate(6, dataclasses.replace(config, schedule="linear")) == pytest.approx(0.3 + 2.7 * 0.5)
    quarter = 0.3 + 2.7 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(4, dataclasses.replace(config, schedule="cosine")) == pytest.approx(quarter)
