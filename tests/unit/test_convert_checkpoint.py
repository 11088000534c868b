"""Hugging Face -> torch_dist -> Hugging Face is bit-equal; a faulty conversion and damaged files are named."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_hf_model

from megatron_fipo.errors import UserError

SIDE_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def imported(convert, hf_model, tmp_path) -> Path:
    """A checkpoint of a Qwen3-MoE whose layers are not all alike."""
    convert.import_hf(hf_model("qwen3_moe", tied=False)[0], tmp_path / "megatron", None, [])
    return tmp_path / "megatron"


def assert_same_folder(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for name in SIDE_FILES:
        assert (found / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", True, torch.float32),
        ("qwen2", False, torch.bfloat16),
        ("qwen3", True, torch.bfloat16),
        ("qwen3", False, torch.float32),
        ("qwen3_moe", False, torch.float32),
        ("qwen3_moe", True, torch.bfloat16),
    ],
)
def test_round_trip_is_bit_equal(convert, hf_model, tmp_path, family, tied, dtype):
    source, _ = hf_model(family, tied=tied, dtype=dtype)
    convert.import_hf(source, tmp_path / "megatron", None, [])
    convert.export_hf(tmp_path / "megatron", None, tmp_path / "out", None)
    assert_same_folder(tmp_path / "out", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "out"]


def test_layers_that_are_all_mixtures_are_stacked(convert, tmp_path):
    write_hf_model(tmp_path / "hf", "qwen3_moe", tied=False, mlp_only_layers=[])
    convert.import_hf(tmp_path / "hf", tmp_path / "megatron", None, [])
    convert.export_hf(tmp_path / "megatron", None, tmp_path / "out", None)
    assert_same_folder(tmp_path / "out", tmp_path / "hf")
    assert convert.verify(tmp_path / "hf", tmp_path / "megatron", None, None, []).equal


def test_dtypes_can_be_chosen_on_both_ways(convert, hf_model, tmp_path):
    source, _ = hf_model("qwen3", tied=False)
    convert.import_hf(source, tmp_path / "megatron", torch.bfloat16, [])
    convert.export_hf(tmp_path / "megatron", None, tmp_path / "bf16", None)
    convert.export_hf(tmp_path / "megatron", None, tmp_path / "fp32", torch.float32)
    for name, tensor in load_file(source / "model.safetensors").items():
        for folder in ("bf16", "fp32"):
            written = load_file(tmp_path / folder / "model.safetensors")[name]
            assert torch.equal(written.float(), tensor.bfloat16().float()), name
    for folder, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
        assert {t.dtype for t in load_file(tmp_path / folder / "model.safetensors").values()} == {dtype}


def test_sharded_folders_come_and_go(convert, hf_model, tmp_path, monkeypatch):
    from megatron_fipo.checkpoint import hf_write

    source, _ = hf_model("llama", tied=False)
    monkeypatch.setattr(hf_write, "MAX_SHARD_BYTES", 60_000)
    for number in range(2):
        convert.import_hf(source, tmp_path / f"megatron{number}", None, [])
        convert.export_hf(tmp_path / f"megatron{number}", None, tmp_path / f"hf{number}", None)
        source = tmp_path / f"hf{number}"
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for name, tensor in load_file(hf_model("llama", tied=False)[0] / "model.safetensors").items():
        assert torch.equal(load_file(source / index[name])[name], tensor)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_verify_names_the_layer_that_differs(convert, hf_model, tmp_path, family):
    source, _ = hf_model(family, tied=True)
    convert.import_hf(source, tmp_path / "megatron", None, [])
    right = convert.verify(source, tmp_path / "megatron", None, None, [])
    assert right.equal and right.limit == 1e-5
    assert list(right.errors) == ["embedding", "layer 0", "layer 1", "layer 2", "logits"]

    wrong = tmp_path / "wrong"
    shutil.copytree(source, wrong)
    tensors = load_file(wrong / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][0] *= 1.01
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    found = convert.verify(wrong, tmp_path / "megatron", None, None, [])
    assert not found.equal and found.worst == "layer 1" and found.errors["layer 0"] < 1e-6
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w5 w9 w17\nw88 w2\n")
    assert not convert.verify(wrong, tmp_path / "megatron", prompts, None, []).equal
    assert convert.verify(source, tmp_path / "megatron", prompts, None, []).equal
    assert convert.verify(source, tmp_path / "megatron", prompts, torch.bfloat16, []).limit == 2e-2


class _Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def _damage(checkpoint: Path, kind: str) -> None:
    release = checkpoint / "release"
    data = release / "weights_0.distcp"
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif kind == "missing file":
        data.unlink()
    elif kind == "flipped":
        data.write_bytes(b"\0" * data.stat().st_size)
    elif kind == "no metadata":
        (release / ".metadata").unlink()
    elif kind == "cut metadata":
        (release / ".metadata").write_bytes((release / ".metadata").read_bytes()[:-100])
    elif kind == "foreign code":
        (release / ".metadata").write_bytes(pickle.dumps(_Malice()))
    elif kind == "code behind an allowed module":
        words = (b"torch.distributed.checkpoint.filesystem", b"os.mkdir", b"evil")
        module, name, argument = (b"\x8c" + bytes([len(word)]) + word for word in words)
        (release / ".metadata").write_bytes(b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R.")
    elif kind == "no tracker":
        (checkpoint / "latest_checkpointed_iteration.txt").unlink()
    elif kind == "bad tracker":
        (checkpoint / "latest_checkpointed_iteration.txt").write_text("soon")
    elif kind == "no side files":
        shutil.rmtree(checkpoint / "hf")
    else:
        change = {"fewer layers": {"num_hidden_layers": 2, "mlp_only_layers": [0]}, "more layers": {}}
        change |= {"wider": {"hidden_size": 128}, "more experts": {"num_local_experts": 8}}
        values = change[kind] or {"num_hidden_layers": 5}
        config = json.loads((checkpoint / "hf" / "config.json").read_text()) | values
        (checkpoint / "hf" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"weights_0\.distcp cannot be read at .*weight"),
        ("missing file", r"weights_0\.distcp cannot be read"),
        ("flipped", r"weights_0\.distcp cannot be read at embedding\.word_embeddings\.weight"),
        ("no metadata", r"release.*incomplete"),
        ("cut metadata", r"\.metadata cannot be read"),
        ("foreign code", r"\.metadata cannot be read .*must not refer to .*mkdir"),
        ("code behind an allowed module", r"\.metadata cannot be read .*must not refer to .*os\.mkdir"),
        ("no tracker", "holds no Megatron checkpoint"),
        ("bad tracker", "'soon'"),
        ("no side files", "--hf"),
        ("fewer layers", r"has decoder\.layers\.2\..* beyond it"),
        ("more layers", r"lacks decoder\.layers\.3\."),
        ("wider", r"with shape \(\d+, 64\).* needs \(93, 128\)"),
        ("more experts", r"router\.weight with shape \(4, 64\).* needs \(8, 64\)"),
    ],
)
def test_damage_is_named_and_leaves_no_output(convert, imported, tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    _damage(imported, kind)
    with pytest.raises(UserError, match=message) as error:
        convert.export_hf(imported, None, tmp_path / "out", None)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"], "no output, no leftovers, no foreign code"


def test_a_checkpoint_with_nan_is_refused(convert, hf_model, tmp_path):
    from megatron.training import checkpointing

    from megatron_fipo.checkpoint.hf import load_hf_weights

    source, _ = hf_model("qwen3", tied=False)
    args, chunks = convert.build_model(source, torch.float32, [])
    load_hf_weights(chunks, source)
    with torch.no_grad():
        chunks[0].decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")
    args.save = str(tmp_path / "megatron")
    checkpointing.save_checkpoint(7, chunks, None, None, 0)
    with pytest.raises(UserError, match=r"iter_0000007 .*decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        convert.export_hf(tmp_path / "megatron", source, tmp_path / "out", None)
    with pytest.raises(UserError, match=r"linear_fc2\.weight"):
        convert.verify(source, tmp_path / "megatron", None, None, [])


def test_mistakes_are_one_line_and_exit_code_2(convert, hf_model, imported, tmp_path, capsys):
    source, _ = hf_model("qwen3_moe", tied=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    mistakes = {
        "--out": ["import", "--hf", source, "--out", tmp_path / "taken"],
        "config.json does not exist": ["import", "--hf", tmp_path / "nowhere", "--out", tmp_path / "out"],
        "holds no Megatron checkpoint": ["export", "--megatron", source, "--hf", source, "--out", tmp_path / "out"],
        "--tensor-paralel": ["export", "--megatron", imported, "--out", tmp_path / "out", "--tensor-paralel", "2"],
        "--prompts": ["verify", "--hf", source, "--megatron", imported, "--prompts", tmp_path / "none.txt"],
    }
    for message, argv in mistakes.items():
        assert convert.main(list(map(str, argv))) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out, err
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "out").exists()
