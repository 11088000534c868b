"""Conversion through Megatron-Bridge, for architectures that our own weight map (`hf_map`) does not know.

Megatron-Bridge builds the model and moves the weights, all of the model at once; the checkpoint is Megatron-LM's, as
that of our own import is. Its packages come with `make bridge`.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.activations import squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import AutoConfig

from megatron_fipo.checkpoint.hf_files import HFTensor, is_finite, some
from megatron_fipo.compat import bridge_without_te
from megatron_fipo.errors import UserError
from megatron_fipo.model.build import uses_transformer_engine

_LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel",
)  # fmt: skip
_RUN = (
    "params_dtype", "bf16", "use_cpu_initialization", "gradient_accumulation_fusion", "make_vocab_size_divisible_by",
)  # fmt: skip

_ELSEWHERE = "convert it on a machine with TransformerEngine and a GPU"


class Bridge:
    """Megatron-Bridge's conversion of one architecture."""

    def __init__(self, hf_dir: str | Path) -> None:
        """Read the folder's config.json; its weights are not needed.

        Raises:
            UserError: Megatron-Bridge is not installed, there is no config.json, or it does not know the architecture.
        """
        if importlib.util.find_spec("megatron.bridge") is None:
            raise UserError(
                "--bridge megatron-bridge: megatron.bridge is not installed; run 'make bridge' and start the tool "
                "with .venv-bridge/bin/python"
            )
        if not (Path(hf_dir) / "config.json").is_file():
            raise UserError(f"{hf_dir} has no config.json: give a Hugging Face model folder.")
        bridge_without_te.install()
        from megatron.bridge import AutoBridge  # takes ten seconds, and is there after `make bridge` only
        from megatron.bridge.models.gpt_provider import default_layer_spec, local_layer_spec

        if not AutoBridge.can_handle(hf_dir):
            raise UserError(
                f"{hf_dir}/config.json names no architecture that Megatron-Bridge knows: its documentation lists them"
            )
        self._bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(hf_dir, local_files_only=True))
        self._provider = self._bridge.to_megatron_provider(load_weights=False)
        self._provider.perform_initialization = False  # every weight is loaded
        if not uses_transformer_engine():
            for name in ("moe_grouped_gemm", "moe_permute_fusion", "apply_rope_fusion", "persist_layer_norm"):
                setattr(self._provider, name, False)
            if self._provider.transformer_layer_spec is default_layer_spec:
                self._provider.transformer_layer_spec = local_layer_spec

    def arguments(self) -> dict[str, Any]:
        """What Megatron's own checks and process groups need to know of the model, as defaults of its arguments."""
        p = self._provider
        return {
            "num_layers": p.num_layers,
            "hidden_size": p.hidden_size,
            "num_attention_heads": p.num_attention_heads,
            "num_experts": p.num_moe_experts,
            "max_position_embeddings": p.seq_length,
            "vocab_size": p.vocab_size,
        }

    def model_provider(self, args: argparse.Namespace) -> Callable[..., torch.nn.Module]:
        """The provider that `megatron.training.training.get_model` calls for each chunk, in the layout of `args`.

        Writes into `args` what else Megatron's arguments can say of the model, for the checkpoint to record it.
        """
        provider = self._provider
        for name in (*_LAYOUT, *_RUN):
            setattr(provider, name, getattr(args, name))
        provider.pipeline_dtype = args.params_dtype
        # Megatron-Bridge pads the tensors of a vocabulary that it cuts, and no others. Megatron loads them either way.
        provider.should_pad_vocab = args.tensor_model_parallel_size > 1
        provider.finalize()
        vars(args).update(_recorded(provider, args))

        def provide(
            pre_process: bool = True,
            post_process: bool = True,
            vp_stage: int | None = None,
            config: Any = None,
            pg_collection: ProcessGroupCollection | None = None,
        ) -> torch.nn.Module:
            provider._pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
            try:
                model = provider.provide(pre_process, post_process, vp_stage)
            except Exception as error:  # whatever a builder makes of modules that are None without TransformerEngine
                if uses_transformer_engine():
                    raise
                raise UserError(
                    f"Megatron builds this model with TransformerEngine only ({error}); {_ELSEWHERE}"
                ) from error
            for layer in model.decoder.layers:
                if isinstance(layer.mlp, MoELayer):  # only the norm of a dense MLP has a fused name, see model/build.py
                    layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            return model

        return provide

    def load_hf_weights(self, model_chunks: Sequence[torch.nn.Module], hf_dir: str | Path) -> None:
        """Copy the folder's weights into the model. Collective.

        Raises:
            UserError: weights are missing or not finite, or Megatron-Bridge has no names for some.
        """
        if any(task is None for task in self._bridge.get_conversion_tasks(list(model_chunks), str(hf_dir))):
            without = "" if uses_transformer_engine() else f" built without TransformerEngine; {_ELSEWHERE}"
            raise UserError(f"{hf_dir}: Megatron-Bridge does not know all weights of this model{without}")
        with torch.no_grad():
            for parameter in (p for chunk in model_chunks for p in chunk.parameters()):
                parameter.fill_(float("nan"))  # Megatron-Bridge only warns of what it does not find
        self._bridge.load_hf_weights(list(model_chunks), str(hf_dir))
        _refuse_nan(model_chunks, f"{hf_dir}, as Megatron-Bridge reads it,")

    def export_hf_weights(self, model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """The whole model under its Hugging Face names, on the host. Collective, as `checkpoint.hf`'s stream is."""
        tied = self._provider.share_embeddings_and_output_weights
        for name, tensor in self._bridge.export_hf_weights(list(model_chunks), cpu=True, show_progress=False):
            if not (tied and name == "lm_head.weight"):  # Hugging Face folders do not repeat it
                yield name, tensor

    def hf_layout(self, model_chunks: Sequence[torch.nn.Module], dtype: torch.dtype | None) -> list[HFTensor]:
        """What :meth:`export_hf_weights` brings, in `dtype` (None: each tensor's own). Collective: it runs the stream.

        Raises:
            UserError: a weight is not finite.
        """
        _refuse_nan(model_chunks, "the checkpoint")
        return [HFTensor(name, tuple(t.shape), dtype or t.dtype) for name, t in self.export_hf_weights(model_chunks)]


def _recorded(provider: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The model in Megatron-LM's arguments, which `--use-checkpoint-args` reads back."""
    fields = {field.name for field in dataclasses.fields(provider)} & vars(args).keys()
    plain = (bool, int, float, str, list, tuple, type(None))
    same = {name: value for name in fields if isinstance(value := getattr(provider, name), plain)}
    return same | {
        "num_experts": provider.num_moe_experts,
        "swiglu": provider.gated_linear_unit and provider.activation_func is torch.nn.functional.silu,
        "squared_relu": provider.activation_func is squared_relu,
        "apply_layernorm_1p": provider.layernorm_zero_centered_gamma,
        "untie_embeddings_and_output_weights": not provider.share_embeddings_and_output_weights,
        "group_query_attention": provider.num_query_groups != provider.num_attention_heads,
        "use_rope_scaling": provider.rope_scaling,
        "max_position_embeddings": provider.seq_length,
    }


def _refuse_nan(model_chunks: Sequence[torch.nn.Module], where: str) -> None:
    """Raises the same UserError on every rank if a rank holds a weight with NaNs or infinities."""
    found = [n for m in map(unwrap_model, model_chunks) for n, p in m.named_parameters() if not is_finite(p.detach())]
    everywhere: list[list[str]] = [found] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    if names := sorted({name for part in everywhere for name in part}):
        raise UserError(f"{where} has no values, NaNs or infinities for {some(names)}: take another copy of the model.")
