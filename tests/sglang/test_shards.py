"""The part of a tensor that each rank of a server holds is the one that SGLang's own layers load."""

import pytest
import torch

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, VOCAB = 48, 4, 12, 6, 96, 100
SHAPES = {
    "a.q_proj.weight": (HEADS * HEAD, HIDDEN), "a.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "a.v_proj.weight": (KV_HEADS * HEAD, HIDDEN), "a.q_proj.bias": (HEADS * HEAD,), "a.k_proj.bias": (KV_HEADS * HEAD,),
    "a.v_proj.bias": (KV_HEADS * HEAD,), "a.o_proj.weight": (HIDDEN, HEADS * HEAD), "a.o_proj.bias": (HIDDEN,),
    "m.gate_proj.weight": (INNER, HIDDEN), "m.up_proj.weight": (INNER, HIDDEN), "m.down_proj.weight": (HIDDEN, INNER),
    "model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
}  # fmt: skip


@pytest.fixture(scope="module")
def load(sglang_installed):
    """load(tensors, rank, ranks) -> the parameters of SGLang's layers on that rank, by name."""
    from megatron_fipo.compat import sglang_cpu

    if not torch.cuda.is_available():
        sglang_cpu.install()
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    def load(tensors, rank: int, ranks: int) -> dict[str, torch.Tensor]:
        place = {"tp_rank": rank, "tp_size": ranks, "attn_tp_rank": rank, "attn_tp_size": ranks}
        with get_parallel().override(**place):
            layers = {
                "a.qkv_proj": QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=True),
                "a.o_proj": RowParallelLinear(HEADS * HEAD, HIDDEN, bias=True),
                "m.gate_up_proj": MergedColumnParallelLinear(HIDDEN, [INNER] * 2, bias=False),
                "m.down_proj": RowParallelLinear(INNER, HIDDEN, bias=False),
                "model.embed_tokens": VocabParallelEmbedding(VOCAB, HIDDEN),
                "lm_head": ParallelLMHead(VOCAB, HIDDEN),
            }
            parameters = {f"{n}.{k}": p for n, layer in layers.items() for k, p in layer.named_parameters()}
            parts = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
            parts |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
            for name, tensor in tensors.items():
                *path, module, kind = name.split(".")
                fused, *part = parts.get(module, (module,))
                parameter = parameters[".".join([*path, fused, kind])]
                parameter.weight_loader(parameter, tensor, *part)
        return {name: parameter.data for name, parameter in parameters.items()}

    return load


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12])
def test_every_rank_holds_what_sglang_loads(ranks, load):
    """Of twelve ranks two share each key-value head; for three and six the vocabulary is padded further."""
    from megatron_fipo.rollout.sglang.parameters import server_parameter
    from megatron_fipo.rollout.sglang.shards import Shard

    g = torch.Generator().manual_seed(ranks)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    for rank in range(ranks):
        shard, parts = Shard(rank, ranks, KV_HEADS), {}
        for name, tensor in tensors.items():
            parameter, place = server_parameter(name)
            parts.setdefault(parameter, {})[place] = shard.of(name, tensor)
        ours = {parameter: torch.cat([part for _, part in sorted(of.items())]) for parameter, of in parts.items()}
        theirs = load(tensors, rank, ranks)
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            assert torch.equal(ours[name], parameter), f"{name} on rank {rank} of {ranks}"


def test_what_cannot_be_told_is_refused_by_name():
    from megatron_fipo.rollout.sglang.shards import uncut

    names = [*SHAPES, "model.norm.weight", "m.gate.weight"]
    assert uncut(names, {"tp_size": 2, "ep_size": 1, "enable_dp_attention": False}) is None
    assert "ep_size 2" in uncut(names, {"tp_size": 2, "ep_size": 2})
    assert "a.conv1d.weight" in uncut([*names, "a.conv1d.weight"], {})
