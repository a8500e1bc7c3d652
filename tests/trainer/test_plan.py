"""The plan against the tensors of real runs."""

import itertools
from dataclasses import replace

import pytest
import support
import torch
import transformers

from aapo_fast import config
from aapo_fast.bench import memory as measured
from aapo_fast.bench.shapes import Case, Head
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import take_over_attention
from aapo_fast.models.recompute import recompute_layers
from aapo_fast.rollout.vllm.weights import named_weights, size_bytes
from aapo_fast.trainer import plan, plan_shape, plan_time
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.step import make_optimizer, optimizer_step

SIZES = support.SIZES | {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
H100 = plan_shape.GPUS["h100"]


def save(folder, **changes):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))
    model.save_pretrained(folder)
    support.tokenizer().save_pretrained(folder)
    return folder


def make(folder, lora=0, **rollout):
    rollout = {"group_size": 4, "prompts_per_step": 2, "max_tokens": 96} | rollout
    tree = {"model": {"path": str(folder), "device": "cpu"}, "lora": {"rank": lora}, "rollout": rollout}
    return config.parse({**tree, "data": {"max_prompt_tokens": 32}, "train": {"max_microbatch_tokens": 1024}})


def parts(settings):
    return {part.name: part for part in plan.memory(settings, plan_shape.read_shape(settings), H100)}


def nbytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("lora", "mode", "copies"), [(0, "cached", 1), (4, "cached", 1), (0, "online", 2)])
def test_a_server_on_the_trainers_gpu_has_its_share_and_what_it_copies(tmp_path, lora, mode, copies, tied):
    settings = make(save(tmp_path, tie_word_embeddings=tied), lora, engine="vllm_server")
    elsewhere = parts(settings)
    assert not {"vLLM", "copies for vLLM"} & set(elsewhere)
    assert [part.name for part in plan_time.seconds(settings, plan_shape.read_shape(settings), H100)] == ["train"]
    vllm, reference = replace(settings.vllm, transfer="ipc"), replace(settings.reference, mode=mode)
    settings = replace(settings, vllm=vllm, reference=reference)
    found, policy = parts(settings), Policy.from_config(settings.model, 1.0, settings.loss, settings.lora)
    assert found["vLLM"].amount == 0.4 * H100.memory_bytes and found["vLLM"].phase == "always"
    assert found["copies for vLLM"].amount == copies * size_bytes(named_weights(policy.model, torch.bfloat16))
    assert "rollout" in [part.name for part in plan_time.seconds(settings, plan_shape.read_shape(settings), H100)]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("lora", [0, 4])
def test_weights_gradients_and_moments_are_those_of_a_run(tmp_path, lora, changes):
    settings = make(save(tmp_path, **changes), lora)
    policy = Policy.from_config(settings.model, 1.0, settings.loss, settings.lora)
    optimizer = make_optimizer(policy, settings.train)
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(nbytes([p.grad for p in policy.model.parameters() if p.grad is not None]))
    )
    samples = [Weighted(support.sample([2, 3, 4], [5, 6]), 1.0), Weighted(support.sample([2, 3, 4], [7]), -1.0)]
    assert optimizer_step(policy, optimizer, samples, settings.train, 1e-3).updated
    found = parts(settings)
    assert found["weights"].amount == nbytes(policy.model.parameters())
    assert found["AdamW moments"].amount == nbytes(t for state in optimizer.state.values() for t in state.values())
    assert [found["gradients"].amount] == gradients
    assert all(found[name].kind == "arithmetic" for name in ("weights", "gradients", "AdamW moments"))


def test_an_offloaded_optimizer_is_on_the_host(tmp_path):
    settings = make(save(tmp_path))
    offloaded = replace(settings, train=replace(settings.train, offload_optimizer=True))
    policy = Policy.from_config(settings.model, 1.0)
    optimizer = make_optimizer(policy, offloaded.train)
    held = []
    optimizer.register_step_post_hook(
        lambda *_: held.extend(t for g in optimizer.param_groups for p in g["params"] for t in (p, p.grad))
    )
    samples = [Weighted(support.sample([2, 3, 4], [5, 6]), 1.0), Weighted(support.sample([2, 3, 4], [7]), -1.0)]
    assert optimizer_step(policy, optimizer, samples, offloaded.train, 1e-3).updated
    held += [t for state in optimizer.state.values() for t in state.values()]
    found, plain = parts(offloaded), parts(settings)
    assert found["optimizer on the host"].amount == nbytes(held) and "AdamW moments" not in found
    device = [plan.peak(list(each.values())) for each in (plain, found)]
    assert device[0] - device[1] == plain["AdamW moments"].amount


def test_a_frozen_reference_is_a_copy_where_one_is_made(tmp_path):
    settings = make(save(tmp_path))
    online = config.parse({**config.to_dict(settings), "reference": {"mode": "online"}})
    assert "frozen reference" not in parts(settings)
    found = parts(online)
    assert found["frozen reference"].amount == found["weights"].amount
    adapted = config.parse({**config.to_dict(online), "lora": {"rank": 4}})
    assert "frozen reference" not in parts(adapted)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("prompt", "completion", "count"), [(32, 96, 8), (16, 240, 4), (4, 60, 16)])
