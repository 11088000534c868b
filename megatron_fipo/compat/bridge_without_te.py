"""Imports Megatron-Bridge 0.6.2 on machines without TransformerEngine.

One of its modules imports TransformerEngine whether it is there or not, for a class that only ever wraps
TransformerEngine's own layers. All its other modules ask whether TransformerEngine is there and build models of
Megatron's local layers if it is not: so no stand-in may be visible to them, and none is put into `sys.modules`.
"""

import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

_MODULE = "megatron.bridge.peft.lora_layers"
_IMPORT = "import transformer_engine.pytorch as te"
_STAND_IN = f"from {__name__} import transformer_engine_names as te"

# What the module's annotations name when it is imported; its code beyond that runs with TransformerEngine only.
transformer_engine_names = types.SimpleNamespace(ops=types.SimpleNamespace(Sequential=object))


class _Loader(SourceFileLoader):
    """Compiles the module with `_STAND_IN` for `_IMPORT`; nothing on disk changes, the bytecode cache included."""

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_source(fullname)
        assert source is not None and _IMPORT in source, f"{self.path} is not Megatron-Bridge 0.6.2's"
        return compile(source.replace(_IMPORT, _STAND_IN), self.path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def install() -> None:
    """Call before `megatron.bridge` is imported. Does nothing where TransformerEngine is installed."""
    if importlib.util.find_spec("transformer_engine") is None and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
