"""What holds where ModelOpt is installed; test_modelopt.py runs this file there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_hf_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import quantize_checkpoint as tool

PROMPTS = ("w5 w9 w17 w80", "w88 w2", "w3 w3 w41 w7 w6", "w1")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # FP4's magnitudes by code; bit 3 is the sign


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "w1"}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="module")
def quantised(hf_model, prompts, tmp_path_factory):
    """quantised(format, family) -> (source, transformers model, OUT, what --json holds)."""

    def run(name: str, family: str):
        folder, model = hf_model(family, tied=False, dtype=torch.bfloat16)
        tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        out, found = tmp_path_factory.mktemp(name) / "out", tmp_path_factory.mktemp(name) / "found.json"
        argv = ["--hf", folder, "--prompts", prompts, "--format", name, "--out", out, "--json", found]
        assert tool.main(list(map(str, argv))) == 0
        assert list(out.parent.iterdir()) == [out], "nothing else is left"
        return folder, model, out, json.loads(found.read_text())

    return run


def assert_files_and_plain_weights(folder: Path, out: Path, quantised: set[str], algorithm: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == algorithm
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["Qwen3ForCausalLM"]
    source, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name in source if "proj" in name} == quantised, "linear layers, and no others"
    for name in source.keys() - quantised:
        assert torch.equal(written[name], source[name]), name


def test_fp8(quantised):
    folder, model, out, found = quantised("fp8", "qwen3")
    source, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    names = {name for name, tensor in written.items() if tensor.dtype is torch.float8_e4m3fn}
    assert_files_and_plain_weights(folder, out, names, "FP8")
    for name in names:
        weight, scale = source[name].float(), written[name + "_scale"]
        assert scale.dtype is torch.float32 and torch.allclose(scale, weight.abs().max() / 448)
        error = (written[name].float() * scale - weight).abs()
        # Half a step of E4M3: 2^-4 of the value, and 2^-10 where its numbers are subnormal.
        assert (error <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * 1.001).all(), name
        assert written[name.removesuffix("weight") + "input_scale"] > 0

    # The activations' scale is that of the prompts.
    seen = []
    first = model.model.layers[0].self_attn.q_proj
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max().float()))
    for prompt in PROMPTS:
        model(torch.tensor([[int(word[1:]) for word in prompt.split()]]))
    hook.remove()
    scale = written["model.layers.0.self_attn.q_proj.input_scale"]
    assert torch.allclose(scale, max(seen) / 448, rtol=1e-2), (scale, max(seen) / 448)
    assert found["quantized"] == len(names) and found["calibration_tokens"] == sum(len(p.split()) for p in PROMPTS)
    assert found["bytes"] < 0.75 * found["bytes_before"]
    assert 0 < found["logp_difference_mean"] < 0.2 and found["logp_difference_max"] < 2


def test_nvfp4(quantised):
    folder, _, out, found = quantised("nvfp4", "qwen3")
    source, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    names = {name for name, tensor in written.items() if tensor.dtype is torch.uint8}
    assert_files_and_plain_weights(folder, out, names, "NVFP4")
    for name in names:
        weight = source[name].float()
        packed, block, whole = written[name], written[name + "_scale"], written[name + "_scale_2"]
        rows, columns = weight.shape
        assert packed.shape == (rows, columns // 2) and block.shape == (rows, columns // 16)
        assert block.dtype is torch.float8_e4m3fn and whole.dtype is torch.float32 and whole.numel() == 1
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(rows, columns).long()
        values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        scale = (block.float() * whole).repeat_interleave(16, 1)
        largest = weight.reshape(rows, -1, 16).abs().amax(-1).repeat_interleave(16, 1)
        # Half of FP4's largest step (4 to 6), and what a block's scale loses by its own rounding to E4M3.
        assert ((values * scale - weight).abs() <= scale + largest * 2**-4).all(), name
        assert torch.nn.functional.cosine_similarity((values * scale).flatten(), weight.flatten(), 0) > 0.98
    assert found["quantized"] == len(names) and found["bytes"] < 0.6 * found["bytes_before"]


def test_experts_are_written_one_by_one(quantised):
    folder, _, out, _ = quantised("fp8", "qwen3_moe")
    source, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert source.keys() <= written.keys()
    for name in (name for name in source if "experts" in name):
        scale = written[name + "_scale"]
        assert written[name].dtype is torch.float8_e4m3fn
        assert ((written[name].float() * scale - source[name].float()).abs() <= 17 * scale).all(), name
    assert written["model.layers.1.mlp.gate.weight"].dtype is torch.bfloat16, "the router stays as it is"


def test_mistakes_are_one_line_and_leave_nothing(hf_model, prompts, tmp_path, capsys):
    source, _ = hf_model("qwen3", tied=False, dtype=torch.bfloat16)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    write_hf_model(tmp_path / "nan", "qwen3", tied=False)
    write_hf_model(tmp_path / "short", "qwen3", tied=False)
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text('{"quantization_config": {}}')
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] / 0}, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(rest, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    for message, change in {
        "--out": {"--out": tmp_path / "taken"},
        "config.json": {"--hf": tmp_path},
        "quantised already": {"--hf": tmp_path / "quantised"},
        f"NaN or infinite values in {name}": {"--hf": tmp_path / "nan"},
        f"lacks {name}": {"--hf": tmp_path / "short"},
        "does not exist": {"--prompts": tmp_path / "none.jsonl"},
        "--samples": {"--samples": 0},
    }.items():
        flags = {"--hf": source, "--prompts": prompts, "--format": "fp8", "--out": tmp_path / "out"} | change
        capsys.readouterr()
        assert tool.main([str(word) for pair in flags.items() for word in pair]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert sorted(path.name for path in tmp_path.iterdir()) == before
