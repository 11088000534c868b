"""Says what is installed, what a training run will use, what is missing and how to get it.

    python -m megatron_fipo.doctor [--json FILE]

Exit code 1 if training cannot run, else 0. Works in a half-empty environment: nothing outside the standard library is
imported before it was looked for.
"""

import argparse
import importlib
import logging
import platform
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from megatron_fipo.observe.environment import cpu_model, installed_version
from megatron_fipo.observe.run_folder import write_json

PROJECT = Path(__file__).resolve().parents[1]
SET_UP = "make env"
# What the package's imports and patches need from Megatron is found out by importing the program itself.
PROGRAM = "megatron_fipo.train"


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `fix` is a command or an instruction; a "problem" keeps training from running."""

    section: str
    name: str
    status: str  # "ok", "absent" (optional and not there), "warning", "problem"
    value: str
    fix: str = ""


@dataclass(frozen=True)
class OptionalPackage:
    module: str
    distributions: tuple[str, ...]  # names under which wheels of it are known
    use: str
    fix: str = ""


TRANSFORMER_ENGINE = OptionalPackage(
    "transformer_engine",
    ("transformer_engine", "transformer_engine_cu13", "transformer_engine_cu12"),
    "fused layers and FP8 on a GPU",
    "an NGC PyTorch container, or pip install --no-build-isolation 'transformer_engine[pytorch]'",
)
SGLANG = OptionalPackage("sglang", ("sglang",), "--rollout-engine sglang, for long responses", "make sglang")
OPTIONAL = (
    OptionalPackage("apex", ("apex",), "fused optimizer where TransformerEngine is missing"),
    OptionalPackage("flash_attn", ("flash_attn",), "attention kernels inside TransformerEngine"),
    OptionalPackage("modelopt", ("nvidia-modelopt",), "offline quantisation, not used by training"),
    OptionalPackage(
        "megatron.bridge", ("megatron-bridge",), "conversion of other model families, not used by training"
    ),
)


def diagnose() -> list[Check]:
    """All checks, in the order in which they are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns while it is imported of what the checks say better
        checks = [*_installed()]
        torch, error = _import("torch")
        if torch is None:
            return [*checks, Check("Will be used", "torch", "problem", f"does not import: {error}", SET_UP)]
        return [*checks, *_optional(torch), *_device(torch), *_operators(torch), *_megatron(torch)]


def _installed() -> Iterator[Check]:
    section = "Installed"
    new_enough = sys.version_info >= (3, 12)
    fix = "" if new_enough else "install Python 3.12, then " + SET_UP
    yield Check(section, "python", "ok" if new_enough else "problem", platform.python_version(), fix)
    if find_spec("packaging") is None:
        yield Check(section, "packaging", "problem", "not installed, so no version was checked", SET_UP)
        return
    from packaging.requirements import Requirement

    for text in _declared_requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None:
            yield Check(section, requirement.name, "problem", "not installed", SET_UP)
        elif requirement.specifier.contains(version, prereleases=True):
            yield Check(section, requirement.name, "ok", version)
        else:
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check(section, requirement.name, "warning", f"{version}, tested with {requirement.specifier}", fix)


def _declared_requirements() -> list[str]:
    """Requirements as this package declares them: of the checkout, or of the installed copy."""
    pyproject = PROJECT / "pyproject.toml"
    if pyproject.exists():
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return metadata.requires("megatron-fipo") or []


