"""Users' rollout functions with the real engine: turns, tools, masks with holes, budgets, and everything that fails."""

import asyncio
import re
import sys
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import trainer_log_probs
from transformers import AutoTokenizer

from megatron_fipo.data.packing import pack
from megatron_fipo.data.prompts import PromptStream, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout import dialogue as dialogue_module
from megatron_fipo.rollout.collect import CollectSettings, collect
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.functions import FunctionResponder, RolloutFunction
from megatron_fipo.rollout.responder import SingleTurn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "calculator"))
import calculator

LIMIT = 40


class Setup:
    """A model that works out sums, with its engine and prompts."""

    def __init__(self, folder, chunks):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = read_prompts([str(folder / "train.jsonl")], self.tokenizer.encode)
        self.chunks, self.vocab = chunks, len(self.tokenizer)
        self.engine = EmbeddedEngine(chunks, self.vocab, 64, pad_id=0)
        self.sampling = SamplingParams(LIMIT, 1.0, 1.0, (self.tokenizer.eos_token_id,))

    def responder(self, function, engine=None, seconds=20.0):
        loaded = RolloutFunction(f"tests:{function.__name__}", function)
        return FunctionResponder(loaded, engine or self.engine, Replicas.current(), self.tokenizer, self.vocab, seconds)

    def respond(self, function, count=12, *, engine=None, seconds=20.0, given_up=lambda: False, **sampling):
        reported = []
        completions = self.responder(function, engine, seconds).respond(
            self.prompts[:count], range(count), replace(self.sampling, **sampling), reported.append, given_up
        )
        assert sum(reported) == len(completions) or given_up()
        return completions

    def text(self, completion):
        return self.tokenizer.decode(completion.tokens)


@pytest.fixture(scope="module")
def setup(worked_base, build_model):
    return Setup(worked_base, build_model(worked_base))


async def once(dialogue):
    await dialogue.generate()


def test_generating_once_is_as_if_there_were_no_function(setup):
    found = setup.respond(once)
    expected = SingleTurn(setup.engine).respond(setup.prompts[:12], range(12), setup.sampling)
    assert len({len(c.tokens) for c in expected}) > 1
    assert [replace(c, generated=None) for c in found] == expected
    assert all(all(c.generated) for c in found)


def test_the_calculator_fills_in_results_and_only_these_are_holes(setup):
    calls = 0
    for completion in setup.respond(calculator.worked_sums, 40):
        assert [p == 0.0 for p in completion.logp] == [not generated for generated in completion.generated]
        assert all(p <= 0 for p in completion.logp)
        runs = groupby(zip(completion.tokens, completion.generated, strict=True), key=lambda pair: pair[1])
        result = None
        for generated, run in runs:
            text = setup.tokenizer.decode([token for token, _ in run])
            if generated:
                assert result is None
                result = calculator.calculate(re.split("[;=]", text[:-1])[-1]) if text.endswith("=") else None
            else:
                assert text == result or (len(completion.tokens) == LIMIT and result.startswith(text))
                calls, result = calls + 1, None
        assert result is None or len(completion.tokens) == LIMIT
    assert calls > 20, "the model hardly used the tool: the test shows nothing"


def test_log_probs_of_what_the_model_wrote_are_the_trainers(setup):
    for prompt, completion in zip(setup.prompts, setup.respond(calculator.worked_sums), strict=False):
        wanted = trainer_log_probs(setup.chunks, prompt.tokens, completion, 1.0, setup.vocab)
        generated = torch.tensor(completion.generated)
        torch.testing.assert_close(torch.tensor(completion.logp)[generated], wanted[generated], atol=1e-4, rtol=0)


def test_pieces_do_not_show(setup, monkeypatch):
    """A turn that may end at a string is asked for in pieces; their borders change nothing."""
    whole = setup.respond(calculator.worked_sums)
    monkeypatch.setattr(dialogue_module, "PIECE_TOKENS", 3)
    assert [c.tokens for c in setup.respond(calculator.worked_sums)] == [c.tokens for c in whole]


