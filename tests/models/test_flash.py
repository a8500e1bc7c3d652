"""Ragged batches for flash attention, against the models' own logits; the kernels themselves run in tests/gpu."""

import inspect
from functools import partial

import pytest
import support
import torch
import torch.nn.functional as F
import transformers
from policy_support import make_samples, relative
from torch.nn.attention.varlen import varlen_attn

from aapo_fast import config
from aapo_fast.config import ModelConfig
from aapo_fast.data.packing import Weighted, pack
from aapo_fast.models import attention, flash
from aapo_fast.models.flash import Scores
from aapo_fast.trainer import setup
from aapo_fast.trainer.policy import Policy
from aapo_fast.types import UserError


def one_by_one(query, key, value, ragged, scores_of):
    """What a flash kernel computes, one problem after the other and written out."""
    out = []
    scaling, window, softcap = scores_of.scaling, scores_of.window, scores_of.softcap
    groups = query.shape[1] // key.shape[1]
    starts = zip(ragged.query_starts.tolist(), ragged.key_starts.tolist(), strict=True)
    (q_start, k_start), *ends = starts
    for q_end, k_end in ends:
        q, k, v = query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]
        assert 0 < len(q) <= ragged.most_queries and 0 < len(k) <= ragged.most_keys
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        unseen = (distance < 0) | (distance >= (window or len(k)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v))
        q_start, k_start = q_end, k_end
    return torch.cat(out)


def gradients(policy, samples):
    policy.model.zero_grad()
    loss = policy.loss(policy.batch(samples), 50).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("family", list(support.FAMILIES))
def test_ragged_batches_give_the_gradient_of_sdpa(family):
    """Which tests/models/test_models.py compares with that of the model's own logits."""
    model = support.tiny(family, dtype=torch.float64)
    model.set_attn_implementation(attention.NAME)
    ragged = Policy(model, support.tokenizer(), 0.9, flash=one_by_one)
    assert ragged.packed and ragged.batch(make_samples()).packing.key_index.ndim == 1
    buckets = Policy(model, support.tokenizer(), 0.9)
    (loss, gradient), (truth, true_gradient) = gradients(ragged, make_samples()), gradients(buckets, make_samples())
    assert loss == pytest.approx(truth.item(), rel=1e-6) and relative(gradient, true_gradient) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kernels_are_given_the_precision_of_autocast(family):
    """RoPE and norms of queries and keys leave float32, which no flash kernel takes."""
    given = []

    def kernel(query, key, value, *rest):
        given.append({query.dtype, key.dtype, value.dtype})
        return one_by_one(query, key, value, *rest)

    model = support.tiny(family)
    model.set_attn_implementation(attention.NAME)
    policy = Policy(model, support.tokenizer(), 0.9, precision=torch.bfloat16, flash=kernel)
    assert policy.packed and given and all(dtypes == {torch.bfloat16} for dtypes in given)


def test_a_ragged_batch_lists_what_each_problem_sees():
    samples = [Weighted(support.sample([1, 2, 3], c), 1.0) for c in ([4], [5, 6], [7, 8, 9])]
    samples.append(Weighted(support.sample([2, 2], [3]), -1.0))
    batch = pack(samples, ragged=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 7, 8, 2, 2]]
    packing = batch.packing
    assert packing.query_starts.tolist() == [0, 3, 4, 6, 8] and packing.query_starts.dtype == torch.int32
    assert packing.key_starts.tolist() == [0, 3, 7, 12, 14]
    assert packing.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7]
    assert (packing.most_queries, packing.most_keys) == (3, 5)


def problem(heads, kv_heads):
    samples = [Weighted(support.sample([1] * 6, [2] * n), 1.0) for n in (1, 4, 7)]
    ragged = pack(samples, ragged=True).packing
    generator = torch.Generator().manual_seed(0)
    sizes = ((len(samples[0].sample.prompt_ids) + 9, heads), (len(ragged.key_index), kv_heads), (None, kv_heads))
    q, k = (torch.randn(length, count, 16, generator=generator) for length, count in sizes[:2])
    return q, k, torch.randn(k.shape, generator=generator), ragged


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shares_keys", [True, False])
def test_pytorchs_kernel_is_asked_for_the_same(window, shares_keys):
    """Its arguments, bound to its real signature and carried out here: the kernel has no CPU."""

    def carried_out(*args, **kwargs):
        call = inspect.signature(varlen_attn).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        assert given["enable_gqa"] or given["query"].shape[1] == given["key"].shape[1]
        left, right = given["window_size"]
        assert right == 0
        starts = [given["cu_seq_q"], given["cu_seq_k"]]
        as_given = flash.Ragged(torch.empty(0), *starts, given["max_q"], given["max_k"])
        window = None if left == -1 else left + 1
        return one_by_one(
            *(given[n] for n in ("query", "key", "value")), as_given, Scores(given["scale"], window, None)
        )

    q, k, v, ragged = problem(4, 2)
    ours = flash._by_torch(carried_out, shares_keys, q, k, v, ragged, Scores(0.3, window, None))
    assert torch.allclose(ours, one_by_one(q, k, v, ragged, Scores(0.3, window, None)))
    with pytest.raises(ValueError, match="no soft-cap"):
        flash._by_torch(carried_out, shares_keys, q, k, v, ragged, Scores(0.3, window, 5.0))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_attn_is_asked_for_the_same(window, softcap):
    """With the argument names that its versions 2, 3 and 4 have in common; 4 returns a pair."""

    def carried_out(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert causal and window_size[1] == (-1 if window is None else 0)
        as_given = flash.Ragged(torch.empty(0), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        width = None if window_size[0] == -1 else window_size[0] + 1
        return one_by_one(q, k, v, as_given, Scores(softmax_scale, width, softcap or None)), None

    q, k, v, ragged = problem(4, 4)
    ours = flash._by_package(carried_out, q, k, v, ragged, Scores(None, window, softcap))
    assert torch.allclose(ours, one_by_one(q, k, v, ragged, Scores(None, window, softcap)))


def test_the_written_out_truth_is_pytorchs_attention():
    q, k, v, ragged = problem(4, 4)
    last = slice(ragged.query_starts[-2], None), slice(ragged.key_starts[-2], None)
    alone = F.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q[last[0]], k[last[1]], v[last[1]])),
        attn_mask=torch.ones(6, 12, dtype=torch.bool).tril(6),
    ).transpose(0, 1)
    assert torch.allclose(one_by_one(q, k, v, ragged, Scores(None, None, None))[last[0]], alone, atol=1e-6)


