"""The verifiers' process against functions that hang, crash, flood, fork and patch: each costs its own score alone."""

import csv
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.rewards import confine
from megatron_fipo.rewards.functions import Term, parse_terms
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rewards.response import Response, Verdict

TIMEOUT = 2.0
FAILS = {
    "loop": "no verdict in time",
    "sympy": "no verdict in time",
    "gil": "no verdict in time",
    "fork": "PermissionError",
    "threads": "",  # out of memory for stacks, or of time
    "allocate": "MemoryError",
    "exit": "exit code 0",
    "raise exit": "SystemExit",
    "segfault": "SIGSEGV",
    "abort": "SIG",
    "kill": "PermissionError",
    "socket": "PermissionError",
    "file": "OSError",
    "nesting": "without a verdict",
    "huge": "without a verdict",
    "flood": "without a verdict",
    "nan": "the score is nan",
    "text": "ValueError",
}


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("pool"))
    os.environ["HOSTILE_SECRET"] = "1"
    yield
    del os.environ["HOSTILE_SECRET"]
    os.chdir(before)


@pytest.fixture(scope="module")
def pool():
    with RewardPool([Term("hostile_rewards:act")], workers=2, timeout=TIMEOUT) as pool:
        yield pool


def response(text: str, answer: str = "7", source: str = "math500") -> Response:
    return Response("", text, answer, source)


def children(pool: RewardPool) -> list[psutil.Process]:
    return psutil.Process(pool._process.pid).children(recursive=True)


def test_the_kernel_here_filters_system_calls():
    assert confine.available(), "what follows would show less than the documentation promises"


def test_every_hostile_call_scores_0_and_changes_no_other(pool, capfd):
    texts = [text for act in FAILS for text in ("7", act, "8")]
    began = time.monotonic()
    verdicts = pool.score([response(text) for text in texts], range(len(texts)))
    waited = time.monotonic() - began
    for act, before, verdict, after in zip(FAILS, verdicts[::3], verdicts[1::3], verdicts[2::3], strict=True):
        assert (before, after) == (Verdict(1.0, True), Verdict(0.0, False)), act
        assert (verdict.reward, verdict.correct) == (0.0, False), act
        assert FAILS[act] in verdict.error, (act, verdict.error)
    assert waited < len(FAILS) * TIMEOUT, "every call would have had time to run out"
    assert not children(pool), "what was killed is gone"
    assert pool.score([response("7")] * 40, range(40)) == [Verdict(1.0, True)] * 40
    assert capfd.readouterr() == ("", "")


def test_output_goes_nowhere_and_costs_nothing(pool, capfd):
    assert pool.score([response("print"), response("7")], [0, 1]) == [Verdict(1.0, True)] * 2
    assert capfd.readouterr() == ("", "")


def test_what_a_call_patches_or_writes_dies_with_it():
    texts = ["7", "8"] * 20 + ["patch", "descriptors"] + [r"\boxed{7}", r"\boxed{8}"] * 20
    terms = [Term("source", 2.0), Term("hostile_rewards:act", 0.5)]
    with RewardPool(terms, workers=2, timeout=TIMEOUT) as pool:
        for _ in range(2):
            verdicts = pool.score([response(text) for text in texts], range(len(texts)))
            assert [v.reward for v in verdicts[:40]] == [-1.5, -2.0] * 20
            assert [v.reward for v in verdicts[42:]] == [2.0, -2.0] * 20
            assert [v.correct for v in verdicts[42:]] == [True, False] * 20


def test_the_environment_is_the_functions_only_with_the_network(pool):
    assert pool.score([response("environment")], [0]) == [Verdict(0.0, False)]
    with RewardPool([Term("hostile_rewards:act")], workers=1, timeout=TIMEOUT, network=True) as open_pool:
        environment, socket, fork = open_pool.score([response(t) for t in ("environment", "socket", "fork")], [0, 1, 2])
    assert environment == Verdict(1.0, True)
    assert "ConnectionRefusedError" in socket.error and "PermissionError" in fork.error


@pytest.mark.parametrize(
    "bomb",
    [
        "9^{9^{9^{9^{9}}}}",
        r"\frac{1}{10^{10^{10}}}",
        r"\binom{10^9}{5\cdot 10^8}",
        "(" * 400 + "1" + ")" * 400,
        "10^9!!!!",
    ],
)
def test_a_sympy_bomb_in_an_answer_costs_the_other_answers_nothing(bomb):
    half = response(r"\boxed{0.5}", r"\frac12")
    batch = [half] * 5 + [response(rf"\boxed{{{bomb}}}", "x")] + [half] * 5
    with RewardPool(workers=1, timeout=TIMEOUT) as pool:
        verdicts = pool.score(batch, range(11))
    assert verdicts[:5] == verdicts[6:] == [Verdict(1.0, True)] * 5
    assert not verdicts[5].correct


