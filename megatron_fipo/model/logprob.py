"""Log-probs of a packed batch under the policy, without the logits of the batch."""

import itertools
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.model.chunked_logprob import TILE_BYTES, log_probs_of_labels
from megatron_fipo.model.padded_groups import PackedBoundaries


def packed_log_probs(
    model: torch.nn.Module,
    batch: PackedBatch,
    *,
    temperature: float,
    vocab_size: int,
    with_entropy: bool = False,
    tile_bytes: int = TILE_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(labels_T[t] | the tokens of its sequence up to t) for response tokens, by one forward pass.

    The same batch gives bitwise equal log-probs with and without gradients, and with and without entropy.

    Args:
        model: the GPTModel, or its distributed wrapper.
        batch: THD tensors on the model's device; under context parallelism this rank's share of them.
        temperature: logits are divided by it.
        vocab_size: real vocabulary; the padded rows behind it take no probability.
        with_entropy: also return the entropy of each position's distribution.
        tile_bytes: bound on the fp32 logits alive at once.

    Returns:
        logp_T fp32 [T], differentiable, 0 outside `batch.response_mask_T`: no loss reads those, and the output layer,
        a large part of a model's arithmetic, does not run for them. With `with_entropy` (logp_T, entropy_T),
        entropy_T fp32 [T] in nats, differentiable, 0 at the same positions.
        On a pipeline stage that is not the last: the stage's hidden states, with and without `with_entropy`.
    """
    # What the host knows about the batch, it tells: neither here nor in any layer does it wait for the device.
    longest = max(end - start for start, end in itertools.pairwise(batch.boundaries))
    params = PackedBoundaries(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens_padded_S1,  # padding is attended like tokens: nothing sees it
        cu_seqlens_kv=batch.cu_seqlens_padded_S1,
        cu_seqlens_q_padded=batch.cu_seqlens_padded_S1,
        cu_seqlens_kv_padded=batch.cu_seqlens_padded_S1,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,  # left open, TransformerEngine compares the boundaries on the device
        boundaries=batch.boundaries,
    )

    def log_probs(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        config: Any,
        **_unused: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        logp_R, entropy_R = log_probs_of_labels(
            _rows_of_all_shards(hidden_states, batch.response_R, output_layer, config),
            _ready_weight(output_layer, output_weight),
            labels[0].index_select(0, batch.response_R),
            vocab_size=vocab_size,
            temperature=temperature,
            with_entropy=with_entropy,
            group=output_layer.tp_group,
            add_to_main_grad=config.gradient_accumulation_fusion,
            tile_bytes=tile_bytes,
        )
        zeros_T = logp_R.new_zeros(labels.size(1))
        logp_T = zeros_T.index_copy(0, batch.response_R, logp_R)
        return logp_T if entropy_R is None else (logp_T, zeros_T.index_copy(0, batch.response_R, entropy_R))

    return model(
        batch.tokens_T[None],
        batch.position_ids_T[None],
        None,
        labels=batch.labels_T[None],
        packed_seq_params=params,
        output_processor=log_probs,
    )


def _rows_of_all_shards(hidden_states: Tensor, rows_R: Tensor, output_layer: Any, config: Any) -> Tensor:
    """Hidden states [T or T / TP, 1, H] -> [R, H] on every tensor-parallel rank; backward sums over the ranks.

    With sequence parallelism the positions are gathered before rows are taken; without it, rows are taken first, so
    that the sum over the ranks moves only them.
    """
    group = output_layer.tp_group
    if config.sequence_parallel:
        whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
        return whole[:, 0].index_select(0, rows_R)
    return copy_to_tensor_model_parallel_region(hidden_states[:, 0].index_select(0, rows_R), group=group)


def _ready_weight(output_layer: Any, tied_weight: Tensor | None) -> Tensor:
    """The weight of an output layer that is used without calling the layer.

    With `--overlap-param-gather` DDP finishes the weight's all-gather in a hook that runs before the layer does; a tied
    weight, too, belongs to the layer if the embedding is on another pipeline stage.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    return output_layer.weight if tied_weight is None else tied_weight
