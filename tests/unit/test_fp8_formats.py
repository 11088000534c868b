"""Formats of served models, which weights they quantise, what servers cannot take, who computes in what numbers."""

import argparse
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from megatron_fipo.errors import UserError
from megatron_fipo.model.fp8_training import fp8_settings
from megatron_fipo.quantization.block_fp8 import dequantize
from megatron_fipo.quantization.formats import WeightFormat
from megatron_fipo.quantization.layers import linear_weights
from megatron_fipo.quantization.precision import PrecisionReport, trainer_format
from megatron_fipo.rollout.sglang.parameters import Checksums, name_mismatch, server_parameter
from megatron_fipo.rollout.sglang.served import ServedModel, check_rollout_weights, server_fields

ARCHITECTURE = {
    "num_layers": 3,
    "hidden_size": 512,
    "ffn_hidden_size": 768,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 128,
}
EXPERTS = ARCHITECTURE | {"num_experts": 4, "moe_ffn_hidden_size": 256, "moe_layer_freq": [0, 1, 1]}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MX = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
HOPPER, BLACKWELL = (9, 0), (10, 0)
FLASH_RL = "--quantization fp8 --load-format flash_rl"


def served(scheme="block", architecture=ARCHITECTURE, model_type="qwen3", **settings) -> ServedModel:
    return ServedModel("the folder", model_type, architecture, WeightFormat(scheme, **settings))


def flags(text: str) -> dict:
    return server_fields(text.split())


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, WeightFormat()),
        (BLOCK, WeightFormat("block")),
        (BLOCK | {"scale_fmt": "ue8m0"}, WeightFormat("block", power_of_two=True)),
        (BLOCK | {"modules_to_not_convert": ["x.y"]}, WeightFormat("block", not_converted=("x.y",))),
        ({"quant_method": "mxfp8"}, WeightFormat("mxfp8")),
        (MX | {"ignored_layers": ["a"]}, WeightFormat("mxfp8", not_converted=("a",))),
    ],
)  # fmt: skip
def test_formats_are_read_from_config(declared, expected):
    config = {"quantization_config": declared} if declared else {}
    assert WeightFormat.of_config(config, "here") == expected


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "transposes .* so that they cannot be updated"),
        ({"quant_method": "fp8"}, "one scale per tensor"),
        (BLOCK | {"weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        (BLOCK | {"activation_scheme": "static"}, "fixed activation scales"),
        ({"quant_method": "awq"}, "'awq', which the trainer cannot make"),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 16]}, "blocks of"),
        ("fp8?", "quantised by 'fp8[?]'"),
    ],
)  # fmt: skip
def test_formats_that_cannot_be_sent(declared, reason):
    with pytest.raises(UserError, match=f"here .*{reason}.*make_fp8_checkpoint"):
        WeightFormat.of_config({"quantization_config": declared}, "here")


@pytest.mark.parametrize(
    "weight_format",
    [WeightFormat("block", True, ("lm_head",)), WeightFormat("block", False, ("a.b",)), WeightFormat("mxfp8")],
)
def test_what_is_written_is_read(weight_format):
    assert WeightFormat.of_config({"quantization_config": weight_format.config_entry()}, "here") == weight_format


def test_only_linear_layers_are_quantised():
    names = [*linear_weights(EXPERTS)]
    assert all(map(WeightFormat("block").quantizes, names)) and not any(map(WeightFormat().quantizes, names))
    others = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"]
    others += ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"]
    assert not any(map(WeightFormat("block").quantizes, others))


