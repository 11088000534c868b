"""Rewards to advantages, DAPO's way (arXiv 2503.14476), which FIPO uses unchanged."""

import torch
from torch import Tensor


def group_advantage(reward_S: Tensor, group_ids_S: Tensor, *, normalize_std: bool = True) -> Tensor:
    """fp32 [S]: (R - mean of the group) / (std of the group + 1e-6), std unbiased (ddof 1).

    reward_S: [S], any float dtype. group_ids_S: [S] int, the prompt of each response.
    A group of equal rewards, also a group of one, gives 0. normalize_std=False leaves out the division.
    """
    if reward_S.dim() != 1 or group_ids_S.shape != reward_S.shape:
        raise ValueError(
            f"reward and group_ids must both have shape [S], not {list(reward_S.shape)} and {list(group_ids_S.shape)}"
        )
    reward_S = reward_S.double()
    groups, group_S = torch.unique(group_ids_S, return_inverse=True)

    def group_sum(values_S: Tensor) -> Tensor:
        return values_S.new_zeros(groups.shape[0]).index_add(0, group_S, values_S)

    size_G = group_sum(torch.ones_like(reward_S))
    deviation_S = reward_S - (group_sum(reward_S) / size_G)[group_S]
    lowest_G = reward_S.new_full((groups.shape[0],), torch.inf).scatter_reduce(0, group_S, reward_S, "amin")
    highest_G = reward_S.new_full((groups.shape[0],), -torch.inf).scatter_reduce(0, group_S, reward_S, "amax")
    # decided by the rewards themselves: the mean of equal rewards may be off by a rounding, which the std would blow up
    deviation_S = torch.where((highest_G > lowest_G)[group_S], deviation_S, 0.0)
    if not normalize_std:
        return deviation_S.float()
    std_G = (group_sum(deviation_S.square()) / (size_G - 1).clamp(min=1)).sqrt()
    return (deviation_S / (std_G + 1e-6)[group_S]).float()


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, penalty: float) -> Tensor:
    """fp32, like lengths: min(-(length - (max_length - buffer)) / buffer * penalty, 0), to be added to the reward.

    Lengths and buffer in response tokens; -penalty is reached at max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must lie in 1..{max_length} (max_length), not {buffer}")
    excess = lengths.double() - (max_length - buffer)
    return (-excess / buffer * penalty).clamp(max=0.0).float()
