"""Trains the same written rollout in many parallel layouts, in one set of processes, through train.main.

    torchrun --nproc-per-node 4 tests/parallel/layout_worker.py CASES.json

A case is {"ranks": n, "argv": [...]}. Each runs on n of the four ranks, as its own world: one start of the interpreters
serves all. Cases of up to two ranks take turns on the two halves, so that both are busy.
"""

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

RANK = int(os.environ["RANK"])
TIMEOUT = timedelta(seconds=120)


def run(name: str, ranks: int, argv: list[str], first: int, store: Path) -> None:
    """One run of `ranks` ranks from `first` on; returns after Megatron has forgotten it."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars, unset_global_variables

    from megatron_fipo.train import main

    os.environ |= {"RANK": str(RANK - first), "LOCAL_RANK": str(RANK - first), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=RANK - first, world_size=ranks, timeout=TIMEOUT)
    try:
        assert main(argv) == 0
    except BaseException as error:
        error.add_note(f"case {name}, rank {RANK - first} of {ranks}")
        raise
    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    unset_global_variables()
    destroy_global_vars()
    # The optimizer's fp32 shards hold the model in their graph, out of gc's sight, and the model's config holds the
    # optimizer: process groups and their threads would pile up.
    for model in [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        model.config.grad_scale_func = None
    gc.collect()


def main() -> None:
    from megatron_fipo import compat

    compat.install()
    cases_file = Path(sys.argv[1])
    half = 0
    for name, case in json.loads(cases_file.read_text()).items():
        ranks = case["ranks"]
        first, half = (2 * half, 1 - half) if ranks <= 2 else (0, half)
        if first <= RANK < first + ranks:
            run(name, ranks, case["argv"], first, cases_file.with_name(f"store {name}"))
            if first == RANK:
                print(f"ran: {name}", flush=True)


if __name__ == "__main__":
    main()
