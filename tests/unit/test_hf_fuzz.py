"""Damaged safetensors headers and index files: an error that names the file, never a crash or another exception."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.errors import UserError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}
SPLICES = (b'"F32"', b'"BF16"', b"-1", b"9999999999999999999999", b"[", b"{", b"null", b"\xff\xfe", b'"', b"\0" * 8)


def read(folder):
    """Everything that a load touches before it knows the model."""
    from megatron_fipo.checkpoint.hf_files import HFWeights

    weights = HFWeights(folder)
    return {name: (weights.shape(name), weights.dtype(name), weights[name]) for name in weights.names()}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """One to four bits, cuts, repetitions or splices."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed))
        kind = generator.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del changed[at : at + generator.randint(1, 16)]
        elif kind == 2:
            changed[at:at] = changed[at : at + generator.randint(1, 16)]
        elif kind == 3:
            changed[at:at] = generator.choice(SPLICES)
        else:
            changed[:8] = struct.pack("<Q", generator.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, len(data)]))
        if not changed:
            break
    return bytes(changed)


def test_damaged_headers(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    whole, refused = path.read_bytes(), 0
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert len(read(tmp_path)) == 2
    for seed in range(600):
        path.write_bytes(mutate(whole[:header], random.Random(seed)) + whole[header:])
        try:
            read(tmp_path)
        except UserError as error:
            assert "model.safetensors" in str(error) and "\n" not in str(error), seed
            refused += 1
    assert refused > 400, "the damage must be found, not overlooked"


def test_damaged_indexes(tmp_path):
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, (name, tensor) in zip(files, TENSORS.items(), strict=True):
        save_file({name: tensor}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 32}, "weight_map": dict(zip(TENSORS, files, strict=True))}
    whole, refused = json.dumps(content).encode(), 0
    index.write_bytes(whole)
    assert len(read(tmp_path)) == 2
    for seed in range(600):
        index.write_bytes(mutate(whole, random.Random(seed)))
        try:
            read(tmp_path)
        except UserError as error:
            assert "model" in str(error) and "\n" not in str(error), seed
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "weight_map",
    [
        [], 3, None, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"},
        {"a": ""}, {"a": "."}, {"a": "folder"},
    ],
)  # fmt: skip
def test_indexes_of_another_shape(tmp_path, weight_map):
    (tmp_path / "folder").mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError):
        read(tmp_path)


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="no safetensors index"):
        read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
    tensor = torch.ones(7, 5, dtype=dtype)
    tensor[3, 2] = value
    save_file({"good.weight": torch.ones(3), "bad.weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"bad\.weight"):
        read(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    files = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
    for file in files.values():
        save_file(TENSORS, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=r"repeats (a\.weight|b\.bias)"):
        read(tmp_path)
