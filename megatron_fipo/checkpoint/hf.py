"""Streams weights between Hugging Face tensors and the Megatron model, one parameter at a time, for every layout."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_fipo.checkpoint.hf_files import HFTensor, HFWeights
from megatron_fipo.checkpoint.hf_map import Rule, WeightMap, expert_of, for_expert, global_name
from megatron_fipo.model.hf_config import read_hf_config


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], hf_dir: str | Path) -> None:
    """Copy the folder's weights into the model, cast to its parameters' dtype.

    Each rank reads its own shards of its own pipeline stages and experts, without a collective. It checks all names and
    shapes, but values only of what it reads. Call it before the optimizer is built, or let the optimizer reload its
    main parameters afterwards.

    Args:
        model_chunks: this rank's chunks, wrapped or not.
        hf_dir: the folder that `megatron_arguments` described.

    Raises:
        UserError: tensors are missing, superfluous, misshapen or not finite.
    """
    weights = HFWeights(hf_dir)
    weight_map = weight_map_of(model_chunks, read_hf_config(hf_dir)["vocab_size"])
    weights.check(weight_map)
    for name, parameter in global_parameters(model_chunks).items():
        rule = weight_map.rule(name)
        group = _shard_group(name)
        parameter.copy_(read_shard(weights, rule, group.size(), group.rank()))


def read_shard(weights: HFWeights, rule: Rule, size: int, rank: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a parameter, read without the other ranks' rows or columns.

    With fewer query groups than ranks, the ranks of a group all read the group.

    Raises:
        UserError: NaNs or infinities, naming the tensor.
    """
    pieces = rule.pieces(size)
    number, within = divmod(rank, size // pieces)
    read = [weights.read(name, rule.piece(weights.shape(name), pieces, number)) for name in rule.hf_names]
    return rule.shard(rule.merge(read, pieces), size // pieces, within)


@torch.no_grad()
def export_hf_weights(
    model_chunks: Sequence[torch.nn.Module], vocab_size: int, own_stage: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The whole model's weights under their HF names, in the parameters' dtype and on their device.

    Collective: every rank must iterate to the end, and every rank gets every tensor. A parameter goes from the pipeline
    stage that holds it to the others, then its shards (of an expert: those of all expert-parallel ranks) are gathered.
    Memory: one parameter at a time, of experts one per expert-parallel rank, and the tensors that the caller keeps.

    Args:
        model_chunks: this rank's chunks (one per virtual pipeline stage), wrapped or not.
        vocab_size: rows of the embedding to keep; the rest is Megatron's padding.
        own_stage: only the weights that this rank's pipeline stage holds; collective over the ranks of the stage then.
    """
    weight_map = weight_map_of(model_chunks, vocab_size)
    parameters = global_parameters(model_chunks)
    stages = None if own_stage else _Stages(parameters)
    for names in _stream(weight_map):
        mine = _mine(names)
        if own_stage and mine not in parameters:
            continue
        rules = [weight_map.rule(name) for name in names]
        group = _shard_group(mine) if len(names) == 1 else parallel_state.get_expert_tensor_and_model_parallel_group()
        shards = [stages.broadcast(mine) if stages else parameters[mine].detach()]
        if group.size() > 1 and rules[0].tp_axis is not None:
            own = shards[0].contiguous()
            shards = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(shards, own, group=group)
        per_name = len(shards) // len(names)  # the tensor-parallel rank varies fastest
        for i, rule in enumerate(rules):
            full = rule.unshard(shards[i * per_name : (i + 1) * per_name])
            yield from zip(rule.hf_names, rule.split(full), strict=True)


def hf_layout(model_chunks: Sequence[torch.nn.Module], vocab_size: int, own_stage: bool = False) -> list[HFTensor]:
    """Names, shapes and dtypes of :func:`export_hf_weights`'s tensors in its order; no collective, no weight moves."""
    weight_map = weight_map_of(model_chunks, vocab_size)
    parameters = global_parameters(model_chunks)
    return [
        HFTensor(hf_name, weight_map.hf_shape(hf_name), weight_map.config.params_dtype)
        for names in _stream(weight_map)
        if not own_stage or _mine(names) in parameters
        for name in names
        for hf_name in weight_map.rule(name).hf_names
    ]


def weight_map_of(model_chunks: Sequence[torch.nn.Module], vocab_size: int) -> WeightMap:
    """The rules for the model of which these are this rank's chunks."""
    model = unwrap_model(model_chunks[0])
    return WeightMap(get_model_config(model), vocab_size, model.vocab_size, model.share_embeddings_and_output_weights)


def global_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their global names, see `hf_map`."""
    parameters: dict[str, torch.nn.Parameter] = {}
    for chunk in model_chunks:
        model = unwrap_model(chunk)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        local_experts = (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size
        first_expert = local_experts * parallel_state.get_expert_model_parallel_rank()
        parameters |= {global_name(name, layers, first_expert): p for name, p in model.named_parameters()}
    return parameters


def _stream(weight_map: WeightMap) -> Iterator[tuple[str, ...]]:
    """Global names in the order of the stream; together those that lie in the same place of expert-parallel ranks."""
    ranks = weight_map.config.expert_model_parallel_size
    local_experts = (weight_map.config.num_moe_experts or 0) // ranks
    for name in weight_map.names():
        expert = expert_of(name)
        if expert is None:
            yield (name,)
        elif expert < local_experts:
            yield tuple(for_expert(name, expert + rank * local_experts) for rank in range(ranks))


def _mine(names: tuple[str, ...]) -> str:
    """Of the names in one place of the stream, the one that this rank or another stage's like it holds."""
    return names[parallel_state.get_expert_model_parallel_rank() if len(names) > 1 else 0]


def _shard_group(name: str) -> dist.ProcessGroup:
    """The ranks between which a parameter is cut."""
    if expert_of(name) is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


class _Stages:
    """Brings a parameter from the pipeline stage that holds it to all stages."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Collective over the pipeline group, as :meth:`broadcast` is."""
        self._parameters = parameters
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._device = next(iter(parameters.values())).device
        own = {name: (p.shape, p.dtype) for name, p in parameters.items()}
        of_stage = [own] * self._group.size()
        if self._group.size() > 1:
            dist.all_gather_object(of_stage, own, group=self._group)
        self._holders = {
            name: (stage, *what) for stage, held in reversed(list(enumerate(of_stage))) for name, what in held.items()
        }

    def broadcast(self, name: str) -> Tensor:
        stage, shape, dtype = self._holders[name]
        if stage == self._group.rank():
            tensor = self._parameters[name].detach()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        if self._group.size() > 1:
            dist.broadcast(tensor, group_src=stage, group=self._group)
        return tensor
