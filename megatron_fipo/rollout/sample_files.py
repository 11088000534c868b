"""Samples on disk: one safetensors file of columns for any number of them."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from megatron_fipo.data.samples import Sample

_FINISH_REASONS = ("stop", "length")


def save_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write a safetensors file. Raises OSError, which safetensors' own writer hides in an error of its own."""
    path.write_bytes(save(columns))


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write ``samples`` to a file. Raises OSError."""
    save_columns(path, _columns(samples))


def load_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file, in the order in which they were saved."""
    return _samples(load_file(path))


def _columns(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
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
