"""RoPE for packed sequences on the local layer spec, without a loop of small tensor operations."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel


def give_packed_angles(model: GPTModel) -> None:
    """Let the decoder receive RoPE angles laid out like the pack.

    Megatron's unfused THD RoPE rotates one sequence at a time, some 25 tensor operations for each sequence and layer,
    unless the angles already have one row per packed token; then it rotates the pack at once.
    """
    assert not model.config.apply_rope_fusion, "fused RoPE reads angles by the position within a sequence"

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        params, angles = kwargs.get("packed_seq_params"), kwargs.get("rotary_pos_emb")
        if params is None or angles is None:
            return None
        cu_seqlens = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        positions = torch.arange(starts.numel(), device=starts.device) - starts
        return args, kwargs | {"rotary_pos_emb": angles.index_select(0, positions)}

    model.decoder.register_forward_pre_hook(hook, with_kwargs=True)
