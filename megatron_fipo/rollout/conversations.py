"""A batch of a user's coroutines, advanced from one request for tokens to the next."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.dialogue import Dialogue, Request
from megatron_fipo.rollout.engine import Completion


class Conversations:
    """Coroutines of one batch on an event loop that runs in a thread of its own.

    User code that blocks blocks that thread, not the trainer, which gives up on it after a while. Methods are called
    from the trainer's thread and return when the loop has nothing left to do; what the loop's thread works on it then
    leaves alone.
    """

    def __init__(
        self,
        function: Callable[[Dialogue], Awaitable[Any]],
        name: str,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        dialogues: Sequence[Dialogue],
    ):
        """``name`` is told in errors; ``seconds`` bound the user's code between two requests."""
        self._function, self._name, self._loop, self._seconds = function, name, loop, seconds
        self._dialogues = dialogues
        for dialogue in dialogues:
            dialogue.ask = self._ask
        self._completions: list[Completion | None] = [None] * len(dialogues)
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._busy = 0  # coroutines that neither wait for tokens nor have finished
        self._idle = asyncio.Event()
        self._failure: UserError | None = None

    @property
    def finished(self) -> int:
        """Coroutines that have."""
        return sum(completion is not None for completion in self._completions)

    @property
    def completions(self) -> list[Completion]:
        """One for each prompt, once all coroutines have finished."""
        return [completion for completion in self._completions if completion is not None]

    def advance(self, answers: Mapping[int, Completion]) -> list[Request]:
        """Run all coroutines until each waits for tokens or has finished; return what they wait for.

        ``answers`` are completions for requests that the call before returned, by their place.

        Raises UserError naming the prompt on which the function failed, or did neither for too long.
        """
        idle = asyncio.run_coroutine_threadsafe(self._until_idle(answers), self._loop)
        try:
            idle.result(self._seconds)
        except TimeoutError:
            raise UserError(self._late()) from None
        if self._failure is not None:
            raise self._failure
        return [request for request, _ in self._waiting]

    def close(self) -> None:
        """Cancel what has not finished."""
        for task in self._tasks:
            self._loop.call_soon_threadsafe(task.cancel)

    async def _until_idle(self, answers: Mapping[int, Completion]) -> None:
        if not self._tasks:
            self._busy = len(self._dialogues)
            self._tasks = [
                asyncio.create_task(self._run(number, dialogue)) for number, dialogue in enumerate(self._dialogues)
            ]
        answered = [(self._waiting[place][1], completion) for place, completion in answers.items()]
        self._waiting = [waiting for place, waiting in enumerate(self._waiting) if place not in answers]
        for answer, completion in answered:
            if not answer.done():  # else the function has given up waiting
                self._busy += 1
                answer.set_result(completion)
        while self._busy and self._failure is None:
            self._idle.clear()
            await self._idle.wait()

    async def _run(self, number: int, dialogue: Dialogue) -> None:
        try:
            result = await self._function(dialogue)
            if result is not None:
                raise TypeError(f"it returned a {type(result).__name__}; the response is what was written, return None")
            self._completions[number] = dialogue.completion()
        except (Exception, asyncio.CancelledError) as error:  # whatever a user's function raises
            frames = traceback.extract_tb(error.__traceback__)
            where = frames[min(1, len(frames) - 1)]  # the function's own line
            problem = f"{type(error).__name__}: {error} at {where.filename}:{where.lineno}"
            self._failure = self._failure or UserError(
                f"--rollout-function {self._name} fails on prompt {dialogue.prompt.id} ({problem}); mend it, or let it "
                f"handle what its tools raise"
            )
            self._idle.set()
        finally:
            self._rest()

    async def _ask(self, request: Request) -> Completion:
        answer = self._loop.create_future()
        self._waiting.append((request, answer))
        self._rest()
        try:
            return await answer
        except asyncio.CancelledError:  # the function waits no longer
            self._busy += 1
            raise

    def _rest(self) -> None:
        self._busy -= 1
        if self._busy == 0:
            self._idle.set()

    def _late(self) -> str:
        running = asyncio.current_task(self._loop)  # it blocks the loop, if there is one
        late = [
            str(dialogue.prompt.id)
            for task, dialogue in zip(self._tasks, self._dialogues, strict=True)
            if task is running or (running is None and not task.done() and not dialogue.generating)
        ]
        return (
            f"--rollout-function {self._name} has neither finished nor asked for tokens within {self._seconds:g} s on "
            f"prompt {', '.join(late[:3])}{' and others' if len(late) > 3 else ''}; give its tools a time limit, and "
            f"let blocking work run in asyncio.to_thread"
        )
