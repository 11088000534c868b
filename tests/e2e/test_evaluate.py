"""Evaluation of what a training with users' reward functions left: alone, on two replicas, of checkpoint and model;
and with a tool."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.evaluate import main

SIZE = ("--preset", "quickstart", "--rollout-max-tokens", "12")
EXAMPLE = Path(__file__).parents[2] / "examples" / "calculator"
REWARDS = '''
def even(response):
    """Half a point for a response of an even number of characters."""
    assert response.source.startswith("reasoning_gym/") and response.prompt.endswith("=")
    return len(response.text) % 2 == 0


async def shortest(responses):
    return [float(len(r.text) == min(len(s.text) for s in responses)) for r in responses]
'''


def run(cwd: Path, ranks: int, module: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """A module alone (0 ranks) or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks else []
    command = [sys.executable, *launcher, "-m", module, *SIZE, *flags]
    path = os.pathsep.join([str(cwd), str(EXAMPLE), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


def evaluation(cwd: Path, ranks: int, out: str, *flags: object) -> tuple[dict, str]:
    done = run(cwd, ranks, "megatron_fipo.evaluate", "--out", out, "--json", f"{out}.json", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((cwd / out / "metrics.json").read_text())
    assert json.loads((cwd / f"{out}.json").read_text()) == result
    return result, done.stdout


TOOLS = """
import os


async def fails(dialogue):
    assert os.environ["RANK"] == "0", "the tool server is gone"
    await dialogue.generate()
"""


@pytest.fixture(scope="module")
def trained(trained_base, tmp_path_factory) -> Path:
    """A folder with runs/run/checkpoints and hf, the same weights, trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my_rewards.py").write_text(REWARDS)
    done = run(
        folder, 1, "megatron_fipo.train", "--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl",
        "--reward-function", "source=2", "my_rewards:even=0.5", "my_rewards:shortest=0.25", "--num-steps", 2,
        "--grpo-prompts-per-step", 8, "--global-batch-size", 32, "--run-name", "run", "--save-interval", 2,
        "--save-hf", "hf", "--lr", "1e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_reward_is_the_weighted_sum(trained):
    rows = [json.loads(line) for line in (trained / "runs/run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        beside = row["reward/mean"] - 2 * (2 * row["reward/accuracy"] - 1)
        assert 0 < beside < 0.75, "half a point for some, a quarter for some"
        assert row["reward/errors"] == 0


def test_an_evaluation_is_the_same_alone_and_shared_from_checkpoint_and_model(trained, trained_base):
    data = ("--eval-data", f"heldout:{trained_base / 'heldout.jsonl'}:3")
    alone, printed = evaluation(trained, 0, "alone", "--hf-model", "hf", *data)
    shared, _ = evaluation(trained, 2, "shared", "--hf-model", trained_base, "--load", "runs/run/checkpoints", *data)
    assert alone["sets"] == shared["sets"]
    responses = [(trained / out / "heldout.jsonl").read_text() for out in ("alone", "shared")]
    assert responses[0] == responses[1]
    rows = [json.loads(line) for line in responses[0].splitlines()]
    assert [(row["number"], row["sample"]) for row in rows] == [(i, k) for i in range(64) for k in range(3)]
    metrics = alone["sets"]["heldout"]
    assert metrics["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / 192)
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    assert metrics["pass@1"] == pytest.approx(metrics["accuracy"]) and metrics["pass@1"] <= metrics["pass@3"]
    assert printed.startswith("heldout: avg@3 ") and "64 problems" in printed and printed.count("\n") == 1


def test_a_model_with_a_tool_is_evaluated_with_it(worked_base, tmp_path):
    """The calculator of examples/: every sum that a response writes down is right, wherever the response was made."""
    flags = ("--hf-model", worked_base, "--eval-data", f"heldout:{worked_base / 'heldout.jsonl'}:3")
    flags += ("--rollout-function", "calculator:worked_sums", "--rollout-max-tokens", 40)
    alone, _ = evaluation(tmp_path, 0, "alone", *flags)
    shared, _ = evaluation(tmp_path, 2, "shared", *flags)
    assert alone["sets"] == shared["sets"]
    responses = [(tmp_path / out / "heldout.jsonl").read_text() for out in ("alone", "shared")]
    assert responses[0] == responses[1]
    written = [json.loads(line)["response"] for line in responses[0].splitlines()]
    sums = [sum_ for text in written for sum_ in re.findall(r"(?:^|;)(-?\d+)([+-]\d+)=(-?\d+);", text)]
    assert len(sums) > 50, "the model hardly used the tool: the test shows nothing"
    # The model may go on with digits where the calculator's result ends.
    assert all(result.startswith(str(int(a) + int(b))) for a, b, result in sums)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--hf-model", "hf"), "--out is missing"),
        (("--hf-model", "hf", "--out", "new"), "--eval-data is missing"),
        (("--hf-model", "hf", "--out", "full", "--eval-data", "a:b.jsonl:1"), "already holds an evaluation"),
        (("--hf-model", "hf", "--out", "new", "--eval-data", "a:b.jsonl:1"), "b.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line(trained_base, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.json").touch()
    (tmp_path / "hf").symlink_to(trained_base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")  # else it sets that and more, for the tests that follow, too
    assert main([*SIZE, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megatron_fipo: ") and words in err and err.count("\n") == 1


def test_a_mistake_of_one_rank_alone_is_told(trained, trained_base):
    (trained / "my_tools.py").write_text(TOOLS)
    done = run(
        trained, 2, "megatron_fipo.evaluate", "--hf-model", "hf", "--out", "never", "--rollout-function",
        "my_tools:fails", "--eval-data", f"heldout:{trained_base / 'heldout.jsonl'}:1",
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if line.startswith("megatron_fipo: ")]
    assert done.returncode != 0 and len(told) == 1 and "the tool server is gone" in told[0], done.stderr[-4000:]
