"""Plain-torch twin of the scan: any device, fp32 or fp64, differentiable. The oracle of the compiled one."""

import torch
from torch import Tensor

from megatron_fipo.ops.packed import sequence_of_token


def reference_discounted_scan(
    x_T: Tensor, cu_seqlens_S1: Tensor, gamma: float, *, reverse: bool = True, carry: Tensor | None = None
) -> Tensor:
    """The same result as `discounted_scan`, by doubling: after step k a token holds the sum over 2**k tokens.

    T log T operations, so no loop over tokens; gamma's powers are taken in double.
    """
    if not reverse:
        backwards_S1 = (cu_seqlens_S1[-1] - cu_seqlens_S1).flip(0)
        end = int(cu_seqlens_S1[-1])
        y_T = reference_discounted_scan(
            x_T[:end].flip(0), backwards_S1, gamma, carry=None if carry is None else carry.flip(0)
        )
        return torch.cat([y_T.flip(0), torch.zeros_like(x_T[end:])])

    num_tokens, num_sequences = x_T.shape[0], cu_seqlens_S1.shape[0] - 1
    sequence_T = sequence_of_token(cu_seqlens_S1, num_tokens)
    inside_T = sequence_T < num_sequences
    y_T = torch.where(inside_T, x_T, 0.0)
    distance = 1
    while distance < num_tokens:
        same_sequence = sequence_T[:-distance] == sequence_T[distance:]
        later = torch.where(same_sequence, gamma**distance * y_T[distance:], 0.0)
        y_T = y_T + torch.nn.functional.pad(later, (0, distance))
        distance *= 2
    if carry is not None and num_sequences:
        own_T = sequence_T.clamp(max=num_sequences - 1)
        steps_T = cu_seqlens_S1[1:][own_T] - torch.arange(num_tokens, device=x_T.device)
        powers_T = torch.pow(gamma, steps_T.double()).to(x_T.dtype)
        y_T = y_T + torch.where(inside_T, powers_T * carry[own_T].to(x_T.dtype), 0.0)
    return y_T
