"""Terminal output: plain where it is not a terminal, live bars where it is."""

import io
import re

import pytest
from observe_runs import evaluation_metrics, step_metrics

from megatron_fipo.observe.console import Console

SUMMARY = {
    "accuracy_before": 0.234375,
    "accuracy_after": 0.5576171875,
    "greedy_before": 0.15,
    "greedy_after": 0.74,
    "active_fraction_mean": 0.39,
    "train_seconds": 132.4,
    "steps": 2,
    "alarms": [{"step": 2, "kind": "drift", "text": "engine and trainer disagree"}],
}
SAMPLES = [
    {"when": "before", "prompt": "7+1-3-2=", "response": "#4[red]\x1b[31m\n", "answer": "3", "correct": False},
    {"when": "after", "prompt": "7+1-3-2=", "response": "7+1=8;8-3=5;5-2=3#3", "answer": "3", "correct": True},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def whole_run(console: Console) -> None:
    console.banner({"samples_per_step": 8192, "rollout engine": "embedded"})
    console.evaluation("held-out", evaluation_metrics(0.234375, 0.15, 14.2))
    for step in (1, 2):
        with console.progress("rollout", 320) as progress:
            progress.advance(160)
            progress.advance(160)
        console.step(step_metrics(step))
    console.finish(SUMMARY, [("policy KL", "0.0028", "median over steps")], SAMPLES, "runs/quickstart/report.html")


@pytest.fixture
def plain(monkeypatch) -> str:
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by many CI systems; a file must stay free of colours
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    whole_run(Console(20, stream=stream))
    return stream.getvalue()


def test_a_file_gets_plain_text(plain):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", plain)


def test_one_line_per_step_under_one_header(plain):
    lines = plain.splitlines()
    assert sum("entropy" in line for line in lines) == 1
    (header,) = (line for line in lines if "entropy" in line)
    steps = [line for line in lines if re.match(r"\s*\d+/20 ", line)]
    assert [line.split()[0] for line in steps] == ["1/20", "2/20"]
    assert all(len(line) == len(header) <= 80 for line in steps)
    metrics = step_metrics(1)
    values = [float(text.replace(",", "")) for text in steps[0].split()[1:]]
    assert values == pytest.approx(
        [
            metrics["reward/mean"],
            100 * metrics["reward/accuracy"],
            metrics["response/length_mean"],
            metrics["actor/entropy"],
            metrics["actor/ppo_kl"],
            100 * metrics["fipo/active_fraction"],
            metrics["perf/response_tokens_per_second"],
            metrics["time/step"],
        ],
        rel=0.02,
    )


def test_result(plain):
    assert "23.4 % -> 55.8 %  (+32.3 points)" in plain
    assert "sampled 23.4 % (95 % CI 20.9-26.1), greedy 15.0 %, length 14.2, 1,024 problems" in plain
    assert r"#4[red]\x1b[31m\n  [wrong, answer 3]" in plain  # neither markup nor control codes of an answer act
    assert "7+1=8;8-3=5;5-2=3#3  [right]" in plain
    assert plain.rstrip().endswith("runs/quickstart/report.html")
    assert "samples_per_step  8,192" in plain
    assert re.search(r"^policy KL +0\.0028 +median over steps$", plain, flags=re.M)
    assert "\nalarm at step 2: engine and trainer disagree\n" in plain


def test_missing_and_infinite_values_are_shown_as_such():
    stream = io.StringIO()
    Console(3, stream=stream).step({"step": 1, "actor/entropy": float("nan")})
    assert stream.getvalue().splitlines()[1].split() == ["1/3", "-", "-", "-", "nan", "-", "-", "-", "-"]


def test_a_terminal_gets_a_live_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    whole_run(Console(20, stream=stream))
    assert "320/320" in stream.getvalue() and "\x1b[" in stream.getvalue()


def test_other_ranks_are_silent():
    stream = Terminal()
    whole_run(Console(20, enabled=False, stream=stream))
    assert stream.getvalue() == ""
