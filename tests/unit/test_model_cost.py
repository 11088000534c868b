"""The modelled cost of a sequence."""

import numpy as np
import pytest

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
