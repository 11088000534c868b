"""Log-probs of a packed batch under the policy."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch


def packed_log_probs(
    model: torch.nn.Module, batch: PackedBatch, *, temperature: float, vocab_size: int, with_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(labels_T[t] | the tokens of its sequence up to t), by one forward pass.

    The same batch gives bitwise equal log-probs with and without gradients.

    Args:
        model: the GPTModel, or its distributed wrapper.
        batch: THD tensors on the model's device.
        temperature: logits are divided by it.
        vocab_size: real vocabulary; the padded rows behind it take no probability.
        with_entropy: also return the entropy of each position's distribution.

    Returns:
        logp_T fp32 [T], differentiable; with `with_entropy` (logp_T, entropy_T), entropy_T fp32 [T] in nats, detached.
        On a pipeline stage that is not the last: the stage's hidden states.
    """
    lengths = batch.cu_seqlens_padded_S1.diff()
    longest = int(lengths.max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens_S1,
        cu_seqlens_kv=batch.cu_seqlens_S1,
        cu_seqlens_q_padded=batch.cu_seqlens_padded_S1,
        cu_seqlens_kv_padded=batch.cu_seqlens_padded_S1,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )

    def log_probs(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, labels: Tensor, **_unused: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=True)  # [T, 1, padded V]
        logp_TV = (logits[:, 0, :vocab_size].float() / temperature).log_softmax(-1)
        logp_T = logp_TV.gather(1, labels.view(-1, 1))[:, 0]
        if not with_entropy:
            return logp_T
        detached_TV = logp_TV.detach()
        return logp_T, -(detached_TV.exp() * detached_TV).sum(-1)

    return model(
        batch.tokens_T[None],
        batch.position_ids_T[None],
        None,
        labels=batch.labels_T[None],
        packed_seq_params=params,
        output_processor=log_probs,
    )
