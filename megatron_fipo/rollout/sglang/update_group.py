"""The process group in which a trainer rank sends weights to the servers' ranks.

The servers make their end with torch's private helper behind init_process_group, as the trainer's process already has
a default group that servers cannot join. The same helper makes this end: both must agree on the keys of the store.
"""

import socket
import threading
from concurrent.futures import Future
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, PrefixStore, _new_process_group_helper, _world


class UpdateGroup:
    """Rank 0 of a group whose other ranks are told to join ``host:port`` under ``name``.

    Opening is in two steps, so that the caller can watch the others meanwhile: see `everyone_waits`, then `open`.
    """

    def __init__(
        self, name: str, world_size: int, backend: str, host: str, join_timeout_s: float, timeout_s: float
    ) -> None:
        """``host`` is the address of this machine at which the others can reach it; the kernel chooses the port.

        ``join_timeout_s`` bounds each wait in `open`. ``timeout_s`` ends a collective of gloo; at it NCCL would end the
        process, so there it is out of reach, and `abort` ends a collective that takes too long.
        """
        self.name, self.world_size, self.backend, self.host = name, world_size, backend, host
        self._timeout = timedelta(seconds=timeout_s if backend == "gloo" else 10 * timeout_s)
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = listener.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=join_timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._group: dist.ProcessGroup | None = None
        self._begun: Future[dist.Work] | None = None

    def everyone_waits(self) -> bool:
        """Whether all others are at the meeting point, for a backend (gloo) with which they wait there."""
        assert self._store is not None
        return self._store.num_keys() >= self.world_size  # the address of each, and one key of the store itself

    def open(self) -> None:
        """Connect with the others, who are all there. Raises RuntimeError after the timeout."""
        assert self._store is not None
        group, _ = _new_process_group_helper(
            self.world_size,
            0,
            [],
            dist.Backend(self.backend),
            PrefixStore(self.name, self._store),
            group_name=GroupName(self.name),
            backend_options=None,
            timeout=self._timeout,
        )
        assert isinstance(group, dist.ProcessGroup)
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self.world_size)}
        self._group = group

    def broadcast(self, data: Tensor) -> "Future[dist.Work]":
        """Begin to send ``data`` to everyone.

        In a thread of its own: NCCL makes its communicator in the first broadcast, and does not return, whatever the
        timeout, before every rank has come there. The caller can watch meanwhile.
        """
        self._begun = begun = Future[dist.Work]()

        def begin() -> None:
            if data.is_cuda:
                torch.cuda.set_device(data.device)  # each thread has its own
            try:
                work = dist.broadcast(data, src=0, group=self._group, async_op=True)
                assert work is not None  # None is for ranks outside the group
                begun.set_result(work)
            except Exception as error:  # the caller's, who asks for the result
                begun.set_exception(error)

        threading.Thread(target=begin, name=f"broadcast in {self.name}", daemon=True).start()
        return begun

    def abort(self) -> None:
        """Give up collectives under way, where the backend can; gloo's end with a connection or at their timeout."""
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """Leave: whoever still waits for this rank is released. No collective may be under way, but for one that does
        not even begin: nothing stops NCCL there, so it is left to itself."""
        if self._group is not None:
            if self._begun is None or self._begun.done():
                dist.destroy_process_group(self._group)
            else:  # nor may the end of the run, which shuts down all groups that torch knows, wait for it
                for table in (_world.pg_map, _world.pg_names, _world.pg_group_ranks):
                    table.pop(self._group, None)
        self._group = self._store = None


def address_towards(urls: list[str]) -> str:
    """The address of this machine at which all servers of these URLs reach it: a loopback one only if all are local."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: the kernel only chooses a route
            addresses.append(probe.getsockname()[0])
    remote = [address for address in addresses if not address.startswith("127.") and address != "::1"]
    return (remote or addresses)[0]


def default_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def trainer_device() -> torch.device:
    """Where the weights lie that this backend sends."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
