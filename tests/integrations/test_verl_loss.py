"""verl 0.9's loss and forward with our policy loss and fused head: the numbers and gradients of the formulas."""

import importlib.util
import sys

import pytest
import torch
from support import tiny

import aapo_fast as af

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not on the path: `make test` runs this file apart (requirements/verl.txt)", allow_module_level=True
    )

from tensordict import TensorDict
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss
from verl_support import verl_config

import aapo_fast.integrations.verl

pytestmark = pytest.mark.filterwarnings(
    "ignore:register_new_resolver", "ignore:Implicit conversion", "ignore:Warning: "
)

# Six responses and their prompts, in tokens.
LENGTHS = [3, 1, 4, 2, 4, 3]
PROMPT_LENGTHS = [2, 3, 1, 2, 2, 1]
VOCABULARY = 11


def model_output(logits, tokens):
    """What verl's engine makes of packed logits (N, V): log-probabilities of the next token, nested by sequence."""
    lengths = torch.tensor(PROMPT_LENGTHS) + torch.tensor(LENGTHS)
    logps = logits.log_softmax(-1).gather(-1, tokens.roll(-1)[:, None])[:, 0]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return {"log_probs": torch.nested.nested_tensor_from_jagged(logps, offsets)}


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(tokens, advantages, rows, **counts):
    """The fields that verl's `ppo_loss` reads of a micro-batch, and the counts that its engine adds."""
    lengths = [PROMPT_LENGTHS[i] + LENGTHS[i] for i in range(6)]
    sequences = tokens.split(lengths)
    fields = {
        "prompts": nested([sequences[i][: PROMPT_LENGTHS[i]] for i in rows]),
        "responses": nested([sequences[i][PROMPT_LENGTHS[i] :] for i in rows]),
        "response_mask": nested([torch.ones(LENGTHS[i], dtype=torch.long) for i in rows]),
        "old_log_probs": nested([torch.full((LENGTHS[i],), -2.0) for i in rows]),
        "advantages": nested([advantages[i].expand(LENGTHS[i]) for i in rows]),
    }
    data = TensorDict(fields, batch_size=[len(rows)])
    tensordict_utils.assign_non_tensor(data, **({"dp_size": 1, "global_batch_size": 6} | counts))
    return data


def actor_config(loss_agg_mode="token-mean"):
    return omega_conf_to_dataclass(
        verl_config(
            "actor_rollout_ref.actor.policy_loss.loss_mode=aapo",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
            f"actor_rollout_ref.actor.loss_agg_mode={loss_agg_mode}",
        ).actor_rollout_ref.actor
    )


@pytest.fixture
def problem():
    """Packed logits of six sequences, their tokens, an advantage each (one of them zero), and responses' rows."""
    generator = torch.Generator().manual_seed(0)
    lengths = [p + r for p, r in zip(PROMPT_LENGTHS, LENGTHS, strict=True)]
    logits = torch.randn(sum(lengths), VOCABULARY, generator=generator, requires_grad=True)
    tokens = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator)
    adv = torch.tensor([1.5, -0.7, 0.0, 0.3, -1.2, 0.9])
    return logits, tokens, adv


def written_out(logits, tokens, adv, weight_of_row):
    """sum_i w_i sum_t -A_i log pi(o_it), token by token, and its gradient."""
    total, start = torch.zeros(()), 0
    for i, (prompt, response) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        for t in range(start + prompt, start + prompt + response):
            logp = logits[t - 1, tokens[t]] - logits[t - 1].logsumexp(-1)
            total = total - weight_of_row[i] * adv[i] * logp
        start += prompt + response
    return total.detach(), torch.autograd.grad(total, logits)[0]


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


