"""One table row per thing that Megatron needs changed: what, why, and how."""

import importlib
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """Replace `module.symbol` (dotted below the module, as in "Tensor.cuda") by `replace(original)`."""

    module: str
    symbol: str
    why: str
    replace: Callable[[Any], Any]

    def target(self) -> tuple[Any, str]:
        """The object that holds the symbol, and the symbol's name there.

        Raises:
            AttributeError, ImportError: this Megatron does not have it (the pinned version does).
        """
        holder: Any = importlib.import_module(self.module)
        *path, name = self.symbol.split(".")
        for part in path:
            holder = getattr(holder, part)
        if not hasattr(holder, name):
            raise AttributeError(f"{self.module} has no {self.symbol}: {self.why}")
        return holder, name


class View(types.ModuleType):
    """A module with some attributes replaced, everything else looked up in the original."""

    def __init__(self, original: types.ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def apply(patches: Iterable[Patch]) -> None:
    """Apply patches in order; a missing symbol raises before anything is replaced."""
    targets = [(patch, *patch.target()) for patch in patches]
    for patch, holder, name in targets:
        setattr(holder, name, patch.replace(getattr(holder, name)))
