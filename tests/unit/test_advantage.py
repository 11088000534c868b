import pytest
import torch

from megatron_fipo.loss import group_advantage, overlong_penalty


def test_group_advantage_is_the_formula():
    reward = torch.tensor([1.0, -1.0, -1.0, 0.5, 1.0, -1.0, -1.0])
    groups = torch.tensor([7, 3, 7, 7, 3, 3, 7])
    advantage = group_advantage(reward, groups)
    assert advantage.dtype == torch.float32
    for group in (3, 7):
        own = reward[groups == group].double()
        expected = (own - own.mean()) / (own.std(correction=1) + 1e-6)
        torch.testing.assert_close(advantage[groups == group].double(), expected, rtol=1e-6, atol=1e-6)
        centred = group_advantage(reward, groups, normalize_std=False)[groups == group].double()
        torch.testing.assert_close(centred, own - own.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.1, -0.7])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_equal_rewards_give_exactly_zero(value, size):
    """Also where the mean of equal numbers is not that number: 3 x 0.1."""
    reward = torch.full((size,), value)
    assert not group_advantage(reward, torch.zeros(size, dtype=torch.long)).any()


def test_no_sequences():
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="group_ids"):
        group_advantage(torch.zeros(3), torch.zeros(2, dtype=torch.long))


def test_overlong_penalty():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480])
    expected = torch.tensor([0.0, 0.0, -1 / 4096, -0.5, -1.0])
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096, 1.0), expected)
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096, 0.5), expected / 2)
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(lengths, 100, 0, 1.0)
