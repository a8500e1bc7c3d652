"""The Hugging Face engine: the right distribution, the right cut, the same samples for the same seed."""

import math

import pytest
import support
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aapo_fast.models.lora import add_adapter
from aapo_fast.rollout.hf import HFEngine, draw_tokens
from aapo_fast.types import SamplingParams, UserError

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9], [10]]


@pytest.fixture(scope="module", params=["llama", "mistral, sliding window", "gemma2, both soft-caps"])
def engine(request):
    return HFEngine(support.tiny(request.param), support.tokenizer())


def test_greedy_equals_the_full_forward_pass_without_cache_or_padding(engine):
    drawn = engine.generate(PROMPTS, n=1, sampling=SamplingParams(temperature=0, max_tokens=8), seeds=[0] * 3)
    for prompt, (sample,) in zip(PROMPTS, drawn, strict=True):
        ids = list(prompt)
        for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True):
            logps = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token == logps.argmax() and logprob == pytest.approx(logps.max().item(), abs=1e-4)
            ids.append(token)
        assert sample.prompt_ids == tuple(prompt) and sample.text == engine.tokenizer.decode(
            sample.token_ids, skip_special_tokens=True
        )


@pytest.mark.parametrize("family", ["lfm2, convolutions", "falcon-h1, recurrent"])
def test_recurrent_layers_are_copied_and_dropped_with_their_rows(family):
    engine = HFEngine(support.tiny(family), support.tokenizer())
    sampling = SamplingParams(max_tokens=6)
    drawn = engine.generate([[2, 3, 4], [5, 6, 7]], n=3, sampling=sampling, seeds=[1, 2])
    for prompt, samples in zip([[2, 3, 4], [5, 6, 7]], drawn, strict=True):
        for sample in samples:
            logps = engine.model(torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
            truth = logps.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
            assert torch.allclose(torch.tensor(sample.logprobs), truth, atol=1e-3)


def test_logprobs_are_those_of_the_sampling_distribution(engine):
    drawn = engine.generate(PROMPTS, n=4, sampling=SamplingParams(temperature=0.7, max_tokens=6), seeds=[1, 2, 3])
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        for sample in samples:
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            logps = (engine.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            truth = logps.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
            assert torch.allclose(torch.tensor(sample.logprobs), truth, atol=1e-4)


def test_same_seed_same_samples_whatever_else_is_drawn(engine):
    sampling = SamplingParams(max_tokens=6)
    together = engine.generate(PROMPTS, n=3, sampling=sampling, seeds=[7, 8, 9])
    again = engine.generate(PROMPTS, n=3, sampling=sampling, seeds=[7, 8, 9])
    alone = [engine.generate([PROMPTS[i]], n=3, sampling=sampling, seeds=[7 + i])[0] for i in range(3)]
    engine.max_batch_size = 4
    in_parts = engine.generate(PROMPTS, n=3, sampling=sampling, seeds=[7, 8, 9])
    engine.max_batch_size = 256
    ids = [[s.token_ids for s in group] for group in together]
    for other in (again, alone, in_parts):
        assert [[s.token_ids for s in group] for group in other] == ids
    moved = engine.generate(PROMPTS, n=3, sampling=sampling, seeds=[17, 18, 19])
    assert [[s.token_ids for s in group] for group in moved] != ids


@pytest.mark.parametrize(("most", "n"), [(1, 3), (2, 5), (4, 3), (4, 8), (7, 3), (256, 3)])
def test_no_more_sequences_at_once_than_asked_for_and_the_same_samples(engine, monkeypatch, most, n):
    sampling, progress, at_once = SamplingParams(max_tokens=4), [], []
    truth = engine.generate(PROMPTS, n=n, sampling=sampling, seeds=[7, 8, 9])
    monkeypatch.setattr(engine, "max_batch_size", most)
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda **k: at_once.append(len(k["input_ids"])) or forward(**k))
    in_parts = engine.generate(
        PROMPTS, n=n, sampling=sampling, seeds=[7, 8, 9], progress=lambda done, total: progress.append((done, total))
    )
    assert max(at_once) <= most and progress[-1] == (3, 3) and progress == sorted(set(progress))
    assert [[s.token_ids for s in group] for group in in_parts] == [[s.token_ids for s in group] for group in truth]
    for group, other in zip(truth, in_parts, strict=True):
        for one, two in zip(group, other, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)


def test_completions_end_at_eos_or_are_marked_as_cut_off():
    model = support.tiny()
    with torch.no_grad():
        model.lm_head.weight[0] *= 3.0  # EOS is likelier, and sometimes less likely
    engine = HFEngine(model, support.tokenizer())
    samples = engine.generate(PROMPTS, n=40, sampling=SamplingParams(max_tokens=5), seeds=[0, 1, 2])
    reasons = set()
    for sample in (s for group in samples for s in group):
        reasons.add(sample.finish_reason)
        assert 0 not in sample.token_ids[:-1]
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == 0)
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 5
        assert len(sample.logprobs) == len(sample.token_ids)
        assert "<end>" not in sample.text
    assert reasons == {"stop", "length"}


