"""Runs a module with the stand-in: python -m megatron_fipo.compat.te_cpu [--gpu blackwell] MODULE [ARGUMENTS]"""

import runpy
import sys

from megatron_fipo.compat import te_cpu


def main() -> None:
    arguments = sys.argv[1:]
    gpu = "hopper"
    if arguments[:1] == ["--gpu"]:
        gpu, arguments = arguments[1], arguments[2:]
    if not arguments or gpu not in te_cpu.GPUS:
        sys.exit(f"usage: python -m megatron_fipo.compat.te_cpu [--gpu {'|'.join(te_cpu.GPUS)}] MODULE [ARGUMENTS]")
    te_cpu.install(gpu)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
