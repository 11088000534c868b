"""Attention of the TransformerEngine spec on a GPU. Imported only where TransformerEngine is."""

import math

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_fipo.model.attention import unpacked_attention


class PackedAttention(TEDotProductAttention):
    """TransformerEngine's fused attention for packs; for generation torch's, which reads our key/value cache."""

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
        """Attend; shapes as in TorchAttention."""
        if packed_seq_params is None:
            scale = 1.0 / math.sqrt(self.config.kv_channels)
            return unpacked_attention(query, key, value, attention_mask, scale)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
