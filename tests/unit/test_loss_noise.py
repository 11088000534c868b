"""The noise budget against closed forms and against the loss itself."""

import math

import pytest
import torch

from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.loss.noise import Responses, budget, compare, spread, weight_edge

CONFIG = FipoConfig()


def responses(sequences: int, length: int, prompt: int = 0) -> Responses:
    mask_T = torch.ones(sequences, length, dtype=torch.bool)
    mask_T[:, :prompt] = False
    cu_seqlens_S1 = torch.arange(sequences + 1) * length
    return Responses(mask_T.flatten(), cu_seqlens_S1, torch.tensor([1.0, -1.0]).repeat(sequences // 2))


def test_terms_are_those_of_the_loss():
    torch.manual_seed(0)
    made = responses(6, 50, prompt=7)
    old_T = -torch.rand(300)
    logp_T = old_T + 0.3 * torch.randn(300)
    logp_T[40] = 2.8 + old_T[40]  # beyond c
    terms = made.terms(logp_T, old_T, CONFIG)
    out = fipo_loss(logp_T, old_T, made.advantage_S, made.response_mask_T, made.cu_seqlens_S1, CONFIG, backend="torch")
    assert torch.equal(terms.f_R, out.weights_T[made.response_mask_T])
    assert 0.1 < (terms.f_R != 1).double().mean() < 0.9


@pytest.mark.parametrize("half_life", [8.0, 32.0])
def test_independent_errors_reach_f_with_the_known_gain(half_life):
    torch.manual_seed(1)
    gamma = 2 ** (-1 / half_life)
    made = responses(40, 2000)
    found = budget(0.01 * torch.randn(80_000) + 0.002, made, CONFIG, half_life)
    expected = math.hypot(0.002 / (1 - gamma), 0.01 / math.sqrt(1 - gamma**2))
    assert found["long"] == pytest.approx(expected, rel=0.05)
    assert found["rms"] == pytest.approx(found["independent"], rel=0.03)
    assert found["independent"] < found["long"], "the last tokens of a response sum less"


def test_correlated_errors_stand_out():
    """Errors that neighbours share add up to more than independent ones of the same size."""
    torch.manual_seed(2)
    error_T = torch.randn(8_000).repeat_interleave(10) * 0.01
    found = budget(error_T, responses(40, 2000), CONFIG, 32.0)
    assert found["rms"] > 2 * found["independent"]


def test_what_lies_outside_responses_is_no_error():
    made = responses(2, 10, prompt=4)
    error_T = torch.where(made.response_mask_T, 0.0, 1e9)
    assert budget(error_T, made, CONFIG, 32.0)["rms"] == 0


def test_shares_count_tokens_on_another_side_of_an_edge():
    made = responses(2, 4)
    zeros_T = torch.zeros(8)
    same = made.terms(zeros_T, zeros_T, CONFIG)
    moved_T = zeros_T.clone()
    moved_T[3] = math.log(
        1.3
    )  # the last token of its sequence: beyond the ratio's clip, and its own F is beyond f's edge
    moved = made.terms(moved_T, zeros_T, CONFIG)
    found = compare(moved, same, CONFIG)
    assert found["ratio_clip"] == 1 / 8
    assert found["weight_edge"] == 4 / 8, "its sequence's tokens leave the edge at 1"
    assert found["weight_changed"] == 4 / 8
    assert found["d"]["max"] == pytest.approx(math.log(1.3)) and found["f"]["max"] == pytest.approx(0.2)
    assert compare(same, same, CONFIG)["F"] == spread(torch.zeros(8))


def test_edge_of_the_weight():
    assert weight_edge(CONFIG) == pytest.approx(math.log(1.2))
    assert weight_edge(FipoConfig(weight_low=0.9)) == pytest.approx(-math.log(0.9))
    assert weight_edge(FipoConfig(weight_low=1.0, weight_high=1.0)) == math.inf
    assert weight_edge(FipoConfig(weight_low=0.0, weight_high=math.inf)) == math.inf
