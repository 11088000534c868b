"""Which servers may generate, and with which weights: the state that decides whose tokens enter a batch."""

import logging
from collections.abc import Sequence

from megatron_fipo.rollout.sglang.server import Server

log = logging.getLogger(__name__)


class Fleet:
    """A server generates only while it is admitted, and it is admitted to one version of the weights only.

    `begin_update` withdraws every admission; whoever publishes the weights admits each server that holds all of them.
    A condemned server (``condemned`` has the reasons) is left alone until `pardon`, after which it still needs a
    complete update to be admitted. ``condemnations`` counts them, those that were pardoned included.
    """

    def __init__(self, servers: Sequence[Server]):
        self.servers = tuple(servers)
        self.version: int | None = None
        self.condemned: dict[Server, str] = {}
        self.condemnations = 0
        self._admitted: set[Server] = set()

    def begin_update(self, version: int) -> None:
        """From now on ``version`` is what generates; nobody has it yet."""
        self.version = version
        self.withdraw()

    def withdraw(self) -> None:
        """Nobody generates until the next update."""
        self._admitted.clear()

    def admit(self, server: Server) -> None:
        """``server`` holds the present version, whole."""
        if self.version is None:
            raise ValueError("no version to admit to: begin_update comes first")
        if server in self.condemned:
            raise ValueError(f"{server} is condemned ({self.condemned[server]}): pardon and update it first")
        self._admitted.add(server)

    def condemn(self, server: Server, reason: str) -> None:
        """Use ``server`` no more; the first reason is kept."""
        self._admitted.discard(server)
        if server not in self.condemned:
            self.condemned[server] = reason
            self.condemnations += 1
            log.error("%s condemned: %s", server, reason)

    def pardon(self, server: Server) -> None:
        """Let ``server`` take part in the next update; it answers again, or it is a new process."""
        if server in self._admitted:
            return
        if self.condemned.pop(server, None):
            log.warning("%s is back, to generate after the next complete weight update", server)

    def healthy(self) -> list[Server]:
        """Servers that are not condemned: those to publish weights to."""
        return [server for server in self.servers if server not in self.condemned]

    def serving(self) -> list[Server]:
        """Admitted servers: those that may generate."""
        return [server for server in self.servers if server in self._admitted]

    def serves(self, server: Server, version: int | None) -> bool:
        """Whether tokens that ``server`` was asked for under ``version`` may be used now."""
        return server in self._admitted and version == self.version

    def reasons(self) -> str:
        """Why servers are condemned, for a message."""
        return "; ".join(f"{server}: {reason}" for server, reason in self.condemned.items()) or "none condemned"

    def close(self) -> None:
        """Stop the servers that this process started."""
        for server in self.servers:
            server.kill()
