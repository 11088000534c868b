"""Packed sequences: S sequences lie back to back in T tokens, sequence s in [cu_seqlens[s], cu_seqlens[s + 1]).

Tokens from cu_seqlens[-1] to T belong to no sequence (padding of the pack).
"""

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens_S1: Tensor) -> None:
    """Raises ValueError unless int32 or int64 [S + 1]."""
    if cu_seqlens_S1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens_S1.dtype}")
    if cu_seqlens_S1.dim() != 1 or cu_seqlens_S1.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape [S + 1], not {list(cu_seqlens_S1.shape)}")


def check_offsets(cu_seqlens_S1: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless 0 = first <= ... <= last <= num_tokens.

    The values are not read on an accelerator (it would wait) or under torch.compile. The operators on CPU check on
    their own, for less than these few calls cost.
    """
    if cu_seqlens_S1.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens_S1[0]), int(cu_seqlens_S1[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, not {first}")
    if bool((cu_seqlens_S1[1:] < cu_seqlens_S1[:-1]).any()):
        raise ValueError("cu_seqlens must not decrease")
    if last > num_tokens:
        raise ValueError(f"cu_seqlens ends at {last}, beyond the {num_tokens} tokens given")


def sequence_of_token(cu_seqlens_S1: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence of each token; S for tokens past the end."""
    tokens_T = torch.arange(num_tokens, device=cu_seqlens_S1.device, dtype=cu_seqlens_S1.dtype)
    return torch.bucketize(tokens_T, cu_seqlens_S1[1:], right=True)


def expand_to_tokens(values_S: Tensor, cu_seqlens_S1: Tensor, num_tokens: int) -> Tensor:
    """[T]: each sequence's value at each of its tokens; 0 past the end."""
    ends = cu_seqlens_S1[1:]
    lengths = torch.cat([ends - cu_seqlens_S1[:-1], num_tokens - cu_seqlens_S1[-1:]])
    return torch.repeat_interleave(torch.cat([values_S, values_S.new_zeros(1)]), lengths, output_size=num_tokens)


def sum_per_sequence(values_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """fp64 [S]: the sum over each sequence's tokens; tokens past the end are left out."""
    num_sequences = cu_seqlens_S1.shape[0] - 1
    sums = torch.zeros(num_sequences + 1, dtype=torch.float64, device=values_T.device)
    return sums.index_add(0, sequence_of_token(cu_seqlens_S1, values_T.shape[0]), values_T.double())[:num_sequences]
