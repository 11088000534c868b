"""Builds the two extensions; everything else stands in pyproject.toml.

    pip install -e . --no-build-isolation --no-deps

`megatron_fipo._ops`   tensor operators on LibTorch's stable ABI: no Python, no ATen; loads on every torch from 2.10 on
`megatron_fipo._host`  pybind11 module for host code: build information, CPU capability, packing; no torch

The CUDA kernels are built in wherever nvcc is found, whichever torch is installed: they need none of its CUDA headers,
and the one binary loads on a torch with or without CUDA. MEGATRON_FIPO_CUDA=0 leaves them out, =1 insists on them.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CSRC = str(ROOT / "csrc")  # ninja compiles in the build folder: includes need the full path
HEADERS = [
    "csrc/core/fipo.h",
    "csrc/core/statistics.h",
    *(f"csrc/cpu/{name}" for name in ("capability.h", "kernels.h", "packed.h")),
    *(f"csrc/cpu/{name}.inc" for name in ("kernels", "kernels_scan", "kernels_loss")),
    *(f"csrc/cpu/simd_{name}.h" for name in ("portable", "avx2", "avx512")),
]
TORCH_TARGET = (2, 10)
# The last two let the compiler turn selections into vector blends; arithmetic stays IEEE (no -ffast-math).
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# A100, H100 and H200, B200; PTX of the last one serves what comes after.
CUDA_ARCHITECTURES = (80, 90, 100)
CUDA_SOURCES = ("fipo_loss", "discounted_scan", "scale_per_sequence", "runtime")


def find_nvcc() -> str | None:
    """The compiler to use, or None: MEGATRON_FIPO_CUDA=0, or left open and there is none."""
    wanted = os.environ.get("MEGATRON_FIPO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MEGATRON_FIPO_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes)) or shutil.which("nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "1" and nvcc is None:
        raise SystemExit("MEGATRON_FIPO_CUDA=1, but there is no nvcc: put it on PATH, or set CUDA_HOME to its toolkit")
    return nvcc


def ask_nvcc(nvcc: str, *arguments: str) -> str:
    return subprocess.run([nvcc, *arguments], check=True, capture_output=True, text=True).stdout


def cuda_architectures(nvcc: str) -> list[int]:
    offered = ask_nvcc(nvcc, "--list-gpu-code").split()
    usable = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in offered]
    if not usable:
        raise SystemExit(f"{nvcc} compiles for none of {CUDA_ARCHITECTURES}: it offers {' '.join(offered)}")
    return usable


def cuda_library_folders(nvcc: str) -> list[str]:
    """Where nvcc itself would look for the runtime to link."""
    plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=True).stderr
    return re.findall(r'"-L([^"]+)"', plan)


NVCC = find_nvcc()
ARCHITECTURES = cuda_architectures(NVCC) if NVCC else []


class Build(BuildExtension):
    """Compiles csrc/cuda with nvcc and links it into the operators."""

    def build_extensions(self):
        if NVCC:
            with ThreadPoolExecutor(len(CUDA_SOURCES)) as pool:
                operators.extra_objects = list(pool.map(self.compile_cuda, CUDA_SOURCES))
        super().build_extensions()

    def compile_cuda(self, name: str) -> str:
        source, target = ROOT / f"csrc/cuda/{name}.cu", Path(self.build_temp).absolute() / f"cuda/{name}.o"
        headers = [*Path(CSRC, "cuda").glob("*.*h"), *Path(CSRC, "core").glob("*.h"), __file__]
        if newer_group([str(source), *map(str, headers)], str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
            code.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
            command = [
                NVCC,
                "-std=c++17",
                "-O3",
                f"-I{CSRC}",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "--threads=0",
                *code,
            ]
            print(f"{NVCC}: {source.name} for {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}", flush=True)
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)


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
if NVCC:
    operators.sources.append("csrc/bindings/ops_cuda.cpp")
    operators.library_dirs += cuda_library_folders(NVCC)
    operators.extra_link_args += [
        # the symbol that gives the current stream is weak and lives behind libtorch: without this the linker drops
        # libtorch, and the symbol stays null even on a torch with CUDA
        *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"),
        # our own copy of the CUDA runtime, invisible to everybody else's
        *("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"),
    ]

host = Extension(
    "megatron_fipo._host",
    ["csrc/bindings/host.cpp", "csrc/cpu/capability.cpp", "csrc/host/bindings.cpp", "csrc/host/packing.cpp"],
    include_dirs=[CSRC, pybind11.get_include()],
    define_macros=[
        ("MEGATRON_FIPO_FLAGS", '"' + " ".join(FLAGS) + '"'),
        ("MEGATRON_FIPO_TORCH_TARGET", '"{}.{}"'.format(*TORCH_TARGET)),
        ("MEGATRON_FIPO_CUDA_ARCHITECTURES", ", ".join(map(str, [*ARCHITECTURES, 0]))),
    ],
    extra_compile_args=FLAGS,
    depends=[*HEADERS, "csrc/host/bindings.h", "csrc/host/packing.h"],
    language="c++",
)

setup(ext_modules=[operators, host], cmdclass={"build_ext": Build})
