"""Several ranks train as one does: the same samples, the same gradient, the same weights; and they fail together."""

import dataclasses
import math
import random

import pytest
import ranks_support
import support
import torch
from ranks_support import Raised, on_ranks, results
from torch import distributed as dist

from aapo_fast.data.packing import Weighted
from aapo_fast.types import UserError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

# The models are in float64, but Transformers computes their norms and rotary angles in fp32.
ROUNDING = 1e-6


def make_samples(seed=0, live=None, groups=5):
    """``groups`` groups of four; of these samples only those in ``live`` have an advantage."""
    rng = random.Random(seed)
    samples = []
    for _ in range(groups):
        prompt = [rng.randrange(1, 40) for _ in range(rng.randrange(2, 8))]
        for _ in range(4):
            completion = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 7))]
            advantage = rng.uniform(-2, 2) if live is None or len(samples) in live else 0.0
            drawn = dataclasses.replace(
                support.sample(prompt, completion), logprobs=tuple(rng.uniform(-4, -1) for _ in completion)
            )
            samples.append(Weighted(drawn, advantage))
    return samples


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- what ranks tell each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_tell_each_other_is_the_same_on_all(world):
    found = results(world, ranks_support.told)
    assert all(result == found[0] for result in found)
    many, one, total, flags, first, pieces = found[0]
    assert many == [f"{letter}{place % world}" for place, letter in enumerate("abcdefg")]
    assert one == ["a0"] and first == 0 and flags == [True, False]
    assert total == [0.1 if world == 2 else 0.1 + 0.2, world]
    assert pieces == [[rank] for rank in range(world) for _ in range(rank)]


@pytest.mark.parametrize(("kind", "name"), [("user", "UserError"), ("bug", "ZeroDivisionError")])
def test_what_fails_on_one_rank_fails_on_all(kind, name):
    found = on_ranks(3, ranks_support.fails, 1, kind)
    assert found[1] == Raised((name, "no such thing"))
    assert found[0] == found[2] == Raised(("RankError", f"rank 1: {name}: no such thing"))


# --- one gradient ---------------------------------------------------------------------------------------------------


POLICIES = [
    {"family": "llama"},
    {"family": "llama tied"},
    {"family": "gemma2, both soft-caps"},
    {"family": "phi, biased head"},
    {"family": "falcon-h1, recurrent"},
    {"entropy_bonus": 0.3, "z_loss": 0.02},
    {"lora_rank": 2},
    {"family": "llama tied", "backward": "sparse", "sparsity_threshold": 2**-40},  # keeps every entry
]
IN_PIECES = [
    policy | {"vocabulary_parallel": True}
    for policy in (
        {"family": "llama"},
        {"family": "llama tied"},
        {"family": "gemma3"},  # tied, with an embedding of its own class
        {"family": "gemma2, both soft-caps"},
        {"family": "phi, biased head"},
        {"entropy_bonus": 0.3, "z_loss": 0.02, "max_importance_weight": 1.5},
        {"family": "llama tied", "lora_rank": 2},
        {"family": "llama tied", "backward": "sparse", "sparsity_threshold": 2**-40},
    )
]


