"""Attention and norm of the local layer spec: what Megatron leaves to TransformerEngine, in plain torch.

Grouped queries, packed sequences (THD) also under context parallelism, plain causal batches, and generation with a
key/value cache.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fipo.model.kv_cache import KVCache
from megatron_fipo.model.padded_groups import PackedBoundaries, PaddedGroup, groups_on_device

# Overhead of one attention call with its gradient, in multiply-adds (pairs of positions x width), measured on a CPU.
CALL_COST = 2**22


class TorchAttention(MegatronModule):
    """Causal scaled-dot-product attention behind Megatron's core-attention interface."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout), "no dropout here"
        self.cp_group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, heads, d], packed: [t, heads, d], this context-parallel rank's tokens of the pack.
            key, value: [sk, b, groups, d], packed: [t, groups, d].
            attention_mask: None for a causal batch (sq == sk) or packed sequences; in a decoding step (sq == 1) None or
                a float mask [b, 1, 1, sk] that is added to the scores.
            packed_seq_params: boundaries of the packed sequences, of the whole pack. Only packed sequences are shared
                out over context-parallel ranks (zigzag, see parallel/zigzag.py).

        Returns:
            [sq, b, heads * d], packed: [t, heads * d].
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        return unpacked_attention(query, key, value, attention_mask, self.softmax_scale)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        assert isinstance(params, PackedBoundaries), "packs come from packed_log_probs"
        context = self.cp_group.rank(), self.cp_group.size()
        if self.cp_group.size() > 1:
            # One gather for both; backward scatters the sum of what the ranks want of each key and value.
            both = gather_from_sequence_parallel_region(
                torch.cat([key, value], -1), tensor_parallel_output_grad=True, group=self.cp_group
            )
            key, value = both.split([key.size(2), value.size(2)], -1)
        call_cost = CALL_COST / (query.size(1) * query.size(2))
        out = torch.zeros_like(query)  # positions past the last sequence stay 0
        for group in groups_on_device(params.boundaries, context, call_cost, query.device):
            padded = self._group(query, key, value, group)
            out = out.index_copy(0, group.query_source, padded)
        return out.flatten(1)

    def _group(self, query: Tensor, key: Tensor, value: Tensor, group: PaddedGroup) -> Tensor:
        """Attention of one group: [its query tokens, heads, d]."""
        q = group.padded(query, group.query_source, group.query_target, group.query_length)
        k, v = (group.padded(x, group.key_source, group.key_target, group.key_length) for x in (key, value))
        if group.mask is None:
            out = _causal(q, k, v, self.softmax_scale)
        else:
            grouped = q.size(1) != k.size(1)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=group.mask, scale=self.softmax_scale, enable_gqa=grouped
            )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, group.query_target)


def unpacked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of whole causal sequences, or of one position each; arguments and result as in TorchAttention."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, d]
    if query.size(0) > 1:
        assert mask is None and query.size(0) == key.size(0), "only whole causal sequences"
        return _causal(q, k, v, scale).permute(2, 0, 1, 3).flatten(2)
    # One query for each sequence: the heads of a group become its queries, which reads each key once.
    q = q.view(q.size(0), k.size(1), -1, q.size(3))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(1, query.size(1), -1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [b, heads, s, d], k and v [b, groups, s, d] -> [b, heads, s, d]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention, whose generation hook applies RoPE before it stores keys.

    Megatron's own static cache stores raw keys and rotates all of them again in every step.
    """

    def _adjust_key_value_for_inference(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        if not isinstance(inference_context, KVCache):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        query, key = inference_context.rotate(query), inference_context.rotate(key)
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, self.attn_mask_type, None


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works with sequence parallelism, which Megatron's wrapper of torch's norms refuses.

    The attribute on the weight makes Megatron sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
