"""The module that takes the place of `transformer_engine_torch`: real where it computes, names only elsewhere."""

import enum
import types
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_fipo.compat.te_cpu import kernels, optimizer, quantization


class DType(enum.IntEnum):
    """As in common/include/transformer_engine/transformer_engine.h."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{name}" for i in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{i}" for i in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)


def _not_emulated(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"transformer_engine_torch.{name} needs a GPU: the stand-in does not emulate it")

    refuse.__name__ = name
    return refuse


_VALUES: dict[str, Any] = {
    "DType": DType,
    "FP8FwdTensors": FP8FwdTensors,
    "FP8BwdTensors": FP8BwdTensors,
    "NVTE_Fused_Attn_Backend": NVTE_Fused_Attn_Backend,
    "get_cudnn_version": lambda: 92400,
    "get_cublasLt_version": lambda: 130100,
    "get_num_cublas_streams": lambda: 4,
    "get_stream_priority_range": lambda device=None: (0, -1),
    "ubuf_built_with_mpi": lambda: False,
    # Imported by *, which does not ask the module for what it lacks.
    "layernorm_fwd": _not_emulated("layernorm_fwd"),
    "layernorm_bwd": _not_emulated("layernorm_bwd"),
    "device_supports_multicast": lambda device=None: False,
    **{
        function.__name__: function
        for function in (
            kernels.rmsnorm_fwd,
            kernels.rmsnorm_bwd,
            kernels.generic_gemm,
            kernels.fp8_transpose,
            kernels.bgrad_quantize,
            quantization.create_empty_quantized_tensor,
            quantization.quantize,
            quantization.dequantize,
            optimizer.multi_tensor_adam,
            optimizer.multi_tensor_scale,
            optimizer.multi_tensor_l2norm,
        )
    },
}


class _AnyMember(type):
    """Of an enumeration or class that is named while modules are imported, and used in what is not emulated."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        member = len(vars(cls))  # distinct, no more is asked for
        setattr(cls, name, member)
        return member


def module(package: str) -> types.ModuleType:
    """The stand-in, said to belong to `package`."""

    class Binding(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            value = _AnyMember(name, (), {}) if name[0].isupper() else _not_emulated(name)
            setattr(self, name, value)
            return value

    binding = Binding("transformer_engine_torch")
    binding.__package__ = package
    vars(binding).update(_VALUES)
    return binding
