"""The functions on lists of tensors behind TransformerEngine's FusedAdam and Megatron's gradient clipping, in fp32.

Arguments are those of the functions of the same names in pytorch/csrc/extensions/pybind.cpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TensorLists = Sequence[Sequence[Tensor]]


def multi_tensor_adam(
    chunk_size: int, noop: Tensor, lists: TensorLists, lr: float, beta1: float, beta2: float, epsilon: float,
    step: int, decoupled: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Adam on [gradients, parameters, first moments, second moments]; `decoupled` means AdamW."""
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, moment1, moment2 in zip(*lists, strict=True):
        g, p = gradient.float(), parameter.float()
        if not decoupled:
            g = g + weight_decay * p
        moment1.copy_(beta1 * moment1.float() + (1 - beta1) * g)
        moment2.copy_(beta2 * moment2.float() + (1 - beta2) * g * g)
        update = (moment1 / correction1) / ((moment2 / correction2).sqrt() + epsilon)
        if decoupled:
            update = update + weight_decay * p
        parameter.copy_(p - lr * update)


def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: TensorLists, scale: float | Tensor) -> None:
    """Second list = first list * scale; `noop` becomes 1 where a value is not finite."""
    for source, target in zip(*lists, strict=True):
        if not source.isfinite().all():
            noop.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, lists: TensorLists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors, fp32 [1], and with `per_tensor` those of each."""
    norms = torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in lists[0]])
    return torch.linalg.vector_norm(norms)[None], norms if per_tensor else norms.new_empty(0)
