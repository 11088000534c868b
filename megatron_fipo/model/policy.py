"""The policy being trained: Megatron's model, optimizer and schedule, and the two things the RL loop asks of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.loss import LossConfig, LossStatistics
from megatron_fipo.model.logprob import packed_log_probs
from megatron_fipo.model.reference import ReferenceWeights
from megatron_fipo.model.router_replay import RoutingReplay
from megatron_fipo.ops import has_kernels_for
from megatron_fipo.parallel.loss import context_parallel_loss


@dataclass(frozen=True)
class Update:
    """One optimizer update: the statistics of this rank's tokens, the global gradient norm before clipping, and f [T]
    of each micro-batch (none on pipeline stages before the last)."""

    statistics: LossStatistics
    grad_norm: float
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Policy:
    """Model chunks (one per virtual pipeline stage), optimizer, schedule; ``vocab_size`` without padding rows.

    ``context`` joins the context-parallel ranks; a rank's batches hold its share of the tokens. Log-probs, statistics
    and losses exist on the last pipeline stage only.
    """

    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    vocab_size: int
    temperature: float
    max_tokens: int
    context: dist.ProcessGroup

    def __post_init__(self) -> None:
        config = get_model_config(self.chunks[0])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.gather_weights()

    @functools.cached_property
    def _routing(self) -> RoutingReplay:
        return RoutingReplay(self.chunks)

    def gather_weights(self) -> None:
        """Make every rank hold all its weights, which ``--overlap-param-gather`` leaves to the next forward pass.

        Rollouts, exports and checkpoints want them now, and replicas may differ in the forward passes of a rollout.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def add_old_log_probs(self, updates: Sequence[Sequence[PackedBatch]]) -> tuple[list[list[PackedBatch]], Tensor]:
        """Forward passes under the present weights: the batches with ``old_logp_T``, and the sum of entropies.

        The packs are those of the updates, so the first update of a rollout sees ratios of exactly 1. The second value
        is the fp64 sum, over this rank's response tokens, of the entropy in nats. Pipeline stages before the last
        return the batches as they are, and 0.
        """

        def forward(batches: Any, model: Any) -> tuple[Any, Any]:
            batch = next(batches)
            with self._routing.recording(model, batch.routing):
                output = packed_log_probs(
                    model, batch, temperature=self.temperature, vocab_size=self.vocab_size, with_entropy=True
                )

            def keep(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Any]:
                logp_T, entropy_T = output
                return logp_T.sum(), _count(0), (batch.with_old_logp(logp_T), entropy_T.double().sum())

            return output, keep

        with_old: list[list[PackedBatch]] = []
        entropy_sum = torch.zeros((), dtype=torch.float64, device=updates[0][0].tokens_T.device)
        for micro_batches in updates:
            results = self._run(forward, micro_batches, forward_only=True)
            with_old.append([batch for batch, _ in results] or list(micro_batches))
            entropy_sum = entropy_sum + sum(entropy for _, entropy in results)
        return with_old, entropy_sum

    def add_reference_log_probs(
        self, updates: Sequence[Sequence[PackedBatch]], reference: ReferenceWeights
    ) -> list[list[PackedBatch]]:
        """Forward passes with the reference model's weights in place of the policy's: the batches with ``ref_logp_T``.

        Its routers choose experts for themselves. Pipeline stages before the last return the batches as they are.
        """

        def forward(batches: Any, model: Any) -> tuple[Any, Any]:
            batch = next(batches)
            logp_T = packed_log_probs(model, batch, temperature=self.temperature, vocab_size=self.vocab_size)
            return logp_T, lambda logp_T: (logp_T.sum(), _count(0), replace(batch, ref_logp_T=logp_T))

        with reference.in_place():
            return [self._run(forward, update, forward_only=True) or list(update) for update in updates]

    def update(self, micro_batches: Sequence[PackedBatch], loss_config: LossConfig) -> Update:
        """One optimizer update on this replica's share of a mini-batch.

        Back-propagates loss sums; Megatron divides once by the denominator over all micro-batches and replicas
        (``--calculate-per-token-loss``), which the sequence filter makes known only after the last forward pass.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with_entropy = loss_config.entropy_weight > 0

        def forward(batches: Any, model: Any) -> tuple[Any, Any]:
            batch = next(batches)
            with self._routing.replaying(model, batch.routing):
                output = packed_log_probs(
                    model, batch, temperature=self.temperature, vocab_size=self.vocab_size, with_entropy=with_entropy
                )

            def loss(output: Any) -> tuple[Tensor, Tensor, Any]:
                assert batch.old_logp_T is not None, "old log-probs come before updates"
                assert batch.advantage is not None, "advantages come before updates"
                logp_T, entropy_T = output if with_entropy else (output, None)
                out = context_parallel_loss(
                    logp_T,
                    batch.old_logp_T,
                    batch.advantage,
                    batch.response_mask_T,
                    batch.cu_seqlens_padded_S1,
                    loss_config,
                    self.context,
                    ref_logp_T=batch.ref_logp_T,
                    entropy_T=entropy_T,
                    token_weight_T=batch.token_weight_T,
                    loss_scale_S=batch.loss_scale_S,
                    backend="compiled" if has_kernels_for(logp_T.device.type) else "torch",
                )
                # With scales the sum over the mini-batch is the loss itself: nothing is left to divide by.
                denominator = out.denominator if batch.loss_scale_S is None else _count(0)
                return out.loss_sum, denominator.int(), (out.statistics, out.weights_T)

            return output, loss

        device = micro_batches[0].tokens_T.device
        results = self._run(forward, micro_batches, forward_only=False)
        self._routing.clear()
        _, grad_norm, _ = self.optimizer.step()
        parts = [statistics for statistics, _ in results]
        statistics = functools.reduce(LossStatistics.merge, parts, LossStatistics.empty(device))
        return Update(statistics, float(grad_norm), tuple(weight_T for _, weight_T in results))

    def advance_schedule(self, increment: int) -> float:
        """Move the learning-rate schedule by one rollout (``increment`` Megatron samples); returns the rate."""
        self.scheduler.step(increment=increment)
        return self.optimizer.param_groups[0]["lr"]

    def _run(self, forward: Any, micro_batches: Sequence[PackedBatch], *, forward_only: bool) -> list[Any]:
        for chunk in self.chunks:
            chunk.train()
        iterators = [iter(micro_batches) for _ in self.chunks]
        with torch.set_grad_enabled(not forward_only):  # Megatron's schedules leave it on
            return get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=self.max_tokens,
                micro_batch_size=1,
                forward_only=forward_only,
            )


def _count(tokens: int) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int)
