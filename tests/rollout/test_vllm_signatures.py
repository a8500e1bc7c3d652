"""What needs CUDA is written against vLLM's real classes: here their signatures, in tests/gpu the thing itself."""

import inspect

import torch
import vllm_support

from aapo_fast.rollout.vllm import adapter
from aapo_fast.rollout.vllm.client import ServerClient

pytestmark = vllm_support.needs_vllm


def test_the_client_is_what_vllms_trainer_side_drives():
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    wanted = [name for name in vars(VLLMWeightSyncClient) if not name.startswith("_")]
    assert len(wanted) >= 4
    for name in wanted:
        theirs, ours = (inspect.signature(getattr(c, name)).parameters for c in (VLLMWeightSyncClient, ServerClient))
        assert list(ours) == list(theirs), name


def test_nccl_transfers_are_set_up_as_vllm_wants_them(monkeypatch):
    """Everything but the GPUs: the arguments reach the real factory, which takes them."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    made = {}

    def trainer_init(init_info, *, client, source):
        made.update(info=init_info, engine=NCCLTrainerWeightTransferEngine(client=client, source=source))
        return made["engine"]

    real = inspect.signature(WeightTransferTrainerFactory.trainer_init).parameters
    assert list(inspect.signature(trainer_init).parameters) == list(real)
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    sent = []
    monkeypatch.setattr(
        NCCLTrainerWeightTransferEngine, "send_weights", lambda self: sent.append(list(self.source)), raising=True
    )
    client = ServerClient("http://nowhere", "", 1.0)
    monkeypatch.setattr(client, "world_size", lambda: 2)
    transport = adapter.NCCLTransport("127.0.0.1", time_limit_seconds=60)
    weights = [("a", torch.ones(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))]
    transport.publish("policy-1", weights)
    transport.load(client, "policy-1")
    assert (made["info"].backend, made["info"].world_size, made["info"].rank) == ("nccl", 3, 0)
    assert [[name for name, _ in pairs] for pairs in sent] == [["a", "b"]]
    transport.publish("policy-2", weights[:1])
    transport.load(client, "policy-2")  # the same group sends again
    assert [len(pairs) for pairs in sent] == [2, 1]


def test_a_weight_source_declares_what_it_yields():
    from vllm.distributed.weight_transfer.base import WeightSource

    source = adapter.weight_source([("a", torch.ones(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))])
    assert isinstance(source, WeightSource)
    for _ in range(2):  # it can be read again
        declared = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]


def test_sleep_and_wake_take_what_we_give_them():
    import vllm

    inspect.signature(vllm.LLM.sleep).bind(None, level=2)
    inspect.signature(vllm.LLM.wake_up).bind(None, tags=["weights"])
    inspect.signature(vllm.LLM.reset_prefix_cache).bind(None)
