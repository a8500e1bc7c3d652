"""verl 0.9 finds our estimator, calls it with its own tensors, and gets what the formula says; the page on verl."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import make_tokenizer

import aapo_fast as af
from aapo_fast.types import UserError

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not on the path: `make test` runs this file apart (requirements/verl.txt)", allow_module_level=True
    )

import numpy as np
import pandas
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn
from verl_support import verl_config

import aapo_fast.integrations.verl as integration

pytestmark = pytest.mark.filterwarnings(
    "ignore:register_new_resolver", "ignore:Implicit conversion", "ignore:Warning: "
)

# Three groups of 3, 2 and 1 responses, not in order, as verl's balancing leaves them.
UIDS = ["b", "a", "c", "a", "b", "a"]
REWARDS = [1.0, 0.2, 0.7, 1.0, 0.0, 0.0]
REFERENCE = [0.5, 0.1, 0.9, 0.9, 0.4, 0.3]
LENGTHS = [3, 1, 4, 2, 4, 3]


def plain_advantages(rewards, reference, uids, low=-0.2, high=0.28, scale=True):
    """The formulas, group by group."""
    out = [0.0] * len(rewards)
    for uid in set(uids):
        rows = [i for i, u in enumerate(uids) if u == uid]
        mean = sum(rewards[i] for i in rows) / len(rows)
        variance = sum((rewards[i] - mean) ** 2 for i in rows) / max(len(rows) - 1, 1)
        for i in rows:
            out[i] = (rewards[i] - mean) / (variance**0.5 + 1e-4 if scale else 1.0)
            if reference is not None:
                out[i] += min(max(rewards[i] - reference[i], low), high)
    return out


def batch(rewards=REWARDS, reference=REFERENCE, uids=UIDS):
    """What verl's trainer has in its hands when it computes advantages."""
    mask = (torch.arange(4) < torch.tensor(LENGTHS)[:, None]).long()
    token_rewards = torch.zeros(6, 4)
    token_rewards[torch.arange(6), torch.tensor(LENGTHS) - 1] = torch.tensor(rewards)
    tensors = {"token_level_rewards": token_rewards, "response_mask": mask, "prompts": torch.zeros(6, 2)}
    if reference is not None:
        tensors["reward_baselines"] = torch.tensor(reference)
    return DataProto.from_dict(tensors, non_tensors={"uid": np.array(uids, dtype=object)})


def advantages(config, **of_batch):
    """verl's own call of an estimator, by its name."""
    data = compute_advantage(batch(**of_batch), adv_estimator="aapo", config=config.algorithm)
    assert torch.equal(data.batch["advantages"], data.batch["returns"])
    return data.batch["advantages"]


def test_every_process_that_imports_verl_has_both():
    code = (
        "import verl\nfrom verl.trainer.ppo import core_algos\n"
        "print(core_algos.get_adv_estimator_fn('aapo').__module__, core_algos.get_policy_loss_fn('aapo').__module__)"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "aapo_fast.integrations.verl"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["aapo_fast.integrations.verl"] * 2


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_ragged_groups(scale):
    out = advantages(verl_config(f"algorithm.norm_adv_by_std_in_grpo={scale}"))
    expected = torch.tensor(plain_advantages(REWARDS, REFERENCE, UIDS, scale=scale))
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(out, expected[:, None] * mask, rtol=1e-5, atol=1e-6)


def test_each_group_is_as_the_public_function_has_it():
    out = advantages(verl_config())[:, 0]
    for uid in "abc":
        rows = [i for i, u in enumerate(UIDS) if u == uid]
        rewards, reference = torch.tensor(REWARDS)[rows], torch.tensor(REFERENCE)[rows]
        assert torch.equal(out[rows], af.aapo_advantages(rewards, reference, group_size=len(rows)))


def test_a_missing_reward_is_left_out():
    rewards = [float("nan") if i == 3 else r for i, r in enumerate(REWARDS)]
    out = advantages(verl_config(), rewards=rewards)
    rows = [1, 5]
    expected = plain_advantages([REWARDS[i] for i in rows], [REFERENCE[i] for i in rows], ["a", "a"])
    torch.testing.assert_close(out[rows, 0], torch.tensor(expected))
    assert (out[3] == 0).all()


def test_settings_from_the_command_line():
    config = verl_config("+algorithm.aapo.delta_low=-0.05", "+algorithm.aapo.delta_high=1")
    expected = torch.tensor(plain_advantages(REWARDS, REFERENCE, UIDS, low=-0.05, high=1.0))
    torch.testing.assert_close(advantages(config)[:, 0], expected)
    with pytest.raises(UserError, match=r"algorithm\.aapo\.delta is not a setting; there are delta_low"):
        advantages(verl_config("+algorithm.aapo.delta=1"))
    with pytest.raises(UserError, match=r"algorithm\.aapo\.pairing='best'"):
        advantages(verl_config("+algorithm.aapo.pairing=best"))
    with pytest.raises(ValueError, match=r"delta_low=0\.5 is not below"):
        advantages(verl_config("+algorithm.aapo.delta_low=0.5"))


def test_settings_from_verls_dataclass():
    """Which has no room for ours: the defaults."""
    config = omega_conf_to_dataclass(verl_config().algorithm)
    data = compute_advantage(batch(), adv_estimator="aapo", config=config)
    torch.testing.assert_close(data.batch["advantages"], advantages(verl_config()))


def test_no_reference_rewards_is_an_error_unless_asked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "transfer_queue", raising=False)
    with pytest.raises(UserError, match=r"no reference rewards: .*reward_baselines.*\+algorithm\.aapo\.momentum=False"):
        advantages(verl_config(), reference=None)
    config = verl_config("+algorithm.aapo.momentum=False", "algorithm.norm_adv_by_std_in_grpo=False")
    uids = ["b", "a", "a", "a", "b", "a"]  # verl's grpo makes an exception of a group of one
    ours = advantages(config, reference=None, uids=uids)
    theirs = compute_advantage(
        batch(reference=None, uids=uids), adv_estimator="grpo", norm_adv_by_std_in_grpo=False, config=config.algorithm
    )
    torch.testing.assert_close(ours, theirs.batch["advantages"])


