"""Which models have packed batches, which have padded ones, and that a run says why."""

import re

import pytest
import support
import torch
import transformers
from policy_support import make_samples, relative
from resume_support import make_tree, run

from aapo_fast.models import attention, load
from aapo_fast.trainer.policy import Policy


def test_a_model_whose_layers_mix_packed_rows_is_padded():
    """A convolution over the row (as in Mamba or LFM2 blocks) would leak one sequence into the next."""
    model = support.tiny()
    model.set_attn_implementation(attention.NAME)
    real = model.model.embed_tokens.forward

    def mixing(ids):
        return real(ids) + real(ids).roll(1, 1) * (torch.arange(ids.shape[1]) > 0)[:, None]

    model.model.embed_tokens.forward = mixing
    policy = Policy(model, support.tokenizer(), 1.0)
    assert not policy.packed and re.search(r"packed rows are \d+% off those of padded", policy.why_padded)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2, both soft-caps"])
def test_packed_rows_under_autocast_are_as_near_the_truth_as_padded_ones(family):
    """RoPE leaves queries in float32, and attention gives 16 bits for them, which no GPU copies into float32 rows."""
    samples, given = make_samples(), set()

    def gradient(precision, packed):
        model = support.tiny(family)
        model.set_attn_implementation(attention.NAME)
        policy = Policy(model, support.tokenizer(), 0.9, precision=precision)
        assert policy.packed
        policy.packed = packed
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: given.add(args[0].dtype))
        policy.loss(policy.batch(samples), 50).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradient(torch.float32, True)
    given.clear()
    padded = relative(gradient(torch.bfloat16, False), truth)
    assert padded > 1e-3 and relative(gradient(torch.bfloat16, True), truth) < 1.3 * padded
    assert given == {torch.bfloat16}


def test_a_decoder_that_takes_no_positions_is_padded_and_another_fault_is_not_hidden():
    def policy_with(error):
        model = support.tiny()
        model.set_attn_implementation(attention.NAME)
        forward = model.model.forward

        def refusing(*args, **more):
            if "packing" in more:
                raise error
            return forward(*args, **more)

        model.model.forward = refusing
        return Policy(model, support.tokenizer(), 1.0)

    policy = policy_with(TypeError("forward() got an unexpected keyword argument 'position_ids'"))
    assert not policy.packed and "unexpected keyword argument 'position_ids'" in policy.why_padded
    for error in (RuntimeError("self and source expected to have the same dtype"), TypeError("no int")):
        with pytest.raises(type(error), match=str(error)):
            policy_with(error)


def test_attention_that_ours_would_change_stays_the_models_own():
    """Attention sinks (gpt-oss) are one more column of scores, of which our attention knows nothing."""
    sizes = support.SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()
    native = model.config._attn_implementation
    load.take_over_attention(model)
    assert model.config._attn_implementation == native and not Policy(model, support.tokenizer(), 1.0).packed
    plain = support.tiny()
    load.take_over_attention(plain)
    assert load.steers_attention(plain)


def test_a_window_that_only_the_mask_knows_forbids_packing():
    """Qwen2-MoE gives its attention function no window; a short probe would not notice."""
    sizes = support.SIZES | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    sizes |= {"shared_expert_intermediate_size": 32, "sliding_window": 8, "use_sliding_window": True}
    config = transformers.Qwen2MoeConfig(**sizes, layer_types=["sliding_attention", "full_attention"])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    load.take_over_attention(model)
    policy = Policy(model, support.tokenizer(), 1.0)
    assert load.steers_attention(model) and not policy.packed and "sliding_attention window" in policy.why_padded


def test_a_run_says_once_that_it_pads_and_why(tmp_path, tiny_model):
    _, said = run(make_tree(tmp_path, tiny_model, train__steps=1))
    assert "padded" not in said
    folder = tmp_path / "recurrent"
    support.tiny("falcon-h1, recurrent").save_pretrained(folder)
    support.tokenizer().save_pretrained(folder)
    _, said = run(make_tree(tmp_path, folder, train__steps=1, run__folder=str(tmp_path / "other")))
    why = "batches are padded, one row a completion, and prompts are not shared; its attention cannot be told what"
    assert said.count(f"FalconH1ForCausalLM: {why} a packed row holds") == 1
