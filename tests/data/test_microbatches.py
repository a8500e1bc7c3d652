"""How a step is cut into microbatches: everything once, within the budget, and nobody waits long."""

import dataclasses
import itertools
import math
import random

import pytest
import support

from aapo_fast.data.microbatches import Work, microbatches, rounds, waiting_share
from aapo_fast.data.packing import Weighted, pack, pad

WORK = Work(token=6 * 6.5e9, pair=12 * 28 * 3584, target=6 * 3584 * 152064)  # of a model of 7B
PADDED = dataclasses.replace(WORK, packed=False)


def make_samples(seed, prompts, group=8, mean=1200, longest=4096, prompt_tokens=(60, 400)):
    """Long-tailed lengths, some problems longer than others."""
    rng = random.Random(seed)
    samples = []
    for number in range(prompts):
        prompt = [number] * rng.randint(*prompt_tokens)
        shift = rng.gauss(-0.4, 0.5)
        for _ in range(group):
            length = min(longest, 1 + int(mean * math.exp(shift + rng.gauss(0, 0.8))))
            samples.append(Weighted(support.sample(prompt, [1] * length), 1.0))
    return samples


def tokens(part):
    return sum(len(p) for p in {w.sample.prompt_ids for w in part}) + sum(len(w.sample.token_ids) for w in part)


