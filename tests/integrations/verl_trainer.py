"""What verl's trainer does between its data set and the advantages, without engines: run by test_verl.py.

Real are the parquet file, verl's data set and collation, its agent loop's record of a finished response, TransferQueue
on a local Ray (in a network namespace of its own), the padding of a batch and the trainer's ``_compute_advantage``.
Only the responses are made up.

    python verl_trainer.py FOLDER     prints one line of JSON
"""

import asyncio
import fcntl
import json
import socket
import struct
import sys
from pathlib import Path

import hydra
import numpy as np
import pandas
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import AgentLoopWorkerTQ, PPOTrainerSync
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

RESPONSES = {"a": [(1.0, 3), (0.0, 1), (0.25, 2)], "b": [(0.0, 2), (1.0, 4)]}  # rewards and lengths
COLUMN = {"a": [0.1, 0.9], "b": [0.5]}


SETTINGS = [
    "algorithm.adv_estimator=aapo",
    "algorithm.rollout_correction.bypass_mode=True",  # the engine's log-probabilities, without a forward pass
    "data.filter_overlong_prompts=False",
]


def config_of(*overrides):
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=[*SETTINGS, *overrides])


def batch_of_prompts(folder, config, with_column):
    """As the trainer's dataloader gives it."""
    rows = {
        "prompt": [[{"role": "user", "content": name}] for name in COLUMN],
        "data_source": ["test"] * 2,
        "reward_model": [{"ground_truth": "", "style": "rule"}] * 2,
        "extra_info": [{"index": i} for i in range(2)],
    }
    if with_column:
        rows["reference_rewards"] = list(COLUMN.values())
    path = folder / f"{with_column}.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    from support import make_tokenizer

    data = RLHFDataset(str(path), make_tokenizer(), config.data)
    batch = collate_fn([data[i] for i in range(2)])
    batch["uid"] = np.array([f"uid-{with_column}-{name}" for name in COLUMN], dtype=object)
    return tensordict_utils.get_tensordict(batch)


class Worker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's agent loop worker with nobody to ask for rewards, images or teachers."""

    def __init__(self):
        pass

    async def _compute_score(self, outputs, kwargs):
        pass

    async def _compute_teacher_logprobs(self, *arguments, **keywords):
        pass

    def _compute_multi_modal_inputs(self, output, input_ids):
        return {}

    def _compute_position_ids(self, input_ids, attention_mask, multi_modal_inputs):
        return torch.arange(input_ids.shape[1])[None]


async def record(prompts):
    """Put made-up responses into TransferQueue as verl's worker does. Returns the keys, shuffled."""
    keys = []
    for i in range(len(prompts)):
        prompt = {k: v[i] if isinstance(v, torch.Tensor) else v[i].data for k, v in prompts.items()}
        for session, (reward, length) in enumerate(RESPONSES[prompt["raw_prompt"][0]["content"]]):
            output = AgentLoopOutput(
                prompt_ids=[5, 6],
                response_ids=[7] * length,
                response_mask=[1] * length,
                response_logprobs=[-1.0] * length,
                reward_score=reward,
                num_turns=2,
                metrics={},
            )
            await Worker()._agent_loop_postprocess(output, False, session_id=session, global_steps=1, **prompt)
            keys.append(f"{prompt['uid']}_{session}_0")
    return [keys[i] for i in (3, 0, 4, 1, 2)]


def advantages(config, keys):
    """The trainer's own method on a batch of these keys, with padding rows, and what it wrote back."""
    trainer = object.__new__(PPOTrainerSync)
    trainer.config = config
    tags = transfer_queue.kv_list("train")["train"]
    batch = transfer_queue.KVBatchMeta(partition_id="train", keys=keys, tags=[tags[key] for key in keys])
    batch = upsample_batch_to_divisible_size(batch, 4, eos_token_id=0)
    assert len(batch) == 8
    batch = trainer._compute_old_log_prob(batch, metrics={})
    trainer._compute_advantage(batch, metrics={})
    data = transfer_queue.kv_batch_get(batch.keys, "train", select_fields=["advantages", "rm_scores"])
    columns = (batch.keys, data["rm_scores"].unbind(), data["advantages"].unbind())
    return [
        {
            "prompt": "" if key.startswith("pad") else key.rsplit("_", 2)[0][-1],
            "reward": float(rewards.sum()),
            "advantages": advantage.tolist(),
        }
        for key, rewards, advantage in zip(*columns, strict=True)
    ]


@ray.remote
def names_in_a_worker():
    from verl.trainer.ppo import core_algos

    return [core_algos.get_adv_estimator_fn("aapo").__module__, core_algos.get_policy_loss_fn("aapo").__module__]


def raise_loopback():
    """A fresh network namespace has a loopback interface that is down."""
    up, set_flags = 0x1, 0x8914  # IFF_UP, SIOCSIFFLAGS
    fcntl.ioctl(socket.socket(), set_flags, struct.pack("16sh", b"lo", up))


def main(folder):
    raise_loopback()
    # Four "CPUs" are numbers of Ray's: TransferQueue's actors and the task below hold one each.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    storage = {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}
    transfer_queue.init(OmegaConf.create(storage))
    out = {"in a worker": ray.get(names_in_a_worker.remote())}
    keys = asyncio.run(record(batch_of_prompts(folder, config_of(), True)))
    for pairing in ("paired", "mean"):
        out[pairing] = advantages(config_of(f"+algorithm.aapo.pairing={pairing}"), keys)
    keys = asyncio.run(record(batch_of_prompts(folder, config_of(), False)))
    try:
        advantages(config_of(), keys)
    except Exception as error:
        out["without the column"] = str(error)
    transfer_queue.close()
    ray.shutdown()
    print(json.dumps(out))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(Path(sys.argv[1]))
