"""The modelled cost of a sequence."""

import numpy as np
import pytest
import torch

from megatron_fipo.model.cost import CostModel

QWEN_7B = CostModel(
    layers=28, hidden_size=3584, ffn_hidden_size=18944, heads=28, kv_heads=4, head_dim=128, vocab_size=152064
)


def test_the_linear_part_is_two_operations_per_weight_that_a_token_meets():
    """Qwen2.5-7B has 7.62 B parameters, 0.54 B of them the input embedding, which multiplies nothing."""
    assert QWEN_7B.linear / 2 == pytest.approx(7.62e9 - 152064 * 3584, rel=2e-3)


def test_the_quadratic_part_counts_the_causal_half_of_both_attention_products():
    heads, head_dim, tokens = 3, 4, 64
    model = CostModel(
        layers=5, hidden_size=12, ffn_hidden_size=8, heads=heads, kv_heads=1, head_dim=head_dim, vocab_size=7
    )
    pairs = np.tri(tokens).sum() - tokens / 2  # the diagonal counts half
    multiplications = 5 * heads * pairs * head_dim * 2  # query x key, weight x value
    assert model.sequence(tokens) - model.linear * tokens == pytest.approx(2 * multiplications)


def test_a_small_dense_model_counted_by_hand():
    """Two operations per multiply-add: hidden 8, 2 heads of 4, 1 key/value head, MLP 12, vocabulary 10; 3 tokens."""
    model = CostModel(layers=2, hidden_size=8, ffn_hidden_size=12, heads=2, kv_heads=1, head_dim=4, vocab_size=10)
    query, key, value, out = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    gate, up, down = 8 * 12, 8 * 12, 12 * 8
    attention = 2 * (3 * 3 / 2) * 4 * 2  # heads x half of the pairs x head dimension x (scores, values)
    layer = 3 * (query + key + value + out + gate + up + down) + attention
    assert model.sequence(3) == 2 * (2 * layer + 3 * 8 * 10)
    assert model.logits == 2 * 8 * 10


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_it_is_a_third_of_what_megatron_counts_for_training(hf_model, tmp_path, family):
    from megatron_fipo import compat

    compat.install()
    from megatron.training.training import num_floating_point_operations

    from megatron_fipo.arguments import parse_arguments
    from megatron_fipo.settings import cost_model

    folder, _ = hf_model(family, tied=False)
    args = parse_arguments(["--dry-run", "--hf-model", str(folder), "--prompt-data", "x", "--runs-dir", str(tmp_path)])
    lengths = np.array([5, 900, 31])
    counted = num_floating_point_operations(args, 1, (lengths**2).sum(), lengths.sum())
    assert sum(cost_model(args).sequence(n) for n in lengths.tolist()) == pytest.approx(counted / 3, rel=1e-12)


def test_a_mixture_of_experts_counted_by_hand(hf_model, tmp_path):
    """The tiny Qwen3-MoE: hidden 64, 4 heads of 32, 2 key/value heads; a dense layer of width 96, then two layers of
    which every token passes 2 experts of width 48; vocabulary 93, padded to 128."""
    from megatron_fipo import compat

    compat.install()
    from megatron_fipo.arguments import parse_arguments
    from megatron_fipo.settings import cost_model

    folder, _ = hf_model("qwen3_moe", tied=False)
    args = parse_arguments(["--dry-run", "--hf-model", str(folder), "--prompt-data", "x", "--runs-dir", str(tmp_path)])
    projections = 64 * 128 + 2 * 64 * 64 + 128 * 64
    dense, experts = 3 * 64 * 96, 2 * 3 * 64 * 48
    tokens = 50
    pairs = 3 * 4 * 32 * 2 * tokens**2 / 2
    counted = tokens * (3 * projections + dense + 2 * experts + 64 * args.padded_vocab_size) + pairs
    assert cost_model(args).sequence(tokens) == pytest.approx(2 * counted, rel=1e-12)
    assert args.padded_vocab_size % 128 == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_it_is_what_torch_counts_in_the_model(family, hf_model, build_model):
    """Of the matrix products of a forward pass over a sequence, the router's left out; it does not see attention's."""
    from tiny_models import megatron_args
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_fipo.settings import cost_model

    folder, _ = hf_model(family, tied=False)
    (model,) = build_model(folder)
    tokens = 40
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, tokens, dtype=torch.long), torch.arange(tokens)[None], None)
    cost = cost_model(megatron_args(folder))
    router = 2 * tokens * 64 * 4 * 2 if family == "qwen3_moe" else 0
    assert counter.get_total_flops() - router == pytest.approx(cost.linear * tokens, rel=1e-12)
