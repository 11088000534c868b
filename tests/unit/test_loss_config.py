from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from megatron_fipo.loss import FipoConfig, fipo_loss, loss_scale


def test_defaults_are_the_32b_recipe():
    assert FipoConfig() == FipoConfig.preset("fipo-32b")
    small, dapo = FipoConfig.preset("fipo-7b"), FipoConfig.preset("dapo")
    assert (small.weight_low, small.weight_high, small.safety_threshold, small.dual_clip) == (0.8, 1.2, 3.0, 10.0)
    assert (dapo.weight_low, dapo.weight_high, dapo.filters_sequences) == (1.0, 1.0, False)
    assert FipoConfig(half_life=1.0).gamma == 0.5 and FipoConfig(half_life=float("inf")).gamma == 1.0
    with pytest.raises(FrozenInstanceError):
        small.half_life = 1.0


def test_none_follows_the_semantics():
    official = FipoConfig()
    paper = replace(official, semantics="paper")
    assert (official.resolved_normalization, official.filters_sequences) == ("token", True)
    assert (paper.resolved_normalization, paper.filters_sequences) == ("group", False)
    assert replace(paper, normalization="sequence", sequence_filter=True).filters_sequences


@pytest.mark.parametrize(
    "field, value",
    [
        ("half_life", 0.0),
        ("half_life", float("nan")),
        ("weight_low", -0.1),
        ("weight_low", 1.3),
        ("weight_high", float("nan")),
        ("safety_threshold", 0.0),
        ("dual_clip", 1.0),
        ("clip_low", 1.0),
        ("clip_low", -0.1),
        ("clip_high", -0.1),
        ("clip_high", float("inf")),
        ("semantics", "verl"),
        ("normalization", "batch"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field.replace("weight_high", "weight_low")) as error:
        FipoConfig(**{field: value})
    assert str(value) in str(error.value)


def test_unknown_preset():
    with pytest.raises(ValueError, match="fipo-32b, fipo-7b, dapo"):
        FipoConfig.preset("grpo")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(backend="triton"), "backend"),
        (dict(logp_T=torch.zeros(4, dtype=torch.float16)), "logp_T"),
        (dict(logp_T=torch.zeros(4, dtype=torch.float64), old_logp_T=torch.zeros(4).double()), "logp_T"),
        (dict(old_logp_T=torch.zeros(4, dtype=torch.bfloat16)), "old_logp_T"),
        (dict(old_logp_T=torch.zeros(3)), "old_logp_T"),
        (dict(response_mask_T=torch.ones(4)), "response_mask_T"),
        (dict(response_mask_T=torch.ones(5, dtype=torch.bool)), "response_mask_T"),
        (dict(token_weight_T=torch.ones(5)), "token_weight_T"),
        (dict(advantage=torch.ones(3)), "advantage"),
        (dict(cu_seqlens_S1=torch.tensor([0, 2, 5])), "cu_seqlens"),
        (dict(config=FipoConfig(normalization="group")), "group_ids_S"),
        (dict(config=FipoConfig(normalization="group"), group_ids_S=torch.zeros(3)), "group_ids_S"),
        (dict(loss_scale_S=torch.ones(3)), "loss_scale_S"),
    ],
)
def test_wrong_input_to_the_loss_is_named(arguments, named):
    base = dict(
        logp_T=torch.zeros(4),
        old_logp_T=torch.zeros(4),
        advantage=torch.ones(2),
        response_mask_T=torch.ones(4, dtype=torch.bool),
        cu_seqlens_S1=torch.tensor([0, 2, 4]),
        config=FipoConfig(),
    )
    with pytest.raises(ValueError, match=named):
        fipo_loss(**(base | arguments))


def test_loss_scale():
    tokens, groups = torch.tensor([2, 0, 6, 4]), torch.tensor([5, 5, 5, 9])
    assert loss_scale("token", tokens).tolist() == [1, 1, 1, 1]
    assert loss_scale("sequence", tokens).tolist() == pytest.approx([1 / 6, 0, 1 / 18, 1 / 12])
    assert loss_scale("group", tokens, groups).tolist() == pytest.approx([1 / 16, 0, 1 / 16, 1 / 8])
    assert loss_scale("group", torch.tensor([0, 4]), torch.tensor([1, 2])).tolist() == [0, 0.25]  # an empty group
    with pytest.raises(ValueError, match="normalization"):
        loss_scale("batch", tokens)