def test_activations_are_within_a_tenth_of_what_autograd_keeps(tmp_path, prompt, completion, count, precision):
    settings, planned, found = activations(tmp_path, prompt, completion, count, precision, "none")
    assert planned == pytest.approx(found, rel=0.1)
    kept = [
        plan.activation_bytes(with_model(settings, activation_checkpointing=kind), plan_shape.read_shape(settings))
        for kind in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]
    flash = plan.activation_bytes(with_model(settings, attention="auto"), plan_shape.read_shape(settings))
    assert flash < planned if precision == "bfloat16" else flash == planned


def test_checkpointed_layers_keep_their_inputs(tmp_path):
    """And their products, selectively, which no hook sees. The layer that is there whole comes in the backward pass."""
    settings, planned, found = activations(tmp_path, 32, 96, 8, "float32", "full")
    shape = plan_shape.read_shape(settings)
    whole = plan.activation_bytes(with_model(settings, activation_checkpointing="none"), shape)
    assert planned - found == pytest.approx(whole / shape.layers, rel=0.1)


def with_model(settings, **changes):
    return replace(settings, model=replace(settings.model, **changes))


def activations(tmp_path, prompt, completion, count, precision, checkpointing):
    """Settings, bytes that the plan has for them, and bytes that autograd keeps."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    take_over_attention(model)
    policy = Policy(model, support.tokenizer(), 1.0, precision=getattr(torch, precision))
    assert policy.packed
    recompute_layers(policy.decoder, checkpointing)
    samples = [Weighted(support.sample([2 + i] + [5] * (prompt - 1), [6] * completion), 1.0) for i in range(count)]
    batch = policy.batch(samples)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), policy.autocast():
        policy.hidden_states(batch)
    kept += [s.distance for s in batch.packing]
    found = nbytes(t for t in kept if t.untyped_storage().data_ptr() not in weights)
    tree = config.to_dict(make(save(tmp_path), max_tokens=completion))
    tree["data"]["max_prompt_tokens"], tree["train"]["max_microbatch_tokens"] = prompt, batch.input_ids.numel() + count
    tree["model"] |= {"precision": precision, "attention": "sdpa", "activation_checkpointing": checkpointing}
    settings = config.parse(tree)
    return settings, plan.activation_bytes(settings, plan_shape.read_shape(settings)), found


@pytest.mark.parametrize(("rows", "vocab"), [(512, 32768), (2048, 32768), (1024, 98304)])
def test_the_heads_buffer_is_what_a_child_process_takes(rows, vocab):
    case = Case(Head("wide", 64, vocab), rows, "float32", "model-like")
    found = measured.peak_on_cpu(case, "exact:torch", seed=0)
    if found is None:
        pytest.skip("this kernel does not reset the peak of the resident set")
    shape = plan_shape.Shape((), 0, 0, 0, 1, 64, 1, 64, 64, vocab)
    planned = plan.head_buffer_bytes(rows, shape, on_gpu=False)
    # Beside the buffer: the row kernels' temporaries, in plain PyTorch a few blocks of rows in cache. Pages that the
    # child gave back meanwhile make the figure a little smaller.
    assert 0.85 * planned <= found <= planned + 64 * 2**20


def test_the_heads_buffer_on_a_gpu_stays_below_its_limit():
    for vocab in (49152, 151936, 256000):
        shape = plan_shape.Shape((), 0, 0, 0, 1, 64, 1, 64, 64, vocab)
        for half, sparse in itertools.product((False, True), repeat=2):
            taken = plan.head_buffer_bytes(8192, shape, on_gpu=True, half=half, sparse=sparse)
            assert 0.4 * 2**30 < taken < 2**30


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_run_are_those_that_torch_counts(tmp_path, tied):
    """Forward and backward of a padded batch, materialised logits: by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    changes = {"vocab_size": 2000, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes, attn_implementation="eager"))
    ids = torch.randint(0, 30, (2, 256))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    settings = make(save(tmp_path, **changes))
    planned = plan_time.train_flops(settings, plan_shape.read_shape(settings), 512, 256)
    # Eager attention computes the half above the diagonal, too: 6 A a token, layer and key once more.
    whole_square = 6 * 256 * 3 * 256 * 512
    assert planned + whole_square == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_peak_is_of_what_is_there_at_once():
    def part(amount, phase):
        return plan_shape.Part("", amount, "arithmetic", phase, "")

    assert plan.peak([part(5, "always"), part(3, "rollout"), part(2, "training"), part(4, "training")]) == 11
    assert plan.peak([part(5, "always"), part(9, "rollout"), part(2, "training")]) == 14


def test_kv_cache_is_that_of_the_engine(tmp_path):
    settings = make(save(tmp_path), max_tokens=8)
    model = transformers.LlamaForCausalLM.from_pretrained(settings.model.path)
    cache = model(input_ids=torch.full((8, 40), 3), use_cache=True).past_key_values
    held = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert parts(settings)["KV cache"].amount == held  # 8 sequences of 32 + 8 tokens