@pytest.mark.parametrize(
    ("world", "policy"),
    [
        *((2, p) for p in (*POLICIES, *IN_PIECES)),
        *((3, POLICIES[i]) for i in (0, 1, 6, 7)),
        *((3, IN_PIECES[i]) for i in (1, 4, 6)),
        (4, IN_PIECES[1]),  # 45 tokens in parts of 12, and one of 9
    ],
    ids=str,
)
def test_the_gradient_is_that_of_one_rank(world, policy):
    """However groups are dealt out: five of them, microbatches of unequal number, and their count not divisible."""
    samples = make_samples()
    [(truth, alone, _)] = results(1, ranks_support.gradient, samples, [0], 40, policy)
    found = results(world, ranks_support.gradient, samples, [0], 40, policy)
    for ours, result, _ in found:
        assert relative(ours, truth) < ROUNDING
        assert result == found[0][1]
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
        assert result.entropy == pytest.approx(alone.entropy, rel=1e-6)
        assert result.grad_norm == pytest.approx(alone.grad_norm, rel=1e-6)
        assert result.trained_tokens == alone.trained_tokens
        assert dataclasses.astuple(result.mismatch) == pytest.approx(dataclasses.astuple(alone.mismatch), rel=1e-6)
    assert len({len(parts) for *_, parts in found}) == 1
    seeds = [seed for *_, parts in found for seed, _ in parts]
    assert len(set(seeds)) == len(seeds)
    assert sum(size for *_, parts in found for _, size in parts) == len(samples)


@pytest.mark.parametrize("policy", [{}, IN_PIECES[1]], ids=str)
@pytest.mark.parametrize("live", [[9], [1, 17], []])
def test_a_rank_without_anything_to_learn_from(live, policy):
    samples = make_samples(live=live)
    [(truth, alone, _)] = results(1, ranks_support.gradient, samples, [0], 15, policy)
    found = results(3, ranks_support.gradient, samples, [0], 15, policy)
    idle = [[size for _, size in parts] for *_, parts in found[len(live) :]]
    assert idle == [[0] if live else []] * len(idle)  # it took part, with nothing
    for ours, result, _ in found:
        assert ours is truth is None if not live else relative(ours, truth) < ROUNDING
        assert result.updated == alone.updated and result.trained_tokens == alone.trained_tokens


@pytest.mark.parametrize("policy", [{}, IN_PIECES[0]], ids=str)
def test_a_nonfinite_gradient_is_skipped_on_all_ranks(policy):
    poisoned = make_samples()
    poisoned[1] = dataclasses.replace(poisoned[1], advantage=math.nan)
    good = make_samples(seed=1)
    [(truth, _)] = results(1, ranks_support.trained, [good], policy)
    found = results(2, ranks_support.trained, [poisoned, good], policy)
    assert torch.equal(found[0][0], found[1][0])
    for ours, (skipped, taken) in found:
        assert not skipped.updated and not skipped.finite and taken.updated
        assert relative(ours, truth) < ROUNDING


@pytest.mark.parametrize("channel", [0, -1])
def test_a_gradient_that_is_infinite_in_the_shard_of_one_rank_is_skipped_by_all(channel):
    """The loss is finite, and so is all that the other rank holds of the gradient."""
    policy = {"explodes_in": channel, "dtype": "float32"}
    [(start, _)] = results(1, ranks_support.trained, [], policy)
    for weights, [said] in results(2, ranks_support.trained, [make_samples()], policy):
        assert math.isfinite(said.loss) and math.isinf(said.grad_norm)
        assert not said.finite and not said.updated and torch.equal(weights, start)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_sparse_rows_are_another_sample_and_right_on_average(in_pieces):
    """Rows are numbered within a microbatch, and these are cut otherwise by two ranks: another draw, unbiased too."""
    policy = {"vocabulary_parallel": in_pieces}
    sparse = policy | {"backward": "sparse", "sparsity_threshold": 2**-3}
    samples = make_samples()
    [(truth, *_)] = results(1, ranks_support.gradient, samples, [0], 40, policy)
    [(one, *_)] = results(1, ranks_support.gradient, samples, [0], 40, sparse)
    (two, *_), (again, *_) = results(2, ranks_support.gradient, samples, [0], 40, sparse)
    (mean, *_), _ = results(2, ranks_support.gradient, samples, range(0, 2500, 100), 40, sparse)
    assert torch.equal(two, again)
    noise = relative(two, truth)
    assert 0.02 < noise < 0.5 and relative(two, one) > 0.5 * noise
    assert relative(mean, truth) < 0.35 * noise  # a fifth, of 25 draws


