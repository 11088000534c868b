"""What holds where Megatron-Bridge is installed; test_megatron_bridge.py runs this file there."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import write_hf_model

from megatron_fipo.checkpoint.hf_map import EMBEDDING, OUTPUT
from megatron_fipo.errors import UserError

VOCABULARY = 93  # of the tiny models


def write_foreign_model(folder: Path, source: Path, family: str) -> None:
    """A tiny random model of an architecture that `hf_config` does not know, with the source's tokenizer."""
    shape = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False, head_dim=16,
    )  # fmt: skip
    moe = dict(
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1, use_qk_norm=True,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    config = {
        "mistral": lambda: transformers.MistralConfig(**shape, sliding_window=None),
        "nemotron": lambda: transformers.NemotronConfig(**shape, hidden_act="relu2"),
        "glm4_moe": lambda: transformers.Glm4MoeConfig(**shape, **moe),
    }[family]()
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a torch_dist checkpoint as Megatron stores them, read by its own reader; without padded rows."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    tensors = load_plain_tensors(str(checkpoint / "release"))
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(("weight", "bias"))}
    return weights | {name: weights[name][:VOCABULARY] for name in (EMBEDDING, OUTPUT) if name in weights}


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", False, torch.float32),
        ("qwen2", True, torch.bfloat16),
        ("qwen3", False, torch.bfloat16),
        ("qwen3_moe", False, torch.float32),
    ],
)
def test_our_map_is_bit_equal_with_megatron_bridge_both_ways(convert, tmp_path, family, tied, dtype):
    source = tmp_path / "hf"
    settings = {"mlp_only_layers": []} if family == "qwen3_moe" else {}  # Megatron-Bridge knows no dense layers there
    write_hf_model(source, family, tied=tied, dtype=dtype, vocab_size=VOCABULARY, **settings)
    expected = load_file(source / "model.safetensors")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert.import_hf(source, ours, None, [])
    convert.import_hf(source, theirs, None, [], with_bridge=True)
    assert_equal(stored(ours), stored(theirs))
    convert.export_hf(theirs, None, tmp_path / "by us", None)
    convert.export_with_bridge(ours, None, tmp_path / "by them", None, [])
    for folder in ("by us", "by them"):
        assert_equal(load_file(tmp_path / folder / "model.safetensors"), expected)
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_an_architecture_that_we_do_not_know_comes_and_goes(convert, hf_model, tmp_path):
    source = tmp_path / "hf"
    write_foreign_model(source, hf_model("qwen3", tied=False)[0], "mistral")
    with pytest.raises(UserError, match="model_type 'mistral'"):
        convert.import_hf(source, tmp_path / "out", None, [])
    convert.import_hf(source, tmp_path / "megatron", None, [], with_bridge=True)
    convert.export_with_bridge(tmp_path / "megatron", None, tmp_path / "back", None, [])
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]
    convert.export_with_bridge(tmp_path / "megatron", None, tmp_path / "bf16", torch.bfloat16, [])
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_megatron_bridge_cannot_represent_is_no_silent_loss(convert, hf_model, tmp_path):
    """It takes every layer of a Qwen3-MoE for a mixture; our own conversion does not (tests/unit)."""
    source, _ = hf_model("qwen3_moe", tied=False)
    with pytest.raises(UserError, match=r"no values.*decoder\.layers\.0\.mlp\.experts"):
        convert.import_hf(source, tmp_path / "out", None, [], with_bridge=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with TransformerEngine all of them are built")
@pytest.mark.parametrize("family", ["glm4_moe", "nemotron"])
def test_models_that_need_transformer_engine_are_refused_without_it(convert, hf_model, tmp_path, family):
    write_foreign_model(tmp_path / "hf", hf_model("qwen3", tied=False)[0], family)
    with pytest.raises(UserError, match="convert it on a machine with TransformerEngine"):
        convert.import_hf(tmp_path / "hf", tmp_path / "out", None, [], with_bridge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_mistakes_are_named(convert, hf_model, tmp_path, capsys):
    source, _ = hf_model("qwen3", tied=False)
    bert = tmp_path / "bert"
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(bert)
    broken = tmp_path / "broken"
    write_foreign_model(broken, source, "mistral")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    for folder, message in (
        (bert, "no architecture that"),
        (tmp_path, "no config.json"),
        (broken, "linear_fc1.weight"),
    ):
        argv = ["import", "--hf", folder, "--out", tmp_path / "out", "--bridge", "megatron-bridge"]
        assert convert.main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
