"""What a config refuses, each by its message; and overrides."""

import re
from pathlib import Path

import pytest

from aapo_fast import config
from aapo_fast.cli import QUICKSTART

COSINE = {
    "rewards.0.function": "cosine",
    "rewards.0.options.max_length": "100",
    "rewards.0.options.correct": "[1.0, 0.5]",
    "rewards.0.options.wrong": "[0, -0.5]",
}

SERVERS = {"rollout.engine": "vllm_server"}


def test_the_quickstart_is_a_config_and_survives_a_round_trip():
    loaded = config.load(QUICKSTART)
    assert loaded.rollout.stop == ["\n"] and loaded.rewards[0].extract == r"-?\d+"
    assert config.parse(config.to_dict(loaded)) == loaded


CONFIGS = Path(__file__).parent.parent / "configs"


def test_there_are_the_papers_configs():
    assert {path.name for path in CONFIGS.glob("*.toml")} >= {"aapo-1.5b.toml", "aapo-7b.toml", "gpu-0.5b.toml"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_config_loads_and_survives_a_round_trip(path):
    loaded = config.load(path)
    assert config.parse(config.to_dict(loaded)) == loaded
    for name in config.benchmark_names():
        config.load(path, (), name)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("", False),
        ("a\n</think>\nb", True),
        ("a</think>b", False),
        ("a\n</think>\nb\n</think>\nc", False),
        ("a\n</think>\n</think>\nb", True),
        ("a\n" * 5000 + "</think>\n" + "b\n" * 5000, True),
    ],
)
def test_the_papers_format_is_one_end_of_thought(completion, right):
    pattern = config.load(CONFIGS / "aapo-1.5b.toml").rewards[0].pattern
    assert (re.fullmatch(pattern, completion, re.DOTALL) is not None) is right
    assert (completion.count("\n</think>\n") == 1) is right  # the authors' way of telling


def test_overrides():
    loaded = config.load(
        QUICKSTART,
        [
            ("train.steps", "7"),
            ("train.learning_rate", "1"),
            ("run.folder", "123"),
            ("data.template", '"Q: {expression}\\n"'),
            ("rewards.0.weight", "2.5"),
            ("rollout.stop", '["a", "b"]'),
            ("data.options.max_digits", "3"),
            ("run.tensorboard", "true"),
        ],
    )
    assert loaded.train.steps == 7 and loaded.train.learning_rate == 1.0
    assert loaded.run.folder == "123" and loaded.data.template == "Q: {expression}\n" and loaded.run.tensorboard is True
    assert loaded.rewards[0].weight == 2.5 and loaded.rollout.stop == ["a", "b"]
    assert loaded.data.options["max_digits"] == 3 and loaded.data.options["min_digits"] == 1


