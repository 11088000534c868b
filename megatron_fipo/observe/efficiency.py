"""How well a step uses the machine: tokens and floating-point operations per second, full packs, memory."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.model.cost import CostModel
from megatron_fipo.rollout.rollout import Rollout


@dataclass(frozen=True)
class Efficiency:
    """cost: operations of a sequence. ranks: processes of the job. pack_tokens: budget of a micro-batch in tokens.
    peak: operations per second of the device at best, None if not known."""

    cost: CostModel
    ranks: int
    pack_tokens: int
    peak: float | None

    def metrics(
        self, rollout: Rollout, plan: Sequence[UpdatePlan], iterations: int, times: Mapping[str, float]
    ) -> dict[str, float]:
        """ "perf/..." of one step, whose samples were trained on ``iterations`` times.

        Seconds are those of the step without evaluation and saving; "train" is old_logp and update alone. Operations
        are the model's own: what activation recomputation repeats is not counted. A reference model, if there is a
        phase for one, is taken to be of the same architecture.
        """
        seconds = times["time/step"] - times.get("time/eval", 0.0) - times.get("time/checkpoint", 0.0)
        train_seconds = times["time/old_logp"] + times["time/update"]
        generated = rollout.generated
        rates = {
            "response_tokens_per_second": generated.response_tokens.sum().item() / seconds,
            "total_tokens_per_second": generated.tokens.sum().item() / seconds,
        }
        per_rank = {f"{name}_per_rank": rate / self.ranks for name, rate in rates.items()}
        training = self.training_flops(rollout, iterations) / self.ranks
        step = training + self.rollout_flops(rollout) / self.ranks
        if "time/reference" in times:
            step += self.forward_flops(rollout) / self.ranks
        per_rank["train_tflops_per_rank"] = training / train_seconds / 1e12
        per_rank["tflops_per_rank"] = step / seconds / 1e12
        if self.peak is not None:
            per_rank["train_mfu"] = training / train_seconds / self.peak
            per_rank["mfu"] = step / seconds / self.peak
        values = rates | per_rank | self.packing(rollout, plan)
        return {f"perf/{name}": value for name, value in values.items()}

    def training_flops(self, rollout: Rollout, iterations: int) -> float:
        """Of old_logp's forward pass and ``iterations`` updates, forward and twice that backward, over all ranks."""
        return self.forward_flops(rollout) * (1 + 3 * iterations)

    def forward_flops(self, rollout: Rollout) -> float:
        """Of one pass over the samples to train on; logits are computed for response tokens only."""
        forward = sum(self.cost.sequence(n) for n in rollout.packed_length_S.tolist())
        no_logits = rollout.packed_length_S.sum().item() - rollout.response_tokens_S.sum().item()
        return forward - self.cost.logits * no_logits

    def rollout_flops(self, rollout: Rollout) -> float:
        """Of generating every sample, kept or not: prompt and response pass the model once.

        The last token is not fed back; of the prompt only the last position needs logits.
        """
        generated = rollout.generated
        forward = sum(self.cost.sequence(int(n) - 1) for n in generated.tokens.tolist())
        no_logits = (generated.tokens - generated.response_tokens - 1).sum().item()
        return forward - self.cost.logits * no_logits

    def packing(self, rollout: Rollout, plan: Sequence[UpdatePlan]) -> dict[str, float]:
        """packing_efficiency: tokens as a share of what the packs had room for; padding_fraction: positions that hold
        no token, among them those of dummy packs."""
        tokens = padded = room = 0
        for update in plan:
            for pack in (pack for packs in update.micro_batches for pack in packs):
                lengths = rollout.packed_length_S[list(pack)]
                positions = sum(-(-n // update.alignment) * update.alignment for n in lengths.tolist())
                positions = max(positions, update.alignment)  # a dummy's
                positions += -positions % update.pack_alignment
                tokens += int(lengths.sum())
                padded += positions
                room += max(self.pack_tokens, positions)
        return {"packing_efficiency": tokens / room, "padding_fraction": 1 - tokens / padded}


def peak_memory(device: torch.device) -> float:
    """Bytes that the worst of all ranks allocated on its device at most since the last call; collective.

    Without a device: the largest resident size of a process since it started.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    worst = torch.tensor(float(peak), dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()
