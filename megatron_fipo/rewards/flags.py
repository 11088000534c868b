"""The --reward-* flags."""

import argparse

from megatron_fipo.rewards.pool import DEFAULT_TIMEOUT
from megatron_fipo.rewards.verify import RULES


def add_reward_flags(group: argparse._ArgumentGroup) -> None:
    """Add them to a parser's group."""
    group.add_argument(
        "--reward-overlong-buffer",
        type=int,
        metavar="TOKENS",
        help="last tokens of the length limit that cost reward; 0: off",
    )
    group.add_argument("--reward-overlong-penalty", type=float, help="reward lost at the length limit")
    group.add_argument(
        "--reward-overlong-filter",
        action="store_true",
        help="keep responses that ran into the length limit out of the loss",
    )
    group.add_argument(
        "--reward-function",
        nargs="+",
        default=[],
        metavar="MODULE:NAME[=WEIGHT]",
        help="reward: the weighted sum of these functions; 'source' is the verifier that a prompt's source names",
    )
    group.add_argument(
        "--reward-default-rule",
        choices=sorted(RULES),
        help="judges prompts whose source is missing or has no verifier",
    )
    group.add_argument(
        "--reward-timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="of one call of a verifier"
    )
    group.add_argument(
        "--reward-network", action="store_true", help="verifiers may open sockets and see the environment"
    )