AGGREGATIONS = {
    "token-mean": [1 / sum(LENGTHS)] * 6,
    "token-sum": [1.0] * 6,
    "seq-mean-token-sum": [1 / 6] * 6,
    "seq-mean-token-mean": [1 / 6 / n for n in LENGTHS],
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_the_loss_through_verls_own(problem, mode):
    logits, tokens, adv = problem
    data = micro_batch(tokens, adv, range(6), batch_num_tokens=sum(LENGTHS))
    loss, metrics = ppo_loss(actor_config(mode), model_output(logits, tokens), data)
    gradient = torch.autograd.grad(loss, logits)[0]
    expected, expected_gradient = written_out(logits, tokens, adv, AGGREGATIONS[mode])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-5
    assert metrics["actor/zero_advantage_share"].values == [pytest.approx(LENGTHS[2] / sum(LENGTHS))]
    assert metrics["actor/pg_loss"].values[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_does_not_depend_on_the_cut(problem):
    """Two micro-batches on each of two ranks, whose gradients FSDP averages."""
    logits, tokens, adv = problem
    config, whole = actor_config(), model_output(logits, tokens)["log_probs"]
    total = torch.zeros_like(logits)
    for rows in ([0, 3], [5], [1], [2, 4]):
        data = micro_batch(tokens, adv, rows, batch_num_tokens=sum(LENGTHS), dp_size=2)
        part = {"log_probs": nested([whole[i] for i in rows])}
        loss, _ = ppo_loss(config, part, data)
        total += torch.autograd.grad(loss, logits, retain_graph=True)[0] / 2
    _, expected = written_out(logits, tokens, adv, AGGREGATIONS["token-mean"])
    assert relative_error(total, expected) < 1e-5


def test_importance_weights_multiply_each_token(problem):
    logits, tokens, adv = problem
    data = micro_batch(tokens, adv, range(6), batch_num_tokens=sum(LENGTHS))
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25, 3.0])
    data["rollout_is_weights"] = nested([weights[i].expand(n) for i, n in enumerate(LENGTHS)])
    loss, _ = ppo_loss(actor_config(), model_output(logits, tokens), data)
    expected, expected_gradient = written_out(logits, tokens, adv * weights, AGGREGATIONS["token-mean"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(torch.autograd.grad(loss, logits)[0], expected_gradient) < 1e-5


def test_the_loss_is_that_of_the_fused_head(problem):
    """The same hidden states and head through `linear_policy_loss`."""
    _, tokens, adv = problem
    hidden = torch.randn(tokens.numel(), 8, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    data = micro_batch(tokens, adv, range(6), batch_num_tokens=sum(LENGTHS))
    loss, _ = ppo_loss(actor_config(), model_output(hidden @ weight.T, tokens), data)
    theirs = torch.autograd.grad(loss, weight)[0]

    sequence = torch.repeat_interleave(torch.arange(6), torch.tensor(PROMPT_LENGTHS) + torch.tensor(LENGTHS))
    place = torch.cat([torch.arange(p + n) - p for p, n in zip(PROMPT_LENGTHS, LENGTHS, strict=True)])
    rows = (place >= 0).nonzero()[:, 0]
    objective = af.AAPO(adv, sequence[rows], sum(LENGTHS))
    ours = af.linear_policy_loss(hidden[rows - 1], weight, tokens[rows], objective).loss
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)
    assert relative_error(torch.autograd.grad(ours, weight)[0], theirs) < 1e-5


@pytest.fixture
def fused_head(monkeypatch):
    """verl's class is put back afterwards."""
    from verl.utils.experimental import torch_functional

    theirs = torch_functional.FusedLinearForPPO
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", theirs)
    sys.modules.pop("aapo_fast.integrations.verl_head", None)
    module = importlib.import_module("aapo_fast.integrations.verl_head")
    assert torch_functional.FusedLinearForPPO is module.LinearLogProbs
    return module


def test_the_fused_head_in_verls_forward(fused_head, monkeypatch):
    """`use_fused_kernels`, backend "torch": log-probabilities, entropies, and gradients of both."""
    model = tiny("qwen2")
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # verl replaces it on the class
    tokens = torch.randint(1, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(1))

    logits = model(input_ids=tokens).logits / 0.7
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    (upstream[0] * picked + upstream[1] * entropy).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    called = []
    run = fused_head.LinearLogProbs.forward
    monkeypatch.setattr(fused_head.LinearLogProbs, "forward", lambda *a, **k: called.append(1) or run(*a, **k))
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    out = model(input_ids=tokens, temperature=0.7, return_dict=True)
    assert called == [1]
    torch.testing.assert_close(out.log_probs, picked.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)
    (upstream[0] * out.log_probs + upstream[1] * out.entropy).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name


def test_the_other_backends_stay_verls(fused_head, monkeypatch):
    from verl.utils.experimental import torch_functional

    monkeypatch.setattr(fused_head, "linear_logprobs", None)
    # Without Liger's kernels, which want a GPU, verl's "liger" computes with its own PyTorch.
    monkeypatch.setattr(torch_functional, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", None)
    head = fused_head.LinearLogProbs(impl_backend="liger")
    logps, _ = head(torch.zeros(5, 8), torch.zeros(VOCABULARY, 8), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(logps, torch.full((5,), 1 / VOCABULARY).log())
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        fused_head.LinearLogProbs(impl_backend="ours")