@pytest.mark.parametrize(
    ("module", "skipped"),
    [
        ("model.layers.1", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.0.up_proj"]),
        ("layers.1.", ["model.layers.1.self_attn.q_proj"]),
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.gate", []),  # the router, not the beginning of gate_proj
        ("gate", []),
        (
            "model.layers.1.mlp.experts.3.up_proj",
            ["model.layers.1.mlp.experts.0.down_proj"],
        ),  # all experts of the layer
        ("model.layers.10", []),
    ],
)
def test_modules_are_skipped_as_the_engine_does(module, skipped):
    weight_format = WeightFormat("block", not_converted=(module,))
    for name in skipped:
        assert not weight_format.quantizes(f"{name}.weight")
    if not skipped:
        assert all(map(weight_format.quantizes, linear_weights(EXPERTS)))
    assert weight_format.quantizes("model.layers.2.self_attn.k_proj.weight")


@pytest.mark.parametrize(
    "weight_format", [WeightFormat(), WeightFormat("block"), WeightFormat("mxfp8"), WeightFormat("channel")]
)
def test_the_layout_is_that_of_the_tensors(weight_format):
    shapes = linear_weights(EXPERTS) | {"model.norm.weight": (512,), "lm_head.weight": (93, 512)}
    stream = [(name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()]
    layout = [
        entry for name, tensor in stream for entry in weight_format.layout(name, tuple(tensor.shape), tensor.dtype)
    ]
    assert [(name, tuple(t.shape), t.dtype) for name, t in weight_format.convert(iter(stream))] == layout


# --- what servers can take -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "server", "capability", "fault"),
    [
        (served(), "", HOPPER, None),
        (served(), "--tp 2 --fp8-gemm-backend deep_gemm", HOPPER, None),
        (served(), "", BLACKWELL, "--fp8-gemm-backend auto repacks the scales .* give --fp8-gemm-backend"),
        (served(), "--fp8-gemm-backend deep_gemm", BLACKWELL, "--fp8-gemm-backend deep_gemm repacks"),
        (served(), "--fp8-gemm-backend triton", BLACKWELL, None),
        (served(), "--fp8-gemm-backend triton --moe-runner-backend deep_gemm", BLACKWELL, "DeepGEMM repacks"),
        (served(), "--fp8-gemm-backend triton --moe-a2a-backend deepep", BLACKWELL, "DeepGEMM repacks"),
        (served(), "--tp 3", None, r"0.self_attn.q_proj.weight is \[512, 512\], .* holds 170.667 x"),
        (served(), "--tensor-parallel-size 4", None, r"gate_proj.weight is \[768, 512\].* holds 192 x 512"),
        (served(not_converted=("mlp",)), "--tp-size 4", None, None),  # key heads are repeated, not cut
        (served(not_converted=("mlp",)), "--tp-size 8", None, "layers.0.self_attn.q_proj.weight"),
        (served(architecture=EXPERTS), "--tp 2", None, None),
        (served(architecture=EXPERTS, not_converted=("layers.0.mlp",)), "--tp 4", None, "1.mlp.experts.0.gate_proj"),
        (served(architecture=EXPERTS, not_converted=("layers.0.mlp",)), "--tp 4 --ep-size 2", None, None),
        (served(not_converted=("mlp",)), "--tp 8 --dp 4 --enable-dp-attention", None, None),
        (served("mxfp8"), "--tp 4", BLACKWELL, None),
        (served("mxfp8"), "", HOPPER, "MXFP8 needs Blackwell"),
        (served("mxfp8"), "--tp 32", None, r"down_proj.weight is \[512, 768\]|o_proj"),
        (served("mxfp8", architecture=EXPERTS), "", None, "--moe-runner-backend auto gives the scales"),
        (served("mxfp8", architecture=EXPERTS), "--moe-runner-backend cutlass", None, None),
        (served("none"), "--quantization modelopt_fp8", None, "modelopt_fp8 makes .* what cannot be updated"),
        (served("none"), "--quantization fp8", None, "add --load-format flash_rl"),
        (served("none"), FLASH_RL, None, "it was started with --load-format flash_rl"),
        (served("channel"), "--quantization fp8", None, "it was not started with --load-format flash_rl"),
        (served("channel"), FLASH_RL, None, None),
        (served("channel"), "--load-format flash_rl", None, "flash_rl is for --quantization fp8"),
        (served("channel", model_type="qwen3_moe"), FLASH_RL, None, "of qwen3_moe"),
    ],
)  # fmt: skip
def test_faults(model, server, capability, fault):
    found = model.fault(flags(server), capability)
    assert found is None if fault is None else found and re.search(fault, found), found


def test_a_server_with_another_model_is_found_out(tmp_path):
    config = {"model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": BLOCK}))
    server = flags("") | {"model_path": str(tmp_path)}
    assert served().fault(server, None) is None
    assert "it serves" in served("none").fault(server, None)
    assert "it serves" in served(power_of_two=True).fault(server, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "'awq', which the trainer cannot make" in served().fault(server, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "it serves" in served().fault(server, None)
    assert served("none").fault(server, None) is None
    assert served().fault(server | {"model_path": "/of/another/machine"}, None) is None


# --- trainer and engine ----------------------------------------------------------------------------------------------


def trainer(**arguments) -> WeightFormat:
    defaults = {"fp8": "e4m3", "fp8_recipe": "blockwise", "first_last_layers_bf16": False, "num_layers": 3}
    defaults |= {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1, "fp8_backward": "native"}
    fp8 = fp8_settings(argparse.Namespace(**defaults | arguments))
    return trainer_format(fp8.recipe, fp8.power_of_two_scales, fp8.bf16_layers) if fp8 else WeightFormat()


def difference(ours: WeightFormat, theirs: WeightFormat) -> str | None:
    return PrecisionReport(ours, theirs, ARCHITECTURE).difference


def test_trainer_and_engine_compute_in_the_same_numbers(monkeypatch):
    pow2 = WeightFormat("block", power_of_two=True)
    assert difference(trainer(), pow2) is None and difference(trainer(fp8=None), WeightFormat()) is None
    assert difference(trainer(fp8_recipe="mxfp8"), WeightFormat("mxfp8")) is None
    without_ends = replace(pow2, not_converted=("lm_head", "model.layers.0", "model.layers.2"))
    assert difference(trainer(first_last_layers_bf16=True), without_ends) is None
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    assert difference(trainer(), WeightFormat("block")) is None
    assert "fp32 scales here, FP8 in blocks with power-of-two scales there" in difference(trainer(), pow2)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (trainer(fp8=None), WeightFormat("block"), "q_proj.weight: not quantised here, FP8 in .* fp32 scales there"),
        (trainer(), WeightFormat(), "21 of 21 .*power-of-two scales here, not quantised there"),
        (trainer(), WeightFormat("block"), "21 of 21 .*power-of-two scales here, .* fp32 scales there"),
        (trainer(fp8_recipe="tensorwise"), WeightFormat("block", True), "21 of 21 .*a scale per tensor here"),
        (trainer(fp8_recipe="mxfp8"), WeightFormat("channel"), "21 of 21 .*MXFP8 here, .* a scale per channel there"),
        (
            trainer(first_last_layers_bf16=True, num_layers_at_end_in_bf16=0),
            WeightFormat("block", True, ("model.layers.2",)),
            "14 of 21 .*layers.0.self_attn.q_proj.weight: not quantised here, .*layers.2.self_attn.q_proj.weight: FP8",
        ),
    ],
)  # fmt: skip
def test_differences_are_named(ours, theirs, message):
    assert re.search(message, difference(ours, theirs))


