"""The context-parallel loss over NCCL, one rank per GPU: the cases of tests/parallel."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from context_parallel_cases import run_case, run_world
from test_context_parallel import CASES, check

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 2, reason=f"NCCL between ranks needs two GPUs, found {GPUS}")
def test_equals_the_unsharded_loss_over_nccl():
    groups = {size: range(size) for size in (2, 4, 8) if size <= GPUS}
    tasks = [(case.name, case.sizes, run_case, (case,)) for case in CASES]
    results = run_world(tasks, groups, backend="nccl")
    for case in CASES:
        for size in groups:
            check(case, size, results[size, case.name])