@pytest.mark.parametrize("name", list(flash.KERNELS))
def test_a_kernel_that_cannot_run_here_is_an_error_with_the_remedy(tmp_path, name):
    with pytest.raises(UserError, match=rf"model.attention='{name}' computes in 16 bits on a GPU.*'sdpa'"):
        flash.find_flash(name, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="computes in 16 bits on a GPU, and this is float32 on cuda"):
        flash.find_flash(name, torch.device("cuda"), torch.float32)
    if name.startswith("flash"):
        with pytest.raises(UserError, match=rf"flash-attn {name[-1]} is not installed"):
            flash.find_flash(name, torch.device("cuda"), torch.bfloat16)


def test_a_transformers_that_does_not_know_a_version_has_none_of_it(monkeypatch):
    monkeypatch.delattr(transformers.utils, "is_flash_attn_4_available")
    assert flash.find_flash("auto", torch.device("cuda"), torch.bfloat16) is not None
    with pytest.raises(UserError, match="flash-attn 4 is not installed"):
        flash.find_flash("flash_attention_4", torch.device("cuda"), torch.bfloat16)


def test_a_package_that_cannot_be_loaded_is_passed_over_unless_it_is_named(tmp_path, monkeypatch):
    """As one built for another torch; `auto` takes the next, and there is a note of it."""
    text = "undefined symbol: _ZN3c104cuda"
    (tmp_path / "flash_attn_interface.py").write_text(f"raise ImportError({text!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_3_available", lambda: True)
    found = flash.find_flash("auto", torch.device("cuda"), torch.bfloat16)
    assert isinstance(found, partial) and found.args[0] is varlen_attn
    with pytest.raises(UserError, match=f"flash-attn 3 is installed and cannot be loaded .ImportError: {text}") as no:
        flash.find_flash("flash_attention_3", torch.device("cuda"), torch.bfloat16)
    assert flash.broken_packages() == [str(no.value)] == setup.passed_over(config.parse({}))
    assert setup.passed_over(config.parse({"model": {"attention": "sdpa"}})) == []


def test_what_is_found_without_a_name():
    assert flash.find_flash("auto", torch.device("cpu"), torch.bfloat16) is None
    assert flash.find_flash("auto", torch.device("cuda"), torch.float32) is None
    assert flash.find_flash("sdpa", torch.device("cuda"), torch.bfloat16) is None
    found = flash.find_flash("auto", torch.device("cuda"), torch.bfloat16)
    assert isinstance(found, partial) and found.args[0] is varlen_attn  # no flash-attn package is installed here


def test_a_named_kernel_that_does_not_fit_the_model_is_refused_and_auto_falls_back(tmp_path, monkeypatch):
    def no_softcap(*args):
        if args[-1].softcap is not None:
            raise ValueError("no soft-cap")
        return one_by_one(*args)

    for family in ("llama", "gemma2, both soft-caps"):
        support.tiny(family).save_pretrained(tmp_path / family)
        support.tokenizer().save_pretrained(tmp_path / family)
    monkeypatch.setattr("aapo_fast.trainer.policy.find_flash", lambda *_: no_softcap)
    capped = str(tmp_path / "gemma2, both soft-caps")
    policy = Policy.from_config(ModelConfig(path=capped, device="cpu"), 1.0)
    assert policy.packed and policy.flash is None
    assert policy.how_computed().count("own attention does: ValueError: no soft-cap") == 1
    policy = Policy.from_config(ModelConfig(path=str(tmp_path / "llama"), device="cpu", attention="varlen"), 1.0)
    assert policy.packed and policy.flash is no_softcap
    with pytest.raises(UserError, match="model.attention='varlen' does not compute what Gemma2ForCausalLM's own"):
        Policy.from_config(ModelConfig(path=capped, device="cpu", attention="varlen"), 1.0)
