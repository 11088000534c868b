"""Flags: presets, precedence, the batch arithmetic, and mistakes that are told before anything starts."""

import argparse
import json
import shutil

import pytest

from megatron_fipo import compat, validation
from megatron_fipo.arguments import parse_arguments
from megatron_fipo.arithmetic import banner
from megatron_fipo.errors import UserError
from megatron_fipo.rollout.collect import OutOfContrast
from megatron_fipo.session import report
from megatron_fipo.train import main

compat.install()

# What fipo.md's table of presets says.
PUBLISHED = {
    "fipo-32b": {
        "fipo_half_life": 32.0, "fipo_weight_range": [1.0, 1.2], "fipo_safety_threshold": 10.0, "fipo_dual_clip": 10.0,
        "clip_range": [0.2, 0.28], "samples_per_step": 8192, "prompts_per_step": 512, "group_size": 16,
        "prompts_per_update": 64, "updates_per_step": 8, "max_prompt_tokens": 2048, "max_response_tokens": 20480,
        "overlong_buffer": 4096, "overlong_penalty": 1.0, "lr": 1e-6, "lr_warmup_steps": 10, "weight_decay": 0.1,
        "clip_grad": 1.0, "temperature": 1.0, "loss": "fipo",
    },
    "fipo-7b": {
        "fipo_half_life": 32.0, "fipo_weight_range": [0.8, 1.2], "fipo_safety_threshold": 3.0, "fipo_dual_clip": 10.0,
        "samples_per_step": 16384, "group_size": 32, "prompts_per_update": 64, "updates_per_step": 8,
        "max_response_tokens": 10240, "overlong_buffer": 2048, "loss": "fipo",
    },
    "dapo": {
        "fipo_weight_range": [1.0, 1.0], "samples_per_step": 8192, "prompts_per_update": 32, "updates_per_step": 16,
        "max_response_tokens": 20480, "overlong_buffer": 4096, "loss": "dapo",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path_factory):
    """So that no run of the developer's lies in the way."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def dry_run(capsys, *flags: object) -> dict:
    """The JSON object of --dry-run, which must stand alone on stdout."""
    code = main(["--dry-run", *map(str, flags)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def mistake(capsys, *flags: object) -> str:
    """The one line that a mistake prints."""
    code = main([*map(str, flags)])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("megatron_fipo: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_alone_has_the_published_numbers(capsys, preset):
    values = dry_run(capsys, "--preset", preset)
    assert {key: values[key] for key in PUBLISHED[preset]} == PUBLISHED[preset]


def test_no_preset_means_fipo_32b(capsys):
    assert dry_run(capsys) == dry_run(capsys, "--preset", "fipo-32b")


# What the papers of the losses ask for.
LOSSES = {
    "fipo": {"normalization": "token", "clip_range": [0.2, 0.28], "advantage": "group", "fipo_semantics": "official"},
    "dapo": {"normalization": "token", "clip_range": [0.2, 0.28], "fipo_weight_range": [1.0, 1.0]},
    "grpo": {"normalization": "sequence", "clip_range": [0.2, 0.2], "advantage": "group"},
    "gspo": {"normalization": "sequence", "clip_range": [3e-4, 4e-4], "advantage": "group"},
    "cispo": {"normalization": "token", "clip_range": [1.0, 4.0], "advantage": "group"},
    "reinforce++": {"normalization": "token", "clip_range": [0.2, 0.2], "advantage": "batch", "return_gamma": 1.0},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_brings_its_defaults_and_tells_what_it_reads(capsys, loss):
    values = dry_run(capsys, "--loss", loss)
    assert {key: values[key] for key in LOSSES[loss]} == LOSSES[loss]
    assert ("fipo_half_life" in values) == (loss == "fipo") and ("fipo_dual_clip" in values) == (
        loss in ("fipo", "dapo")
    )
    assert not {"kl_weight", "reference_model", "entropy_weight"} & values.keys()
    assert dry_run(capsys, "--loss", loss, "--grpo-clamp-eps-upper", 0.3)["clip_range"][1] == 0.3


def test_penalties_are_told(capsys):
    values = dry_run(capsys, "--loss", "reinforce++", "--grpo-kl-beta", 0.01, "--grpo-entropy-term-weight", 0.002)
    told = {key: values[key] for key in ("kl_weight", "kl_estimator", "kl_in", "entropy_weight")}
    assert told == {"kl_weight": 0.01, "kl_estimator": "k1", "kl_in": "reward", "entropy_weight": 0.002}
    in_loss = dry_run(capsys, "--loss", "grpo", "--grpo-kl-beta", 0.04)
    assert (in_loss["kl_estimator"], in_loss["kl_in"]) == ("k3", "loss")


def test_a_response_may_be_alone_where_nothing_compares_it_with_a_group(capsys):
    alone = ("--grpo-group-size", 1, "--global-batch-size", 64, "--no-rollout-dynamic-sampling")
    assert dry_run(capsys, "--loss", "reinforce++", *alone)["updates_per_step"] == 8


def test_the_banner_says_what_the_loss_is():
    fipo = banner(parse_arguments(["--dry-run"]))["loss"]
    assert fipo.startswith("fipo, ratio in [0.8, 1.28], by token") and "weights in [1, 1.2]" in fipo
    dapo = banner(parse_arguments(["--dry-run", "--loss", "dapo"]))["loss"]
    assert dapo == "dapo, ratio in [0.8, 1.28], by token, advantages by group"
    flags = "--dry-run --loss gspo --grpo-kl-beta 0.1 --grpo-entropy-term-weight 0.01 --reference-model base"
    gspo = banner(parse_arguments(flags.split()))["loss"]
    assert gspo.startswith("gspo, ratio in [0.9997, 1.0004], by sequence")
    assert gspo.endswith("0.1 KL (k3 in the loss) to base, entropy bonus 0.01")


def test_explicit_flags_win_over_the_preset(capsys):
    values = dry_run(capsys, "--preset", "fipo-7b", "--grpo-group-size", 16, "--global-batch-size", 512, "--lr", 2e-6)
    assert (values["group_size"], values["updates_per_step"], values["lr"]) == (16, 16, 2e-6)


def test_a_model_and_its_data_are_checked(capsys, trained_base):
    flags = ("--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl", "--preset", "quickstart")
    assert dry_run(capsys, *flags)["prompts"] == 400


def test_keys_hold_for_evaluation_sets_that_have_them(capsys, trained_base, tmp_path):
    capital = tmp_path / "gsm8k.jsonl"
    capital.write_text(json.dumps({"Problem": "1+1=", "Answer": 2}) + "\n")
    flags = ("--hf-model", trained_base, "--preset", "quickstart", "--prompt-data", capital)
    flags += ("--prompt-key", "Problem", "--answer-key", "Answer")
    sets = (f"a:{capital}:1", f"b:{trained_base / 'heldout.jsonl'}:1")
    assert dry_run(capsys, *flags, "--eval-data", *sets)["eval_prompts"] == 65


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fipo-halflife", "3"], ["--fipo-halflife", "--fipo-half-life"]),
        (["--preset", "fipo-33b"], ["--preset", "fipo-33b", "fipo-32b"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["stray"], ["stray"]),
        (["--grpo-group-size", "1"], ["--grpo-group-size 1", "at least 2"]),
        (["--global-batch-size", "1000"], ["--global-batch-size 1000", "--grpo-group-size 16", "use 992"]),
        (["--global-batch-size", "768"], ["--global-batch-size 768", "512 x 16 = 8192", "use 512"]),
        (["--global-batch-size", "8192"], ["one update per rollout", "at most 4096", "--allow-inactive-fipo"]),
        (["--global-batch-size", "16384"], ["--global-batch-size 16384", "8192"]),
        (["--num-steps", "0"], ["--num-steps 0"]),
        (["--rollout-correction", "tis:2"], ["--rollout-correction", "'tis:2'", "token-tis:C"]),
        (["--global-batch-size", "0"], ["--global-batch-size 0"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size 0"]),
        (["--eval-interval", "0"], ["--eval-interval 0"]),
        (["--keep-last", "0"], ["--keep-last 0"]),
        (["--max-tokens-per-microbatch", "0"], ["--max-tokens-per-microbatch 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--fipo-dual-clip", "1"], ["dual_clip", "1.0"]),
        (["--fipo-half-life", "nan"], ["half_life", "nan"]),
        (["--grpo-clamp-eps-lower", "1"], ["clip_low", "1.0"]),
        (["--rollout-temperature", "nan"], ["--rollout-temperature nan"]),
        (["--exit-duration-in-mins", "3"], ["--exit-duration-in-mins", "--num-steps"]),
        (["--wandb-project", "x"], ["--wandb-project x", "megatron-fipo[wandb]"]),
        (["--wandb-entity", "x"], ["--wandb-entity x", "--wandb-project"]),
        (["--fp16"], ["--fp16", "--bf16"]),
        (["--use-persistent-ckpt-worker"], ["--use-persistent-ckpt-worker"]),
        (["--non-persistent-save-interval", "3"], ["--non-persistent-save-interval", "--keep-last"]),
        (["--fipo-half-life", "-1"], ["half_life", "-1.0"]),
        (["--fipo-weight-low", "1.5"], ["--fipo-weight-low 1.5"]),
        (["--rollout-temperature", "0"], ["--rollout-temperature 0"]),
        (["--reward-overlong-buffer", "30000"], ["--reward-overlong-buffer 30000", "--rollout-max-tokens 20480"]),
        (["--grpo-kl-beta", "-0.1"], ["--grpo-kl-beta -0.1", "from 0 up"]),
        (["--grpo-entropy-term-weight", "nan"], ["--grpo-entropy-term-weight nan", "from 0 up"]),
        (["--kl-in", "reward"], ["--kl-in", "--grpo-kl-beta"]),
        (["--reference-model", "x"], ["--reference-model", "--grpo-kl-beta"]),
        (["--grpo-kl-beta", "0.1", "--kl-estimator", "k1"], ["--kl-estimator k1", "k2 or k3", "--kl-in reward"]),
        (["--loss", "ppo"], ["--loss", "ppo", "reinforce++"]),
        (["--loss", "gspo", "--fipo-half-life", "8"], ["--fipo-half-life", "--loss gspo", "--loss fipo"]),
        (["--preset", "dapo", "--fipo-weight-high=1.2"], ["--fipo-weight-high", "--loss dapo"]),
        (["--advantage", "leave-one-out", "--grpo-group-size", "1"], ["--advantage leave-one-out", "at least 2"]),
        (["--loss", "reinforce++", "--grpo-group-size", "1"], ["--grpo-group-size 1", "--no-rollout-dynamic-sampling"]),
        (["--return-gamma", "0.9"], ["--return-gamma", "--advantage batch"]),
        (["--loss", "reinforce++", "--return-gamma", "0"], ["gamma", "0.0"]),
        (["--loss", "cispo", "--grpo-clamp-eps-lower", "1.5"], ["clip_low", "1.5"]),
        (["--pipeline-model-parallel-size", "2"], ["--pipeline-model-parallel-size 2"]),
        (["--rl-partial-rollouts"], ["--rl-partial-rollouts"]),
        (["--data-path", "x"], ["--data-path", "--prompt-data"]),
        (["--train-iters", "5"], ["--train-iters", "--num-steps"]),
        (["--perform-rl-step"], ["--perform-rl-step"]),
        (["--num-steps", "3"], ["--hf-model is missing"]),
        (["--hf-model", "/nowhere"], ["/nowhere/config.json does not exist"]),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, flags, words):
    message = mistake(capsys, *flags)
    assert all(word in message for word in words), message


def test_inactive_fipo_can_be_asked_for(capsys):
    values = dry_run(capsys, "--global-batch-size", 8192, "--allow-inactive-fipo")
    assert values["updates_per_step"] == 1


def test_mistakes_about_model_and_data(capsys, trained_base, tmp_path):
    model = ("--preset", "quickstart", "--hf-model", trained_base)
    data = (*model, "--prompt-data", trained_base / "train.jsonl")
    assert "--prompt-data is missing" in mistake(capsys, *model)
    assert "4 attention heads" in mistake(capsys, *data, "--tensor-model-parallel-size", 3, "--dry-run")
    assert "NAME:PATH:N" in mistake(capsys, *data, "--eval-data", "nonsense")
    assert "nowhere.jsonl does not exist" in mistake(capsys, *model, "--prompt-data", "nowhere.jsonl")
    assert "--load" in mistake(capsys, *data, "--load", tmp_path / "nothing")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "source": "reasoning_gym/chain_sum"}\n')
    assert "bad.jsonl, row 1" in mistake(capsys, *model, "--prompt-data", bad)
    bad.write_text('{"prompt": "1+1=", "answer": "2", "source": "reasoning_gym/chain_sums"}\n')
    assert "did you mean 'reasoning_gym/chain_sum'" in mistake(capsys, *model, "--prompt-data", bad)


@pytest.fixture
def data(trained_base) -> tuple[object, ...]:
    return "--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl", "--preset", "quickstart"


def test_a_run_is_never_started_over(capsys, data, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    message = mistake(capsys, *data, "--runs-dir", tmp_path, "--run-name", "old")
    assert "already holds a run" in message and "--load" in message
    (tmp_path / "old" / "checkpoints").mkdir()
    (tmp_path / "old" / "checkpoints" / "latest_checkpointed_iteration.txt").touch()
    own = ("--runs-dir", tmp_path, "--run-name", "old", "--load", tmp_path / "old" / "checkpoints")
    assert "already holds a run" in mistake(capsys, *data, *own, "--finetune")
    assert "no whole checkpoint" in mistake(capsys, *data, *own)


def test_folders_are_checked_before_the_start(capsys, data, trained_base, tmp_path):
    assert "no Megatron checkpoint" in mistake(capsys, *data, "--load", tmp_path, "--finetune")
    assert "no whole checkpoint" in mistake(capsys, *data, "--load", tmp_path, "--dry-run")
    assert "--run-name" in mistake(capsys, *data, "--run-name", "a/b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "no Hugging Face folder" in mistake(capsys, *data, "--save-hf", tmp_path / "full")
    assert "is --hf-model" in mistake(capsys, *data, "--save-hf", trained_base)
    (tmp_path / "rollouts" / "step_0000001").mkdir(parents=True)
    assert "already holds rollouts" in mistake(capsys, *data, "--rollout-only", tmp_path / "rollouts")
    twice = f"a:{trained_base / 'heldout.jsonl'}:1"
    assert "'a' twice" in mistake(capsys, *data, "--eval-data", twice, twice)
    assert "NAME:PATH:N" in mistake(capsys, *data, "--eval-data", f"a/b:{trained_base / 'heldout.jsonl'}:1")


def test_half_a_model_is_named(capsys, data, trained_base, tmp_path):
    for name, content, words in (
        ("tokenizer.json", "{", "tokenizer cannot be read"),
        ("config.json", "[]", "config.json holds a list"),
        ("model.safetensors.index.json", "{}", "no safetensors index"),
    ):
        folder = tmp_path / name
        shutil.copytree(trained_base, folder)
        (folder / name).write_text(content)
        assert words in mistake(capsys, *data, "--hf-model", folder, "--dry-run")


def test_a_model_without_end_of_sequence_is_refused(capsys, data, trained_base, tmp_path):
    shutil.copytree(trained_base, tmp_path / "model")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        config = json.loads((trained_base / name).read_text())
        config = {key: value for key, value in config.items() if not key.startswith("eos_token")}
        (tmp_path / "model" / name).write_text(json.dumps(config))
    assert "no end-of-sequence token" in mistake(capsys, *data, "--hf-model", tmp_path / "model", "--dry-run")


def test_a_start_without_launcher_says_how(capsys, trained_base):
    data = ("--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl", "--preset", "quickstart")
    assert "torchrun" in mistake(capsys, *data)


def test_help_shows_our_flags_first(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert 0 < text.index("--fipo-half-life") < text.index("--num-layers")


def test_without_transformer_engine_its_kernels_are_off(trained_base):
    """Its fused RoPE would read angles by the position within a sequence, and ours are laid out like the pack."""
    flags = ("--preset", "quickstart", "--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl")
    args = parse_arguments([*map(str, flags), "--transformer-impl", "local", "--dry-run"])
    assert not args.apply_rope_fusion and not args.moe_grouped_gemm


def test_checksums_need_sglang_on_a_gpu(monkeypatch):
    args = argparse.Namespace(
        rollout_engine="sglang", sglang_url=["http://10.0.0.5:30000"], sglang_servers=None, sglang_flags=[],
        sglang_colocate=False, sglang_port=None, check_weights=True,
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    validation._check_engine(args)  # on a CPU they are Python's own
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="--check-weights: .* SGLang is not installed here; train in a container"):
        validation._check_engine(args)
    args.check_weights = False
    validation._check_engine(args)


def test_who_tells_a_mistake(megatron, monkeypatch, capsys):
    """On a node's second rank: nothing before the start, when the first says the same; later what it found alone."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    report(OutOfContrast("known to all"))
    assert capsys.readouterr().err == ""
    report(UserError("known to one"))
    assert capsys.readouterr().err == "megatron_fipo: known to one\n"
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    report(UserError("known to all"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    report(OutOfContrast("known to all"))
    assert capsys.readouterr().err == "megatron_fipo: known to all\n"
