"""TransformerEngine on a machine without a GPU, for tests and studies of FP8: a stand-in for its compiled half.

TransformerEngine is Python (modules, recipes, quantised tensors) over `transformer_engine_torch`, compiled for CUDA.
`install` puts an emulation in the place of the compiled half, so that Megatron's real TransformerEngine layers run,
forward and backward, in BF16 and in FP8. All that the Python half decides is then what it is on a GPU: names, which
tensor is quantised along which axis in which block, which copy enters which GEMM, what has to be padded.

What an emulation cannot say: speed, the accumulation inside tensor cores (here fp64), fused attention, grouped GEMMs,
user buffers. A function that is not emulated raises NotImplementedError with its name.

It is for those who ask for it: nothing here is imported by training. Where CUDA works or TransformerEngine's own
compiled half is installed, `install` refuses.

    python -m megatron_fipo.compat.te_cpu [--gpu blackwell] MODULE [ARGUMENTS]     runs MODULE with the stand-in
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from megatron_fipo.compat.patching import Patch, apply

GPUS = {"hopper": (9, 0), "blackwell": (10, 0)}
"""The GPUs that it can pass for, and their compute capability. MXFP8 needs Blackwell."""

_capability = GPUS["hopper"]


def is_installed() -> bool:
    """True in a process that asked for the stand-in."""
    return getattr(sys.modules.get("transformer_engine_torch"), "__package__", None) == __name__


def install(gpu: str = "hopper") -> None:
    """Make `import transformer_engine.pytorch` work. Call before anything imports TransformerEngine or Megatron.

    Args:
        gpu: what to pass for, one of `GPUS`: TransformerEngine refuses recipes that a GPU does not have.

    Raises:
        RuntimeError: there is a GPU or a whole TransformerEngine, or TransformerEngine or Megatron is imported already.
        ModuleNotFoundError: TransformerEngine's Python half is not installed.
    """
    if not is_installed():
        _check_environment()
        from megatron_fipo.compat.te_cpu import binding, source

        sys.modules["transformer_engine_torch"] = binding.module(__name__)
        sys.meta_path.insert(0, source.Finder())
        apply(PATCHES)
    pass_for(gpu)


def pass_for(gpu: str) -> None:
    """Pass for another of `GPUS` from here on; TransformerEngine forgets what it has found out."""
    global _capability
    _capability = GPUS[gpu]
    utils, quantization = (sys.modules.get(f"transformer_engine.pytorch.{name}") for name in ("utils", "quantization"))
    if utils is not None and quantization is not None:
        utils._get_device_compute_capability.cache_clear()
        utils.is_non_tn_fp8_gemm_supported.cache_clear()
        for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            assert hasattr(quantization, name), f"TransformerEngine has no {name}"
            setattr(quantization, name, None)


def capability() -> tuple[int, int]:
    """The compute capability that the stand-in passes for."""
    return _capability


def _check_environment() -> None:
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: use TransformerEngine itself")
    for name in ("transformer_engine", "megatron.core"):
        if name in sys.modules:
            raise RuntimeError(f"{name} is imported already: call te_cpu.install() first")
    if importlib.util.find_spec("transformer_engine_torch") is not None:
        raise RuntimeError("TransformerEngine's own compiled half is installed: leave the stand-in out")
    if importlib.util.find_spec("transformer_engine") is None:
        raise ModuleNotFoundError("TransformerEngine is not installed: run 'make te-cpu' and use its python")


def _properties(_original: Any) -> Any:
    def properties(device: Any = None) -> types.SimpleNamespace:
        major, minor = _capability
        return types.SimpleNamespace(
            name="stand-in", major=major, minor=minor, multi_processor_count=132, total_memory=80 << 30
        )

    return properties


class _Done:
    """The handle of collectives that have ended."""

    def wait(self) -> None: ...


def _coalescing_manager(original: Any) -> Any:
    @contextlib.contextmanager
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        if device is None:  # Megatron's calls
            with original(group, device, async_ops) as handle:
                yield handle
        else:
            yield _Done()

    return manager


_ASKED = "TransformerEngine asks for it, and it raises without CUDA"
PATCHES = (
    Patch("torch", "cuda.current_device", _ASKED, lambda original: lambda: torch.device("cpu")),
    Patch("torch", "cuda.get_device_capability", _ASKED, lambda original: lambda device=None: _capability),
    Patch("torch", "cuda.get_device_properties", _ASKED, _properties),
    Patch("torch", "cuda.is_current_stream_capturing", _ASKED, lambda original: lambda: False),
    Patch("torch", "cuda.nvtx.range_push", _ASKED, lambda original: lambda message: None),
    Patch("torch", "cuda.nvtx.range_pop", _ASKED, lambda original: lambda: None),
    Patch("torch.distributed", "_coalescing_manager", "gloo cannot merge collectives", _coalescing_manager),
)
