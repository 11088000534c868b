"""Does the Megatron model compute what transformers computes? Layer by layer, on the same tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import AutoModelForCausalLM

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Parity:
    """``errors``: max |difference| / max |value| after the embedding, after each layer, and of the logits, in order."""

    errors: dict[str, float]
    limit: float

    @property
    def logits(self) -> float:
        return self.errors["logits"]

    @property
    def equal(self) -> bool:
        """True if the logits agree. NaN does not."""
        return self.logits <= self.limit

    @property
    def worst(self) -> str:
        """Where the error grows most over the place before, disregarding what is below a tenth of the limit."""
        floor = self.limit / 10
        before = [floor, *(max(error, floor) for error in self.errors.values())]
        growth = {name: error / b for (name, error), b in zip(self.errors.items(), before, strict=False)}
        return max(growth, key=lambda name: growth[name])


@torch.no_grad()
def compare(chunks: Sequence[torch.nn.Module], hf_dir: str | Path, tokens_BL: Tensor, dtype: torch.dtype) -> Parity:
    """Run both models over the same tokens.

    Collective over all ranks; rank 0 runs transformers. Positions are compared with their sequence to the left, so
    padding at the right of a sequence is compared, too.

    Args:
        chunks: this rank's chunks, with the weights loaded, without sequence parallelism.
        tokens_BL: int64.
        dtype: of both computations; a key of LIMITS.
    """
    device = next(chunks[0].parameters()).device
    found = _megatron(chunks, tokens_BL.to(device))
    errors: dict[str, float] = {}
    for name, expected in _broadcast(_transformers(hf_dir, tokens_BL, dtype), device):
        if name in found:
            actual = found[name][..., : expected.size(-1)].float()
            errors[name] = float((actual - expected).abs().max() / expected.abs().max())
        else:
            errors[name] = 0.0
    of_rank: list[dict[str, float]] = [errors] * dist.get_world_size()
    dist.all_gather_object(of_rank, errors)
    return Parity({name: _largest([e[name] for e in of_rank]) for name in errors}, LIMITS[dtype])


def _largest(errors: Sequence[float]) -> float:
    nan = [error for error in errors if error != error]
    return nan[0] if nan else max(errors)


def _transformers(hf_dir: str | Path, tokens_BL: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """On rank 0 fp32 [B, L, hidden or vocabulary] by name, elsewhere nothing."""
    if dist.get_rank() > 0:
        return {}
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True).eval()
    kept: dict[str, Tensor] = {}
    _keep(model.model.embed_tokens, "embedding", kept)
    for number, layer in enumerate(model.model.layers):
        _keep(layer, f"layer {number}", kept)
    kept["logits"] = model(tokens_BL).logits
    return {name: value.float() for name, value in kept.items()}


def _megatron(chunks: Sequence[torch.nn.Module], tokens_BL: Tensor) -> dict[str, Tensor]:
    """[B, L, hidden or vocabulary] by name, of what this rank's pipeline stages compute."""
    kept: dict[str, Tensor] = {}
    hooks = []
    for chunk in chunks:
        model = unwrap_model(chunk).eval()
        if model.pre_process:
            hooks.append(_keep(model.embedding, "embedding", kept))
        hooks += [_keep(layer, f"layer {layer.layer_number - 1}", kept) for layer in model.decoder.layers]
    positions_BL = torch.arange(tokens_BL.size(1), device=tokens_BL.device).expand_as(tokens_BL)

    def forward(_: Any, model: Any) -> tuple[Tensor, Any]:
        def keep(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return logits.sum(), torch.tensor(1, dtype=torch.int), gather_from_tensor_model_parallel_region(logits)

        return model(tokens_BL, positions_BL, None), keep

    interleaved = len(chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * len(chunks) if interleaved else None,
        model=list(chunks) if interleaved else chunks[0],
        # The interleaved schedule wants a multiple of the stages; each micro-batch is the same.
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1,
        seq_length=tokens_BL.size(1),
        micro_batch_size=tokens_BL.size(0),
        forward_only=True,
    )
    for hook in hooks:
        hook.remove()
    kept = {name: value.transpose(0, 1) for name, value in kept.items()}
    if parallel_state.is_pipeline_last_stage():
        kept["logits"] = results[0]
    return kept


def _keep(module: torch.nn.Module, name: str, kept: dict[str, Tensor]) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        kept[name] = value.clone()  # the schedule empties what it has sent on

    return module.register_forward_hook(hook)


def _broadcast(tensors: dict[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors on every rank, in rank 0's order."""
    shapes = [[(name, tensor.shape) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(shapes, src=0)
    for name, shape in shapes[0]:
        tensor = tensors[name].to(device) if tensors else torch.empty(shape, device=device)
        dist.broadcast(tensor, src=0)
        yield name, tensor
