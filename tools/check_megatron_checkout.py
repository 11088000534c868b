"""What a Megatron-LM checkout changed of that on which megatron_fipo.megatron_rl relies.

python tools/check_megatron_checkout.py PATH [--json FILE]

Reads the checkout's source without importing it and compares it with tools/data/megatron_rl_contract.json, recorded at
the commit named there. One line for each symbol: same, changed (how) or missing. Exit code 0 if all are the same, 1 if
not, 2 if PATH is no checkout.
"""

import argparse
import ast
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

CONTRACT = Path(__file__).parent / "data" / "megatron_rl_contract.json"
Definition = ast.FunctionDef | ast.ClassDef | ast.Module


@dataclass(frozen=True)
class Finding:
    """verdict: "same", "changed" or "missing"; how: what differs, empty if nothing does."""

    file: str
    symbol: str
    verdict: str
    how: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.file}: {self.symbol}" + (f" - {self.how}" if self.how else "")


def parameters(function: Definition) -> list[str]:
    """Names in order, with "=default" where there is one and "*" before those that must be named."""
    spec = function.args
    names = [argument.arg for argument in spec.posonlyargs + spec.args]
    defaults: list[ast.expr | None] = [None] * (len(names) - len(spec.defaults)) + list(spec.defaults)
    keywords = [argument.arg for argument in spec.kwonlyargs]
    every = [*zip(names, defaults, strict=True), *zip(keywords, spec.kw_defaults, strict=True)]
    texts = [name if default is None else f"{name}={ast.unparse(default)}" for name, default in every]
    return texts[: len(names)] + (["*"] if keywords else []) + texts[len(names) :]


def names_inside(definition: Definition) -> list[str]:
    """Every name that is bound in it: assigned, imported or a parameter."""
    bound = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    return sorted(bound)


def returned(function: Definition) -> list[str]:
    """The elements of the tuple that its last return statement gives; a number for what is no plain name."""
    value = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value][-1]
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return [e.id if isinstance(e, ast.Name) else f"[{i}]" for i, e in enumerate(elements)]


def fields(definition: Definition) -> list[str]:
    """Annotated fields of a dataclass."""
    return [n.target.id for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def flags(module: Definition) -> list[str]:
    """Command-line flags that are added anywhere in the file."""
    calls = [n for n in ast.walk(module) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    added = [n.args[0] for n in calls if n.func.attr == "add_argument" and n.args]
    return sorted({n.value for n in added if isinstance(n, ast.Constant) and str(n.value).startswith("--")})


# What can be recorded of a symbol. Of names and flags only those recorded must be there; the rest must be equal.
ASPECTS: dict[str, Callable[[Definition], list[str]]] = {
    "parameters": parameters,
    "returned": returned,
    "fields": fields,
    "names": names_inside,
    "flags": flags,
}
SUBSETS = ("names", "flags")


def find(module: ast.Module, symbol: str) -> Definition | None:
    """A top-level function or class, or the module itself if symbol is "module"."""
    if symbol == "module":
        return module
    definitions = [n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == symbol]
    return definitions[-1] if definitions else None


def compare(aspect: str, recorded: list[str], seen: list[str]) -> str:
    """In words; empty if nothing that matters differs."""
    gone = [item for item in recorded if item not in seen]
    new = [] if aspect in SUBSETS else [item for item in seen if item not in recorded]
    parts = [f"{aspect}: gone {', '.join(gone)}"] if gone else []
    parts += [f"{aspect}: new {', '.join(new)}"] if new else []
    if not parts and aspect not in SUBSETS and recorded != seen:
        parts = [f"{aspect}: another order: {', '.join(seen)}"]
    return "; ".join(parts)


def check(checkout: Path, contract: dict) -> list[Finding]:
    """Every recorded symbol against the checkout's source."""
    findings = []
    for file, symbols in contract["files"].items():
        path = checkout / file
        module = ast.parse(path.read_text()) if path.is_file() else None
        for symbol, aspects in symbols.items():
            definition = find(module, symbol) if module else None
            if definition is None:
                how = "the file is not there" if module is None else "it is not defined there"
                findings.append(Finding(file, symbol, "missing", how))
                continue
            differences = [compare(name, recorded, ASPECTS[name](definition)) for name, recorded in aspects.items()]
            how = "; ".join(filter(None, differences))
            findings.append(Finding(file, symbol, "changed" if how else "same", how))
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="root of a Megatron-LM checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well")
    args = parser.parse_args()
    if not (args.checkout / "megatron").is_dir():
        print(f"{args.checkout} is no Megatron-LM checkout: it has no folder 'megatron'", file=sys.stderr)
        return 2
    contract = json.loads(CONTRACT.read_text())
    findings = check(args.checkout, contract)
    print(f"{args.checkout} against {contract['repository']} at {contract['commit'][:12]} ({contract['date']})")
    print(*findings, sep="\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    return 0 if all(finding.verdict == "same" for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
