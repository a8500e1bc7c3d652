"""AdamW in the host's memory: the moments leave the device, for a copy of the weights that stays beside them.

    device    weights, gradients                 8 bytes a trained parameter, 16 with the moments
    host      weights, gradients, moments        16

A step copies the gradients to the host once they are whole and clipped, moves the host's weights by PyTorch's fused
AdamW for CPUs, and copies them back. Copies are asynchronous, between the device and pinned memory; the host waits for
the gradients, and whatever the device does next comes after its new weights, on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aapo_fast.types import UserError


class OffloadedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose own parameters, and moments, are in the host's memory. ``step`` takes the gradients
    of the parameters that it was given and moves those; for parameters on a CPU it computes the bits of
    ``AdamW(fused=True)``.

    Args:
        groups: as AdamW takes them, with names: ``{"params": [(name, parameter), ...], ...}``. Parameters may be shards
            (DTensor); each rank's are in its host's memory.
        options: AdamW's.

    Raises:
        UserError: the host has no memory for them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        self._given: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        try:
            ours = [{**group, "params": [(name, self._take(p)) for name, p in group["params"]]} for group in groups]
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"train.offload_optimizer=true: {str(error).splitlines()[0]}; the host needs 16 bytes a trained "
                "parameter; train an adapter (lora.rank)"
            ) from error
        super().__init__(ours, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for given, host, gradient in self._all():
            host.grad = None if given.grad is None else gradient
            if given.grad is not None:
                _local(gradient).copy_(_local(given.grad), non_blocking=True)
        self._finish_copies()
        super().step(closure)
        for given, host, _ in self._all():
            if given.grad is not None:
                _local(given).copy_(_local(host), non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for given in self._given:
            given.grad = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The weights are those that the given parameters have by then."""
        super().load_state_dict(state_dict)
        for given, host, _ in self._all():
            _local(host).copy_(_local(given))

    def _take(self, given: nn.Parameter) -> nn.Parameter:
        """The host's copy of a parameter."""
        self._given.append(given)
        self._gradients.append(_on_host(given))
        return nn.Parameter(_on_host(given))

    def _all(self) -> Iterable[tuple[nn.Parameter, nn.Parameter, Tensor]]:
        ours = (host for group in self.param_groups for host in group["params"])
        return zip(self._given, ours, self._gradients, strict=True)

    def _finish_copies(self) -> None:
        for device in {given.device for given in self._given if given.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


@torch.no_grad()
def _on_host(tensor: Tensor) -> Tensor:
    """A copy; of a shard a shard, of the same whole among the hosts of the ranks."""
    mine = _local(tensor)
    copy = torch.empty_like(mine, device="cpu", pin_memory=mine.is_cuda).copy_(mine)
    if mine is tensor:
        return copy
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    shard: Any = tensor
    hosts = DeviceMesh("cpu", shard.device_mesh.mesh) if mine.is_cuda else shard.device_mesh
    return DTensor.from_local(
        copy, hosts, shard.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
