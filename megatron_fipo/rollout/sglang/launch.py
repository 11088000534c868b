"""The process of one SGLang server: `python -m megatron_fipo.rollout.sglang.launch FLAGS`, keys in the environment.

A command line can be read by every user of the machine, so the keys are added to the flags in here. SGLang's own
processes run this module's top level again when they start, which puts the stand-in for its CUDA kernels in place.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    from megatron_fipo.compat import sglang_cpu

    sglang_cpu.install()

API_KEY, ADMIN_KEY = "MEGATRON_FIPO_SGLANG_API_KEY", "MEGATRON_FIPO_SGLANG_ADMIN_KEY"


def main() -> None:
    """Serve until killed."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    keys = ["--api-key", os.environ.pop(API_KEY), "--admin-api-key", os.environ.pop(ADMIN_KEY)]
    run_server(prepare_server_args(sys.argv[1:] + keys))


if __name__ == "__main__":
    main()
