"""prime-rl's custom loss, on tensors in the signature it calls it with. prime-rl itself is on no package index."""

from types import SimpleNamespace

import pytest
import torch

from aapo_fast.integrations.prime_rl import aapo_loss


def inputs(**changes):
    """One sequence of six tokens, the fields of prime-rl's LossInputs; two are prompt, one has no advantage."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(6, generator=generator) - 2
    fields = {
        "trainer_logprobs": logps.requires_grad_(),
        "inference_logprobs": logps.detach() + torch.tensor([0.0, 0.0, 0.1, -0.4, 1.0, -2.0]),
        "ref_logprobs": None,
        "advantages": torch.tensor([9.0, 9.0, 0.7, -0.3, 0.0, 1.1]),
        "loss_mask": torch.tensor([False, False, True, True, True, True]),
        "loss_weights": None,
        "trainer_mask_logprobs": None,
        "inference_mask_logprobs": None,
    }
    return SimpleNamespace(**(fields | changes))


def check(of, weights, **options):
    out = aapo_loss(of, **options)
    expected = -sum(w * of.trainer_logprobs[t].item() for t, w in weights.items())
    assert out.loss.shape == () and out.loss.item() == pytest.approx(expected, rel=1e-6)
    gradient = torch.autograd.grad(out.loss, of.trainer_logprobs)[0]
    assert gradient.tolist() == pytest.approx([-weights.get(t, 0.0) for t in range(6)], rel=1e-6)
    return out


def test_a_sum_over_the_masked_tokens():
    out = check(inputs(), {2: 0.7, 3: -0.3, 4: 0.0, 5: 1.1})
    assert all(value.shape == () for value in out.metrics.values())
    assert out.metrics["zero_advantage_share"].item() == 0.25
    assert out.metrics["inference_gap"].item() == pytest.approx((0.1 + 0.4 + 1.0 + 2.0) / 4)


def test_prime_rls_weights():
    weights = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 3.0])
    check(inputs(loss_weights=weights), {2: 0.35, 3: -0.6, 4: 0.0, 5: 3.3})


def test_truncated_importance_weights():
    """pi / inference is e^-0.1, e^0.4, e^-1 and e^2, of which the last is cut."""
    e = torch.e
    check(inputs(), {2: 0.7 * e**-0.1, 3: -0.3 * e**0.4, 4: 0.0, 5: 1.1 * 2.0}, max_importance_weight=2.0)
    with pytest.raises(ValueError, match="max_importance_weight=0"):
        aapo_loss(inputs(), max_importance_weight=0)


def test_the_scaled_sum_is_the_mean_over_all_tokens():
    """prime-rl adds its sequences up and divides once by the tokens of the step."""
    sequences = [inputs(), inputs(loss_mask=torch.tensor([False] * 5 + [True]))]
    total = sum(aapo_loss(s).loss for s in sequences) / 5
    tokens = [(s.advantages[t] * s.trainer_logprobs[t]).item() for s in sequences for t in range(6) if s.loss_mask[t]]
    assert total.item() == pytest.approx(-sum(tokens) / 5, rel=1e-6)


def test_nothing_comes_from_outside_the_mask():
    logps = inputs().trainer_logprobs.detach().clone()
    logps[:2] = float("nan")
    of = inputs(trainer_logprobs=logps.requires_grad_())
    gradient = torch.autograd.grad(aapo_loss(of).loss, logps)[0]
    assert gradient.isfinite().all() and (gradient[:2] == 0).all()
    empty = inputs(loss_mask=torch.zeros(6, dtype=torch.bool))
    out = aapo_loss(empty)
    assert out.loss.item() == 0 and (torch.autograd.grad(out.loss, empty.trainer_logprobs)[0] == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())
