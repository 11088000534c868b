"""Everything that is tested with TransformerEngine's real layers, in one set of processes of the te-cpu environment.

    torchrun --nproc-per-node 2 tests/te/worker.py FOLDER

FOLDER holds the models that test_transformer_engine.py wrote. Prints one line for each case that holds; the first that
does not raises.
"""

import logging
import os
import sys
from pathlib import Path

from megatron_fipo.compat import te_cpu

te_cpu.install()

from megatron_fipo import compat  # noqa: E402

compat.install()

import torch.distributed as dist  # noqa: E402

RANK = int(os.environ["RANK"])


def run(cases: dict, *, shared: bool = False) -> None:
    """Run cases, each on one of the ranks, or those of `shared` on all together."""
    for number, (name, case) in enumerate(cases.items()):
        if shared or number % 2 == RANK:
            try:
                case()
            except BaseException as error:
                error.add_note(f"case {name}, rank {RANK}")
                raise
            if not shared or RANK == 0:
                print(f"holds: {name}\n", end="", flush=True)  # one write: the ranks share a pipe


def main() -> None:
    import model_cases
    import parallel_cases
    import quantizer_cases
    import training_cases

    logging.getLogger("megatron").setLevel(logging.WARNING)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    run(quantizer_cases.cases())
    with model_cases.model_parallel():
        run(model_cases.cases(folder))
    run(parallel_cases.cases(folder), shared=True)
    dist.destroy_process_group()
    run(training_cases.cases(folder, training_cases.ALONE, 1))
    run(training_cases.cases(folder, training_cases.TOGETHER, 2), shared=True)
    run(training_cases.cases(folder, training_cases.CONTINUED, 1))


if __name__ == "__main__":
    main()
