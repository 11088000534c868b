"""Builds the two extensions; everything else stands in pyproject.toml.

    pip install -e . --no-build-isolation --no-deps

`megatron_fipo._ops`   tensor operators on LibTorch's stable ABI: no Python, no ATen; loads on every torch from 2.10 on
`megatron_fipo._host`  pybind11 module for host code: build information, CPU capability, packing; no torch
"""

from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = str(Path(__file__).parent / "csrc")  # ninja compiles in the build folder: includes need the full path
HEADERS = [
    "csrc/core/fipo.h",
    "csrc/core/statistics.h",
    *(f"csrc/cpu/{name}" for name in ("capability.h", "kernels.h", "kernels.inc", "packed.h")),
    *(f"csrc/cpu/simd_{name}.h" for name in ("portable", "avx2", "avx512")),
]
TORCH_TARGET = (2, 10)
# The last two let the compiler turn selections into vector blends; arithmetic stays IEEE (no -ffast-math).
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]

operators = CppExtension(
    "megatron_fipo._ops",
    [
        "csrc/bindings/ops.cpp",
        "csrc/cpu/packed.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/capability.cpp",
        "csrc/cpu/kernels_portable.cpp",
        "csrc/cpu/kernels_avx2.cpp",
        "csrc/cpu/kernels_avx512.cpp",
    ],
    include_dirs=[CSRC],
    define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000")],
    extra_compile_args=FLAGS,
    depends=HEADERS,
    py_limited_api=True,
)

host = Extension(
    "megatron_fipo._host",
    ["csrc/bindings/host.cpp", "csrc/cpu/capability.cpp", "csrc/host/bindings.cpp", "csrc/host/packing.cpp"],
    include_dirs=[CSRC, pybind11.get_include()],
    define_macros=[
        ("MEGATRON_FIPO_FLAGS", '"' + " ".join(FLAGS) + '"'),
        ("MEGATRON_FIPO_TORCH_TARGET", '"{}.{}"'.format(*TORCH_TARGET)),
    ],
    extra_compile_args=FLAGS,
    depends=[*HEADERS, "csrc/host/bindings.h", "csrc/host/packing.h"],
    language="c++",
)

setup(ext_modules=[operators, host], cmdclass={"build_ext": BuildExtension})