def test_async_calls_wait_together_and_time_out_alone():
    texts = ["7"] * 20 + ["sleep", "8", "text"]
    with RewardPool([Term("hostile_rewards:act_async")], workers=1, timeout=TIMEOUT, network=True) as pool:
        began = time.monotonic()
        verdicts = pool.score([response(text) for text in texts], [0] * len(texts))
        waited = time.monotonic() - began
    assert verdicts[:20] == [Verdict(1.0, True)] * 20 and verdicts[21] == Verdict(0.0, False)
    assert "TimeoutError" in verdicts[20].error and "ValueError" in verdicts[22].error
    assert waited < 20 * 0.2, "one after the other takes longer"


@pytest.mark.parametrize("name", ["longest", "longest_async"])
def test_a_batch_function_sees_the_responses_to_one_prompt(name):
    texts = ["a", "aaa", "aa", "b", "bb", "short", "c"]
    with RewardPool([Term(f"hostile_rewards:{name}", 2.0)], workers=2, timeout=TIMEOUT) as pool:
        verdicts = pool.score([response(text) for text in texts], [4, 4, 4, 9, 9, 2, 2])
    assert [v.reward for v in verdicts] == [0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0]
    assert [v.error is not None for v in verdicts] == [False] * 5 + [True] * 2
    assert "1 scores for 2 responses" in verdicts[5].error


def test_no_answers_are_no_verdicts(pool):
    assert pool.score([], []) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("no_such_module:f", "importing no_such_module fails (ModuleNotFoundError"),
        ("hostile_rewards:nothing", "hostile_rewards has no function 'nothing'"),
        ("hostile_rewards:two_arguments", "takes 2 arguments"),
    ],
)
def test_a_function_that_cannot_be_called_is_a_user_error(name, hint):
    with pytest.raises(UserError) as raised:
        RewardPool([Term(name)])
    assert f"--reward-function {name}" in str(raised.value) and hint in str(raised.value)


def test_weights_are_parsed():
    assert parse_terms([]) == (Term("source", 1.0),)
    assert parse_terms(["source", "a.b:f=0.5", "c:g=-2"]) == (Term("source"), Term("a.b:f", 0.5), Term("c:g", -2.0))


@pytest.mark.parametrize("spec", ["f", "a:b:c", "a:f=", "a:f=x", "a:f=nan", "a.py:f!", ":f", "sources"])
def test_a_malformed_reward_function_is_named(spec):
    with pytest.raises(UserError, match="--reward-function"):
        parse_terms([spec])
    with pytest.raises(UserError, match="twice"):
        parse_terms(["a:f=1", "a:f=2"])


def test_the_signals_that_stop_a_job_stop_the_trainer_first(pool):
    for asked in (signal.SIGINT, signal.SIGTERM):
        os.kill(pool._process.pid, asked)
    assert pool.score([response("7")], [0]) == [Verdict(1.0, True)]


def test_a_dead_verifiers_process_is_reported():
    with RewardPool(workers=1) as pool:
        pool._process.kill()
        with pytest.raises(RuntimeError, match="verifiers' process ended .exit code -9. while .* for 1 verdicts"):
            pool.score([response("7")], [0])


@pytest.mark.long
def test_a_hundred_hostile_among_two_thousand(pool):
    acts = [a for a in FAILS if a not in ("sympy", "threads")]
    texts = ["7" if i % 20 else acts[i // 20 % len(acts)] for i in range(2000)]
    clean = pool.score([response("7") for text in texts if text == "7"], range(1900))
    verdicts = pool.score([response(text) for text in texts], range(2000))
    assert [v for v, text in zip(verdicts, texts, strict=True) if text == "7"] == clean
    assert sum(v.error is not None for v in verdicts) == 100
    began = time.monotonic()
    pool.score([response("7")] * 2, [0, 1])
    assert time.monotonic() - began < 2.0, "capacity is back"


@pytest.mark.long
@pytest.mark.parametrize("act", ["loop", "gil", "sympy", "threads"])
def test_a_verdict_comes_within_a_second_of_its_timeout(pool, act):
    began = time.monotonic()
    assert pool.score([response(act)], [0])[0].error
    assert time.monotonic() - began < TIMEOUT + 1.0


def test_two_cores_judge_five_hundred_ordinary_answers_a_second():
    """In CPU time of the verifiers' process and its workers, so that a busy machine makes no difference."""
    with open(Path(__file__).with_name("answer_pairs.tsv"), newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        pairs = [p for p in table if p["from"] in ("aime24", "amc23", "gsm8k")]
    responses = [response(rf"So it is \boxed{{{p['answer']}}}.", p["reference"]) for p in pairs] * 7
    with RewardPool(workers=2, sources=["math500"]) as pool:
        pool.score(responses[:100], range(100))
        began = sum(psutil.Process(pool._process.pid).cpu_times()[:4])
        verdicts = pool.score(responses, range(len(responses)))
        seconds = sum(psutil.Process(pool._process.pid).cpu_times()[:4]) - began
    assert [v.correct for v in verdicts] == [p["math_verify"] == "1" for p in pairs] * 7
    assert 2 * len(responses) / seconds >= 500
