"""What needs CUDA is written against vLLM's real classes: here their signatures, in tests/gpu the thing itself."""

import inspect
import json

import pytest
import torch
import vllm_ipc_stand_in as stand_in
import vllm_support

from aapo_fast.rollout.vllm import transfer
from aapo_fast.rollout.vllm.client import ServerClient
from aapo_fast.rollout.vllm.process import READING_HANDLES

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
    transport = transfer.NCCLTransport("127.0.0.1", time_limit_seconds=60)
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

    source = transfer.weight_source([("a", torch.ones(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))])
    assert isinstance(source, WeightSource)
    for _ in range(2):  # it can be read again
        metadata = source.metadata() if callable(source.metadata) else source.metadata  # 0.32, 0.33
        declared = [(meta.name, meta.dtype, meta.shape) for meta in metadata]
        assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]


def test_sleep_and_wake_take_what_we_give_them():
    import vllm

    inspect.signature(vllm.LLM.sleep).bind(None, level=2)
    inspect.signature(vllm.LLM.wake_up).bind(None, tags=["weights"])
    inspect.signature(vllm.LLM.reset_prefix_cache).bind(None)


def test_ipc_handles_reach_vllm_as_it_reads_them(monkeypatch):
    """From vllm's trainer side over our client's JSON to vllm's worker side: everything but the GPU."""
    from vllm import envs
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
        IPCWeightTransferEngine,
        IPCWeightTransferInitInfo,
        IPCWeightTransferUpdateInfo,
    )

    assert inspect.signature(WeightTransferTrainerFactory.trainer_init).bind(
        IPCTrainerInitInfo(rank=0), client=None, source=None
    )
    assert {"ipc", "nccl"} <= set(WeightTransferEngineFactory._registry)
    posted = []
    client = ServerClient("http://nowhere", "", 1.0)
    monkeypatch.setattr(client, "_call", lambda *route, json=None: posted.append((route[1], json)))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", stand_in.gpu)
    monkeypatch.setenv(stand_in.FOLDER, "nowhere")
    source = transfer.weight_source([("a", torch.ones(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))])
    sender = IPCTrainerWeightTransferEngine.trainer_init(IPCTrainerInitInfo(rank=0), client=client, source=source)
    handle = (torch.Tensor, torch.Size([2, 3]), (3, 1), 0, torch.storage.UntypedStorage, torch.float32, 0, b"\x00\xff")
    monkeypatch.setattr(ipc_engine, "reduce_tensor", lambda tensor: (None, handle))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    sender.send_weights()
    posted = [(route, json.loads(json.dumps(body))) for route, body in posted]
    assert [route for route, _ in posted] == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    ]
    assert IPCWeightTransferInitInfo(**posted[0][1]["init_info"]).packed is False
    assert IPCWeightTransferEngine.update_info_cls is IPCWeightTransferUpdateInfo
    update = posted[2][1]["update_info"]
    monkeypatch.setattr(envs, "VLLM_ALLOW_INSECURE_SERIALIZATION", False, raising=False)
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        IPCWeightTransferUpdateInfo(**update)
    [(variable, value)] = READING_HANDLES["ipc"].items()
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(envs, variable, envs.environment_variables[variable](), raising=False)
    read = IPCWeightTransferUpdateInfo(**update)
    assert (read.names, read.dtype_names, read.shapes) == (["a", "b"], ["float32", "bfloat16"], [[2, 3], [4]])
    assert read.ipc_handles == [{"GPU-nowhere": handle}] * 2


def test_cuda_handles_have_the_device_where_vllm_puts_its_own():
    """vLLM replaces field 6 of a handle; the stand-in of the CPU tests keeps the order of the real ones."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    fields = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert fields[6] == "storage_device" and fields[7] == "storage_handle"
    assert len(fields) == 15
