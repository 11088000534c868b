"""HF -> Megatron -> HF is bit-equal, the model computes what transformers computes, and errors name the tensor."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_hf_model

from megatron_fipo.errors import UserError

CASES = [(family, tied) for family in ("llama", "qwen2", "qwen3", "qwen3_moe") for tied in (True, False)]


def copy_folder(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_logits_equal_transformers(build_model, hf_model, family, tied):
    folder, hf = hf_model(family, tied=tied)
    model = build_model(folder)[0]
    tokens = torch.randint(0, 93, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens, torch.arange(50).expand(2, -1), None)
        assert logits.shape == (2, 50, 96)  # 93 padded to a multiple of 8
        torch.testing.assert_close(logits[..., :93], hf(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_topk_prob": False},
        {"mlp_only_layers": [], "num_experts_per_tok": 3},
        {"mlp_only_layers": [], "decoder_sparse_step": 2},
    ],
)
def test_routing_equals_transformers(build_model, tmp_path, settings):
    """Weights not renormalised; experts in every layer; experts in every second layer."""
    hf = write_hf_model(tmp_path, "qwen3_moe", tied=False, **settings)
    model = build_model(tmp_path)[0]
    tokens = torch.randint(0, 93, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens, torch.arange(50).expand(2, -1), None)
        torch.testing.assert_close(logits[..., :93], hf(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_round_trip_is_bit_equal(build_model, hf_model, tmp_path, family, tied, dtype):
    from megatron_fipo.checkpoint.hf_write import save_hf

    folder, _ = hf_model(family, tied=tied, dtype=dtype)
    save_hf(build_model(folder), folder, tmp_path / "out")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert source.keys() == written.keys()
    for name, tensor in source.items():
        assert written[name].dtype == tensor.dtype == dtype
        assert torch.equal(written[name], tensor), name
    assert {f.name for f in folder.iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_loads_sharded_and_writes_shards_and_dtype(build_model, hf_model, tmp_path, monkeypatch):
    import transformers

    from megatron_fipo.checkpoint import hf_write

    folder, reference = hf_model("qwen3", tied=False)
    monkeypatch.setattr(hf_write, "MAX_SHARD_BYTES", 50_000)
    hf_write.save_hf(build_model(folder), folder, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    again = build_model(tmp_path / "sharded")
    hf_write.save_hf(again, folder, tmp_path / "bf16", dtype=torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for (name, theirs), ours in zip(reference.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(theirs.bfloat16(), ours), name


def test_export_replaces_the_folder_as_a_whole(build_model, hf_model, tmp_path):
    from megatron_fipo.checkpoint import hf_write

    folder, _ = hf_model("qwen2", tied=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("")
    hf_write.save_hf(build_model(folder), folder, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()


@pytest.mark.parametrize("name", ["self_attn.k_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype"])
def test_wrong_tensors_are_named(build_model, hf_model, tmp_path, name, fault):
    from megatron_fipo.checkpoint.hf import load_hf_weights

    source, _ = hf_model("qwen2", tied=True)
    model = build_model(source)
    folder = copy_folder(source, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    full_name = f"model.layers.1.{name}"
    if fault == "missing":
        del tensors[full_name]
    elif fault == "extra":
        full_name = f"model.layers.7.{name}"
        tensors[full_name] = torch.zeros(3)
    elif fault == "shape":
        tensors[full_name] = tensors[full_name][:-1].clone()
    else:
        tensors[full_name] = tensors[full_name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=full_name):
        load_hf_weights(model, folder)


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_shards_join_to_the_whole(build_model, hf_model, size):
    from megatron_fipo.checkpoint.hf import global_parameters, weight_map_of

    folder, _ = hf_model("qwen2", tied=True)
    model = build_model(folder)
    weight_map = weight_map_of(model, 93)
    cut = 0
    for name, parameter in global_parameters(model).items():
        rule = weight_map.rule(name)
        shards = [rule.shard(parameter, size, rank) for rank in range(size)]
        assert torch.equal(rule.unshard(shards), parameter), name
        cut += shards[0].shape != parameter.shape
    assert cut == 1 + 3 * 5  # embedding; qkv weight and bias, proj, fc1, fc2 of three layers
    fc1 = weight_map.rule("decoder.layers.0.mlp.linear_fc1.weight").shard(torch.arange(8.0), 2, 1)
    assert fc1.tolist() == [2, 3, 6, 7]  # rank 1 holds the second half of gate and of up


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("family", "dtype"), [("qwen2", torch.bfloat16), ("qwen3_moe", torch.float32)])
def test_ranks_read_their_shards_alone(hf_model, build_model, tmp_path, family, dtype, size):
    """Bit for bit what is cut from the whole, with 2 query groups and 4 ranks too; and nobody else's values."""
    from megatron_fipo.checkpoint.hf import read_shard, weight_map_of
    from megatron_fipo.checkpoint.hf_files import HFWeights
    from megatron_fipo.checkpoint.hf_map import WeightMap

    source, _ = hf_model(family, tied=False, dtype=dtype)
    folder = copy_folder(source, tmp_path / "spoiled")
    tensors = load_file(folder / "model.safetensors")
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in spoiled.values():
        tensor.view(-1)[-1] = torch.nan
    save_file(spoiled, folder / "model.safetensors")
    whole, bad = HFWeights(source), HFWeights(folder)
    padded = {2: 188, 4: 128}[size]  # so many that the last rank has nothing of the vocabulary
    weight_map = WeightMap(weight_map_of(build_model(source), 93).config, 93, padded, tied=False)
    for name in weight_map.names():
        rule = weight_map.rule(name)
        full, full_bad = (rule.merge([of[hf_name] for hf_name in rule.hf_names]) for of in (tensors, spoiled))
        pieces = rule.pieces(size)
        assert pieces == (1 if rule.tp_axis is None else 2 if "linear_qkv" in name else size)
        for rank in range(size):
            expected = rule.shard(full, size, rank)
            assert torch.equal(read_shard(whole, rule, size, rank), expected), (name, rank)
            if rule.shard(full_bad, pieces, rank * pieces // size).isnan().any():
                with pytest.raises(UserError, match="|".join(map(re.escape, rule.hf_names))):
                    read_shard(bad, rule, size, rank)
            else:
                assert rule.tp_axis is not None
                assert torch.equal(read_shard(bad, rule, size, rank), expected), (name, rank)


def test_config_index_and_tokenizer_faults_are_named(hf_model, tmp_path):
    from megatron_fipo.model.hf_config import megatron_arguments

    source, _ = hf_model("qwen3", tied=False)

    def fault(number, message, change):
        folder = copy_folder(source, tmp_path / str(number))
        change(folder)
        with pytest.raises(UserError, match=message) as error:
            megatron_arguments(folder)
        assert str(error.value).count("\n") == 0

    def edit(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text()) | values
            (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

        return change

    def index(folder):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        )

    def truncate(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    faults = [
        ("config.json does not exist", lambda f: (f / "config.json").unlink()),
        ("not valid JSON", lambda f: (f / "config.json").write_text("{")),
        ("neither model.safetensors nor", lambda f: (f / "model.safetensors").unlink()),
        ("model-2.safetensors, which the folder lacks", index),
        ("no complete safetensors", lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{}")),
        ("no complete safetensors", truncate),
        ("no tokenizer", lambda f: (f / "tokenizer.json").unlink()),
        ("'mamba'.*llama, qwen2, qwen3, qwen3_moe", edit(model_type="mamba")),
        ("'yarn'", edit(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0})),
        ("'linear'", edit(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})),
        ("sliding-window", edit(use_sliding_window=True)),
        ("sliding-window", edit(layer_types=["full_attention", "sliding_attention", "full_attention"])),
        ("'gelu'", edit(hidden_act="gelu")),
        ("'hidden_size'", edit(hidden_size=None)),
        ("'num_hidden_layers'", edit(num_hidden_layers=None)),
        ("num_hidden_layers 1000000000, no number", edit(num_hidden_layers=10**9)),
        ("num_hidden_layers 'many', no number", edit(num_hidden_layers="many")),
        ("num_hidden_layers 9000, where the weights have 3", edit(num_hidden_layers=9000)),
        ("num_hidden_layers 2, where the weights have 3", edit(num_hidden_layers=2)),
        ("attention_bias", edit(attention_bias=True)),
        ("'llama3'", edit(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0})),
        ("mlp_bias", edit(model_type="llama", mlp_bias=True)),
        (
            "rope scaling other than Llama 3's",
            edit(model_type="llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ),
        ("'num_local_experts'", edit(model_type="qwen3_moe", moe_intermediate_size=8, num_experts_per_tok=2)),
        ("num_experts_per_tok 1", edit(model_type="qwen3_moe", norm_topk_prob=True, num_experts_per_tok=1)),
    ]
    for number, (message, change) in enumerate(faults):
        fault(number, message, change)
    with pytest.raises(UserError, match="absent/config.json"):
        megatron_arguments(tmp_path / "absent")


def test_arguments_of_llama_3_and_of_experts(hf_model):
    from megatron_fipo.model.hf_config import megatron_arguments

    llama = megatron_arguments(hf_model("llama", tied=True)[0])
    assert llama["use_rope_scaling"] and llama["rope_scaling_factor"] == 8.0 and llama["rotary_base"] == 5e5
    assert not llama["add_qkv_bias"] and not llama["qk_layernorm"] and "num_experts" not in llama
    experts = megatron_arguments(hf_model("qwen3_moe", tied=False)[0])
    assert experts["num_experts"] == 4 and experts["moe_router_topk"] == 2 and experts["moe_ffn_hidden_size"] == 48
    assert experts["moe_layer_freq"] == [0, 1, 1] and not experts["moe_router_pre_softmax"]
    assert not experts["use_rope_scaling"] and experts["qk_layernorm"]


def test_arguments_of_old_and_new_configs(hf_model, tmp_path):
    from megatron_fipo.model.hf_config import megatron_arguments

    source, _ = hf_model("qwen3", tied=False)
    new = megatron_arguments(source)
    assert new["kv_channels"] == 32 and new["qk_layernorm"] and not new["add_qkv_bias"]
    assert new["untie_embeddings_and_output_weights"] and new["vocab_size"] == 93 and new["rotary_base"] == 10000.0
    folder = copy_folder(source, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 1e6, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert megatron_arguments(folder) == new | {"rotary_base": 1e6}
