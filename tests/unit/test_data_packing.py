"""Packed tensors are aligned on the position that predicts a token."""

import numpy as np
import torch

from megatron_fipo.data.packing import pack
from megatron_fipo.data.samples import Sample


def sample(prompt: list[int], response: list[int], group: int) -> Sample:
    n = len(prompt)
    return Sample(
        prompt_id=group, group_id=group, tokens=np.array(prompt + response, np.int32),
        response_mask=np.arange(n + len(response)) >= n,
        rollout_logp=np.array([0.0] * n + [-float(t) for t in response], np.float32),
        finish_reason="stop", weight_versions=((0, 0, len(response)),), reward=1.0, correct=True,
    )  # fmt: skip


def test_labels_masks_and_log_probs_are_aligned():
    batch = pack([sample([1, 2, 3], [4, 5], 0), sample([6], [7], 1)], [10, 11], torch.tensor([0.5, -0.5]))
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 6]
    assert batch.labels_T.tolist() == [2, 3, 4, 5, 7]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0]
    assert batch.response_mask_T.tolist() == [False, False, True, True, True]
    assert batch.rollout_logp_T.tolist() == [0, 0, -4, -5, -7]
    assert batch.cu_seqlens_S1.tolist() == [0, 4, 5] and batch.cu_seqlens_S1.dtype == torch.int32
    assert batch.sample_ids_S.tolist() == [10, 11] and batch.group_ids_S.tolist() == [0, 1]
    assert batch.loss_scale_S is None and batch.old_logp_T is None


def test_a_mask_may_have_holes():
    whole = sample([1], [2, 3, 4], 0)
    mask = whole.response_mask.copy()
    mask[2] = False  # a tool wrote token 3
    holed = Sample(**{**vars(whole), "response_mask": mask})
    assert pack([holed], [0], torch.zeros(1)).response_mask_T.tolist() == [True, False, True]
