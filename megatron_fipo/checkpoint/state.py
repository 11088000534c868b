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
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's


@dataclass(frozen=True)
class LoopState:
    """Where the RL loop stands after ``step`` finished steps.

    ``prompt_cursor`` prompts were handed out by the stream with the fingerprint ``prompts``; ``contrast_rate`` is the
    last step's share of groups with contrast.
    """

    step: int = 0
    prompt_cursor: int = 0
    contrast_rate: float = 1.0
    prompts: str = ""


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
        older = [step for step in whole_checkpoints(folder) if step <= state.step]
        for step in older[:-keep_last]:
            shutil.rmtree(_folder_of(folder, step))
    dist.barrier()


def load(folder: str, args: argparse.Namespace, model: list[Any], optimizer: Any, scheduler: Any) -> LoopState:
    """Load the newest whole checkpoint in ``folder``, which :func:`check_loadable` has found.

    ``args`` are Megatron's global arguments, which its loader reads. Collective over all ranks.
    """
    args.load = folder
    args.ckpt_step = whole_checkpoints(folder)[-1]
    checkpointing.load_checkpoint(model, optimizer, scheduler)
    return LoopState(**json.loads((_folder_of(folder, args.ckpt_step) / _STATE_FILE).read_text()))


def load_weights(folder: str, args: argparse.Namespace, model: list[Any], optimizer: Any) -> None:
    """Load the weights alone, of any checkpoint that :func:`check_loadable` has found (``args.finetune``)."""
    args.load = folder
    checkpointing.load_checkpoint(model, None, None)
    optimizer.reload_model_params()  # fp32 main copies, where there are any


def check_loadable(folder: str, *, finetune: bool) -> None:
    """Raises UserError if there is nothing to load: Megatron itself would go on with random weights."""
    if finetune and not (Path(folder) / _TRACKER).is_file():
        raise UserError(f"--load {folder} holds no Megatron checkpoint (no {_TRACKER}); give a checkpoints folder")
    if not finetune and not whole_checkpoints(folder):
        raise UserError(
            f"--load {folder} holds no whole checkpoint (a folder iter_* with {_STATE_FILE}); give a run's checkpoints "
            f"folder, or add --finetune to start from weights alone"
        )


def whole_checkpoints(folder: str) -> list[int]:
    """Steps with a complete checkpoint in ``folder``, oldest first."""
    found = (re.fullmatch(r"iter_(\d+)", path.name) for path in Path(folder).glob("iter_*"))
    return sorted(int(m[1]) for m in found if m and (Path(folder) / m[0] / _STATE_FILE).is_file())


def _folder_of(folder: str, step: int) -> Path:
    return Path(folder) / f"iter_{step:07d}"