@pytest.mark.parametrize(
    ("change", "ranks", "kinds"),
    [
        ({}, 1, []),
        ({}, 2, []),
        ({}, 4, ["gate, up, down"]),
        ({}, 8, ["o", "gate, up, down"]),
        ({"kv_channels": 64}, 1, ["q, k, v"]),
        ({"num_experts": 4, "moe_ffn_hidden_size": 192}, 1, ["experts"]),
    ],
)
def test_blocks_that_the_trainer_cuts_elsewhere(change, ranks, kinds):
    block = WeightFormat("block")
    assert PrecisionReport(block, block, ARCHITECTURE | change, ranks).blocks_cut_elsewhere == kinds
    assert PrecisionReport(WeightFormat("mxfp8"), block, ARCHITECTURE | change, ranks).blocks_cut_elsewhere == []


# --- at the start of a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a bf16 model, the same in block FP8)."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import make_fp8_checkpoint
    from test_fp8_checkpoint import FAMILIES
    from tiny_models import write_hf_model

    folder = tmp_path_factory.mktemp("models")
    write_hf_model(folder / "bf16", "qwen3", tied=False, dtype=torch.bfloat16, **FAMILIES["qwen3"])
    assert make_fp8_checkpoint.main(["--hf", str(folder / "bf16"), "--out", str(folder / "fp8")]) == 0
    return folder / "bf16", folder / "fp8"


def parse(hf, *words):
    from megatron_fipo.arguments import parse_arguments

    (hf / "prompts.jsonl").write_text('{"prompt": "w5", "answer": "1"}\n')
    base = ["--preset", "quickstart", "--dry-run", "--rollout-engine", "sglang", "--hf-model", str(hf)]
    return parse_arguments([*base, "--prompt-data", str(hf / "prompts.jsonl"), *map(str, words)])


