"""The trainer's weights to the servers, as all trainer ranks see it: an export in which all take part, sent by one."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.rollout.sglang.buckets import TensorSpec, plan_buckets
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.sender import Sender
from megatron_fipo.rollout.sglang.update_session import SyncSettings

WeightStream = Iterator[tuple[str, Tensor]]


class WeightSync:
    """Publishes weights to the healthy servers of a fleet.

    Trainer rank 0 sends. The export brings every tensor whole to it, from all tensor-parallel ranks, experts and
    pipeline stages; what it holds at once is a tensor and two buckets.
    """

    def __init__(
        self,
        export: Callable[[], WeightStream],
        fleet: Fleet,
        settings: SyncSettings,
        quantize: Callable[[WeightStream], WeightStream] | None = None,
    ) -> None:
        """
        Args:
            export: the weights under their HF names, always in the same order; collective over all ranks.
            quantize: turns them into what the servers load, where that is another format than the trainer's.
        """
        self._export = (lambda: quantize(export())) if quantize else export
        self._fleet, self._settings = fleet, settings
        self._sender: Sender | None = None
        self._listed = False

    def publish(self, version: int) -> None:
        """Give the weights to all healthy servers and admit those that hold all of them; collective over all ranks.

        Raises nothing for a server's fault: that server is condemned with the reason, and the others are updated.
        """
        if not self._listed:
            self._list_tensors()
        while self._agree(self._sender is not None and self._sender.open()):
            stream = self._export()
            sent = self._sender is not None and self._sender.transfer(stream, str(version))
            for _ in stream:  # to its end on every rank, whatever happened: it is a collective
                pass
            if self._agree(sent):
                break
        else:
            return
        if self._sender:
            self._sender.finish(str(version))

    def close(self) -> None:
        """Dissolve the group with the servers."""
        if self._sender:
            self._sender.close()

    def _list_tensors(self) -> None:
        """Record names, dtypes and shapes once: sizes on both sides follow from this one list."""
        layout, device = [], torch.device("cpu")
        for name, tensor in self._export():
            layout.append(TensorSpec.of(name, tensor))
            device = tensor.device
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._sender = Sender(
                plan_buckets(layout, self._settings.bucket_bytes), device, self._fleet, self._settings
            )
        self._listed = True

    def _agree(self, value: bool) -> bool:
        """Rank 0's value, on every rank."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            told = torch.tensor([value], dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
            dist.broadcast(told, src=0)
            value = bool(told.item())
        return value
