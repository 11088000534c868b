"""What the servers of a run serve: the format of its weights, and what keeps such weights from being updated.

Facts are those of SGLang 0.5.23 (srt/layers/quantization/fp8.py, srt/model_loader/loader.py).
"""

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.errors import UserError
from megatron_fipo.model.fp8_training import fp8_settings
from megatron_fipo.model.hf_config import architecture, read_hf_config
from megatron_fipo.quantization.block_fp8 import BLOCK, MX_BLOCK
from megatron_fipo.quantization.formats import WeightFormat
from megatron_fipo.quantization.layers import linear_weights
from megatron_fipo.quantization.precision import PrecisionReport, trainer_format

# SGLang's flags, and its names for them in /server_info.
_FIELDS = {
    "--model-path": "model_path",
    "--load-format": "load_format",
    "--quantization": "quantization",
    "--tp": "tp_size",
    "--tp-size": "tp_size",
    "--tensor-parallel-size": "tp_size",
    "--ep": "ep_size",
    "--ep-size": "ep_size",
    "--expert-parallel-size": "ep_size",
    "--dp": "dp_size",
    "--dp-size": "dp_size",
    "--data-parallel-size": "dp_size",
    "--fp8-gemm-backend": "fp8_gemm_runner_backend",
    "--moe-runner-backend": "moe_runner_backend",
    "--moe-a2a-backend": "moe_a2a_backend",
}
_MXFP8_EXPERTS = ("cutlass", "flashinfer_trtllm", "flashinfer_trtllm_routed")  # that keep the shape of the scales
_DEEP_GEMM_DISPATCHERS = ("deepep", "mooncake", "nixl")  # that take DeepGEMM if no --moe-runner-backend is named
_IGNORED = "SGLANG_FP8_IGNORED_LAYERS"
_FLASH_RL = ("qwen2", "qwen3")  # dense
_BLACKWELL = 10  # compute capability of the GPUs on which DeepGEMM repacks scales


def server_fields(flags: Sequence[str]) -> dict[str, Any]:
    """What flags say of these things, as /server_info would."""
    fields: dict[str, Any] = {"tp_size": 1, "ep_size": 1, "dp_size": 1}
    fields["enable_dp_attention"] = "--enable-dp-attention" in flags
    for flag, value in itertools.pairwise(flags):
        if flag in _FIELDS:
            name = _FIELDS[flag]
            fields[name] = int(value) if name.endswith("_size") else value
    return fields


@dataclass(frozen=True)
class ServedModel:
    """``folder`` from which servers load; ``architecture``: its configuration as Megatron's arguments."""

    folder: str
    model_type: str
    architecture: Mapping[str, Any]
    format: WeightFormat

    @classmethod
    def of(cls, hf_model: str, flags: Sequence[str]) -> "ServedModel":
        """The model of --sglang-model-path, or else --hf-model. Raises UserError if it is another model than that."""
        fields = server_fields(flags)
        folder = fields.get("model_path", hf_model)
        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"--sglang-model-path {folder} has no config.json; give a folder that this machine can read"
            )
        config, wanted, found = read_hf_config(folder), architecture(hf_model), architecture(folder)
        if different := [key for key in wanted if found.get(key) != wanted[key]]:
            raise UserError(
                f"--sglang-model-path {folder} is another model than --hf-model {hf_model} ({', '.join(different)} "
                f"differ); make it of that one with tools/make_fp8_checkpoint.py"
            )
        weight_format = WeightFormat.of_config(config, folder)
        if weight_format.scheme == "none" and fields.get("load_format") == "flash_rl":
            weight_format = WeightFormat("channel")
        return cls(folder, config["model_type"], found, weight_format)

    def fault(self, server: Mapping[str, Any], capability: tuple[int, int] | None) -> str | None:
        """Why a server cannot take this model's updates; None if it can.

        Args:
            server: :func:`server_fields`, or the answer of /server_info.
            capability: compute capability of its GPUs; None without.
        """
        blackwell = capability is not None and capability[0] == _BLACKWELL
        if wrong := self._fault_of_loading(server):
            return wrong
        if self.format.scheme == "block":
            return (_fault_of_deep_gemm(server) if blackwell else None) or self._fault_of_shapes(server, BLOCK, BLOCK)
        if self.format.scheme == "mxfp8":
            if capability and not blackwell:
                return f"MXFP8 needs Blackwell, and these GPUs have compute capability {capability}; use block FP8"
            return self._fault_of_experts(server) or self._fault_of_shapes(server, 1, MX_BLOCK)
        return None

    def _fault_of_loading(self, server: Mapping[str, Any]) -> str | None:
        """Whether the server holds the weights as the trainer thinks."""
        method, channel = server.get("quantization"), server.get("load_format") == "flash_rl"
        path = Path(server["model_path"]) / "config.json" if server.get("model_path") else None
        if path and path.is_file():  # a server on another machine may name a folder that is not here
            try:
                served = WeightFormat.of_config(read_hf_config(path.parent), str(path.parent))
            except UserError as error:  # a fault of that server alone
                return str(error)
            if served != (self.format if self.format.is_sent else WeightFormat()):
                return f"it serves {path.parent}, the trainer sends what suits {self.folder}; give --sglang-model-path"
        if channel != (self.format.scheme == "channel"):
            return (
                f"it {'was' if channel else 'was not'} started with --load-format flash_rl; tell the trainer the same"
            )
        if channel and (method != "fp8" or self.model_type not in _FLASH_RL):
            return (
                f"--load-format flash_rl is for --quantization fp8 of {' and '.join(_FLASH_RL)}; this is "
                f"--quantization {method} of {self.model_type}"
            )
        if self.format.scheme == "none" and method:
            return (
                f"--quantization {method} makes of loaded weights what cannot be updated; serve what "
                f"tools/make_fp8_checkpoint.py writes, or add --load-format flash_rl to --quantization fp8"
            )
        return None

    def _fault_of_experts(self, server: Mapping[str, Any]) -> str | None:
        backend = server.get("moe_runner_backend") or "auto"
        if not self.architecture.get("num_experts") or backend in _MXFP8_EXPERTS:
            return None
        return (
            f"--moe-runner-backend {backend} gives the scales of MXFP8 experts another shape, so that an update no "
            f"longer fits; give --moe-runner-backend cutlass"
        )

    def _fault_of_shapes(self, server: Mapping[str, Any], block_rows: int, block_columns: int) -> str | None:
        """SGLang asks every part of a fused weight for whole blocks, and its own check of the weights every row."""
        for name, shape in linear_weights(self.architecture).items():
            rows, columns = self._shard(name, shape, server)
            if self.format.quantizes(name) and (rows % block_rows or columns % block_columns):
                return (
                    f"{name} is {list(shape)}, of which a server rank holds {rows:g} x {columns:g}: no multiple of "
                    f"{block_rows} x {block_columns}; use less tensor parallelism, or leave the module out with "
                    f"make_fp8_checkpoint.py --skip"
                )
        return None

    def _shard(self, name: str, shape: tuple[int, int], server: Mapping[str, Any]) -> tuple[float, float]:
        """[out, in] of one rank: o and down are cut along ``in``, the others along ``out``; a key head is never cut."""
        (rows, columns), ranks = shape, server["tp_size"]
        if ".experts." in name:
            ranks //= server.get("ep_size", 1)
        elif ".self_attn." in name and server.get("enable_dp_attention"):
            ranks //= server["dp_size"]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return rows, columns / ranks
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return max(rows / ranks, self.architecture["kv_channels"]), columns
        return rows / ranks, columns


