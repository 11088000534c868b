"""tools/make_fp8_checkpoint.py: what it writes, what it refuses, and that damaged input leaves no partial folder."""

import json
import random
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hf_fuzz import mutate
from tiny_models import write_hf_model

from megatron_fipo.quantization.block_fp8 import block_fp8, dequantize, mxfp8

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

# Every part of a fused weight has whole blocks, two of them or more somewhere.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
FAMILIES = {
    "qwen2": SIZES,
    "qwen3": SIZES,
    "llama": SIZES,
    "qwen3_moe": SIZES | {"moe_intermediate_size": 128, "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def tool():
    import make_fp8_checkpoint

    return make_fp8_checkpoint


@pytest.fixture
def source(tmp_path):
    """source(family) -> a bf16 folder of its own."""

    def write(family: str = "qwen3", **settings) -> Path:
        write_hf_model(
            tmp_path / family, family, tied=False, dtype=torch.bfloat16,
            **FAMILIES[family] | {"num_hidden_layers": 2} | settings,
        )  # fmt: skip
        return tmp_path / family

    return write


def run(tool, hf, out, *flags) -> int:
    return tool.main(["--hf", str(hf), "--out", str(out), *map(str, flags)])


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["block", "mxfp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written(family, scheme, tool, source, tmp_path):
    hf, out = source(family), tmp_path / "fp8"
    assert run(tool, hf, out, "--format", scheme, "--json", tmp_path / "report.json") == 0
    original, written = read_all(hf), read_all(out)
    linear = {n for n in original if n.endswith("_proj.weight")}
    assert written.keys() == original.keys() | {f"{name}_scale_inv" for name in linear}
    for name, tensor in original.items():
        if name not in linear:
            assert same(written[name], tensor), name
            continue
        pair = block_fp8(tensor, power_of_two=True) if scheme == "block" else mxfp8(tensor)
        assert same(written[name], pair[0]) and same(written[f"{name}_scale_inv"], pair[1]), name
        assert (dequantize(*pair) - tensor.float()).abs().max() <= tensor.float().abs().max() / 16
    config = json.loads((out / "config.json").read_text())
    declared = config.pop("quantization_config")
    assert config == json.loads((hf / "config.json").read_text())
    assert declared["weight_block_size"] == ([128, 128] if scheme == "block" else [1, 32])
    assert declared["scale_fmt"] == "ue8m0" and "lm_head" in declared["modules_to_not_convert"]
    assert ("model.layers.1.mlp.gate" in declared["modules_to_not_convert"]) == (family == "qwen3_moe")
    for file in ("tokenizer.json", "generation_config.json"):
        assert (out / file).read_bytes() == (hf / file).read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["quantised"] == len(linear) and report["tensors"] == len(original)
    assert report["bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert report["quantization_config"] == declared


def test_scales_that_are_no_powers_of_two_and_modules_that_stay(tool, source, tmp_path):
    hf, out = source(), tmp_path / "fp8"
    assert run(tool, hf, out, "--fp32-scales", "--skip", "model.layers.1", "self_attn.o_proj") == 0
    original, written = read_all(hf), read_all(out)
    quantised = {name for name in written if f"{name}_scale_inv" in written}
    assert quantised == {
        f"model.layers.0.{x}_proj.weight"
        for x in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    }
    name = "model.layers.0.mlp.down_proj.weight"
    assert same(written[f"{name}_scale_inv"], block_fp8(original[name], power_of_two=False)[1])
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "scale_fmt" not in declared and declared["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1",
        "self_attn.o_proj",
    ]


def test_shards_in_and_out(tool, source, tmp_path, monkeypatch):
    """Files are cut where the limit is, and the index names where each tensor is; so may those of the source be."""
    from megatron_fipo.checkpoint import hf_write

    hf, whole, out = source(), tmp_path / "whole", tmp_path / "sharded"
    assert run(tool, hf, whole) == 0
    tensors = load_file(hf / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, hf / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    (hf / "model.safetensors").unlink()

    monkeypatch.setattr(hf_write, "MAX_SHARD_BYTES", 200_000)
    assert run(tool, hf, out) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_all(out).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as handle:
            assert same(handle.get_tensor(name), load_file(whole / "model.safetensors")[name])


def refused(tool, capsys, hf, out, *flags) -> str:
    """The one line that the tool says; nothing may be left of the output."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert run(tool, hf, out, *flags) == 2
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("make_fp8_checkpoint: ")
    return message


def test_mistakes(tool, source, tmp_path, capsys):
    hf, out = source(), tmp_path / "fp8"
    assert "--skip model.layers.2 names no linear layer" in refused(tool, capsys, hf, out, "--skip", "model.layers.2")
    assert "config.json does not exist" in refused(tool, capsys, tmp_path / "nowhere", out)
    odd = source("qwen2", intermediate_size=320)
    assert "model.layers.0.mlp.gate_proj.weight is [320, 256]" in refused(tool, capsys, odd, out)
    small = source("llama", intermediate_size=336)
    assert "model.layers.0.mlp.down_proj.weight is [256, 336]" in refused(tool, capsys, small, out, "--format", "mxfp8")
    assert run(tool, hf, out) == 0
    assert "exists: give a new folder" in refused(tool, capsys, hf, out)
    assert "is quantised already" in refused(tool, capsys, out, tmp_path / "again")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    assert "scale_inv" in refused(tool, capsys, out, tmp_path / "again")


@pytest.mark.parametrize("damage", ["nan", "missing", "misshapen", "extra", "truncated"])
def test_damaged_models_are_named(damage, tool, source, tmp_path, capsys):
    hf = source()
    tensors, name = load_file(hf / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if damage == "nan":
        tensors[name][3, 5] = float("nan")
    elif damage == "missing":
        del tensors[name]
    elif damage == "misshapen":
        tensors[name] = tensors[name][:-1].contiguous()
    elif damage == "extra":
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(1)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    if damage == "truncated":
        name = "model.safetensors"
        (hf / name).write_bytes((hf / name).read_bytes()[:-1])
    assert name in refused(tool, capsys, hf, tmp_path / "fp8")


def test_a_failure_while_writing_leaves_nothing(tool, source, tmp_path, monkeypatch):
    """Whatever it is: here the disk is full."""
    from megatron_fipo.checkpoint import hf_write

    hf = source()
    before, write, calls = sorted(tmp_path.iterdir()), hf_write.PieceWriter.write, []

    def full(file, data):
        calls.append(1)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(hf_write.PieceWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(tool, hf, tmp_path / "fp8")
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_headers(tool, source, tmp_path, capsys):
    """Bits, cuts, repetitions and splices in the header: either the whole folder or one line and nothing."""
    hf, out = source(num_hidden_layers=1), tmp_path / "fp8"
    path = hf / "model.safetensors"
    whole, results = path.read_bytes(), []
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for seed in range(150):
        path.write_bytes(mutate(whole[:header], random.Random(seed)) + whole[header:])
        results.append(outcome(tool, capsys, hf, out, seed))
    assert results.count(2) > 100, "the damage must be found, not overlooked"


def test_damaged_indexes(tool, source, tmp_path, capsys):
    hf, out = source(num_hidden_layers=1), tmp_path / "fp8"
    names = list(load_file(hf / "model.safetensors"))
    index = hf / "model.safetensors.index.json"
    whole, results = json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}).encode(), []
    for seed in range(150):
        index.write_bytes(mutate(whole, random.Random(seed)))
        results.append(outcome(tool, capsys, hf, out, seed))
    assert results.count(2) > 50


def outcome(tool, capsys, hf, out, seed) -> int:
    capsys.readouterr()
    code = run(tool, hf, out)
    message = capsys.readouterr().err
    assert code in (0, 2) and out.exists() == (code == 0), seed
    assert not out.with_name("fp8.partial").exists()
    if code == 2:
        assert message.startswith("make_fp8_checkpoint: ") and message.count("\n") == 1, seed
    else:
        shutil.rmtree(out)
    return code
