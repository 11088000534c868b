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


class FP8FwdTensors(enum.IntEnum):
    """Slots of a layer's forward tensors, as in pytorch/csrc/common.h."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """Slots of a layer's gradients."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Kept for its members' names: there is no fused attention here."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


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
    "multi_tensor_scale_tensor": optimizer.multi_tensor_scale,  # by a number that is on the device
    "device_supports_multicast": lambda device=None: False,
    # Imported by *, which does not ask the module for what it lacks.
    "layernorm_fwd": _not_emulated("layernorm_fwd"),
    "layernorm_bwd": _not_emulated("layernorm_bwd"),
    **{
        function.__name__: function
        for function in (
            kernels.rmsnorm_fwd,
            kernels.rmsnorm_bwd,
            kernels.generic_gemm,
            kernels.fp8_transpose,
            kernels.swap_first_dims,
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
