"""What nvcc makes of the CUDA kernels, on every architecture: no spills, no local memory, wide loads of tokens."""

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_emulator.emulated import CSRC, mutated_sources

from megatron_fipo import _host
from megatron_fipo.ops import library

ARCHITECTURES = (80, 90, 100)
SOURCES = ("fipo_loss", "discounted_scan", "scale_per_sequence")
ROWS = 4  # of a warp, one vector per lane each

NVCC = shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


CUOBJDUMP = find_cuobjdump()
pytestmark = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason="needs nvcc, and cuobjdump on PATH or from triton")


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled
    architecture: int
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.instructions)

    def problems(self) -> list[str]:
        """LDL and STL are spills and local memory; streams carry NA (no allocation in L1), nothing else does."""
        found = [line for line in self.instructions if re.search(r"\b(LDL|STL)\b", line)]
        aligned = re.search(r"fipo_kernel<[^,]+, true|scan_kernel<\w+, true>|scale_kernel<true>", self.name)
        if not aligned:
            return found
        wide = self.count(r"LDG\S*\.NA\S*\.(128|64)|LDG\S*\.(128|64)\S*\.NA")
        streaming = self.count(r"LDG\S*\.NA")
        streams, masks = (2, 1) if "fipo_kernel" in self.name else (1, 0)
        if wide != ROWS * streams:
            found.append(f"{wide} wide loads of token streams, not {ROWS * streams}")
        if streaming - wide != ROWS * masks:
            found.append(f"{streaming - wide} narrow loads of token streams, not {ROWS * masks} (the mask's words)")
        return found


def compile_kernels(folder: Path, source: str, architecture: int, csrc: Path = CSRC) -> list[Kernel]:
    """Alone, without a torch header."""
    cubin = folder / f"{source}_{architecture}.cubin"
    command = [NVCC, "-std=c++17", "-O3", f"-I{csrc}", "-cubin", f"-arch=sm_{architecture}"]
    subprocess.run([*command, str(csrc / f"cuda/{source}.cu"), "-o", str(cubin)], check=True, timeout=200)
    sass = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    names = subprocess.run(["c++filt"], input=sass, check=True, capture_output=True, text=True).stdout
    kernels = []
    for part in names.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        kernels.append(Kernel(name.strip(), architecture, [line for line in body.splitlines() if ";" in line]))
    return kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return [k for part in pool.map(lambda job: compile_kernels(folder, *job), jobs) for k in part]


def test_no_spills_and_wide_loads(kernels):
    # loss and aggregate for 2 dtypes, scan for 2 directions, scale: aligned or not each; and the fp64 scan
    assert len(kernels) == len(ARCHITECTURES) * (8 + 4 + 2 + 1)
    assert {(k.architecture, k.name): k.problems() for k in kernels if k.problems()} == {}


@pytest.mark.parametrize(
    ("source", "file", "mutation", "symptom"),
    [
        (
            "fipo_loss",
            "fipo_loss.cu",
            {"__launch_bounds__(kThreads, 4)": "__launch_bounds__(kThreads, 14)"},
            r"LDL|STL",
        ),
        (
            "discounted_scan",
            "token_streams.cuh",
            {"  if (kAligned)\n    unpack(load_stream(": "  if (kAligned && sizeof(T) == 1)\n    unpack(load_stream("},
            "0 wide loads",
        ),
    ],
    ids=["too few registers", "scalar loads"],
)
def test_a_bad_variant_is_noticed(tmp_path, source, file, mutation, symptom):
    csrc = mutated_sources(tmp_path, file, mutation)
    bad = [problem for k in compile_kernels(tmp_path, source, 90, csrc) for problem in k.problems()]
    assert any(re.search(symptom, problem) for problem in bad), bad


def test_built_in_architectures_and_stream_symbol():
    """The build of the environment has the kernels, and finds the current stream wherever torch has CUDA."""
    import torch

    assert _host.build_info()["cuda"] == tuple(f"sm_{architecture}" for architecture in ARCHITECTURES)
    binary = ctypes.CDLL(str(next(library._PACKAGE.glob("_ops*.so"))))
    assert bool(binary.megatron_fipo_finds_cuda_stream()) == (torch.version.cuda is not None)
