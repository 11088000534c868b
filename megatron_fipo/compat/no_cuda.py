"""Megatron-core and megatron.training 0.19.2 on a machine without CUDA. Never imported where CUDA is available.

Two kinds of patches keep the rest of the process untouched:
- a torch function that can only raise without CUDA gets a CPU meaning for the whole process;
- where Megatron's code would take a wrong turn (a literal device="cuda", no device counted, the CUDA random generator),
  the Megatron module concerned gets its own view of `torch` in place of torch itself.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_fipo.compat.patching import Patch, View

_CPU = torch.device("cpu")


class _Stream:
    """torch.cuda.Stream where there is one queue only. A class, because libraries annotate with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self  # of an event, Megatron asks for `synchronize` alone

    def synchronize(self) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


_FACTORIES = {name: _on_cpu(getattr(torch, name)) for name in ("zeros", "ones", "empty", "tensor", "empty_like")}
_TORCH = View(torch, **_FACTORIES)
# Set-up and checkpoints moreover count devices, pick one, and save and restore the generator.
_TORCH_FOR_SETUP = View(
    torch,
    **_FACTORIES,
    cuda=View(
        torch.cuda,
        device_count=lambda: 1,
        set_device=lambda device: None,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    ),
)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and sys._getframe(1).f_globals["__name__"].startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return tensor_type


def _maybe_move_tensor_to_cpu(_original: Callable[..., Any]) -> Callable[..., Any]:
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    return move


_ONLY_RAISES = "raises without CUDA; Megatron calls it on every device"
_LITERAL = 'creates tensors with a literal device="cuda" or in pinned memory'
_GENERATOR = "seeds, saves or restores the CUDA generator; on the CPU the CPU's generator takes its place"

PATCHES = (
    Patch("torch", "cuda.current_device", _ONLY_RAISES, _constant(lambda: _CPU)),
    Patch("torch", "cuda.synchronize", _ONLY_RAISES, _constant(lambda device=None: None)),
    Patch("torch", "cuda.Stream", _ONLY_RAISES, _constant(_Stream)),
    Patch("torch", "cuda.current_stream", _ONLY_RAISES, _constant(lambda device=None: _Stream())),
    Patch("torch", "cuda.default_stream", _ONLY_RAISES, _constant(lambda device=None: _Stream())),
    Patch("torch", "cuda.stream", "must accept the stand-in stream", _constant(lambda s: contextlib.nullcontext())),
    Patch("torch", "Tensor.cuda", _ONLY_RAISES, _constant(lambda self, *args, **kwargs: self)),
    Patch("torch", "Tensor.type", "Megatron's optimizers compare it with 'torch.cuda.FloatTensor'", _tensor_type),
    *(
        Patch(f"megatron.core.{module}", "torch", _LITERAL, _constant(_TORCH))
        for module in (
            "utils",
            "pipeline_parallel.schedules",
            "optimizer.optimizer",
            "optimizer.clip_grads",
            "optimizer.grad_scaler",
            "models.common.embeddings.rope_utils",
            "dist_checkpointing.exchange_utils",
            "dist_checkpointing.strategies.state_dict_saver",
        )
    ),
    *(
        Patch(f"megatron.training.{module}", "torch", _LITERAL, _constant(_TORCH_FOR_SETUP))
        for module in ("initialize", "training", "checkpointing", "utils.common_utils")
    ),
    Patch("megatron.core.tensor_parallel.random", "torch", _GENERATOR, _constant(_TORCH_FOR_SETUP)),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _GENERATOR,
        _constant(lambda *args, **kwargs: torch.get_rng_state()),
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _GENERATOR,
        _constant(lambda state, *args, **kwargs: torch.set_rng_state(state)),
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "skips CPU tensors, so that split sizes stay tensors and the all-to-all refuses them",
        _maybe_move_tensor_to_cpu,
    ),
    Patch(
        "megatron.training.initialize",
        "_compile_dependencies",
        "runs `make` inside site-packages for the pre-training data index, which we do not use",
        _constant(lambda: None),
    ),
    Patch(
        "megatron.training.arguments",
        "get_device_arch_version",
        "asks the GPU for its generation when TP or CP > 1",
        _constant(lambda: 10),
    ),
)
PATCHED = tuple((patch.module, patch.symbol) for patch in PATCHES)
