"""A signal while completions are generated stops the generation, and the engine can be used again."""

import os
import signal

import pytest
import torch

from megatron_fipo import compat
from megatron_fipo.data.prompts import Prompt
from megatron_fipo.parallel.interruption import SIGNALS, Interrupted, Interruption
from megatron_fipo.rollout.engine import SamplingParams

compat.install()

from megatron_fipo.rollout.embedded import POLL_TOKENS, EmbeddedEngine  # noqa: E402
from megatron_fipo.rollout.interruptible import InterruptibleResponder  # noqa: E402
from megatron_fipo.rollout.responder import SingleTurn  # noqa: E402


@pytest.fixture
def interruption():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Interruption(torch.device("cpu"))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_the_generation(build_model, hf_model, interruption, number):
    engine = EmbeddedEngine(build_model(hf_model("qwen3", tied=False)[0]), 93, max_batch=4, pad_id=0)
    interruptible = InterruptibleResponder(SingleTurn(engine), interruption)
    prompt = Prompt(0, (5, 6, 7), "", "")
    request = ([prompt] * 4, [1, 2, 3, 4], SamplingParams(max_tokens=3 * POLL_TOKENS, stop_token_ids=(2,)))
    expected = interruptible.respond(*request)
    assert expected == engine.generate([prompt.tokens] * 4, *request[1:])
    finished = 0

    def kill_once_one_is_finished(count: int) -> None:
        nonlocal finished
        if not finished:
            os.kill(os.getpid(), number)
        finished += count

    with pytest.raises(Interrupted):
        interruptible.respond(*request, kill_once_one_is_finished)
    assert 0 < finished < 4, "the generation went on to its end"
    assert engine.generate([prompt.tokens] * 4, *request[1:]) == expected
    with pytest.raises(Interrupted):  # the request to stop stays
        interruption.check()