def test_no_groups_is_an_error():
    with pytest.raises(UserError, match="needs the prompt's uid"):
        integration.aapo_advantage(torch.ones(2, 3), torch.ones(2, 3))


def test_the_trainer_fetches_the_column(tmp_path):
    """Parquet, verl's data set, its agent loop's record of it, TransferQueue, `_compute_advantage` of its trainer."""
    missing = [name for name in ("transfer_queue", "torchdata") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"verl's trainer needs {missing} (requirements/verl.txt)")
    confined = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*confined, "true"], capture_output=True).returncode:
        pytest.skip("Ray and TransferQueue listen on every interface, and no namespace of our own can be had (unshare)")
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": "aapo_fast.integrations.verl",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [*confined, sys.executable, Path(__file__).with_name("verl_trainer.py"), tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    out = json.loads(result.stdout.splitlines()[-1])

    assert out["in a worker"] == ["aapo_fast.integrations.verl"] * 2
    columns = {"a": [0.1, 0.9], "b": [0.5]}
    pairs = {"paired": {"a": [0.1, 0.9, 0.1], "b": [0.5, 0.5]}, "mean": {"a": [0.5] * 3, "b": [0.5] * 2}}
    assert set(columns) == {row["prompt"] for row in out["paired"] if row["prompt"]}
    for pairing, references in pairs.items():
        rows = out[pairing]
        real = [row for row in rows if row["prompt"]]
        nth = [[r for r in real if r["prompt"] == row["prompt"]].index(row) for row in real]
        reference = [references[row["prompt"]][n] for row, n in zip(real, nth, strict=True)]
        expected = plain_advantages([r["reward"] for r in real], reference, [r["prompt"] for r in real])
        for row, advantage in zip(real, expected, strict=True):
            assert row["advantages"] == pytest.approx([advantage] * len(row["advantages"]), rel=1e-5, abs=1e-6)
        assert len(rows) > len(real) and all(r["advantages"] == [0.0] for r in rows if not r["prompt"])
    assert "no column 'reference_rewards'" in out["without the column"]


def blocks_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "verl.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def rows_of_data():
    return {
        "prompt": [[{"role": "user", "content": name}] for name in "ab"],
        "data_source": ["test"] * 2,
        "reward_model": [{"ground_truth": truth, "style": "rule"} for truth in ("x", "y")],
        "extra_info": [{"index": i} for i in range(2)],
    }


def test_the_page_makes_the_column(tmp_path, monkeypatch):
    (tmp_path / "generated").mkdir()
    (tmp_path / "rewards.py").write_text("def compute_score(source, text, truth, extra): return float(text == truth)")
    frame = pandas.DataFrame(rows_of_data() | {"responses": [["x", "y"], ["y", "y"]]})
    frame.to_parquet(tmp_path / "generated" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(blocks_of_the_page()[0], {})
    out = pandas.read_parquet("train.parquet")
    assert [list(r) for r in out["reference_rewards"]] == [[1.0, 0.0], [1.0, 1.0]] and "responses" not in out


def test_the_page_brings_baselines_to_the_older_trainers(tmp_path):
    """verl's data set, collation and repetition of prompts; the estimator gets the mean of each."""
    space = {}
    exec(blocks_of_the_page()[1], space)
    path = tmp_path / "train.parquet"
    pandas.DataFrame(rows_of_data() | {"reference_rewards": [[0.1, 0.9], [0.4]]}).to_parquet(path)
    config = verl_config("data.filter_overlong_prompts=False")
    data = space["WithBaselines"](str(path), make_tokenizer(), config.data)
    prompts = DataProto.from_single_dict(collate_fn([data[0], data[1]]))
    prompts.non_tensor_batch["uid"] = np.array(["a", "b"], dtype=object)
    repeated = prompts.repeat(repeat_times=3, interleave=True)
    rewards = [1.0, 0.0, 0.4, 0.3, 0.5, 0.5]
    repeated.batch["token_level_rewards"] = torch.tensor(rewards)[:, None]
    repeated.batch["response_mask"] = torch.ones(6, 1)
    out = compute_advantage(repeated, adv_estimator="aapo", config=config.algorithm).batch["advantages"]
    expected = plain_advantages(rewards, [0.5] * 3 + [0.4] * 3, list("aaabbb"))
    torch.testing.assert_close(out[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_names_are_ours_in_verls_registries():
    assert core_algos.get_adv_estimator_fn("aapo") is integration.aapo_advantage
    assert core_algos.get_policy_loss_fn("aapo") is integration.aapo_policy_loss
