"""Rewards to advantages.

    group          (R - mean) / (std + 1e-6) of the group        GRPO (arXiv 2402.03300), DAPO (2503.14476), FIPO
    group-mean     R - mean of the group                         Dr. GRPO (2503.20783)
    leave-one-out  R - mean of the others of the group           RLOO (2402.14740)
    batch          (G - mean) / (std + 1e-6) of the step         REINFORCE++ (2501.03262)

`batch` is by tokens: G[t] is the discounted sum of the rewards from response token t on, where the last one has R, and
mean and std are over all response tokens of the step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.loss.kl import check_estimator

GROUP_ADVANTAGES = ("group", "group-mean", "leave-one-out")
ADVANTAGES = (*GROUP_ADVANTAGES, "batch")

STD_FLOOR = 1e-6  # added to every std


@dataclass(frozen=True)
class AdvantageConfig:
    """kind: one of ADVANTAGES. gamma: discount per token of the returns, for "batch".

    kl_weight, kl_estimator: each response token's reward is lowered by kl_weight times its KL estimate (see kl.py)
    between the policy that sampled and the reference; 0 leaves it out. A group's advantages see a response's sum.
    Raises ValueError for values out of range.
    """

    kind: str = "group"
    gamma: float = 1.0
    kl_weight: float = 0.0
    kl_estimator: str = "k1"

    def __post_init__(self) -> None:
        if self.kind not in ADVANTAGES:
            raise ValueError(f"kind must be one of {', '.join(ADVANTAGES)}, not {self.kind!r}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be a finite number from 0 up, not {self.kl_weight}")
        check_estimator(self.kl_estimator)


def group_advantage(reward_S: Tensor, group_ids_S: Tensor, kind: str = "group") -> Tensor:
    """fp32 [S]: the reward relative to its group, by one of GROUP_ADVANTAGES; std is unbiased (ddof 1).

    reward_S: [S], any float dtype. group_ids_S: [S] int, the prompt of each response.
    A group of equal rewards, also a group of one, gives 0.
    """
    if kind not in GROUP_ADVANTAGES:
        raise ValueError(f"kind must be one of {', '.join(GROUP_ADVANTAGES)}, not {kind!r}")
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
    others_G = (size_G - 1).clamp(min=1)
    if kind == "group":
        std_G = (group_sum(deviation_S.square()) / others_G).sqrt()
        return (deviation_S / (std_G + STD_FLOOR)[group_S]).float()
    if kind == "leave-one-out":  # R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
        return (deviation_S * (size_G / others_G)[group_S]).float()
    return deviation_S.float()


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, penalty: float) -> Tensor:
    """fp32, like lengths: min(-(length - (max_length - buffer)) / buffer * penalty, 0), to be added to the reward.

    Lengths and buffer in response tokens; -penalty is reached at max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must lie in 1..{max_length} (max_length), not {buffer}")
    excess = lengths.double() - (max_length - buffer)
    return (-excess / buffer * penalty).clamp(max=0.0).float()
