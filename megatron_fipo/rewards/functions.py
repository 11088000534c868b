"""Users' reward functions: ``--reward-function package.module:name[=WEIGHT] ...``.

A function takes one ``response: Response``, or, if its only parameter is called ``responses``, all responses to one
prompt as a list; it returns a number, or one for each. Either may be async: then the responses to a prompt are scored
together. ``source`` stands for the verifier that a prompt's source names.
"""

import asyncio
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.rewards.response import Response

SOURCE = "source"

Score = tuple[float, str | None]
"""(score, how the function failed); a failure scores 0."""


@dataclass(frozen=True)
class Term:
    """One summand of the reward: ``weight`` times the score of ``name``."""

    name: str
    weight: float = 1.0


def parse_terms(specs: Sequence[str]) -> tuple[Term, ...]:
    """``--reward-function``'s values; none means the source's verifier alone. Raises UserError."""
    terms = []
    for spec in specs:
        match = re.fullmatch(r"(source|[A-Za-z_][\w.]*:[A-Za-z_]\w*)(?:=(.+))?", spec)
        try:
            weight = float(match[2] or 1.0) if match else math.nan
        except ValueError:
            weight = math.nan
        if match is None or not math.isfinite(weight):
            raise UserError(
                f"--reward-function {spec!r} is not package.module:name[=WEIGHT] or source[=WEIGHT], "
                f"for example my_rewards:brevity=0.2"
            )
        terms.append(Term(match[1], weight))
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--reward-function names {name} twice; add up its weights")
    return tuple(terms) or (Term(SOURCE),)


def import_function(flag: str, name: str) -> Callable[..., Any]:
    """Import the ``package.module:name`` that a user gave with ``flag``. Raises UserError."""
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise UserError(f"{flag} {name!r} is not package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises as it is imported
        raise UserError(
            f"{flag} {name}: importing {module_name} fails ({type(error).__name__}: {error}); "
            f"mend it, or start where Python finds it"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{flag} {name}: {module_name} has no function {attribute!r}; check the name")
    return function


def required_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that a call must give by position."""
    return [
        p for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]  # fmt: skip


@dataclass(frozen=True)
class RewardFunction:
    """A loaded function. ``batched``: it takes a list; ``together``: one call scores all responses to a prompt."""

    call: Callable[..., Any]
    batched: bool
    asynchronous: bool

    @property
    def together(self) -> bool:
        return self.batched or self.asynchronous

    @classmethod
    def load(cls, name: str) -> "RewardFunction":
        """Import ``package.module:name``. Raises UserError."""
        function = import_function("--reward-function", name)
        parameters = required_parameters(function)
        if len(parameters) != 1:
            raise UserError(
                f"--reward-function {name} takes {len(parameters)} arguments; let it take one: 'response', "
                f"or 'responses' for all responses to a prompt"
            )
        return cls(function, parameters[0].name == "responses", inspect.iscoroutinefunction(function))

    def score(self, responses: Sequence[Response], timeout: float) -> list[Score]:
        """Score ``responses`` (one, unless ``together``); seconds of ``timeout`` bound each call of an async one."""
        if self.batched:
            result = self.call(list(responses))
            values = list(asyncio.run(asyncio.wait_for(result, timeout)) if self.asynchronous else result)
            if len(values) != len(responses):
                raise ValueError(f"{len(values)} scores for {len(responses)} responses")
            return [_score(value) for value in values]
        if self.asynchronous:
            return asyncio.run(self._gather(responses, timeout))
        return [_score(self.call(response)) for response in responses]

    async def _gather(self, responses: Sequence[Response], timeout: float) -> list[Score]:
        async def one(response: Response) -> Score:
            try:
                return _score(await asyncio.wait_for(self.call(response), timeout))
            except Exception as error:  # of the user's function; it must not cost the other responses their scores
                return failure(error)

        return list(await asyncio.gather(*map(one, responses)))


def failure(error: BaseException) -> Score:
    """The score of a call that raised."""
    return 0.0, f"{type(error).__name__}: {error}"[:500]


def _score(value: Any) -> Score:
    number = float(value)
    return (number, None) if math.isfinite(number) else (0.0, f"the score is {number}")
