"""The only place that patches Megatron: without CUDA or TransformerEngine, in its FP8 recipes, for safe checkpoints."""

import functools
import logging
import os
import warnings

import torch

from megatron_fipo.compat.patching import Patch, apply

# What is absent and what takes its place is `doctor`'s to say, once; Megatron says it in a dozen warnings per process.
_ABSENT = "(?s).*(Transformer Engine|transformer-engine|Apex|experimental|Could not determine (rank|world size))"
warnings.filterwarnings("ignore", _ABSENT, UserWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def needed_patches() -> tuple[Patch, ...]:
    """The patches that this machine needs (imports Megatron); `install` applies them, `doctor` lists them."""
    from megatron_fipo.compat import checkpoints, fp8_recipe, no_te

    patches: tuple[Patch, ...] = checkpoints.PATCHES
    if not torch.cuda.is_available():
        from megatron_fipo.compat import no_cuda

        patches += no_cuda.PATCHES
    if no_te.is_needed():
        patches += no_te.PATCHES
    if fp8_recipe.is_needed():
        patches += fp8_recipe.PATCHES
    return patches


@functools.cache
def install() -> None:
    """Make Megatron work on this machine. Call before Megatron and CUDA are used; further calls do nothing."""
    # Up to Hopper, kernels of tensor and context parallelism overlap with communication only if they start in order;
    # Megatron insists, and CUDA reads it when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    apply(needed_patches())
