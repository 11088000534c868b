"""The quickstart's base model and problems, made in a tiny configuration."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_fipo.data.prompts import read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.rewards.response import Response
from megatron_fipo.rewards.verify import score

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import make_base_model  # noqa: E402
from answer_styles import answer_styles  # noqa: E402

TINY = make_base_model.Settings(iterations=3, batch_size=8, hidden_size=16, heldout=64, train=200, warmup=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_base_model.write_folder(folder, TINY)
    return folder


def rows(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def test_a_seed_decides_every_byte(base, tmp_path):
    make_base_model.write_folder(tmp_path / "model", TINY)
    assert contents(tmp_path / "model") == contents(base)
    make_base_model.write_folder(tmp_path / "other", dataclasses.replace(TINY, seed=2))
    for name in ("model.safetensors", "train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "other" / name).read_bytes() != (base / name).read_bytes()


def test_no_prompt_is_in_two_parts_or_twice():
    problems = make_base_model.make_problems(TINY)
    prompts = [row["prompt"] for part in problems.values() for row in part]
    assert [len(part) for part in problems.values()] == [TINY.heldout, TINY.train, TINY.warmup]
    assert len(set(prompts)) == len(prompts)


def test_parts_and_seeds_use_disjoint_ranges_of_seed_plus_index():
    """Problem i of a data set depends on seed + i alone, so ranges that overlap repeat problems."""
    generators = []
    for seed in range(3):
        problems = make_base_model.make_problems(dataclasses.replace(TINY, seed=seed))
        for number, part in enumerate(problems.values()):
            first = (seed * 3 + number) * make_base_model.PART_RANGE
            assert 0 <= part[-1]["metadata"]["source_index"] < make_base_model.PART_RANGE
            generators += [first + row["metadata"]["source_index"] for row in part]
    assert len(set(generators)) == len(generators)


def test_rows_are_verifiable_prompts(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for part in ("train", "heldout"):
        for prompt in read_prompts([str(base / f"{part}.jsonl")], lambda text: tokenizer(text)["input_ids"]):
            assert (
                score(Response("", f"<answer>{prompt.answer}</answer>", prompt.answer, prompt.source, prompt.metadata))
                == 1.0
            )
            expression = prompt.metadata["expression"].replace(" ", "")
            assert tokenizer.decode(prompt.tokens) == expression + "="
            assert eval(expression) == int(prompt.answer)


def test_solutions_are_right_unless_a_step_is_wrong():
    row = {"prompt": "7+1-3-9=", "answer": "-4"}
    clean = dataclasses.replace(TINY, step_error=0.0, direct=0.0)
    assert make_base_model.noisy_solution(row, clean, random.Random(0)) == "7+1=8;8-3=5;5-9=-4<answer>-4</answer><eos>"
    wrong = dataclasses.replace(clean, step_error=1.0)
    steps = make_base_model.noisy_solution(row, wrong, random.Random(0)).split("<answer>")[0].split(";")
    assert all(1 <= abs(eval(left) - int(right)) <= 2 for left, right in (step.split("=") for step in steps))
    bare = dataclasses.replace(clean, direct=1.0)
    assert make_base_model.noisy_solution(row, bare, random.Random(0)) == "<answer>-4</answer><eos>"


def test_only_the_solution_is_learned():
    tokenizer = make_base_model.make_tokenizer()
    problems = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "1+2+3+4=", "answer": "10"}]
    settings = dataclasses.replace(TINY, step_error=0.0, direct=0.0)
    ids, labels = make_base_model.encode_solutions(problems, tokenizer, settings)
    assert tokenizer.decode(ids[0]).startswith("1+2=1+2=3<answer>3</answer><eos><pad>")
    for row, solution in ((0, "1+2=3<answer>3</answer><eos>"), (1, "1+2=3;3+3=6;6+4=10<answer>10</answer><eos>")):
        learned = labels[row] != -100
        assert tokenizer.decode(labels[row][learned]) == solution
        assert torch.equal(labels[row][:-1][learned[:-1]], ids[row][1:][learned[:-1]])


def test_the_folder_is_an_ordinary_hugging_face_model(base):
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= {path.name for path in base.iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == len(make_base_model.VOCABULARY)
    assert GenerationConfig.from_pretrained(base).eos_token_id == tokenizer.eos_token_id
    text = "7+1=8;8-3=5;5-9=-4<answer>-4</answer>"
    ids = tokenizer(text + "<eos>")["input_ids"]
    assert len(ids) == len("7+1=8;8-3=5;5-9=-4") + len("-4") + 3
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == text + "<eos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_character_outside_the_vocabulary_is_an_error(base):
    with pytest.raises(Exception, match=r"(?i)unk"):
        AutoTokenizer.from_pretrained(base)("what is 7+1?")


def test_styles_count_worked_and_bare_answers(base):
    """A model that always ends at once gives bare, wrong answers of one token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    prompts = read_prompts([str(base / "heldout.jsonl")], lambda text: tokenizer(text)["input_ids"])
    always_eos = torch.nn.Linear(TINY.hidden_size, len(tokenizer))
    torch.nn.init.zeros_(always_eos.weight)
    always_eos.bias.data = 100.0 * torch.nn.functional.one_hot(torch.tensor(1), len(tokenizer)).float()
    model.lm_head = always_eos
    styles = answer_styles(model, tokenizer, prompts, sampled=True)
    assert styles == {"accuracy": 0, "worked": 0, "accuracy_worked": 0, "accuracy_bare": 0, "tokens": 1}


def test_a_second_call_keeps_the_folder_and_other_settings_replace_it(base):
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    assert make_base_model.is_current(base, TINY)
    assert not make_base_model.is_current(base, dataclasses.replace(TINY, seed=2))
    assert before == {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    assert [path.name for path in base.parent.iterdir()] == [base.name], "a temporary folder was left behind"


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this tool"):
        make_base_model.is_current(tmp_path, TINY)


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    command = [sys.executable, TOOLS / "make_base_model.py", "--out", tmp_path / "x", "--seed", "-5"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: --seed -5") and run.stderr.count("\n") == 1
