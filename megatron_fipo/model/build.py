"""Builds the policy, in one function: Megatron has announced that GPTModel will be replaced."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_fipo.compat import te_cpu
from megatron_fipo.compat.fp8_recipe import OVERRIDE
from megatron_fipo.model.attention import CachedSelfAttention, TorchAttention, TorchRMSNorm
from megatron_fipo.model.fp8_training import BACKWARD
from megatron_fipo.model.rotary import give_packed_angles


def uses_transformer_engine(transformer_impl: str = "transformer_engine") -> bool:
    """True if the model is built from TransformerEngine's modules: wanted, there, and on a GPU (or its stand-in)."""
    on_device = torch.cuda.is_available() or te_cpu.is_installed()
    return transformer_impl == "transformer_engine" and HAVE_TE and on_device


def model_provider(args: argparse.Namespace) -> Callable[..., GPTModel]:
    """The provider that `megatron.training.training.setup_model_and_optimizer` calls for each model chunk.

    Args:
        args: Megatron's validated arguments, with `padded_vocab_size` set.
    """
    transformer_engine = uses_transformer_engine(args.transformer_impl)

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> GPTModel:
        config = config or core_transformer_config_from_args(args)
        if args.fp8:
            setattr(config, OVERRIDE, BACKWARD[args.fp8_backward])
        logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # "GPTModel IS DEPRECATED"
        model = GPTModel(
            config,
            _block_spec(config, vp_stage, transformer_engine),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if transformer_engine:
            _save_like_local_layers(model)
        if not config.apply_rope_fusion:
            give_packed_angles(model)
        return model

    return provide


def _block_spec(config: TransformerConfig, vp_stage: int | None, transformer_engine: bool) -> Any:
    """The layers of this pipeline stage, dense or with experts as `config.moe_layer_freq` says.

    Experts run in TransformerEngine's grouped GEMM with --moe-grouped-gemm, else one after the other.
    """
    if transformer_engine:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in {id(layer): layer for layer in block.layer_specs}.values():
            attention = layer.submodules.self_attention
            attention.module = CachedSelfAttention
            attention.submodules.core_attention = _attention_over_transformer_engine()
        return block
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    block.layer_norm = TorchRMSNorm
    for layer in {id(layer): layer for layer in block.layer_specs}.values():
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchRMSNorm
        attention = layer.submodules.self_attention
        attention.module = CachedSelfAttention
        attention.submodules.core_attention = TorchAttention
        if config.qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = TorchRMSNorm
        if layer.submodules.mlp.func is MoELayer:
            # TransformerEngine's spec fuses this norm into a dense MLP only; checkpoints of both specs have its names.
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return block


def _save_like_local_layers(model: GPTModel) -> None:
    """Leave the state of TransformerEngine's norms out of checkpoints: it is empty, and the local layers have none."""
    suffix = "layernorm._extra_state"

    def save(module: torch.nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state.pop(f"{prefix}_extra_state", None)

    def load(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(suffix)]

    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_state_dict_post_hook(save)
    model.register_load_state_dict_post_hook(load)


def _attention_over_transformer_engine() -> type[torch.nn.Module]:
    """TransformerEngine's kernels for packs; on a CPU it has none."""
    if not torch.cuda.is_available():
        return TorchAttention
    # Imported here: without TransformerEngine, Megatron's class has no usable base.
    from megatron_fipo.model.te_attention import PackedAttention

    return PackedAttention
