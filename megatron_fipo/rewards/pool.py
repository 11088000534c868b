"""The trainer's side of the verifiers' process."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing import Pipe
from typing import Any, Self

from megatron_fipo.errors import UserError
from megatron_fipo.rewards.functions import SOURCE, Term
from megatron_fipo.rewards.response import Response, Verdict
from megatron_fipo.rewards.server import Settings

DEFAULT_TIMEOUT = 5.0
_START_SECONDS = 120.0
_SLACK_SECONDS = 60.0
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


class RewardPool:
    """Scores responses in processes of their own; see server.py.

    Built on a rank before or after CUDA and process groups start: the verifiers' process shares nothing with the
    trainer but a pipe. It ends with the trainer.
    """

    def __init__(
        self,
        terms: Sequence[Term] = (Term(SOURCE),),
        *,
        workers: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        network: bool = False,
        sources: Iterable[str] = (),
    ):
        """
        Args:
            terms: the reward's summands.
            workers: processes at a time; default: one for each core.
            timeout: seconds of one call.
            network: verifiers may open sockets and see the trainer's environment.
            sources: of the prompts to come; their verifiers are loaded ahead.

        Raises:
            UserError: a function cannot be loaded.
        """
        self._terms, self._timeout = tuple(terms), timeout
        self._workers = workers or len(os.sched_getaffinity(0))
        kept = os.environ if network else {k: os.environ[k] for k in _KEPT_ENVIRONMENT if k in os.environ}
        environment = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.rewards", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        names = tuple(term.name for term in self._terms)
        settings = Settings(
            names, self._workers, timeout, network, frozenset(sources) if SOURCE in names else frozenset()
        )
        confined = self._ask(settings, _START_SECONDS, "the reward functions to load")
        if isinstance(confined, UserError):
            self.close()
            raise confined
        if not confined:
            warnings.warn(
                "this kernel has no system-call filter: verifiers may start processes and open sockets "
                "(memory, files and time are still limited)",
                stacklevel=2,
            )

    def score(self, responses: Sequence[Response], groups: Sequence[int]) -> list[Verdict]:
        """Judge all responses; those to one prompt have the same number in ``groups``.

        Raises:
            RuntimeError: the verifiers' process has died or does not answer.
        """
        longest = self._longest(len(self._terms) * len(responses))
        names = [term.name for term in self._terms]
        scores = self._ask((list(responses), list(groups), names), longest, f"{len(responses)} verdicts")
        return [self._verdict({name: column[i] for name, column in scores.items()}) for i in range(len(responses))]

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Are these pairs of final answers mathematically equal? A pair that cannot be compared is not."""
        responses = [Response("", f"Answer: {a}", b, "math_verify") for a, b in pairs]
        request = responses, range(len(pairs)), [SOURCE]
        scores = self._ask(request, self._longest(len(pairs)), f"{len(pairs)} comparisons")
        return [score >= 1.0 for score, _ in scores[SOURCE]]

    def _longest(self, calls: int) -> float:
        return _SLACK_SECONDS + (calls + 1) * (self._timeout + 1.0) / self._workers

    def _verdict(self, scores: dict[str, tuple[float, str | None]]) -> Verdict:
        """The weighted sum; correct by the source's verifier, or, without it, by full credit from every function."""
        errors = [f"{name}: {error}" for name, (_, error) in scores.items() if error is not None]
        if SOURCE in scores:
            correct, error = scores[SOURCE][0] >= 1.0, scores[SOURCE][1]
            scores = scores | {SOURCE: (1.0 if correct else -1.0, error)}
        else:
            correct = all(score >= 1.0 for score, _ in scores.values())
        reward = sum(term.weight * scores[term.name][0] for term in self._terms)
        return Verdict(reward, correct, "; ".join(errors) or None)

    def close(self) -> None:
        """End the verifiers' process."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: object, seconds: float, what: str) -> Any:
        try:
            self._pipe.send(request)
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"the verifiers' process ended (exit code {self._process.wait()}) while the trainer waited for {what}; "
                f"its stderr says why"
            ) from None
        raise RuntimeError(
            f"the verifiers' process did not answer within {seconds:.0f} s; the trainer waited for {what}"
        )