def _fault_of_deep_gemm(server: Mapping[str, Any]) -> str | None:
    """On Blackwell, DeepGEMM's scales are packed powers of two: after loading, a plain update no longer fits."""
    linear, experts = (server.get(key) or "auto" for key in ("fp8_gemm_runner_backend", "moe_runner_backend"))
    if linear in ("auto", "deep_gemm"):
        return (
            f"--fp8-gemm-backend {linear} repacks the scales for DeepGEMM on this GPU, so that an update no longer "
            f"fits; give --fp8-gemm-backend flashinfer_trtllm (or triton), or serve MXFP8"
        )
    if experts == "deep_gemm" or (experts == "auto" and server.get("moe_a2a_backend") in _DEEP_GEMM_DISPATCHERS):
        return "DeepGEMM repacks the scales of experts on this GPU; give --moe-runner-backend triton"
    return None


def check_rollout_weights(args: argparse.Namespace, *, training: bool = True) -> PrecisionReport:
    """Which weights trainer and servers compute with in FP8, after checking all of it that flags and folders tell.

    Raises UserError: the servers could not take the updates, or weights differ in precision and nothing weighs that
    (which concerns ``training`` only).
    """
    served = ServedModel.of(args.hf_model, args.sglang_flags)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if ignored := args.sglang_servers and os.environ.get(_IGNORED):  # servers would leave out what config.json has not
        raise UserError(
            f"{_IGNORED}={ignored} in the environment: use make_fp8_checkpoint.py --skip instead, and unset it"
        )
    if args.sglang_servers and (fault := served.fault(server_fields(args.sglang_flags), capability)):
        raise UserError(f"--sglang-servers could not be updated (--sglang-X below stands for their --X): {fault}")
    if args.check_weights and served.format.scheme in ("mxfp8", "channel"):
        raise UserError(
            f"--check-weights: servers change the layout of {'MXFP8' if served.format.is_sent else 'flash_rl'} weights "
            f"after loading them, so there is nothing to compare; leave it out"
        )
    fp8 = fp8_settings(args)
    ours = trainer_format(fp8.recipe, fp8.power_of_two_scales, fp8.bf16_layers) if fp8 else WeightFormat()
    report = PrecisionReport(ours, served.format, served.architecture, args.tensor_model_parallel_size)
    if training and report.difference and not args.rollout_correction:
        raise UserError(
            f"{report.difference}: train as the engine computes (docs/fp8_rollouts.md), or weigh the difference with "
            f"--rollout-correction, e.g. token-tis:2"
        )
    return report
