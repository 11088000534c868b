"""The released code's way to the future KL, written anew: future tokens in chunks, each a matrix product with a
triangle of powers of gamma. O(length^2) for every sequence."""

import torch
from torch import Tensor


def chunked_matmul_scan(x_BL: Tensor, gamma: float, chunk: int = 128) -> Tensor:
    """[B, L]: sum over k >= t of gamma^(k - t) x[k]."""
    length = x_BL.shape[1]
    positions_L = torch.arange(length, dtype=x_BL.dtype)
    rate = torch.tensor(gamma, dtype=x_BL.dtype)
    y_BL = torch.zeros_like(x_BL)
    for begin in range(0, length, chunk):
        distance_LC = positions_L[begin : begin + chunk] - positions_L[:, None]
        powers_LC = torch.where(distance_LC >= 0, torch.pow(rate, distance_LC.clamp(min=0)), 0.0)
        y_BL += x_BL[:, begin : begin + chunk] @ powers_LC.T
    return y_BL