@pytest.mark.parametrize("budget", [1, 7, 20, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_every_sample_is_there_once_within_the_budget(budget, ranks):
    samples = make_samples(0, 4, mean=5, prompt_tokens=(1, 9))
    cut = rounds(samples, budget, WORK, ranks)
    assert all(len(parts) == ranks for parts in cut)
    parts = [part for parts in cut for part in parts if part]
    assert sorted(map(id, itertools.chain(*parts))) == sorted(map(id, samples))
    assert all(len(part) == 1 or pack(part).input_ids.numel() <= tokens(part) <= budget for part in parts)
    if budget == 10_000:
        assert len(cut) == 1
    if ranks == 1:
        assert cut == [[part] for part in microbatches(samples, budget)]


def test_work_counts_what_a_packed_batch_has():
    samples = make_samples(0, 3, mean=9, prompt_tokens=(1, 9))
    batch = pack(samples)
    assert Work(1, 0, 0).of(samples) == batch.input_ids.numel()
    assert Work(0, 0, 1).of(samples) == batch.targets.numel()
    real = [s.distance.flatten(0, 1)[s.query_rows] for s in batch.packing]
    assert Work(0, 1, 0).of(samples) == sum((distance >= 0).sum().item() for distance in real)


@pytest.mark.parametrize("budget", [1, 7, 20, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_padded_rows_stay_within_the_budget_with_their_padding(budget, ranks):
    samples = make_samples(0, 4, mean=5, prompt_tokens=(1, 9))
    cut = rounds(samples, budget, PADDED, ranks)
    assert all(len(parts) == ranks for parts in cut) and all(any(parts) for parts in cut)
    parts = [part for parts in cut for part in parts if part]
    assert sorted(map(id, itertools.chain(*parts))) == sorted(map(id, samples))
    assert all(len(part) == 1 or pad(part, 0).input_ids.numel() <= budget for part in parts)
    assert len(cut) == 1 or budget < 10_000


def test_padded_rows_do_not_share_a_long_prompt():
    """Three rows of 1100 tokens are 3300; packed, the prompt would be there once, beside 30 completions."""
    samples = [Weighted(support.sample([1] * 1000, [2] * 100), 1.0) for _ in range(16)]
    assert [len(part) for part in microbatches(samples, 4096, PADDED)] == [3] * 5 + [1]
    assert [len(part) for part in microbatches(samples, 4096, WORK)] == [16]


def test_work_counts_what_a_padded_batch_has():
    samples = make_samples(0, 3, mean=9, prompt_tokens=(1, 9))
    batch = pad(samples, 0)
    rows, longest = batch.input_ids.shape
    assert Work(1, 0, 0, packed=False).of(samples) == batch.input_ids.numel()
    assert Work(0, 0, 1, packed=False).of(samples) == batch.targets.numel()
    assert Work(0, 1, 0, packed=False).of(samples) == rows * longest * (longest + 1) / 2
    assert PADDED.of([]) == 0 and PADDED.of(samples[:1]) == pytest.approx(WORK.of(samples[:1]))


def test_ranks_have_about_as_much_to_do_with_padded_rows():
    for seed in range(5):
        samples = make_samples(seed, 32)
        cut = rounds(samples, 16384, PADDED, 4)
        filled = list(microbatches(samples, 16384, PADDED))
        assert len(cut) == math.ceil(len(filled) / 4)
        assert waiting_share(cut, PADDED) < 0.1
        padded = sum(pad(part, 0).input_ids.numel() for parts in cut for part in parts if part)
        assert padded < 1.15 * sum(len(w.sample.prompt_ids) + len(w.sample.token_ids) for w in samples)


STEPS = {
    "many groups": ({"prompts": 64}, 16384, 8),
    "few groups": ({"prompts": 16}, 8192, 8),
    "long completions": ({"prompts": 32, "group": 16, "mean": 4000, "longest": 16384}, 32768, 8),
    "long prompts": ({"prompts": 64, "mean": 200, "longest": 1024, "prompt_tokens": (1000, 4000)}, 16384, 8),
    "two ranks": ({"prompts": 16}, 8192, 2),
}


@pytest.mark.parametrize("kind", STEPS)
def test_ranks_have_about_as_much_to_do_in_no_more_rounds_and_little_is_computed_twice(kind):
    shape, budget, ranks = STEPS[kind]
    more_rounds = 0
    for seed in range(5):
        samples = make_samples(seed, **shape)
        cut = rounds(samples, budget, WORK, ranks)
        more_rounds += len(cut) - math.ceil(len(list(microbatches(samples, budget))) / ranks)
        assert waiting_share(cut, WORK) < (0.12 if kind == "few groups" else 0.06)
        assert sum(WORK.of(part) for parts in cut for part in parts) < 1.04 * WORK.of(samples)
    assert more_rounds <= 1


def test_tokens_alone_are_not_the_work():
    """A long completion and many short ones: the rank that has it would otherwise have some of those, too."""
    samples = [Weighted(support.sample([i], [1] * length), 1.0) for i, length in enumerate([8192, *[256] * 64])]
    for pair, short in ((0.01, 64), (0.0, 48)):
        [[*parts]] = rounds(samples, 50_000, Work(1.0, pair, 0.0), 2)
        assert short in map(len, parts)
    parts = itertools.chain(*rounds(samples, 10_000, Work(1.0, 0.01, 0.0), 2))
    assert max(map(tokens, parts)) <= 10_000


def test_no_round_is_empty_on_every_rank():
    """Filled in turn, short ones take 40 microbatches; beside one that is far over the budget, first fit takes 27."""
    samples = [Weighted(support.sample([i], [1] * length), 1.0) for i, length in enumerate([10_000, *[30, 80] * 20])]
    cut = rounds(samples, 100, WORK, 2)
    assert all(any(parts) for parts in cut)
    assert sum(len(part) for parts in cut for part in parts) == 41


def test_groups_stay_whole_where_they_fit():
    samples = make_samples(0, 40, mean=100, prompt_tokens=(400, 500))
    cut = rounds(samples, 100_000, WORK, 4)
    prompts = [w for parts in cut for part in parts for w in {w.sample.prompt_ids for w in part}]
    assert len(prompts) == 40


def test_one_group_is_cut_for_the_ranks_that_would_idle():
    [[*parts]] = rounds(make_samples(0, 1), 100_000, WORK, 4)
    assert all(parts)


def test_the_cut_is_the_same_whatever_the_order_of_equal_groups():
    """Every rank makes it for itself: nothing but the samples decides."""
    samples = make_samples(0, 16)
    assert rounds(samples, 8192, WORK, 4) == rounds(list(samples), 8192, WORK, 4)
    assert rounds([], 10, WORK, 4) == []


def test_waiting():
    one, three = [Weighted(support.sample([1], [1]), 1.0)], [Weighted(support.sample([1], [1] * 3), 1.0)]
    by_target = Work(0, 0, 1)
    assert waiting_share([[one, three], [three, three]], by_target) == pytest.approx(1 - 10 / 12)
    assert waiting_share([[one, []]], by_target) == 0.5 and waiting_share([], by_target) == 0.0
    assert waiting_share([[one], [three]], by_target) == 0.0
