"""Rollouts on disk: ``--rollout-only`` writes, ``--train-from-rollouts`` trains on them, on any number of replicas.

``DIR/step_0000001/`` holds ``table.safetensors`` (the numbers of every generated sample) and one
``replica_00000.safetensors`` per replica that generated; it appears whole.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from megatron_fipo.data.samples import Sample
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout
from megatron_fipo.rollout.sample_files import load_samples, save_columns, save_samples


def write_rollout(folder: str, step: int, rollout: Rollout, replicas: Replicas) -> None:
    """Write the kept samples of one step. Collective over the replicas."""
    target = _folder_of(folder, step)
    partial = target.with_suffix(".partial")
    if replicas.leads and replicas.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    dist.barrier(replicas.group)
    if replicas.leads:
        save_samples(partial / f"replica_{replicas.rank:05d}.safetensors", list(rollout.held.values()))
    if replicas.leads and replicas.rank == 0:
        numbers = {
            "table": rollout.table.numpy(),
            "kept": np.array(rollout.kept, np.int64),
            "visits": np.array(rollout.visits, np.int64),
            "carried": np.array(rollout.carried, np.int64),
            "batches": np.array(rollout.batches, np.int64),
        }
        save_columns(partial / "table.safetensors", numbers)
    dist.barrier(replicas.group)
    if replicas.leads and replicas.rank == 0:
        os.replace(partial, target)


def read_rollout(folder: str, step: int, prompts: int, group_size: int, replicas: Replicas) -> Rollout:
    """Read one step; each replica takes every size-th group, whoever generated it.

    Raises UserError if the step is not there or holds other than ``prompts`` groups of ``group_size`` samples.
    """
    source = _folder_of(folder, step)
    if not source.is_dir():
        raise UserError(
            f"--train-from-rollouts {folder} has no {source.name}; lower --num-steps or write more rollouts"
        )
    numbers = load_file(source / "table.safetensors")
    written = len(numbers["kept"]), numbers["table"].shape[1]
    if written != (prompts, group_size):
        raise UserError(
            f"{source} holds {written[0]} prompts x {written[1]} samples; set --grpo-prompts-per-step {written[0]} and "
            f"--grpo-group-size {written[1]}"
        )
    groups: dict[int, list[Sample]] = {}
    for path in sorted(source.glob("replica_*.safetensors")):
        for sample in load_samples(path):
            if sample.group_id % replicas.size == replicas.rank:
                groups.setdefault(sample.group_id, []).append(sample)
    rollout = Rollout.of(
        torch.from_numpy(numbers["table"]),
        numbers["kept"].tolist(),
        numbers["visits"].tolist(),
        groups,
        int(numbers["batches"]),
        int(numbers["carried"]),
    )
    return replace(rollout, leftovers=None)  # the next step's folder has what it used of them


def _folder_of(folder: str, step: int) -> Path:
    return Path(folder) / f"step_{step:07d}"
