"""The losses of sequences that are cut across context-parallel ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.loss import (
    FipoConfig,
    FipoOutput,
    LossConfig,
    LossOutput,
    RatioConfig,
    fipo_loss,
    ratio_loss,
    with_penalties,
)
from megatron_fipo.loss.correction import sequence_log_ratio
from megatron_fipo.loss.inputs import check_sequence_values, check_token_tensors
from megatron_fipo.loss.metrics import RatioTerms
from megatron_fipo.ops import future_kl_aggregate, reference_discounted_scan
from megatron_fipo.ops.packed import check_offsets, sum_per_sequence
from megatron_fipo.parallel.carry import CarryExchange, first_of_run
from megatron_fipo.parallel.zigzag import run_cu_seqlens


def context_parallel_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: LossConfig,
    group: dist.ProcessGroup,
    *,
    ref_logp_T: Tensor | None = None,
    entropy_T: Tensor | None = None,
    token_weight_T: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
    backend: str = "compiled",
) -> LossOutput:
    """This rank's part of the loss that `config` describes: policy gradient, KL and entropy bonus.

    Arguments and result as in `context_parallel_fipo_loss`; ref_logp_T and entropy_T [T] as in `with_penalties`.
    backend: of the losses that the operator computes.
    """
    out: LossOutput
    if isinstance(config.policy, FipoConfig):
        out = context_parallel_fipo_loss(
            logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, config.policy, group,
            token_weight_T=token_weight_T, loss_scale_S=loss_scale_S, backend=backend,
        )  # fmt: skip
    else:
        out = context_parallel_ratio_loss(
            logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, config.policy, group,
            token_weight_T=token_weight_T, loss_scale_S=loss_scale_S,
        )  # fmt: skip
    return with_penalties(
        out, logp_T, config, ref_logp_T=ref_logp_T, entropy_T=entropy_T, token_weight_T=token_weight_T
    )


def context_parallel_fipo_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: FipoConfig,
    group: dist.ProcessGroup,
    *,
    token_weight_T: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
    backend: str = "compiled",
) -> FipoOutput:
    """This rank's part of `fipo_loss`: over the group the parts add up to that of the whole sequences.

    logp_T, old_logp_T, response_mask_T, token_weight_T: [T], this rank's tokens as `zigzag.token_index` orders them; a
    padded batch is given flattened. The mask is false in the padding. cu_seqlens_S1: [S + 1], those of the whole pack,
    padded (Megatron's cu_seqlens_q_padded). advantage: [S], or [T] like logp_T. loss_scale_S: [S], `loss_scale` of the
    whole mini-batch, required unless the normalization is "token": no rank sees all response tokens of a sequence.
    Add up loss_sum and, for "token", denominator over ranks and micro-batches and divide once; `loss` is that of this
    rank's tokens alone. Statistics merge over ranks as over micro-batches.
    A group of several ranks costs one all_gather of 12 bytes per sequence and rank, in which every rank must take part;
    a group of one costs nothing. Raises ValueError like `fipo_loss`.
    """
    check_token_tensors(logp_T, old_logp_T, response_mask_T, token_weight_T, backend)
    _check_sequence_values(logp_T, advantage, cu_seqlens_S1, loss_scale_S, config.resolved_normalization)
    if group.size() == 1:
        return fipo_loss(
            logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, config,
            token_weight_T=token_weight_T, loss_scale_S=loss_scale_S, backend=backend,
        )  # fmt: skip

    # To the operators the runs of a sequence are sequences of their own; only carries and counts join them.
    if logp_T.device.type == "cpu" and logp_T.dtype == torch.bfloat16:
        logp_T, old_logp_T = logp_T.float(), old_logp_T.float()
    runs_R1 = run_cu_seqlens(cu_seqlens_S1, group.size())
    check_offsets(runs_R1, logp_T.shape[0])
    chunk_S, advantage_R = runs_R1.diff()[::2], _of_runs(advantage.detach(), cu_seqlens_S1)
    terms = RatioTerms(logp_T.detach(), old_logp_T.detach(), advantage_R, response_mask_T, runs_R1)
    aggregates = compiled_aggregates if backend == "compiled" else torch_aggregates
    exchange = CarryExchange(*aggregates(terms, config), chunk_S, config.gamma, group)
    loss_scale_R = None if loss_scale_S is None else _of_runs(loss_scale_S, cu_seqlens_S1)
    carry_R, beyond_c_S = exchange.wait()
    return fipo_loss(
        logp_T, old_logp_T, advantage_R, response_mask_T, runs_R1, config,
        token_weight_T=token_weight_T,
        loss_scale_S=loss_scale_R,
        carry_S=carry_R,
        beyond_c_S=beyond_c_S.repeat_interleave(2),
        backend=backend,
    )  # fmt: skip


def context_parallel_ratio_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: RatioConfig,
    group: dist.ProcessGroup,
    *,
    token_weight_T: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
) -> LossOutput:
    """This rank's part of `ratio_loss`, arguments as above. GSPO's sequence ratios cost a group of several ranks one
    all_reduce of 16 bytes per sequence, in which every rank must take part."""
    check_token_tensors(logp_T, old_logp_T, response_mask_T, token_weight_T, "torch")
    _check_sequence_values(logp_T, advantage, cu_seqlens_S1, loss_scale_S, config.normalization)
    if group.size() == 1:
        return ratio_loss(
            logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, config,
            token_weight_T=token_weight_T, loss_scale_S=loss_scale_S,
        )  # fmt: skip
    runs_R1 = run_cu_seqlens(cu_seqlens_S1, group.size())
    log_ratio_2R = None
    if config.kind == "gspo":
        log_ratio_2S = sequence_log_ratio(logp_T, old_logp_T, response_mask_T, runs_R1).view(2, -1, 2).sum(-1)
        dist.all_reduce(log_ratio_2S, group=group)
        log_ratio_2R = log_ratio_2S.repeat_interleave(2, dim=1)
    return ratio_loss(
        logp_T, old_logp_T, _of_runs(advantage, cu_seqlens_S1), response_mask_T, runs_R1, config,
        token_weight_T=token_weight_T,
        loss_scale_S=None if loss_scale_S is None else _of_runs(loss_scale_S, cu_seqlens_S1),
        log_ratio_2S=log_ratio_2R,
    )  # fmt: skip


def _check_sequence_values(
    logp_T: Tensor, advantage: Tensor, cu_seqlens_S1: Tensor, loss_scale_S: Tensor | None, normalization: str
) -> None:
    check_sequence_values(cu_seqlens_S1.shape[0] - 1, logp_T.shape[0], advantage, loss_scale_S=loss_scale_S)
    if loss_scale_S is None and normalization != "token":
        raise ValueError(f"normalization {normalization!r} needs loss_scale_S, made from the whole mini-batch")


def _of_runs(values: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """[R]: each sequence's value for both of its runs; values [T] stay as they are."""
    return values.repeat_interleave(2) if values.shape[0] == cu_seqlens_S1.shape[0] - 1 else values


def compiled_aggregates(terms: RatioTerms, config: FipoConfig) -> tuple[Tensor, Tensor]:
    """fp32 [R], the future KL at each run's first token with nothing behind the run, and int32 [R], its tokens with
    A < 0 and r > c; by the operator."""
    return future_kl_aggregate(
        terms.logp_T.contiguous(),
        terms.old_logp_T.contiguous(),
        terms.advantage.float(),
        terms.response_mask_T.contiguous(),
        terms.cu_seqlens_S1,
        advantage_is_per_token=terms.advantage.shape[0] != terms.cu_seqlens_S1.shape[0] - 1,
        gamma=config.gamma,
        dual_clip=config.dual_clip,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )


def torch_aggregates(terms: RatioTerms, config: FipoConfig) -> tuple[Tensor, Tensor]:
    """The same in plain torch, on any device."""
    x_T = torch.where(terms.log_ratio_T <= math.log(config.dual_clip), terms.log_ratio_T, 0.0)
    F_T = reference_discounted_scan(x_T.double(), terms.cu_seqlens_S1, config.gamma)
    beyond_c_T = (terms.advantage_T < 0) & (terms.log_ratio_T.exp() > config.dual_clip)
    beyond_c_R = sum_per_sequence(beyond_c_T, terms.cu_seqlens_S1)
    return first_of_run(F_T, terms.cu_seqlens_S1).float(), beyond_c_R.int()
