"""Compiles native.c and calls it on torch tensors."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("native.c")


class Native:
    """The functions of native.c; `threads` as torch has them at the call."""

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise SystemExit("a C compiler is needed for the peers: set CC or install gcc")
        torch_lib = Path(torch.__file__).parent / "lib"
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "native.so"
            # the path makes it find the OpenMP that torch brings, so that both use the same threads
            link = ["-shared", "-fPIC", "-fopenmp", "-Wl,--disable-new-dtags", f"-Wl,-rpath,{torch_lib}"]
            subprocess.run([compiler, "-O3", "-march=native", str(_SOURCE), *link, "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def call(*arguments) -> None:
            """Tensors as pointers, int as int64, float as float; the number of threads comes last."""
            function(*map(_native, arguments), ctypes.c_int(torch.get_num_threads()))

        return call


def _native(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
