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


def test_sequences_are_padded_to_the_alignment():
    batch = pack([sample([1, 2, 3], [4, 5], 0), sample([6], [7, 8], 1)], [10, 11], torch.ones(2), alignment=4)
    assert batch.cu_seqlens_S1.tolist() == [0, 4, 6] and batch.cu_seqlens_padded_S1.tolist() == [0, 4, 8]
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 6, 7, 0, 0]
    assert batch.labels_T.tolist() == [2, 3, 4, 5, 7, 8, 0, 0]
    assert batch.response_mask_T.tolist() == [False, False, True, True, True, True, False, False]


def test_a_pack_without_samples_is_a_dummy_without_a_response():
    for scale_S in (None, torch.zeros(0)):
        batch = pack([], [], torch.zeros(0), scale_S, alignment=8)
        assert len(batch.tokens_T) == 8 and not batch.response_mask_T.any()
        assert batch.cu_seqlens_padded_S1.tolist() == [0, 8] and batch.advantage_S.tolist() == [0]
        assert (batch.loss_scale_S is None) == (scale_S is None)


def test_a_dummy_fills_the_pack():
    samples = [sample([1, 2, 3], [4, 5], 0), sample([6], [7, 8], 1)]
    for scale_S in (None, torch.ones(2)):
        batch = pack(samples, [10, 11], torch.ones(2), scale_S, alignment=4, pack_alignment=16)
        assert batch.cu_seqlens_padded_S1.tolist() == [0, 4, 8, 16] and batch.cu_seqlens_S1.tolist() == [0, 4, 6, 7]
        assert batch.tokens_T.tolist() == [1, 2, 3, 4, 6, 7, 0, 0] + [0] * 8 and not batch.response_mask_T[8:].any()
        assert batch.sample_ids_S.tolist() == [10, 11, -1] and batch.advantage_S.tolist() == [1, 1, 0]
        assert scale_S is None or batch.loss_scale_S.tolist() == [1, 1, 0]
    full = pack(samples, [10, 11], torch.ones(2), alignment=4, pack_alignment=8)
    assert full.cu_seqlens_padded_S1.tolist() == [0, 4, 8]
    empty = pack([], [], torch.zeros(0), alignment=4, pack_alignment=16)
    assert len(empty.tokens_T) == 16 and not empty.response_mask_T.any() and set(empty.sample_ids_S.tolist()) == {-1}


def test_context_parallel_shares_hold_every_token_once():
    whole = pack([sample([1, 2, 3], [4, 5], 0), sample([6], [7, 8], 1)], [10, 11], torch.ones(2), alignment=4)
    first, second = (whole.shard(rank, 2) for rank in range(2))
    assert first.tokens_T.tolist() == [1, 4, 6, 0] and second.tokens_T.tolist() == [2, 3, 7, 0]
    assert first.labels_T.tolist() == [2, 5, 7, 0] and first.old_logp_T is None
    assert first.cu_seqlens_padded_S1 is whole.cu_seqlens_padded_S1
    assert whole.shard(0, 1) is whole
