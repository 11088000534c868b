"""Runs a command in this process group and ends the whole group when the command or the parent is gone.

`python supervisor.py PARENT_PID COMMAND...` prints the command's process id. It asks for its parent instead of waiting
for a signal or the end of a pipe: a trainer killed by SIGKILL sends none, and its forked children keep pipes open.
"""

import os
import signal
import subprocess
import sys
import time


def main(parent: int, command: list[str]) -> None:
    """Never returns: the group that ends is its own."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(child.pid, flush=True)
    while child.poll() is None and os.getppid() == parent:
        time.sleep(0.1)
    print(f"supervisor: server {child.pid} ended: {child.poll()}, trainer alive: {os.getppid() == parent}",
          file=sys.stderr, flush=True)  # fmt: skip
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