def test_a_turn_ends_with_the_token_that_completes_a_string(setup, monkeypatch):
    strings, turns = ("-", "1="), {}

    async def watched(dialogue):
        turns[dialogue.prompt.id] = await dialogue.generate(stop=strings)

    monkeypatch.setattr(dialogue_module, "PIECE_TOKENS", 2)  # the border of a piece cuts through "1="
    for number, completion in enumerate(setup.respond(watched, 40)):
        turn = turns[number]
        assert turn.tokens == completion.tokens and turn.text == setup.text(completion)
        assert not any(string in turn.text[:-1] for string in strings)
        assert turn.text.endswith(strings) == (turn.finish_reason == "string")
    assert {turn.finish_reason for turn in turns.values()} >= {"stop", "string"}
    assert {turn.text[-1] for turn in turns.values()} >= {"-", "="}


def test_the_limit_holds_for_model_and_tools_together(setup):
    async def chatty(dialogue):
        turn = await dialogue.generate(max_tokens=4)
        while turn.finish_reason == "length" and turn.tokens:
            dialogue.insert("1+2" * 5)
            assert dialogue.room == LIMIT - len(setup.tokenizer.encode(dialogue.text))
            turn = await dialogue.generate(max_tokens=3)
        assert turn.tokens or (turn.finish_reason == "length" and dialogue.room == 0)

    lengths = set()
    for completion in setup.respond(chatty, 40):
        stopped = completion.tokens[-1] == setup.tokenizer.eos_token_id
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert len(completion.tokens) == LIMIT or (stopped and len(completion.tokens) < LIMIT)
        lengths.add(completion.finish_reason)
    assert lengths == {"stop", "length"}


def test_a_function_may_end_a_response_without_a_stop_token(setup):
    async def brief(dialogue):
        await dialogue.generate(max_tokens=2)

    assert {(len(c.tokens), c.finish_reason) for c in setup.respond(brief)} == {(2, "stop")}


class Watched:
    """The real engine, and a record of what it was asked."""

    def __init__(self, engine):
        self._engine, self.in_step, self.asked = engine, engine.in_step, []

    def generate(self, prompts, seeds, sampling, on_finished, given_up, starts):
        places = list(zip(seeds, starts, strict=True))
        self.asked.append(([len(p) for p in prompts], places, sampling.max_tokens))
        return self._engine.generate(prompts, seeds, sampling, on_finished, given_up, starts)


async def uneven(dialogue):
    """Conversations that want very different numbers of tokens."""
    dialogue.insert("1" * (dialogue.prompt.id % 4 * 12))
    await dialogue.generate(max_tokens=1 + dialogue.prompt.id % 3 * 7)
    await dialogue.generate(stop=["never"])


def test_no_request_goes_beyond_its_context_and_each_is_batched_with_many(setup):
    engine = Watched(setup.engine)
    completions = setup.respond(uneven, 40, engine=engine)
    longest = max(len(p.tokens) for p in setup.prompts[:40])
    assert all(max(lengths, default=0) + limit <= longest + LIMIT for lengths, _, limit in engine.asked)
    assert sum(len(lengths) for lengths, _, _ in engine.asked) > 80 and len(engine.asked) < 25
    places = [place for _, asked, _ in engine.asked for place in asked]
    assert len(set(places)) == len(places), "two requests draw the same random numbers"
    assert len(completions) == 40


@pytest.mark.parametrize("function", [calculator.worked_sums, uneven])
def test_a_response_does_not_depend_on_what_shares_its_batch(setup, function):
    """Those that do not want equally many tokens get them in pieces, which must not show."""
    many = setup.respond(function, 40)
    for count in (1, 2, 5):
        few = setup.respond(function, count)
        assert [c.tokens for c in few] == [c.tokens for c in many[:count]]