def _optional(torch: ModuleType) -> Iterator[Check]:
    from megatron_fipo.compat import te_cpu

    section = "Optional"
    package = TRANSFORMER_ENGINE
    version = _version(package)
    if version is None:
        status = "warning" if torch.cuda.is_available() else "absent"
        yield Check(section, package.module, status, package.use, package.fix)
    else:
        _, error = _import("transformer_engine.pytorch")
        if error:
            # Some of Megatron's modules ask for the outer package only, others for its torch part: they disagree.
            value = f"{version}, half installed: its torch part fails ({error}), which breaks Megatron"
            wheels = " ".join(name for name in package.distributions if installed_version(name))
            remove = f"pip uninstall {wheels}" if wheels else f"take {package.module} off PYTHONPATH"
            fix = f"{remove}; or on a GPU: {package.fix}"
            yield Check(section, package.module, "problem", value, fix)
        elif te_cpu.is_installed():
            yield Check(
                section, package.module, "warning", f"{version}, emulated on the CPU: for tests and studies only"
            )
        else:
            yield Check(section, package.module, "ok", version)
    yield _sglang(torch)
    for package in OPTIONAL:
        version = _version(package)
        if version is None:
            yield Check(section, package.module, "absent", package.use, package.fix)
        else:
            yield Check(section, package.module, "ok", version)


def _sglang(torch: ModuleType) -> Check:
    section, version = "Optional", _version(SGLANG)
    if version is None:
        return Check(section, "sglang", "absent", SGLANG.use, SGLANG.fix)
    from packaging.version import Version

    from megatron_fipo.rollout.sglang.flags import OLDEST_VERSION

    if version == "unknown version" or Version(version) < Version(OLDEST_VERSION):
        return Check(section, "sglang", "warning", f"{version}, refused: it has published holes", SGLANG.fix)
    if torch.cuda.is_available() and find_spec("sgl_kernel") is None:
        return Check(section, "sglang", "warning", f"{version}, but sgl_kernel is missing", SGLANG.fix)
    device = "CUDA" if torch.cuda.is_available() else "the CPU, without SGLang's kernels"
    return Check(section, "sglang", "ok", f"{version}, for --rollout-engine sglang; servers run on {device}")


def _version(package: OptionalPackage) -> str | None:
    """Version, "unknown version" for a module without metadata, None if it is not there."""
    parent = package.module.rpartition(".")[0]
    if (parent and find_spec(parent) is None) or find_spec(package.module) is None:
        return None
    versions = (installed_version(name) for name in package.distributions)
    return next((version for version in versions if version), "unknown version")


def _device(torch: ModuleType) -> Iterator[Check]:
    build = f"torch {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'} build"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("Will be used", "device", "ok", f"{len(names)} x {names[0]}, NCCL ({build})")
    elif Path("/dev/nvidiactl").exists():
        value = f"CPU: this machine has an NVIDIA GPU that torch cannot use ({build})"
        yield Check("Will be used", "device", "warning", value, "compare the driver in nvidia-smi with torch's CUDA")
    else:
        yield Check("Will be used", "device", "ok", f"CPU, gloo: {cpu_model()} ({build})")


def _operators(torch: ModuleType) -> Iterator[Check]:
    section, name = "Will be used", "compiled operators"
    host, error = _import("megatron_fipo._host")
    if host is not None:
        _, error = _import("megatron_fipo.ops")
    if host is None or error:
        yield Check(section, name, "problem", f"do not load: {error}", SET_UP)
        return
    build, cpu = host.build_info(), host.cpu_capability()
    cuda = "with CUDA kernels" if build["cuda"] else "without CUDA kernels"
    value = f"{cpu['selected']} on a CPU that offers {cpu['offered']}, {cuda}, {build['compiler']}"
    slow = torch.cuda.is_available() and not build["cuda"]
    yield Check(section, name, "warning" if slow else "ok", value, SET_UP if slow else "")


