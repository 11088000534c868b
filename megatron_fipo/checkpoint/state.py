"""Training state on disk: Megatron's torch_dist checkpoint plus the small state of the RL loop.

A checkpoint is ``iter_0000010/`` with Megatron's files (weights, optimizer, schedule, RNG) and, written last and
atomically, ``rl_state.json``. A folder without it was interrupted and is never loaded.
"""

import argparse
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import checkpointing

from megatron_fipo.errors import UserError

_STATE_FILE = "rl_state.json"


@dataclass(frozen=True)
class LoopState:
    """Where the RL loop stands after ``step`` finished steps.

    ``prompt_cursor`` prompts were handed out; ``contrast_rate`` is the last step's share of groups with contrast.
    """

    step: int = 0
    prompt_cursor: int = 0
    contrast_rate: float = 1.0


def save(folder: str, state: LoopState, model: list[Any], optimizer: Any, scheduler: Any, keep_last: int) -> None:
    """Write a checkpoint of ``state.step`` into ``folder`` (Megatron's args.save) and drop all but the newest ones.

    Collective over all ranks.
    """
    checkpointing.save_checkpoint(state.step, model, optimizer, scheduler, num_floating_point_operations_so_far=0)
    if dist.get_rank() == 0:
        target = _folder_of(folder, state.step) / _STATE_FILE
        partial = target.with_suffix(".tmp")
        with open(partial, "w") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        for step in whole_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(_folder_of(folder, step))
    dist.barrier()


def load(folder: str, args: argparse.Namespace, model: list[Any], optimizer: Any, scheduler: Any) -> LoopState:
    """Load the newest whole checkpoint in ``folder``; with ``args.finetune`` its weights only.

    ``args`` are Megatron's global arguments, which its loader reads. Collective over all ranks. Raises UserError if
    there is no whole checkpoint.
    """
    args.load = folder
    if args.finetune:
        checkpointing.load_checkpoint(model, None, None)
        return LoopState()
    steps = whole_checkpoints(folder)
    if not steps:
        raise UserError(
            f"--load {folder} holds no whole checkpoint (a folder iter_* with {_STATE_FILE}); give a run's checkpoints "
            f"folder, or add --finetune to start from weights alone"
        )
    args.ckpt_step = steps[-1]
    checkpointing.load_checkpoint(model, optimizer, scheduler)
    return LoopState(**json.loads((_folder_of(folder, steps[-1]) / _STATE_FILE).read_text()))


def whole_checkpoints(folder: str) -> list[int]:
    """Steps with a complete checkpoint in ``folder``, oldest first."""
    found = (re.fullmatch(r"iter_(\d+)", path.name) for path in Path(folder).glob("iter_*"))
    return sorted(int(m[1]) for m in found if m and (Path(folder) / m[0] / _STATE_FILE).is_file())


def _folder_of(folder: str, step: int) -> Path:
    return Path(folder) / f"iter_{step:07d}"