@pytest.fixture(scope="module")
def rollout(setup):
    """A step's samples, written with the calculator."""
    answers = Answers(setup.tokenizer, setup.sampling.stop_token_ids, RewardPool())
    settings = CollectSettings(
        prompts_per_step=6, group_size=6, sampling=setup.sampling, seed=1, dynamic_sampling=True, max_batches=20,
        overlong_buffer=0, overlong_penalty=1.0,
    )  # fmt: skip
    return collect(
        setup.responder(calculator.worked_sums), PromptStream(setup.prompts, seed=1), answers.verify, settings,
        Replicas.current(), version=3, contrast_rate=1.0, on_finished=lambda n: None,
    )  # fmt: skip


def test_samples_have_holes(rollout):
    holes = 0
    for number, sample in rollout.held.items():
        response = np.arange(len(sample.tokens)) > np.flatnonzero(sample.response_mask)[0]
        holes += (response & ~sample.response_mask).sum()
        assert rollout.response_tokens_S[number] == sample.response_mask.sum()
        assert rollout.packed_length_S[number] == len(sample.tokens) - 1
        assert (sample.rollout_logp[~sample.response_mask] == 0).all()
        assert sample.weight_versions[0][2] == len(sample.tokens) - np.flatnonzero(sample.response_mask)[0]
    assert holes > 50


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("semantics", ["official", "paper"])
def test_the_loss_does_not_see_what_a_tool_wrote(rollout, backend, semantics):
    """Other log-probs in the holes change neither the loss nor a gradient, and get none."""
    numbers = list(range(len(rollout.held)))
    batch = pack([rollout.held[i] for i in numbers], numbers, rollout.reward_S)
    random = torch.Generator().manual_seed(0)
    old_T = batch.rollout_logp_T.clone()
    logp_T = old_T + 0.3 * torch.randn(old_T.shape, generator=random)
    holes_T = ~batch.response_mask_T
    outcomes = []
    for shift in (0.0, 5.0):
        noise_T = shift * torch.randn(old_T.shape, generator=random) * holes_T
        leaf = (logp_T + noise_T).requires_grad_()
        out = fipo_loss(
            leaf, old_T - 0.5 * noise_T, batch.advantage_S, batch.response_mask_T, batch.cu_seqlens_S1,
            FipoConfig(semantics=semantics), group_ids_S=batch.group_ids_S, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        outcomes.append((out.loss.item(), leaf.grad, out.weights_T[batch.response_mask_T]))
    (loss, grad_T, weights), (other_loss, other_grad_T, other_weights) = outcomes
    assert loss == other_loss and torch.equal(grad_T, other_grad_T) and torch.equal(weights, other_weights)
    assert grad_T.any() and not grad_T[holes_T].any() and (weights != 1).any()


def test_tools_are_given_up_with_the_rollout(setup):
    ended = []

    async def endless(dialogue):
        try:
            while True:
                await dialogue.generate(max_tokens=1)
                dialogue.insert([5])
        finally:
            ended.append(dialogue.prompt.id)

    asked = 0

    def given_up():
        nonlocal asked
        asked += 1
        return asked > 3

    assert setup.respond(endless, 4, given_up=given_up) == []
    for _ in range(500):  # cancelled in the loop's own thread
        if len(ended) == 4:
            break
        time.sleep(0.01)
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_function_may_stop_waiting_for_tokens(setup):
    async def impatient(dialogue):
        await dialogue.generate(max_tokens=1)
        try:
            async with asyncio.timeout(0):
                await dialogue.generate()
        except TimeoutError:
            dialogue.insert("1")
        await dialogue.generate(max_tokens=1)

    for completion in setup.respond(impatient, 6):
        assert completion.generated == (True, False, True)


async def raises(dialogue):
    await dialogue.generate(max_tokens=1)
    if dialogue.prompt.id == 3:
        raise KeyError("tool")


async def sleeps(dialogue):
    await dialogue.generate(max_tokens=1)
    if dialogue.prompt.id == 2:
        await asyncio.sleep(60)


async def blocks(dialogue):
    await dialogue.generate(max_tokens=1)
    if dialogue.prompt.id == 1:
        time.sleep(3)


async def foreign_ids(dialogue):
    dialogue.insert([3, 99_999])


async def writes_nothing(dialogue):
    dialogue.insert("1+1")


async def returns_something(dialogue):
    await dialogue.generate()
    return dialogue.text


async def twice_at_once(dialogue):
    await asyncio.gather(dialogue.generate(), dialogue.generate())


async def goes_on(dialogue):
    while True:
        await dialogue.generate()
        dialogue.insert([5] * LIMIT)


async def inserts_meanwhile(dialogue):
    writing = asyncio.ensure_future(dialogue.generate())
    await asyncio.sleep(0)
    dialogue.insert([5])
    await writing


async def asks_for_nothing(dialogue):
    await dialogue.generate(max_tokens=0)


async def stops_at_nothing(dialogue):
    await dialogue.generate(stop="")


async def cancels_itself(dialogue):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"tests:raises fails on prompt 3 \(KeyError: 'tool' at .*test_rollout_functions.py:\d+\); mend it"),
        (sleeps, r"tests:sleeps has neither finished nor asked for tokens within 1 s on prompt 2; give its tools"),
        (blocks, r"tests:blocks has neither .* on prompt 1; give .* asyncio.to_thread"),
        (foreign_ids, r"on prompt 0 .*token id 99999 is outside the vocabulary of 18 at"),
        (writes_nothing, r"on prompt 0 .*before the model had written a token"),
        (returns_something, r"fails on prompt \d \(TypeError: it returned a str"),
        (twice_at_once, r"on prompt 0 .*while another call for the same response waits"),
        (goes_on, r"the response is full: return once a turn's finish_reason is 'length'"),
        (inserts_meanwhile, r"on prompt 0 .*insert\(\) was called while generate\(\) waits"),
        (asks_for_nothing, r"generate\(max_tokens=0\): ask for at least 1"),
        (stops_at_nothing, r"generate\(stop=''\): an empty string"),
        (cancels_itself, r"on prompt 0 \(CancelledError"),
    ],
)
def test_mistakes_are_named(setup, function, message):
    with pytest.raises(UserError, match=message):
        setup.respond(function, 5, seconds=1.0 if function in (sleeps, blocks) else 20.0)
    if function is blocks:
        time.sleep(3)  # the thread is busy until then
    assert len(setup.respond(once, 2)) == 2, "the loop is broken for the next batch"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "'nowhere' is not package.module:name"),
        ("no_such_module:f", "importing no_such_module fails .ModuleNotFoundError"),
        ("calculator:nothing", "calculator has no function 'nothing'"),
        ("calculator:calculate", r"must be 'async def calculate\(dialogue\)'"),
    ],
)
def test_what_is_no_rollout_function_is_refused(name, message):
    with pytest.raises(UserError, match=f"--rollout-function {name}.*{message}|--rollout-function {message}"):
        RolloutFunction.load(name)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"), ("7+1-3", "5"), ("-(2+3)*4", "-20"), ("1/3", "0.3333333333"), ("6/3", "2"), ("0.1+0.2", "0.3"),
        (" 5 ", "5"), ("9" * 40 + "*10", "9" * 40 + "0"), ("1/0", None), ("", None), ("7+", None), ("2**99999", None),
        ("__import__('os').getpid()", None), ("a", None), ("True+1", None), ("1j", None), ("'a'*9", None),
        ("(" * 101 + "1", None), ("1,2", None), ("1e999", None), ("x:=1", None), ("1\0", None), ("0x10", "16"),
        ("[1]", None),
    ],
)  # fmt: skip
def test_the_calculator_computes_and_does_nothing_else(expression, value):
    assert calculator.calculate(expression) == value
