"""Imports point downward: train -> capabilities -> loss, parallel -> ops."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_fipo"
# Each layer may import itself and what stands after it. Within a layer, modules may import each other.
LAYERS = (
    {"train", "evaluate"},
    {"session", "recorder", "report", "doctor", "megatron_rl"},
    {"inputs"},
    {"arguments", "arithmetic"},
    {"refused_flags", "validation"},
    {"settings"},
    {"rollout", "rewards", "checkpoint", "model", "data", "evaluation", "observe", "presets"},
    {"loss", "parallel", "quantization"},
    {"ops"},
    {"compat", "errors", "_ops", "_host", ""},
)
PURE = ("loss", "ops")  # tensor functions: torch, the compiled modules and each other only


def imports(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    modules = []
    for node in nodes:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def unit(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def layer(name: str) -> int:
    return next(i for i, members in enumerate(LAYERS) if name in members)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    assert {unit(path) for path in FILES} <= set().union(*LAYERS)


def test_imports_point_downward():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        for module in imports(path)
        if module.startswith("megatron_fipo.") and layer(unit(path)) > layer(module.split(".")[1])
    ]
    assert not wrong


def test_loss_and_operators_know_neither_megatron_nor_the_rest():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        if unit(path) in PURE
        for module in imports(path)
        if module.split(".")[0] in ("megatron", "transformers")
        or (module.startswith("megatron_fipo.") and module.split(".")[1] not in (*PURE, "_host"))
    ]
    assert not wrong


def test_global_arguments_are_read_nowhere():
    assert not [path for path in FILES if "get_args" in path.read_text()]


def test_files_are_short():
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400} == {}