def test_an_override_speaks_of_the_default_reward(tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert config.load(empty, [("rewards.0.extract", "x+")]).rewards == [config.RewardConfig(extract="x+")]


def test_every_option_is_documented():
    rows = list(config.describe())
    assert len(rows) > 40
    for key, kind, _, text in rows:
        assert kind and len(text) > 10, key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.step": "3"}, "unknown key train.step; did you mean train.steps?"),
        ({"trainer.steps": "3"}, "unknown key trainer; did you mean train?"),
        ({"zzz.a": "3"}, "unknown key zzz; known here: run, model, lora, loss, data"),
        ({"train.steps": "many"}, "train.steps='many' must be int, not str"),
        ({"train.steps": "2.5"}, "train.steps=2.5 must be int, not float"),
        ({"train.steps": "true"}, "train.steps=True must be int, not bool"),
        ({"train.steps": "0"}, "train.steps=0 must be at least 1"),
        ({"train.learning_rate": "nan"}, "train.learning_rate=nan must be finite"),
        ({"train.learning_rate": "-1e-5"}, "train.learning_rate=-1e-05 must be at least 0"),
        ({"train.schedule": "step"}, "train.schedule='step' must be one of constant, linear, cosine"),
        ({"run.tensorboard": "1"}, "run.tensorboard=1 must be bool, not int"),
        ({"rollout.stop": '"x"'}, "rollout.stop='x' must be list of str"),
        ({"rollout.stop": "[1]"}, "rollout.stop.0=1 must be str, not int"),
        ({"rollout.stop": '[""]'}, "rollout.stop has an empty string"),
        ({"rollout.temperature": "0"}, "rollout.temperature=0.0 must be above 0"),
        ({"rollout.top_p": "1.5"}, "rollout.top_p=1.5 must lie in (0, 1]"),
        ({"loss.sparsity_threshold": "0"}, "loss.sparsity_threshold=0.0 must lie in (0, 1]"),
        ({"loss.backward": "fast"}, "loss.backward='fast' must be one of exact, sparse"),
        ({"loss.backward": "sparse", "loss.implementation": "reference"}, "is not for loss.implementation='reference'"),
        (
            {"model.vocabulary_parallel": "true", "loss.implementation": "reference", "loss.backward": "exact"},
            "model.vocabulary_parallel=true is not for loss.implementation='reference'; use 'auto' or 'torch'",
        ),
        ({"loss.max_importance_weight": "0.5"}, "loss.max_importance_weight=0.5 must be at least 1 and finite"),
        ({"rollout.engine": "vllm", "vllm.tensor_parallel_size": "2"}, "use rollout.engine='vllm_server'"),
        ({"rollout.engine": "vllm", "vllm.max_model_len": "64"}, "would cut completions short"),
        ({"rollout.engine": "vllm", "rollout.temperature": "0.001"}, "vLLM samples at 0.01 or above"),
        (
            SERVERS | {"vllm.servers": '["http://a"]', "vllm.num_servers": "2"},
            "vllm.num_servers=2 is for servers started here",
        ),
        (
            {"vllm.servers": '["http://a"]'},
            "vllm.servers=['http://a'] is for rollout.engine='vllm_server', which is 'hf'",
        ),
        (
            {"vllm.servers": '["http://a"]', "rollout.engine": "vllm"},
            "which is 'vllm'; set it, or leave vllm.servers e",
        ),
        (SERVERS | {"vllm.servers": '["http://a", "http://b", "http://a/"]'}, "names http://a twice; name each server"),
        ({"vllm.address": "a", "vllm.weights_folder": "b"}, "set one of them"),
        (
            {"vllm.transfer": "ipc", "rollout.engine": "vllm"},
            "vllm.transfer='ipc' is for servers: an engine in",
        ),
        (
            SERVERS | {"vllm.transfer": "ipc", "vllm.servers": '["http://127.0.0.1:1"]'},
            "leave vllm.servers empty, or",
        ),
        (
            SERVERS | {"vllm.transfer": "ipc", "vllm.num_servers": "2"},
            "trainer's own GPU, and vllm.num_servers=2, vllm.t",
        ),
        (SERVERS | {"vllm.transfer": "ipc", "vllm.tensor_parallel_size": "2"}, "vllm.tensor_parallel_size=2; set both"),
        (
            SERVERS | {"vllm.transfer": "ipc", "vllm.address": "a"},
            "vllm.address='a' is for vllm.transfer='nccl'",
        ),
        (SERVERS | {"vllm.transfer": "file", "vllm.address": "a"}, "vllm.transfer='nccl', which is 'file'; set one"),
        (SERVERS | {"vllm.transfer": "nccl", "vllm.weights_folder": "b"}, "'b' is for vllm.transfer='file', which is"),
        (
            SERVERS | {"vllm.transfer": "nccl", "vllm.servers": '["http://a"]'},
            "needs vllm.address, this host as",
        ),
        (SERVERS | {"vllm.transfer": "rdma"}, "vllm.transfer='rdma' must be"),
        ({"rollout.max_staleness": "1"}, "rollout.max_staleness=1 needs rollout.engine='vllm_server'"),
        ({"rollout.max_staleness": "2", "rollout.engine": "vllm_server"}, "rollout.max_staleness=2 must be 0 or 1"),
        ({"vllm.gpu_memory_utilization": "1"}, "vllm.gpu_memory_utilization=1.0 must lie in (0, 1)"),
        ({"vllm.time_limit_seconds": "0"}, "vllm.time_limit_seconds=0.0 must be above 0"),
        ({"vllm.servers": "here"}, "vllm.servers='here' must be list of str"),
        ({"lora.alpha": "nan"}, "lora.alpha=nan must be finite"),
        ({"lora.rank": "513", "rollout.engine": "vllm"}, "vLLM takes adapters of rank 512 at most"),
        ({"train.beta1": "2"}, "train.beta1=2.0 must lie in [0, 1)"),
        ({"scoring.max_failure_share": "3"}, "scoring.max_failure_share=3.0 must lie in [0, 1]"),
        ({"scoring.time_limit_seconds": "0"}, "scoring.time_limit_seconds=0.0 must be above 0"),
        (
            {"scoring.time_limit_seconds": "1e7"},
            "scoring.time_limit_seconds=10000000.0 must be above 0, and 1000000 at",
        ),
        ({"vllm.time_limit_seconds": "1e300"}, "vllm.time_limit_seconds=1e+300 must be above 0, and 1000000 at most"),
        ({"train.learning_rate": "1" + "0" * 400}, "train.learning_rate is an integer beyond the range of a float"),
        ({"train.learning_rate": "1" + "0" * 5000}, "must be float, not str"),
        ({"advantage.delta_low": "0.5"}, "advantage.delta_low=0.5 must not exceed advantage.delta_high=0.28"),
        ({"rollout.group_size": "1", "reference.mode": "none"}, "leaves every advantage zero"),
        ({"train.warmup_steps": "60"}, "train.warmup_steps=60 must be below train.steps=60"),
        ({"data.held_out": "0"}, "eval.every=20 needs problems to evaluate on"),
        ({"rewards.0.function": "mine"}, "rewards.0.function='mine' must be reasoning_gym"),
        ({"rewards.0.pattern": "x"}, "rewards.0.pattern='x' goes with function='format'"),
        ({"rewards.0.function": "format"}, "rewards.0.pattern='' goes with function='format'"),
        ({"rewards.0.extract": "("}, "rewards.0.extract='(' is not a regular expression"),
        ({"rewards.0.options.max_length": "9"}, "rewards.0.options={'max_length': 9} goes with function='cosine'"),
        ({"rewards.0.function": "cosine"}, "rewards.0.options has []; function='cosine' wants max_length, correct"),
        (COSINE | {"rewards.0.options.max_length": "0"}, "rewards.0.options.max_length=0 must be a number of"),
        (COSINE | {"rewards.0.options.wrong": "[1]"}, "rewards.0.options.wrong=[1] must be [reward at length 0,"),
        ({"data.system_prompt": "be brief"}, "data.system_prompt needs data.chat_template=true"),
        ({"rewards.3.weight": "1"}, "'3' is not one of the 1 entries"),
        ({"rewards.².weight": "1"}, "'²' is not one of the 1 entries"),
        ({"rewards": "[]"}, "rewards is empty"),
        ({"train": "3"}, "train=3 must be a table"),
        ({"train.steps.x": "3"}, "train.steps has no key 'x'"),
        ({"data.source.x": "1"}, "--data.source.x: data.source has no key 'x'"),
        ({"data.source.x.y": "1"}, "--data.source.x.y: data.source has no key 'x'"),
        ({"rewards.weight": "1"}, "--rewards.weight: rewards has no key 'weight'"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(config.ConfigError) as refusal:
        config.load(QUICKSTART, list(overrides.items()))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(config.ConfigError, match="nowhere.toml cannot be read: No such file"):
        config.load(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nsteps = 3")
    with pytest.raises(config.ConfigError, match="broken.toml is not valid TOML"):
        config.load(broken)
    broken.write_text("[train]\nsteps = 1" + "0" * 5000)
    with pytest.raises(config.ConfigError, match="broken.toml is not valid TOML"):
        config.load(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(config.ConfigError, match="broken.toml is not valid TOML"):
        config.load(broken)
