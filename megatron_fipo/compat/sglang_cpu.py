"""SGLang without its CUDA kernels: a stand-in for the package `sgl_kernel`, for servers on machines without CUDA.

SGLang imports names from it at module level on every device, and there is no CPU wheel. On the CPU path none of its
functions is called (Qwen2 and Qwen3, dense and MoE, torch_native attention); one that were would say so.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any


class _SglKernel(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0.0.0+cpu"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} needs a CUDA device")

        return missing


def install() -> None:
    """Put the stand-in in place. Every process of a server needs it before it imports SGLang."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    module = _SglKernel("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    sys.modules.setdefault("sgl_kernel", module)
