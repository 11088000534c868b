"""FP8's flags: what presets mean, how far packs are filled up, and what is refused with the fix."""

import json

import pytest
from tiny_models import write_hf_model

from megatron_fipo import compat
from megatron_fipo.train import main

compat.install()

TP, SP, CP = "--tensor-model-parallel-size", "--sequence-parallel", "--context-parallel-size"
HOPPER, BLACKWELL = "--bf16 --fp8-preset hopper", "--bf16 --fp8-preset blackwell"
TENSORWISE = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise"


def dry_run(capsys, flags: str) -> dict:
    code = main(["--dry-run", *flags.split()])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def mistake(capsys, flags: str) -> str:
    assert main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "alignment"),
    [
        (HOPPER, 16),
        (BLACKWELL, 32),
        (TENSORWISE, 16),
        (f"{HOPPER} {TP} 4", 16),  # every rank has all tokens
        (f"{HOPPER} {CP} 2", 2 * 16),
        (f"{HOPPER} {TP} 4 {SP}", 4 * 128),  # whole blocks are gathered in FP8
        (f"{HOPPER} {TP} 4 {SP} {CP} 2", 4 * 2 * 128),
        (f"{HOPPER} {TP} 8 {SP} {CP} 4", 8 * 4 * 16),  # whole blocks would cost too much of a pack
        (f"{BLACKWELL} {TP} 8 {SP} {CP} 4", 8 * 4 * 32),
        (f"{TENSORWISE} {TP} 2 {SP}", 2 * 16),
    ],
)
def test_packs_are_filled_up_for_every_layout(capsys, flags, alignment):
    values = dry_run(capsys, f"--preset fipo-32b --max-tokens-per-microbatch 32768 {flags}")
    assert values["fp8"]["pack_alignment"] == alignment


def test_presets_and_what_follows_from_them(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dry_run(capsys, "--preset fipo-32b")["fp8"] is None
    expected = {"format": "e4m3", "recipe": "blockwise", "backward": "native", "power_of_two_scales": True}
    hopper = dry_run(capsys, f"--preset fipo-32b {HOPPER}")["fp8"]
    assert hopper == expected | {"bf16_layers": [], "pack_alignment": 16}
    assert dry_run(capsys, f"--preset fipo-32b {BLACKWELL}")["fp8"]["recipe"] == "mxfp8"
    assert dry_run(capsys, f"--preset fipo-32b {HOPPER} --fp8-recipe tensorwise")["fp8"]["recipe"] == "tensorwise"
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    assert dry_run(capsys, f"--preset fipo-32b {HOPPER}")["fp8"]["power_of_two_scales"] is False
    assert dry_run(capsys, f"--preset fipo-32b {BLACKWELL}")["fp8"]["power_of_two_scales"] is True
    write_hf_model(tmp_path / "model", "qwen3", tied=False, num_hidden_layers=5)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6", "answer": "w7", "source": "math_dapo"}\n')
    flags = f"--hf-model {tmp_path}/model --prompt-data {tmp_path}/prompts.jsonl --preset quickstart {HOPPER}"
    flags += " --grpo-prompts-per-step 1 --global-batch-size 8 --allow-inactive-fipo"
    values = dry_run(capsys, f"{flags} --first-last-layers-bf16 --num-layers-at-end-in-bf16 2")
    assert values["fp8"]["bf16_layers"] == [0, 3, 4]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bf16 --fp8-format e4m3", "--fp8-recipe delayed no ratio --fp8-preset"),
        ("--fp8-preset hopper", "add --bf16"),
        ("--bf16 --fp8-recipe blockwise", "--fp8-recipe nothing --fp8-preset"),
        ("--bf16 --first-last-layers-bf16", "--first-last-layers-bf16 nothing"),
        (f"{HOPPER} --fp8-param-gather", "--fp8-param-gather weights leave"),
        (f"{HOPPER} --fp8-amax-history-len 16", "--fp8-amax-history-len delayed --fp8-preset"),
        (f"{HOPPER} --no-fp8-wgrad", "--no-fp8-wgrad --fp8-backward"),
        (f"{BLACKWELL} --fp8-output-proj", "--fp8-output-proj BF16 leave"),
        (f"{HOPPER} --fp8-recipe custom", "--fp8-quantizer-factory"),
        (f"{HOPPER} --fp8-backward backwards", "--fp8-backward native high-precision dequantized"),
        (f"{HOPPER} --transformer-impl transformer_engine", "TransformerEngine NGC"),
        (f"--dry-run {HOPPER} {TP} 8 {SP} {CP} 4 --max-tokens-per-microbatch 256", "256 512 raise"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, flags, words):
    message = mistake(capsys, f"--preset fipo-32b {flags}")
    assert all(word in message for word in words.split()), message


def test_a_variable_that_changes_the_backward_pass_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("NVTE_BACKWARD_OVERRIDE", "dequantized")
    assert "use --fp8-backward" in mistake(capsys, f"--preset fipo-32b {HOPPER}")


@pytest.mark.parametrize(
    ("flags", "model", "words"),
    [
        (f"{HOPPER} {TP} 4 {SP}", {}, "16 mlp.linear_fc2 24 4 --tensor-model-parallel-size 2"),
        (BLACKWELL, {"intermediate_size": 80}, "32 mlp.linear_fc2 80 1 without FP8"),
        (HOPPER, {"head_dim": 12, "num_key_value_heads": 1}, "self_attention.linear_qkv 72"),
        (HOPPER, {"hidden_size": 72}, "hidden 72"),
        (f"{HOPPER} {TP} 2 {SP}", {"family": "qwen3_moe", "moe_intermediate_size": 16}, "mlp.experts.linear_fc2 8"),
    ],
)
def test_widths_that_fp8_kernels_refuse_are_named(capsys, tmp_path, flags, model, words):
    write_hf_model(tmp_path / "model", model.pop("family", "qwen3"), tied=False, **model)
    capsys.readouterr()
    message = mistake(capsys, f"--dry-run --hf-model {tmp_path}/model --preset quickstart {flags}")
    assert all(word in message for word in words.split()), message
