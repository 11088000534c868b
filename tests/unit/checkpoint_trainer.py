"""A model, its optimizer and its checkpoints in this process, and a save that kills itself at a chosen point."""

import builtins
import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo import compat

compat.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.global_vars import destroy_global_vars, set_global_variables  # noqa: E402

from megatron_fipo.arguments import parse_arguments  # noqa: E402
from megatron_fipo.checkpoint.start import check_same_start  # noqa: E402
from megatron_fipo.checkpoint.state import Checkpoints, LoopState  # noqa: E402
from megatron_fipo.data.samples import Sample  # noqa: E402
from megatron_fipo.errors import UserError  # noqa: E402
from megatron_fipo.model.build import model_provider  # noqa: E402
from megatron_fipo.parallel.replicas import Replicas  # noqa: E402
from megatron_fipo.rollout.leftovers import Leftovers  # noqa: E402
from megatron_fipo.rollout.rollout import GeneratedSamples  # noqa: E402


@dataclass
class Trainer:
    """What a run has at its checkpoints. ``warnings`` collects what is said about damaged ones."""

    args: Any
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    warnings: list[str] = field(default_factory=list)

    def checkpoints(self, folder: Path, keep_last: int = 2, *, asynchronous: bool = False) -> Checkpoints:
        self.args.async_save = asynchronous
        return Checkpoints(
            folder, self.args, self.chunks, self.optimizer, self.scheduler, keep_last, self.warnings.append,
            Replicas.current(),
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """Weights and Adam's moments."""
        weights = [p.data for p in self.chunks[0].parameters()]
        states = self.optimizer.chained_optimizers[0].optimizer.state.values()
        return weights + [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]

    def become(self, step: int) -> LoopState:
        """Take on made-up weights, moments and loop state that only ``step`` decides."""
        generator = torch.Generator().manual_seed(step)
        for tensor in self.tensors():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
        self.optimizer.reload_model_params()
        return LoopState(step, 10 * step, 1 / step, "prompts", made_up_leftovers(step))

    def is_at(self, step: int, state: LoopState) -> bool:
        found = [tensor.clone() for tensor in self.tensors()]
        expected = self.become(step)
        same_loop = state.numbers() == expected.numbers() and same_leftovers(state.leftovers, expected.leftovers)
        return same_loop and all(map(torch.equal, found, self.tensors()))


def made_up_leftovers(step: int, groups: int = 3, size: int = 2) -> Leftovers:
    """Groups of random samples that only ``step`` decides, all on this replica; the second response has a hole."""
    random, held = np.random.default_rng(step), {}
    for visit in range(7 * step, 7 * step + groups):
        held[visit] = [
            Sample(
                prompt_id=visit % 5, group_id=visit, tokens=random.integers(0, 99, 9, np.int32),
                response_mask=np.array([0, 0, 0, 1, 1, 1 - i, 1, 1, 1], bool),
                rollout_logp=random.normal(size=9).astype(np.float32), finish_reason=("stop", "length")[i],
                weight_versions=((step, 0, 4), (step + 1, 4, 6)), reward=random.normal(), correct=i == 0,
            )
            for i in range(size)
        ]  # fmt: skip
    table = torch.tensor([[GeneratedSamples.row(s, False) for s in group] for group in held.values()])
    return Leftovers(tuple(held), table.double(), held)


def same_leftovers(found: Leftovers | None, expected: Leftovers | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return (
        found.visits == expected.visits
        and torch.equal(found.table, expected.table)
        and list(found.held) == list(expected.held)
        and all(
            np.array_equal(getattr(a, name), value)
            for visit, group in expected.held.items()
            for a, b in zip(found.held[visit], group, strict=True)
            for name, value in vars(b).items()
        )
    )


def open_trainer(base: Path) -> Trainer:
    """Set Megatron up in this process, in which torch.distributed has a group of one."""
    flags = f"--preset quickstart --hf-model {base} --prompt-data {base}/train.jsonl --save-interval 1 --run-name none"
    args = parse_arguments(flags.split())
    with contextlib.redirect_stdout(io.StringIO()):
        set_global_variables(args, build_tokenizer=False)
        chunks, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider(args)
        )
    optimizer.chained_optimizers[0].init_state_fn(optimizer.chained_optimizers[0].optimizer, None)
    return Trainer(args, chunks, optimizer, scheduler)


def close_trainer() -> None:
    destroy_global_vars()
    destroy_num_microbatches_calculator()


def save_and_die(base: Path, folder: Path, step: int, point: int) -> None:
    """In a process of its own: save ``step``, dying by SIGKILL at the ``point``-th write, flush, rename or removal."""
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        trainer = open_trainer(base)
        state = trainer.become(step)
        checkpoints = trainer.checkpoints(folder)
    sys.stdout.flush()
    _die_at(point, folder)
    checkpoints.save(state)


def load_and_fail_to_save(base: Path, folder: Path, store: Path, rank: int, results: Any) -> None:
    """One of two ranks: load, then save while rank 1 cannot write. Puts (step, warnings, weights, problems), where the
    first problem is what is said if only rank 0 had found the folder."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    problems = []
    try:
        check_same_start(str(folder.parent), None if rank else str(folder))
    except UserError as error:
        problems.append(str(error))
    check_same_start(str(folder.parent), str(folder))
    trainer = open_trainer(base)
    checkpoints = trainer.checkpoints(folder)
    state = checkpoints.load(folder)
    weights = [p.detach().numpy() for p in trainer.chunks[0].parameters()]
    if rank == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        checkpoints.save(replace(state, step=4))
    except UserError as error:
        problems.append(str(error))
    results.put((state.step, trainer.warnings, weights, problems))


def _die_at(point: int, folder: Path) -> None:
    passed = 0

    def is_reached() -> bool:
        nonlocal passed
        passed += 1
        return passed == point

    class TornWrites(io.FileIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes % 16 == 1 and is_reached():  # a tensor's file is written in dozens of pieces
                super().write(bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    real_open = builtins.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode or not str(file).startswith(str(folder)):
            return real_open(file, mode, buffering, *args, **kwargs)
        buffered = io.BufferedWriter(TornWrites(file, "w"), 2**17)
        return buffered if "b" in mode else io.TextIOWrapper(buffered)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_reached():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    builtins.open = io.open = opened
    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