def test_a_run_says_in_what_numbers_it_computes(folders):
    from megatron_fipo.arithmetic import batch_arithmetic

    bf16, fp8 = folders
    args = parse(bf16, "--sglang-servers", 1)
    assert batch_arithmetic(args)["precision"] == {
        "linear_weights": 21, "trainer_fp8": 0, "rollout_fp8": 0, "differing": 0, "difference": None,
        "blocks_cut_elsewhere": [],
    }  # fmt: skip
    with pytest.raises(
        UserError, match="21 of 21 linear weights differ .* weigh the difference with --rollout-correction"
    ):
        parse(bf16, "--sglang-servers", 1, "--sglang-model-path", fp8)
    args = parse(bf16, "--sglang-servers", 1, "--sglang-model-path", fp8, "--rollout-correction", "token-tis:2")
    assert args.sglang_flags == ("--model-path", str(fp8))
    assert batch_arithmetic(args)["precision"]["rollout_fp8"] == 21
    args.fp8, args.fp8_recipe, args.rollout_correction = "e4m3", "blockwise", []
    assert check_rollout_weights(args).difference is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sglang-servers 1 --sglang-model-path FP8 --sglang-tp 2", "servers could not be updated .*gate_proj"),
        ("--sglang-servers 1 --sglang-model-path /nowhere", "--sglang-model-path /nowhere has no config.json"),
        ("--sglang-servers 1 --sglang-quantization modelopt_fp8", "cannot be updated"),
        ("--sglang-url http://a:1 --sglang-model-path FP8 --sglang-tp 2", "--sglang-tp is for servers that"),
        (
            "--sglang-servers 1 --sglang-quantization fp8 --sglang-load-format flash_rl --check-weights",
            "--check-weights: servers change the layout of flash_rl",
        ),
    ],
)  # fmt: skip
def test_mistakes(words, message, folders):
    bf16, fp8 = folders
    with pytest.raises(UserError, match=message):
        parse(bf16, *words.replace("FP8", str(fp8)).split())


def test_modules_are_left_out_by_the_folder_alone(folders, monkeypatch):
    monkeypatch.setenv("SGLANG_FP8_IGNORED_LAYERS", "model.layers.0")
    with pytest.raises(UserError, match="SGLANG_FP8_IGNORED_LAYERS=model.layers.0 .* --skip"):
        parse(folders[0], "--sglang-servers", 1)


def test_flags_describe_servers_that_run_already(folders):
    bf16, fp8 = folders
    words = ("--sglang-url", "http://a:1", "--rollout-correction", "token-tis:2", "--sglang-model-path", fp8)
    args = parse(bf16, *words)
    assert ServedModel.of(args.hf_model, args.sglang_flags).format.scheme == "block"


def test_another_model_is_refused(folders, tmp_path):
    bf16, fp8 = folders
    config = json.loads((fp8 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="is another model than --hf-model .*num_layers"):
        parse(bf16, "--sglang-servers", 1, "--sglang-model-path", tmp_path)


# --- parameters of servers --------------------------------------------------------------------------------------------


def test_names_of_fp8_servers():
    """Block FP8 is reported as one parameter, MXFP8 as two and copies in kernels' order, flash_rl has own scales."""
    weights = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.1.down_proj.weight"]
    parameters = ["model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.experts.w2_weight"]
    sent = [name for weight in weights for name in (weight, f"{weight}_scale_inv")]
    scales = [f"{parameter}_scale_inv" for parameter in parameters]
    assert [server_parameter(name)[0] for name in sent[1::2]] == scales
    assert name_mismatch(sent, parameters) is None
    assert name_mismatch(sent, [*parameters, *scales, f"{scales[0]}_swizzled"]) is None
    assert name_mismatch(weights, [*parameters, "model.layers.0.self_attn.qkv_proj.weight_scale"]) is None
    assert "no place for model.layers.0.self_attn.q_proj.weight" in name_mismatch(sent, parameters[1:])
    assert f"no {scales[1]}, {scales[0]}" in name_mismatch(weights, [*parameters, *scales])


def test_checksums_are_those_of_the_values():
    """Of the fused weight and its fused scales, in whatever order they come."""
    g = torch.Generator().manual_seed(1)
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    weights = {name: torch.randn(256, 128, generator=g).bfloat16() for name in names}
    sent = [pair for name in names for pair in WeightFormat("block").tensors(name, weights[name])]
    sums = Checksums(name for name, _ in sent)
    for name, tensor in reversed(sent):
        sums.add(name, tensor)
    tensors = dict(sent)
    values = [dequantize(tensors[name], tensors[f"{name}_scale_inv"], torch.bfloat16) for name in names]
    expected = hashlib.sha256(torch.cat(values).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    assert sums.mismatch([{"model.layers.0.mlp.gate_up_proj.weight": expected}]) is None
    assert "gate_up_proj.weight of 1 parameters differ" in sums.mismatch([{}])
