"""Rollouts as --rollout-only writes them, of random tokens, to train on."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.data.samples import Sample
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.replay import write_rollout
from megatron_fipo.rollout.rollout import GeneratedSamples, Rollout

GROUPS, GROUP_SIZE, VOCAB = 6, 4, 93


def written_rollout(folder: Path, step: int, number: int = GROUPS, size: int = GROUP_SIZE, sigma: float = 1.0) -> None:
    """Random samples of very different lengths, with holes in the masks; engine log-probs that disagree a little."""
    generator = np.random.default_rng(step)
    groups, table = {}, torch.zeros(number, size, len(GeneratedSamples.COLUMNS), dtype=torch.float64)
    for g in range(number):
        prompt = generator.integers(3, VOCAB, generator.integers(2, 20))
        groups[g] = []
        for i in range(size):
            response = generator.integers(3, VOCAB, min(60, 1 + int(generator.lognormal(2.5, sigma))))
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            mask[len(prompt) + 2 : len(prompt) + 4] = len(response) < 8
            correct = bool(generator.random() < 0.5) if i else g % 2 == 0
            sample = Sample(
                prompt_id=g, group_id=g, tokens=tokens, response_mask=mask,
                rollout_logp=(generator.normal(-4.5, 0.3, len(tokens)) * mask).astype(np.float32),
                finish_reason="stop", weight_versions=((0, 0, len(response)),),
                reward=2.0 * correct - 1 + generator.normal(0, 0.1), correct=correct,
            )  # fmt: skip
            groups[g].append(sample)
            table[g, i] = torch.tensor(GeneratedSamples.row(sample, False), dtype=torch.float64)
    alone = dist.group.WORLD
    replicas = Replicas(0, 1, alone, alone, (), (), torch.device("cpu"), leads=True)
    write_rollout(str(folder), step, Rollout.of(table, range(number), range(number), groups, 1), replicas)
