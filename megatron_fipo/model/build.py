"""Builds the policy, in one function: Megatron has announced that GPTModel will be replaced."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_fipo.model.attention import CachedSelfAttention, TorchAttention, TorchRMSNorm
from megatron_fipo.model.rotary import give_packed_angles


def uses_transformer_engine(transformer_impl: str = "transformer_engine") -> bool:
    """True if the model is built from TransformerEngine's modules: wanted, installed, and a GPU is there."""
    return transformer_impl == "transformer_engine" and HAVE_TE and torch.cuda.is_available()


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
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if not transformer_engine:
            give_packed_angles(model)
        return model

    return provide


def _block_spec(config: TransformerConfig, vp_stage: int | None, transformer_engine: bool) -> Any:
    if transformer_engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    attention = layer.submodules.self_attention
    attention.module = CachedSelfAttention
    attention.submodules.core_attention = TorchAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = TorchRMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TorchRMSNorm)
