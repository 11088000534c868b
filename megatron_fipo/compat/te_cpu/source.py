"""TransformerEngine's Python half, edited while it is imported: no CUDA libraries, no CUDA devices, no refusals."""

import importlib.machinery
import re
from collections.abc import Sequence
from types import CodeType, ModuleType

_ROOT = "transformer_engine.pytorch"
# In every module below it: literal devices.
_DEVICES = (
    (re.compile(r'torch\.device\("cuda"(, torch\.cuda\.current_device\(\))?\)'), 'torch.device("cpu")'),
    (re.compile(r'(\bdevice(: [^=\n]+)? ?= ?)"cuda"'), r'\1"cpu"'),
    (re.compile(r'(if device is not None else )"cuda"'), r'\1"cpu"'),
    (re.compile(r'(device\.type != )"cuda"'), r'\1"cpu"'),
    (re.compile(r"torch\.Tensor\(\)\.cuda\(\)"), "torch.Tensor()"),
)
# Module -> what is replaced in it, and must be there.
_EDITS = {
    "transformer_engine.common": (('if "NVTE_PROJECT_BUILDING" not in os.environ or', "if False and"),),
    _ROOT: (('load_framework_extension("torch")', "None"),),
    f"{_ROOT}.module.base": (("if not torch.cuda.is_available():", "if False:"), ("if not inp.is_cuda:", "if False:")),
}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # neither from a .pyc nor into one
        source = self.get_source(fullname)
        assert source is not None
        if fullname.startswith(_ROOT):
            for pattern, replacement in _DEVICES:
                source = pattern.sub(replacement, source)
        for old, new in _EDITS.get(fullname, ()):
            if old not in source:
                raise ImportError(f"{fullname} has no {old!r}: the stand-in is for another TransformerEngine")
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds the modules that are edited; for sys.meta_path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _EDITS and not fullname.startswith(_ROOT + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
