"""The process of a server that this one started, under a supervisor of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.rollout.sglang import supervisor


@dataclass(frozen=True)
class Process:
    """``pid`` is the server's, ``supervisor`` leads the process group of everything that it starts."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    supervisor: subprocess.Popen
    pid: int

    @classmethod
    def launch(cls, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> "Process":
        """Start ``command``; its output is added to the log."""
        with open(log_path, "a") as log:
            supervised = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, str(os.getpid()), *command],
                env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        assert supervised.stdout is not None
        return cls(tuple(command), environment, log_path, supervised, int(supervised.stdout.readline()))

    def alive(self) -> bool:
        """A stopped process is alive."""
        return self.supervisor.poll() is None

    def kill(self) -> None:
        """End the whole group at once; a server stuck in a collective ignores gentler ways."""
        if self.alive():
            os.killpg(self.supervisor.pid, signal.SIGKILL)
            self.supervisor.wait()

    def again(self) -> "Process":
        """End it and start the same command."""
        self.kill()
        return self.launch(self.command, self.environment, self.log_path)

    def log_tail(self, lines: int = 12) -> str:
        """The end of the log."""
        return "\n".join(line[:300] for line in self.log_path.read_text(errors="replace").splitlines()[-lines:])
