"""Mistakes that people make with flags, files, layouts and models: --dry-run names each, with the fix, in one line."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_fipo import compat
from megatron_fipo.train import main

compat.install()

ROW = {"prompt": "1+1=", "answer": "2", "source": "reasoning_gym/chain_sum"}
CHAT = {"prompt": [{"role": "user", "content": "1+1="}], "answer": "2", "source": "gsm8k"}

FLAGS = [
    ("--global_batch_size 128", "did you mean --global-batch-size"),
    ("--prompt_data x.jsonl", "did you mean --prompt-data"),
    ("--rollout-max-token 12", "did you mean --rollout-max-tokens"),
    ("--learning-rate 1e-6", "unknown flag --learning-rate"),
    ("--lr 1e-6x", "argument --lr"),
    ("--num-steps 10.5", "argument --num-steps: invalid int value: '10.5'"),
    ("--num-steps -3", "--num-steps -3 must be at least 1"),
    ("--preset FIPO-32B", "invalid choice: 'FIPO-32B'"),
    ("--loss ppo", "invalid choice: 'ppo'"),
    ("--loss-normalization tokens", "invalid choice: 'tokens'"),
    ("--fipo-semantics code", "invalid choice: 'code'"),
    ("--fipo-half-life 0", "half_life"),
    ("--fipo-weight-high 0.9", "--fipo-weight-high 0.9 must enclose 1"),
    ("--fipo-dual-clip 0.5", "dual_clip"),
    ("--grpo-clamp-eps-lower 1.5", "clip_low"),
    ("--grpo-group-size 1", "use at least 2"),
    ("--global-batch-size 100", "--global-batch-size 100 is no multiple of --grpo-group-size 8"),
    ("--global-batch-size 512", "lower --global-batch-size to at most 256"),
    ("--rollout-temperature 0", "greedy rollouts have no contrast"),
    ("--cp-comm-type a2a", "--cp-comm-type a2a is TransformerEngine's choice"),
    ("--eval-top-p 0", "--eval-top-p 0.0 must be in (0, 1]"),
    ("--eval-top-p 95", "--eval-top-p 95.0 must be in (0, 1]"),
    ("--rollout-max-tokens 0", "--rollout-max-tokens 0 must be at least 1"),
    ("--max-prompt-tokens 1", "drops every prompt (the shortest has"),
    ("--reward-overlong-buffer 99999", "must be less than --rollout-max-tokens"),
    ("--reward-timeout 0", "--reward-timeout 0.0 must be positive"),
    ("--reward-function my_rewards.score", "is not package.module:name"),
    ("--reward-function no_such_module:score", "importing no_such_module fails"),
    ("--reward-function json:score", "json has no function 'score'"),
    ("--reward-function a:f=half", "is not package.module:name[=WEIGHT]"),
    ("--reward-default-rule math-verify", "invalid choice: 'math-verify'"),
    ("--eval-data heldout.jsonl", "is not NAME:PATH:N"),
    ("--eval-data h:heldout.jsonl", "is not NAME:PATH:N"),
    ("--eval-data h:heldout.jsonl:0", "is not NAME:PATH:N"),
    ("--eval-data h:nowhere.jsonl:4", "nowhere.jsonl does not exist"),
    ("--eval-data h:good.jsonl:1 h:good.jsonl:2", "names 'h' twice"),
    ("--prompt-weights 0.5 0.5", "has 2 values for 1 --prompt-data paths"),
    ("--prompt-weights -1", "must be 0 or more"),
    ("--prompt-key questoin", "--prompt-key 'questoin' is in no row"),
    ("--answer-key gold", "--answer-key 'gold' is in no row"),
    ("--apply-chat-template", "no chat template"),
    ("--problem-template daop", "'daop' is none of none, dapo, boxed"),
    ("--fp16", "use --bf16"),
    ("--train-iters 100", "use --num-steps"),
    ("--micro-batch-size 4", "use --max-tokens-per-microbatch"),
    ("--seq-length 4096", "--max-prompt-tokens and --rollout-max-tokens"),
    ("--save out", "use --runs-dir and --run-name"),
    ("--data-path corpus", "give prompts with --prompt-data"),
    ("--wandb-project x", "pip install 'megatron-fipo[wandb]'"),
    ("--tensor-model-parallel-size 3", "attention heads"),
    ("--load nowhere", "nowhere holds no whole checkpoint"),
    ("--load . --finetune", "no Megatron checkpoint"),
    ("--save-hf model", "is --hf-model, which a resumed run reads again"),
    ("--run-name a/b", "--run-name"),
    ("--train-from-rollouts nowhere", "holds no rollouts"),
    ("--train-from-rollouts folder", "holds no rollouts"),
    ("--rollout-only good.jsonl", "--rollout-only good.jsonl is no folder"),
    ("--runs-dir good.jsonl", "--runs-dir good.jsonl is no folder"),
    ("--finetune", "name it with --load"),
    ("--num-layers 99", "the model of --hf-model has 1"),
    ("--lr=-1e-6", "--lr -1e-06 must be a finite number from 0 up"),
    ("--lr-warmup-iters -1", "--lr-warmup-iters -1 must be"),
    ("--weight-decay -0.1", "--weight-decay -0.1 must be"),
    ("--clip-grad -1", "--clip-grad -1.0 must be"),
    ("--save-interval 0", "--save-interval 0 must be at least 1"),
    ("--reward-overlong-penalty -1", "--reward-overlong-penalty -1.0 must be"),
    ("--rollout-engine vllm", "invalid choice: 'vllm'"),
    ("--rollout-function my_tools", "'my_tools' is not package.module:name"),
    ("--rollout-function my_tools:search", "importing my_tools fails (ModuleNotFoundError"),
    ("--rollout-function json:loads", "must be 'async def loads(dialogue)'"),
    ("--grpo-kl-beta 0.1 --kl-estimator k1", "--kl-in reward"),
    ("--grpo-kl-beta 0.1 --reference-model other_architecture", "'gemma2', which is not supported"),
    ("--loss dapo --fipo-half-life 16", "--fipo-half-life says nothing about --loss dapo"),
    ("--seed -1", "--seed -1 must not be negative"),
]  # fmt: skip
FILES = [
    ("nowhere.jsonl", "nowhere.jsonl does not exist"),
    ("table.csv", "of no known format; give .jsonl"),
    ("list.json", "list.json, row 1: a JSON list"),
    ("broken.jsonl", "broken.jsonl, row 2: not JSON"),
    ("empty.jsonl", "no prompt in"),
    ("no_answer.jsonl", "no_answer.jsonl, row 1: no 'reward_model.ground_truth', 'answer'"),
    ("no_prompt.jsonl", "no_prompt.jsonl, row 1: no 'prompt', 'problem'"),
    ("empty_prompt.jsonl", "empty_prompt.jsonl, row 1: the prompt is empty"),
    ("unknown_task.jsonl", "did you mean 'reasoning_gym/chain_sum'"),
    ("unknown_source.jsonl", "--reward-default-rule"),
    ("chat.jsonl", "--no-apply-chat-template"),
    ("words.jsonl", "cannot encode the prompt 'How many"),
    ("bad_chat.jsonl", "bad_chat.jsonl, row 1: the chat message"),
    ("half.jsonl.gz", "half.jsonl.gz cannot be read"),
    ("half.parquet", "half.parquet cannot be read"),
    ("folder", "folder holds no .jsonl"),
    ("someone/dataset", "check the name and the connection"),
]  # fmt: skip
MODELS = [
    ("nowhere", "nowhere/config.json does not exist"),
    ("model/config.json", "config.json"),
    ("other_architecture", "model_type 'gemma2', which is not supported"),
    ("half_config", "config.json"),
    ("no_tokenizer", "download the model's tokenizer files"),
    ("no_eos", "no end-of-sequence token"),
]


@pytest.fixture(scope="module")
def place(trained_base, tmp_path_factory):
    """A folder with a good model, good data, and everything that is wrong above."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(trained_base, place / "model")

    def write(name: str, *rows) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (place / name).write_text("".join(line + "\n" for line in lines))

    write("good.jsonl", ROW, ROW | {"prompt": "2+2=", "answer": "4"})
    write("mathematics.jsonl", ROW | {"source": "gsm8k"})
    write("table.csv", "prompt,answer", "1+1=,2")
    write("list.json", json.dumps([ROW]))
    write("broken.jsonl", ROW, '{"prompt": "1+1=", "answer')
    write("empty.jsonl")
    write("no_answer.jsonl", {"prompt": "1+1=", "response": "2"})
    write("no_prompt.jsonl", {"text": "1+1=", "answer": "2"})
    write("empty_prompt.jsonl", ROW | {"prompt": ""})
    write("unknown_task.jsonl", ROW | {"source": "reasoning_gym/chain_sums"})
    write("unknown_source.jsonl", ROW | {"source": "deepscaler"})
    write("chat.jsonl", CHAT)
    write("words.jsonl", ROW | {"prompt": "How many are 1 and 1?"})
    write("bad_chat.jsonl", CHAT | {"prompt": [{"from": "human", "value": "1+1="}]})
    whole = gzip.compress("".join(json.dumps(ROW | {"prompt": f"{i}+1="}) + "\n" for i in range(5000)).encode())
    (place / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    pa.parquet.write_table(pa.Table.from_pylist([ROW] * 100), place / "whole.parquet")
    (place / "half.parquet").write_bytes((place / "whole.parquet").read_bytes()[:-100])
    (place / "folder").mkdir()

    for name in ("other_architecture", "half_config", "no_tokenizer", "no_eos"):
        shutil.copytree(trained_base, place / name)
    config = json.loads((trained_base / "config.json").read_text())
    gemma = config | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    (place / "other_architecture" / "config.json").write_text(json.dumps(gemma))
    (place / "half_config" / "config.json").write_text(json.dumps(config)[:100])
    for file in (place / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        values = json.loads((trained_base / name).read_text())
        values = {key: value for key, value in values.items() if not key.startswith("eos_token")}
        (place / "no_eos" / name).write_text(json.dumps(values))
    return place


def told(capsys, monkeypatch, place, *flags: str) -> str:
    """The one line that --dry-run says about these flags, later ones winning."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = ("--preset", "quickstart", "--hf-model", "model", "--prompt-data", "good.jsonl", "--dry-run")
    code = main([*good, *flags])
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (out, err)
    assert err.startswith("megatron_fipo: ") and err.count("\n") == 1, err
    return err


def test_there_are_more_than_sixty_and_the_right_command_is_none_of_them(capsys, monkeypatch, place):
    assert len(FLAGS) + len(FILES) + len(MODELS) >= 60
    monkeypatch.chdir(place)
    assert main(["--preset", "quickstart", "--hf-model", "model", "--prompt-data", "good.jsonl", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 2


def test_a_process_says_nothing_else(place):
    """No library's warning stands beside the one line, nor beside the JSON of a right command."""
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "megatron_fipo.train",
        "--preset",
        "quickstart",
        "--hf-model",
        "model",
        "--dry-run",
    ]
    wrong, right = (
        subprocess.Popen(
            [*command, "--prompt-data", file],
            cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for file in ("empty.jsonl", "mathematics.jsonl")
    )  # fmt: skip
    out, err = wrong.communicate(timeout=120)
    assert (wrong.returncode, out) == (2, "")
    assert err.startswith("megatron_fipo: no prompt in empty.jsonl") and err.count("\n") == 1
    out, err = right.communicate(timeout=120)
    assert (right.returncode, err) == (0, "") and json.loads(out)["prompts"] == 1


@pytest.mark.parametrize(("flags", "words"), FLAGS)
def test_flags(capsys, monkeypatch, place, flags, words):
    assert words in told(capsys, monkeypatch, place, *flags.split())


@pytest.mark.parametrize(("path", "words"), FILES)
def test_prompt_data(capsys, monkeypatch, place, path, words):
    assert words in told(capsys, monkeypatch, place, "--prompt-data", path)


@pytest.mark.parametrize(("folder", "words"), MODELS)
def test_models(capsys, monkeypatch, place, folder, words):
    assert words in told(capsys, monkeypatch, place, "--hf-model", folder)
