"""SIGTERM and SIGUSR1 as a request to save and stop, on which all ranks agree."""

import signal
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal asked to stop; raised on every rank at the same point."""


class Interruption:
    """Remembers a signal until the ranks reach a point where they can act on it together.

    Any rank may get the signal, and each at a time of its own: nothing may follow from what one rank knows.
    """

    def __init__(self, device: torch.device) -> None:
        """Install the handlers. ``device``: of the flags that the ranks exchange, as their backend wants it."""
        self._received = False
        self._device = device
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def check(self) -> None:
        """Raise Interrupted if any rank got a signal. Collective over all ranks."""
        if self.received():
            raise Interrupted

    def received(self, groups: Sequence[dist.ProcessGroup | None] = (None,)) -> bool:
        """Whether a rank of the groups (None: of all ranks) got a signal. Collective over them, in turn."""
        flag = torch.tensor([int(self._received)], device=self._device)
        for group in groups:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return bool(flag.item())
