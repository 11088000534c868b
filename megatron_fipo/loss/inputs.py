"""Checks of what a loss is given, shared by the losses; each raises ValueError naming the argument."""

import torch
from torch import Tensor

BACKENDS = ("compiled", "torch")


def check_token_tensors(
    logp_T: Tensor, old_logp_T: Tensor, response_mask_T: Tensor, token_weight_T: Tensor | None, backend: str
) -> None:
    """Dtypes and shapes of what there is for each token."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    allowed = (torch.float32, torch.bfloat16) if backend == "compiled" else (torch.float32, torch.float64)
    if logp_T.dim() != 1 or logp_T.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"logp_T must be {names} of shape [T], not {logp_T.dtype} {list(logp_T.shape)}")
    if old_logp_T.dtype != logp_T.dtype:
        raise ValueError(f"old_logp_T must have logp_T's dtype {logp_T.dtype}, not {old_logp_T.dtype}")
    if response_mask_T.dtype != torch.bool:
        raise ValueError(f"response_mask_T must be bool, not {response_mask_T.dtype}")
    like_logp = {"old_logp_T": old_logp_T, "response_mask_T": response_mask_T, "token_weight_T": token_weight_T}
    for name, tensor in like_logp.items():
        if tensor is not None and tensor.shape != logp_T.shape:
            raise ValueError(f"{name} must have logp_T's shape {list(logp_T.shape)}, not {list(tensor.shape)}")


def check_sequence_values(num_sequences: int, num_tokens: int, advantage: Tensor, **values_S: Tensor | None) -> None:
    """The advantage, [S] or [T], and what else there is for each sequence, by its argument's name."""
    if advantage.shape not in ((num_sequences,), (num_tokens,)):
        raise ValueError(f"advantage must have shape [{num_sequences}] or [{num_tokens}], not {list(advantage.shape)}")
    for name, tensor in values_S.items():
        if tensor is not None and tensor.shape != (num_sequences,):
            raise ValueError(f"{name} must have shape [{num_sequences}], not {list(tensor.shape)}")
