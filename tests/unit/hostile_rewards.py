"""Reward functions that misbehave, chosen by the response's text; loaded by the verifiers' process only."""

import asyncio
import builtins
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_fipo.rewards import dapo, verify
from megatron_fipo.rewards.response import Response


def _loop() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass


def _sympy() -> None:
    import sympy

    sympy.factor(sympy.expand((sympy.Symbol("x") + sympy.Symbol("y") + 1) ** 400))


def _hold_gil() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def _fork() -> None:
    while True:
        os.fork()


def _threads() -> None:
    while True:
        threading.Thread(target=time.sleep, args=(60,)).start()


def _allocate() -> None:
    memory = bytearray(10 << 30)
    memory[::4096] = b"x" * len(memory[::4096])


def _print() -> float:
    for _ in range(1 << 10):
        sys.stdout.write("noise" * 100_000)
        os.write(2, b"x" * 500_000)
    return 1.0


def _write_file() -> None:
    with open("hostile.bin", "wb") as file:
        file.truncate(1 << 40)
        file.write(b"x" * (1 << 30))


def _patch() -> float:
    verify.RULES["math_verify"] = verify.RULES["dapo"] = lambda *_: 1.0
    dapo.score = lambda *_: 1.0
    builtins.float = lambda *_: 1.0
    return 1


def _write_to_every_descriptor() -> float:
    for fd in range(64):
        try:
            os.write(fd, b"[[1.0, null]]\n" * 100)
            os.close(fd)
        except OSError:
            continue
    return 1.0


def _read_environment() -> float:
    started_with = Path("/proc/self/environ").read_bytes()
    return float("HOSTILE_SECRET" in os.environ or b"HOSTILE_SECRET" in started_with)


ACTS = {
    "loop": _loop,
    "sympy": _sympy,
    "gil": _hold_gil,
    "fork": _fork,
    "threads": _threads,
    "allocate": _allocate,
    "exit": lambda: os._exit(0),
    "raise exit": lambda: sys.exit("no"),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "kill": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "socket": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
    "file": _write_file,
    "nan": lambda: float("nan"),
    "text": lambda: "much",
    "print": _print,
    "patch": _patch,
    "descriptors": _write_to_every_descriptor,
    "nesting": lambda: os.write(3, b"[" * 500_000 + b"\n") and time.sleep(60),
    "huge": lambda: os.write(3, b"[[1" + b"0" * 4000 + b", null]]\n") and time.sleep(60),
    "flood": lambda: [os.write(3, b"x" * 100_000) for _ in range(1000)],
    "environment": _read_environment,
}  # fmt: skip


def act(response: Response) -> float:
    """The act that the text names; else whether the text is the answer."""
    if response.text in ACTS:
        return ACTS[response.text]()
    return float(response.text == response.answer)


async def act_async(response: Response) -> float:
    """As above, after a moment; "sleep" sleeps for longer than any timeout."""
    await asyncio.sleep(60 if response.text == "sleep" else 0.2)
    return act(response)


def longest(responses: list[Response]) -> list[float]:
    """1 for the longest response to a prompt, 0 for the others; "short" gives one score too few."""
    texts = [r.text for r in responses]
    scores = [float(text == max(texts, key=len)) for text in texts]
    return scores[1:] if "short" in texts else scores


async def longest_async(responses: list[Response]) -> list[float]:
    """The same."""
    return longest(responses)


def two_arguments(response: Response, more: int) -> float:
    """Not a reward function."""
    return 0.0