def test_stop_strings_end_a_completion_and_stay_in_it():
    engine = HFEngine(support.tiny(), support.tokenizer())
    free = engine.generate(PROMPTS, n=8, sampling=SamplingParams(max_tokens=12), seeds=[0, 1, 2])
    text = max((s.text for group in free for s in group), key=len)
    stop = text[3:5]
    cut = engine.generate(PROMPTS, n=8, sampling=SamplingParams(max_tokens=12, stop=(stop,)), seeds=[0, 1, 2])
    hit = 0
    for before, after in zip((s for g in free for s in g), (s for g in cut for s in g), strict=True):
        end = before.text.find(stop)
        hit += end >= 0
        expected = before.text if end < 0 else before.text[: end + len(stop)]
        assert after.text == expected
        assert end < 0 or after.finish_reason == "stop"
    assert hit


def test_the_sampler_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, -math.inf, 0.0, 3.0]])
    draws = 40_000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        truth = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            truth = torch.where(truth >= truth.sort(descending=True)[0][1], truth, 0.0)  # two tokens hold 0.88
            truth = truth / truth.sum()
        tokens, logprobs = draw_tokens(logits.expand(draws, -1), uniforms, temperature, top_p)
        share = torch.bincount(tokens, minlength=5) / draws
        deviation = (share - truth).abs() / (truth * (1 - truth) / draws).sqrt().clamp(min=1e-9)
        assert (deviation < 4).all() and share[2] == 0
        assert torch.allclose(logprobs, truth[tokens].log(), atol=1e-5)


