"""The importance correction of sequences that are cut across context-parallel ranks."""

import torch.distributed as dist
from torch import Tensor

from megatron_fipo.loss.correction import Correction, CorrectionConfig, importance_correction, sequence_log_ratio
from megatron_fipo.parallel.zigzag import run_cu_seqlens


def context_parallel_correction(
    old_logp_T: Tensor,
    rollout_logp_T: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: CorrectionConfig,
    group: dist.ProcessGroup,
) -> Correction:
    """`importance_correction` at this rank's tokens; its statistics add up over the group.

    _T: this rank's tokens as `zigzag.token_index` orders them, the mask false in the padding. cu_seqlens_S1: the padded
    ones of the whole pack. One all_reduce of 16 bytes per sequence, in which every rank of the group takes part.
    """
    if group.size() == 1:
        return importance_correction(old_logp_T, rollout_logp_T, response_mask_T, cu_seqlens_S1, config)
    runs_R1 = run_cu_seqlens(cu_seqlens_S1, group.size())
    own_2R = sequence_log_ratio(old_logp_T, rollout_logp_T, response_mask_T, runs_R1)
    log_ratio_2S = own_2R.view(2, -1, 2).sum(-1)
    dist.all_reduce(log_ratio_2S, group=group)
    return importance_correction(
        old_logp_T, rollout_logp_T, response_mask_T, runs_R1, config,
        log_ratio_2S=log_ratio_2S.repeat_interleave(2, dim=1),
    )  # fmt: skip
