"""Wall-clock seconds of each phase of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up seconds per phase: `with timer("rollout"): ...`, then `timer.take()` once per step.

    A phase inside a phase counts for the inner one only, so that phases are disjoint and their sum never exceeds the
    step. `synchronize` runs at both ends of a phase: pass `torch.cuda.synchronize` on a GPU, whose kernels outlive the
    Python call that started them.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._inner_seconds: list[float] = []  # per open phase: time spent in phases inside it
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        self._inner_seconds.append(0.0)
        try:
            yield
        finally:
            self._synchronize()
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner_seconds.pop()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + own
            if self._inner_seconds:
                self._inner_seconds[-1] += elapsed

    def take(self) -> dict[str, float]:
        """`{"time/PHASE": seconds, ..., "time/step": seconds}` since the previous call, and start again at zero."""
        now = time.perf_counter()
        times = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        times["time/step"] = now - self._step_start
        self._seconds = {}
        self._step_start = now
        return times
