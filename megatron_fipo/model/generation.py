"""One forward pass of the training model for generation, whatever its layout."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.model.attention import CachedSelfAttention
from megatron_fipo.model.fp8_training import row_multiple
from megatron_fipo.model.generation_memory import row_bytes
from megatron_fipo.model.kv_cache import KVCache


class GenerationModel:
    """The training model as generation sees it: token ids in, logits of the next token out on the last pipeline stage.

    Ranks of a tensor-parallel group and stages of a pipeline call it together, with the same arguments. Ranks of a
    context-parallel group hold the same weights and generate alone, each for other prompts. Ranks whose experts work
    together (expert parallelism, over data- and context-parallel ranks alike) may hold different rows, but must run the
    same number of passes: `largest` is how they agree.

    Attributes:
        context_group: the context-parallel group.
        device: where tokens and caches live.
        dtype: of the weights.
        row_multiple: what the number of positions in a pass (rows times length) has to be a multiple of: FP8 layers
            generate in FP8, so that samples come from the policy as it is trained.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], vocab_size: int) -> None:
        """
        Args:
            model_chunks: what Megatron's set-up returned: this stage's chunks in order, wrapped or not.
            vocab_size: real vocabulary; logits of the padded rows behind it are cut off.

        Raises:
            UserError: the model's experts are spread in a way that ranks with different rows cannot use.
        """
        self._chunks: list[Any] = [unwrap_model(chunk) for chunk in model_chunks]
        self._vocab_size = vocab_size
        layers = [layer for chunk in self._chunks for layer in chunk.decoder.layers]
        assert all(isinstance(layer.self_attention, CachedSelfAttention) for layer in layers), "not model_provider's"
        self._config = self._chunks[0].config
        groups = self._chunks[0].pg_collection
        self.context_group: dist.ProcessGroup = groups.cp
        self.device = next(p.device for chunk in self._chunks for p in chunk.parameters())
        self.dtype: torch.dtype = self._config.params_dtype
        self.row_multiple = row_multiple(self._config.fp8_recipe) if self._config.fp8 else 1
        self._tensor: dist.ProcessGroup = groups.tp
        self._pipeline: dist.ProcessGroup = groups.pp
        self._experts: dist.ProcessGroup | None = groups.tp_ep if self._config.num_moe_experts else None
        if self._experts is not None:
            _check_experts(self._experts.size(), groups.tp.size())

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Evaluation mode without sequence parallelism: a decoding step has one position, which cannot be cut.

        Layers copy the setting from the configuration when they are built, so it is switched wherever it stands.
        """
        modules = [module for chunk in self._chunks for module in chunk.modules()]
        holders = modules + [module.config for module in modules if hasattr(module, "config")]
        names = ("sequence_parallel", "reduce_scatter_embeddings")
        switched = [(holder, name) for holder in holders for name in names if getattr(holder, name, False) is True]
        were_training = [chunk.training for chunk in self._chunks]
        try:
            for chunk in self._chunks:
                chunk.eval()
                chunk.set_is_first_microbatch()  # the FP8 weights kept since the last forward pass are older than these
            for holder, name in switched:
                setattr(holder, name, False)
            yield
        finally:
            for holder, name in switched:
                setattr(holder, name, True)
            for chunk, was_training in zip(self._chunks, were_training, strict=True):
                chunk.train(was_training)

    def new_cache(self, max_length: int) -> KVCache:
        """A cache for sequences of up to `max_length` prompt and generated tokens; layers of all chunks share it."""
        return KVCache(self._chunks[0].rotary_pos_emb, max_length)

    def row_bytes(self, prompt: int, tokens: int) -> int:
        """Bytes of this rank's memory for a row of `tokens` tokens at the most, `prompt` of them the prompt's."""
        config, tensor = self._config, self._tensor.size()
        # While an MLP runs: residual, its input and output; gate and up, two more in the making of their product.
        activations = 4 * config.hidden_size + 4 * config.ffn_hidden_size // tensor
        if config.num_moe_experts:  # copies of the token go to the chosen experts, and come back
            width = 2 * config.hidden_size + 4 * config.moe_ffn_hidden_size
            activations = max(activations, 4 * config.hidden_size + config.moe_router_topk * width)
        return row_bytes(
            sum(len(chunk.decoder.layers) for chunk in self._chunks),
            max(1, config.num_query_groups // tensor),
            config.kv_channels,
            prompt,
            tokens,
            vocab_size=self._vocab_size,
            activations=activations,
            itemsize=self.dtype.itemsize,
        )

    def logits(self, token_BL: Tensor, cache: KVCache, mask: Tensor | None, last_B: Tensor | None) -> Tensor | None:
        """Run one pass over `token_BL` (int64 [B, L], the same on every stage).

        Args:
            mask: see TorchAttention.
            last_B: the position of each row whose logits are wanted; None: the last.

        Returns:
            On the last stage fp32 [B, V], the vocabulary gathered over tensor-parallel ranks; None on the others.
        """

        def logits_of_last(
            *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_unused: Any
        ) -> Tensor:
            hidden = (
                hidden_states[-1]
                if last_B is None
                else hidden_states[last_B, torch.arange(len(last_B), device=last_B.device)]
            )
            logits, _ = output_layer(hidden[None], weight=output_weight, runtime_gather_output=True)
            return logits[0, :, : self._vocab_size].float()

        rank, size = self._pipeline.rank(), self._pipeline.size()
        for chunk in self._chunks:
            if not chunk.pre_process:
                shape = (token_BL.size(1), token_BL.size(0), self._config.hidden_size)
                hidden = torch.empty(shape, dtype=self._config.pipeline_dtype, device=self.device)
                dist.recv(hidden, group=self._pipeline, group_src=(rank - 1) % size)
                chunk.set_input_tensor(hidden)
            # The cache knows the RoPE positions; Megatron ignores position ids under RoPE.
            out = chunk(token_BL, None, mask, inference_context=cache, output_processor=logits_of_last)
            chunk.set_input_tensor(None)
            if chunk.post_process:
                return out
            dist.send(out.contiguous(), group=self._pipeline, group_dst=(rank + 1) % size)  # the next chunk, or stage 0
        return None

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` on every rank of the replica with what the last stage's first rank has; return it.

        On a GPU not even the ranks of one stage may go by what each has drawn itself: its sums are not reproducible to
        the last bit, and one token that differs would leave the ranks with unequal work, waiting for each other.
        """
        if self._tensor.size() > 1 and self._pipeline.rank() == self._pipeline.size() - 1:
            dist.broadcast(tensor, group=self._tensor, group_src=0)
        if self._pipeline.size() > 1:
            dist.broadcast(tensor, group=self._pipeline, group_src=self._pipeline.size() - 1)
        return tensor

    @property
    def in_step(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups that, reduced over in turn, join the ranks which run the same passes.

        Experts may be spread over replicas, and these over the experts' groups.
        """
        replica = parallel_state.get_model_parallel_group()
        return (replica,) if self._experts is None else (replica, self._experts, replica)

    def largest(self, count: int) -> int:
        """The largest `count` among the ranks whose experts work together; without experts, `count`."""
        if self._experts is None or self._experts.size() == 1:
            return count
        counts = torch.tensor(count, device=self.device)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._experts)
        return int(counts)

    def fewest(self, count: int) -> int:
        """The smallest `count` among the ranks that run the same passes; all of them call it."""
        counts = torch.tensor(count, device=self.device)
        for group in self.in_step:
            dist.all_reduce(counts, dist.ReduceOp.MIN, group=group)
        return int(counts)


def _check_experts(experts: int, tensor: int) -> None:
    """Experts are spread over `experts` ranks, each replica's layers over `tensor` of them. Raises UserError."""
    if experts % tensor and tensor % experts:
        raise UserError(
            f"experts are spread over {experts} ranks (--expert-model-parallel-size x --expert-tensor-parallel-size), "
            f"which cuts through replicas of --tensor-model-parallel-size {tensor}: make one a multiple of the other."
        )