@pytest.mark.parametrize(
    ("world", "family", "dtype", "in_pieces", "bound"),
    [
        (2, "llama", "float64", False, 2 * ROUNDING),
        (3, "llama tied", "float64", False, 2 * ROUNDING),
        (2, "llama tied", "float32", False, 1e-3),
        (3, "llama", "float32", False, 1e-3),
        (2, "llama", "float64", True, 2 * ROUNDING),
        (3, "llama tied", "float64", True, 2 * ROUNDING),
        (2, "llama tied", "float32", True, 1e-3),
    ],
)
def test_weights_after_some_steps_are_those_of_one_rank(world, family, dtype, in_pieces, bound):
    """Of the way they have come. AdamW divides each entry by its own size, so one whose gradient is all rounding moves
    as far as any other: in float32 more of the difference is left than the rounding of a gradient.
    """
    policy = {"family": family, "dtype": dtype, "vocabulary_parallel": in_pieces}
    batches = [make_samples(seed) for seed in range(4)]
    [(start, _)] = results(1, ranks_support.trained, [], policy)
    [(truth, alone)] = results(1, ranks_support.trained, batches, policy)
    found = results(world, ranks_support.trained, batches, policy)
    for ours, said in found:
        assert torch.equal(ours, found[0][0])
        assert relative(ours - start, truth - start) < bound
        assert [r.grad_norm for r in said] == pytest.approx([r.grad_norm for r in alone], rel=bound)


# --- embedding and head in pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_neither_the_table_nor_its_gradient_is_ever_whole(family):
    policy, samples = {"family": family, "vocab_size": 4001}, make_samples(groups=2)
    whole = 4001 * support.SIZES["hidden_size"]
    gathered = results(2, ranks_support.largest_tensor, samples, policy)
    in_pieces = results(2, ranks_support.largest_tensor, samples, policy | {"vocabulary_parallel": True})
    assert min(gathered) >= whole
    assert max(in_pieces) <= 2001 * support.SIZES["hidden_size"]


def test_the_paddings_row_has_no_gradient_from_the_embedding():
    samples = [
        dataclasses.replace(w, sample=dataclasses.replace(w.sample, prompt_ids=(0, *w.sample.prompt_ids)))
        for w in make_samples()
    ]
    [(truth, *_)] = results(1, ranks_support.gradient, samples, [0], 40, IN_PIECES[1])
    for ours, *_ in results(2, ranks_support.gradient, samples, [0], 40, IN_PIECES[1]):
        assert relative(ours, truth) < ROUNDING


def test_in_bfloat16_the_gradient_is_as_right_as_that_of_one_rank():
    samples, policy = make_samples(), {"family": "llama tied", "dtype": "float32"}
    rounded = policy | {"precision": "bfloat16"}
    [(truth, *_)] = results(1, ranks_support.gradient, samples, [0], 40, policy)
    [(one, *_)] = results(1, ranks_support.gradient, samples, [0], 40, rounded)
    (two, *_), _ = results(2, ranks_support.gradient, samples, [0], 40, rounded | {"vocabulary_parallel": True})
    assert 1e-3 < relative(two, truth) < 1.2 * relative(one, truth)


def test_too_few_tokens_for_so_many_ranks():
    found = on_ranks(4, ranks_support.make_policy, "llama", "float32", 0, 6, "float32", True)
    message = "model.vocabulary_parallel=true: 6 tokens in parts of 2 are too few for 4 ranks, the last would have none"
    assert all(name == "UserError" and text.startswith(message) for name, text in found), found


def test_an_embedding_with_an_adapter_is_not_cut():
    from aapo_fast.models.lora import add_adapter
    from aapo_fast.trainer.vocabulary import _find_embedding

    adapted = add_adapter(support.tiny(), 2, 4.0, ["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match=r"model.vocabulary_parallel=true: the embedding of LlamaForCausalLM is a "):
        _find_embedding(adapted)
