"""Rollouts on disk: ``--rollout-only`` writes, ``--train-from-rollouts`` trains on them, on any number of replicas.

``DIR/step_0000001/`` holds ``table.safetensors`` (the numbers of every generated sample) and one
``replica_00000.safetensors`` per replica that generated; it appears whole.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file

from megatron_fipo.data.samples import Sample
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout

_FINISH_REASONS = ("stop", "length")


def write_rollout(folder: str, step: int, rollout: Rollout, replicas: Replicas) -> None:
    """Write the kept samples of one step. Collective over the replicas."""
    target = _folder_of(folder, step)
    partial = target.with_suffix(".partial")
    if replicas.leads and replicas.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    dist.barrier(replicas.group)
    if replicas.leads:
        save_file(_columns(list(rollout.held.values())), partial / f"replica_{replicas.rank:05d}.safetensors")
    if replicas.leads and replicas.rank == 0:
        numbers = {
            "table": rollout.table.numpy(),
            "kept": np.array(rollout.kept, np.int64),
            "first_visit": np.array(rollout.first_visit, np.int64),
            "batches": np.array(rollout.batches, np.int64),
        }
        save_file(numbers, partial / "table.safetensors")
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
        for sample in _samples(load_file(path)):
            if sample.group_id % replicas.size == replicas.rank:
                groups.setdefault(sample.group_id, []).append(sample)
    return Rollout.of(
        torch.from_numpy(numbers["table"]),
        numbers["kept"].tolist(),
        int(numbers["first_visit"]),
        groups,
        int(numbers["batches"]),
    )


def _folder_of(folder: str, step: int) -> Path:
    return Path(folder) / f"step_{step:07d}"


def _columns(samples: list[Sample]) -> dict[str, np.ndarray]:
    """Per-token columns [tokens of all samples], per-sample columns [samples], version ranges [ranges, 3]."""
    versions = list(chain.from_iterable(s.weight_versions for s in samples))
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *(s.tokens for s in samples)]),
        "response_mask": np.concatenate([np.empty(0, bool), *(s.response_mask for s in samples)]),
        "rollout_logp": np.concatenate([np.empty(0, np.float32), *(s.rollout_logp for s in samples)]),
        "length": np.array([len(s.tokens) for s in samples], np.int64),
        "prompt_id": np.array([s.prompt_id for s in samples], np.int64),
        "group_id": np.array([s.group_id for s in samples], np.int64),
        "finish_reason": np.array([_FINISH_REASONS.index(s.finish_reason) for s in samples], np.int64),
        "reward": np.array([s.reward for s in samples], np.float64),
        "correct": np.array([s.correct for s in samples], bool),
        "versions": np.array(versions, np.int64).reshape(-1, 3),
        "version_count": np.array([len(s.weight_versions) for s in samples], np.int64),
    }


def _samples(columns: dict[str, np.ndarray]) -> Iterator[Sample]:
    token_ends, version_ends = columns["length"].cumsum(), columns["version_count"].cumsum()
    for i, (end, version_end) in enumerate(zip(token_ends, version_ends, strict=True)):
        tokens = slice(end - columns["length"][i], end)
        versions = columns["versions"][version_end - columns["version_count"][i] : version_end]
        yield Sample(
            prompt_id=int(columns["prompt_id"][i]),
            group_id=int(columns["group_id"][i]),
            tokens=columns["tokens"][tokens],
            response_mask=columns["response_mask"][tokens],
            rollout_logp=columns["rollout_logp"][tokens],
            finish_reason=_FINISH_REASONS[columns["finish_reason"][i]],
            weight_versions=tuple((int(v), int(a), int(b)) for v, a, b in versions),
            reward=float(columns["reward"][i]),
            correct=bool(columns["correct"][i]),
        )