def test_the_sampler_inverts_the_distribution_in_float64():
    """Over many tiles, some of them empty, and a ragged end: the token whose interval of the running sum holds u."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 1003, generator=generator)
    logits[:, 128:320] = -math.inf
    logits[0, 1:] = -40.0  # mass in the first token, 3e-18 a token beyond
    logits = logits.repeat_interleave(500, 0)
    uniforms = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    tokens, logprobs = draw_tokens(logits, uniforms, 1.0, 1.0)
    truth = logits.double().log_softmax(-1)
    running = truth.exp().cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
    before = running - truth.exp().gather(1, tokens[:, None]).squeeze(1)
    assert (uniforms < running + 1e-6).all() and (uniforms > before - 1e-6).all()
    assert torch.allclose(logprobs.double(), truth.gather(1, tokens[:, None]).squeeze(1), rtol=1e-6, atol=1e-6)
    assert (tokens[500:] > 960).any() and not ((tokens >= 128) & (tokens < 320)).any()


def test_ends_of_the_unit_interval():
    short = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    long = torch.full((1, 500), -math.inf).index_fill(1, torch.tensor([130, 260]), 0.0)
    for logits, ends in ((short, (1, 2)), (long, (130, 260))):
        for u, token in zip((0.0, 1 - 2**-53), ends, strict=True):
            assert draw_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)[0].item() == token


def test_logits_that_are_not_numbers_give_a_token_and_say_so():
    logits = torch.stack([torch.full((500,), math.nan), torch.full((500,), -math.inf), torch.zeros(500)])
    tokens, logprobs = draw_tokens(logits, torch.full((3,), 0.5, dtype=torch.float64), 1.0, 1.0)
    assert ((tokens >= 0) & (tokens < 500)).all() and logprobs.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("kind", ["policy", "reference", "adapter"])
def test_under_autocast_a_weight_is_cast_once_a_call(kind):
    """Frozen ones too, which autocast by itself casts again for every token."""
    model = support.tiny()
    if kind == "adapter":
        model = add_adapter(model, 4, 8.0, ["all-linear"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    engine = HFEngine(model, support.tokenizer(), precision=lambda: torch.autocast("cpu", torch.bfloat16))
    if kind == "reference":
        engine.keep_reference()
        engine.sync_weights(1)
    counts = []
    for tokens in (2, 6):
        with Casts() as casts:
            weights = "reference" if kind == "reference" else "policy"
            sampling = SamplingParams(temperature=0, max_tokens=tokens)
            (drawn,) = engine.generate(PROMPTS[:1], n=1, sampling=sampling, seeds=[3], weights=weights)
        counts.append((len(drawn[0].token_ids), casts.of_weights))
    assert counts[1][0] > counts[0][0] and counts[0][1] == counts[1][1] > 0
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen


class Casts(TorchDispatchMode):
    """Counts the matrices that are cast to bfloat16; activations have three or four dimensions."""

    of_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.of_weights += args[0].ndim == 2
        return func(*args, **(kwargs or {}))


def test_a_model_that_has_diverged_stops_the_rollout():
    model = support.tiny()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    engine, sampling = HFEngine(model, support.tokenizer()), SamplingParams(max_tokens=2)
    with pytest.raises(UserError, match="next-token logits are NaN or infinite.*precision='float32'"):
        engine.generate(PROMPTS, n=1, sampling=sampling, seeds=[1, 2, 3])


def test_reference_weights_stay_when_the_policy_moves():
    engine = HFEngine(support.tiny(), support.tokenizer())
    sampling = SamplingParams(max_tokens=6)
    before = engine.generate(PROMPTS, n=4, sampling=sampling, seeds=[0, 1, 2], weights="reference")
    engine.keep_reference()
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.5)
    engine.sync_weights(1)
    reference = engine.generate(PROMPTS, n=4, sampling=sampling, seeds=[0, 1, 2], weights="reference")
    policy = engine.generate(PROMPTS, n=4, sampling=sampling, seeds=[0, 1, 2])
    for earlier, later in zip(before, reference, strict=True):
        assert [s.token_ids for s in earlier] == [s.token_ids for s in later]
        assert [s.logprobs for s in later] == [pytest.approx(s.logprobs, abs=1e-5) for s in earlier]
    assert [g[0].weight_version for g in (reference[0:1] + policy[0:1])] == [0, 1]
    assert [s.token_ids for s in policy[0]] != [s.token_ids for s in before[0]]
    with pytest.raises(RuntimeError, match="has moved already"):
        engine.keep_reference()


def test_a_reference_that_was_not_kept_is_an_error_not_the_policy():
    engine = HFEngine(support.tiny(), support.tokenizer())
    engine.sync_weights(1)
    with pytest.raises(RuntimeError, match="were not kept"):
        engine.generate(PROMPTS, n=1, sampling=SamplingParams(max_tokens=1), seeds=[0] * 3, weights="reference")


def test_refusals():
    engine = HFEngine(support.tiny(), support.tokenizer())
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], n=1, sampling=SamplingParams(), seeds=[0, 0])
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        engine.generate([[1], [2]], n=1, sampling=SamplingParams(), seeds=[0])
    assert engine.generate([], n=2, sampling=SamplingParams(), seeds=[]) == []


def test_weights_of_each_prompt():
    engine = HFEngine(support.tiny(), support.tokenizer())
    engine.keep_reference()
    for parameter in engine.model.parameters():
        parameter.data += 0.05
    engine.sync_weights(3)
    sampling, told = SamplingParams(max_tokens=5), []
    prompts, seeds = [[5, 3], [7], [5, 3], [9, 9]], [1, 2, 1, 4]
    weights = ["policy", "reference", "reference", "policy"]
    mixed = engine.generate(prompts, n=2, sampling=sampling, seeds=seeds, weights=weights,
                            progress=lambda done, total: told.append((done, total)))  # fmt: skip
    alone = [
        engine.generate([p], n=2, sampling=sampling, seeds=[s], weights=w)[0]
        for p, s, w in zip(prompts, seeds, weights, strict=True)
    ]
    tokens, truth = ([[s.token_ids for s in group] for group in drawn] for drawn in (mixed, alone))
    assert tokens == truth and tokens[0] != tokens[2] and [g[0].weight_version for g in mixed] == [3, 0, 0, 3]
    assert told[-1] == (4, 4) and told == sorted(told)
    with pytest.raises(ValueError, match="4 prompts but 1 weights"):
        engine.generate(prompts, n=1, sampling=sampling, seeds=seeds, weights=["policy"])