def _megatron(torch: ModuleType) -> Iterator[Check]:
    """What Megatron picks on this machine, and whether everything is there that we patch or use in it."""
    section, contract = "Will be used", "Megatron contract"
    compat, error = _import("megatron_fipo.compat")
    core, error = _import("megatron.core") if compat else (None, error)
    optimizer, error = _import("megatron.core.optimizer") if core else (None, error)
    if compat is None or core is None or optimizer is None:
        yield Check(section, "megatron-core", "problem", f"does not import: {error}", SET_UP)
        return
    yield Check(section, "megatron-core", "ok", f"{core.__version__.split('+')[0]} in {Path(core.__path__[0]).parent}")
    adam, clipping = optimizer.Adam, importlib.import_module("megatron.core.optimizer.clip_grads").multi_tensor_applier
    yield Check(section, "optimizer", "ok", f"{adam.__module__.partition('.')[0]}: {adam.__name__}")
    clipped_by = clipping if hasattr(clipping, "__name__") else type(clipping)
    yield Check(section, "gradient clipping", "ok", clipped_by.__module__.partition(".")[0])
    missing = list(_missing_symbols(compat.needed_patches()))
    yield from missing
    if missing:
        return
    compat.install()
    program, error = _import(PROGRAM)
    if program is None:
        yield Check(contract, PROGRAM, "problem", f"does not import: {error}", SET_UP)
        return
    count = len(compat.needed_patches())
    yield Check(contract, "symbols", "ok", f"all imports work, {count} patched symbols are as expected")
    build = importlib.import_module("megatron_fipo.model.build")
    fused = build.uses_transformer_engine()
    yield Check(section, "layers", "ok", "TransformerEngine" if fused else "Megatron's local layers")
    yield Check(section, "norms", "ok", "TransformerEngine" if fused else "torch")
    attention = "TransformerEngine" if fused and torch.cuda.is_available() else "torch, packed sequences"
    yield Check(section, "attention", "ok", attention)
    fusion = importlib.import_module("megatron_fipo.arguments").platform_defaults()["gradient_accumulation_fusion"]
    yield Check(section, "weight gradients", "ok", "added up by Apex" if fusion else "added up after the GEMM")
    yield _fp8(fused)
    yield Check(section, "rollout engine", "ok", "embedded (the training weights) unless told otherwise")


def _fp8(has_layers: bool) -> Check:
    """Which --fp8-preset the GPU computes."""
    if not has_layers:
        return Check("Will be used", "FP8 training", "absent", "needs TransformerEngine on a GPU")
    engine = importlib.import_module("transformer_engine.pytorch")
    presets = {"hopper": engine.is_fp8_block_scaling_available, "blackwell": engine.is_mxfp8_available}
    offered = [f"--fp8-preset {name}" for name, is_available in presets.items() if is_available()]
    return Check("Will be used", "FP8 training", "ok" if offered else "absent", ", ".join(offered) or "not on this GPU")


def _missing_symbols(patches: Sequence[Any]) -> Iterator[Check]:
    for patch in patches:
        try:
            patch.target()
        except (AttributeError, ImportError) as error:
            fix = "use the pinned megatron-core, " + SET_UP
            yield Check("Megatron contract", f"{patch.module}.{patch.symbol}", "problem", f"changed: {error}", fix)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and why not. A broken installation may raise anything; it is reported, not hidden."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


COLORS = {"ok": "32", "absent": "2", "warning": "33", "problem": "31"}


def show(checks: Sequence[Check], out: TextIO) -> None:
    """The checks as a table by section; colours on a terminal only."""
    width = max(len(check.name) for check in checks)
    for section in dict.fromkeys(check.section for check in checks):
        print(section, file=out)
        for check in checks:
            if check.section != section:
                continue
            status = f"{check.status:<8}"
            if out.isatty():
                status = f"\033[{COLORS[check.status]}m{status}\033[0m"
            print(f"  {status} {check.name:<{width}}  {check.value}", file=out)
            if check.fix and check.status != "absent":
                print(f"  {'':<8} {'':<{width}}  -> {check.fix}", file=out)
    problems = [check.name for check in checks if check.status == "problem"]
    print(f"\nTraining cannot run: {', '.join(problems)}." if problems else "\nTraining can run.", file=out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the checks to FILE")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # for the same reason as the warnings in `diagnose`
    checks = diagnose()
    can_train = all(check.status != "problem" for check in checks)
    show(checks, sys.stdout)
    if arguments.json:
        write_json(arguments.json, {"can_train": can_train, "checks": [asdict(check) for check in checks]})
    return 0 if can_train else 1


if __name__ == "__main__":
    sys.exit(main())
