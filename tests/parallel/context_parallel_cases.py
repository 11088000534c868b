"""Cases of the context-parallel loss, and what every rank of a group does with one of them.

Starting ranks is dear, so one world of 8 processes runs all cases: groups of 2, 4 and 8 of its ranks, chosen so that a
rank's number in its group differs from its number in the world.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo.loss import FipoConfig, fipo_loss, loss_scale
from megatron_fipo.loss.metrics import SUMS
from megatron_fipo.ops.packed import expand_to_tokens, sum_per_sequence
from megatron_fipo.parallel import zigzag
from megatron_fipo.parallel.loss import context_parallel_fipo_loss

GROUPS = {1: [5], 2: [3, 6], 4: [1, 2, 5, 7], 8: list(range(8))}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """lengths: real tokens per sequence, before padding to a multiple of 2 * size * align. prompt: leading share of
    each sequence without response. beyond: number of tokens with r > c in each sequence, evenly spread over the
    response, so that they lie on different ranks; those sequences have A < 0."""

    name: str
    lengths: tuple[int, ...]
    config: FipoConfig = FipoConfig()
    prompt: float = 0.25
    align: int = 1
    rows: bool = False  # as a padded batch [B, L]
    weighted: bool = False
    beyond: tuple[int, ...] = ()
    spread: float = 0.1  # standard deviation of the log-ratio
    seed: int = 0
    backend: str = "compiled"
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = (2, 4, 8)


@dataclass(frozen=True)
class Batch:
    """The whole pack, padded."""

    logp_T: torch.Tensor
    old_logp_T: torch.Tensor
    mask_T: torch.Tensor
    token_weight_T: torch.Tensor | None
    advantage_S: torch.Tensor
    group_ids_S: torch.Tensor
    cu_seqlens_S1: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if value is None else value.to(device) for value in vars(self).values()))


def make_batch(case: Case, size: int) -> Batch:
    """NaN or inf wherever no response token is."""
    g = torch.Generator().manual_seed(case.seed)
    multiple = 2 * size * case.align
    real_S = torch.tensor(case.lengths, dtype=torch.int32)
    if case.rows:
        cu = zigzag.uniform_cu_seqlens(len(real_S), -(-int(real_S.max()) // multiple) * multiple)
    else:
        cu = zigzag.pad_cu_seqlens(torch.nn.functional.pad(real_S.cumsum(0, dtype=torch.int32), (1, 0)), multiple)
    tokens = int(cu[-1])
    position_T = torch.arange(tokens) - expand_to_tokens(cu[:-1], cu, tokens)
    length_T = expand_to_tokens(real_S, cu, tokens)
    mask = (position_T < length_T) & (position_T >= (case.prompt * length_T).int())
    mask &= torch.rand(tokens, generator=g) < 0.95  # holes: tool output, other turns
    step = case.spread * torch.randn(tokens, generator=g)
    for s, count in enumerate(case.beyond):
        own = torch.arange(int(cu[s]), int(cu[s + 1]))[mask[cu[s] : cu[s + 1]]]
        step[own[len(own) * torch.arange(1, min(count, len(own)) + 1) // (count + 1)]] = 3.0
    logp = -3 * torch.rand(tokens, generator=g)
    padding = torch.tensor([NAN, INF, -INF])[torch.randint(3, (tokens,), generator=g)]
    advantage = torch.randn(len(real_S), generator=g) + 0.3
    for s, count in enumerate(case.beyond):
        advantage[s] = -advantage[s].abs() if count else advantage[s]
    token_weight = torch.where(mask, 2 * torch.rand(tokens, generator=g), NAN) if case.weighted else None
    return Batch(
        torch.where(mask, logp, padding).to(case.dtype),
        torch.where(mask, logp - step, padding.flip(0)).to(case.dtype),
        mask,
        token_weight,
        advantage,
        torch.arange(len(real_S)) // 3,
        cu,
    )


class Alone:
    """A group of this rank alone, as a loss sees it: nothing is sent."""

    def size(self) -> int:
        return 1


class Collectives(TorchDispatchMode):
    """Every operator in order, and for each collective its name and the bytes that this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func.name())
        if func.namespace in ("c10d", "_c10d_functional"):
            message = args[0][0] if isinstance(args[0], list) else args[1]  # all_reduce takes a list
            self.sent.append((func.name(), message.nbytes))
        return func(*args, **(kwargs or {}))


def loss_and_grad(batch: Batch, case: Case, scale_S, dtype: torch.dtype, backend: str, **kwargs):
    """The unsharded loss."""
    leaf = batch.logp_T.to(dtype, copy=True).requires_grad_()
    out = fipo_loss(
        leaf, batch.old_logp_T.to(dtype), batch.advantage_S, batch.mask_T, batch.cu_seqlens_S1, case.config,
        token_weight_T=batch.token_weight_T, loss_scale_S=scale_S, backend=backend, **kwargs,
    )  # fmt: skip
    out.loss_sum.backward()
    return out, leaf.grad


def run_case(case: Case, group: dist.ProcessGroup, device: torch.device) -> dict:
    """One rank's part of a case, compared with the same tokens of the unsharded loss in fp32 and fp64.

    Errors of the gradient are relative to its maximum. loss_size is the size of the loss, terms_size that of the terms
    it is the sum of.
    """
    size, rank = group.size(), group.rank()
    batch = make_batch(case, size).to(device)
    cu, tokens = batch.cu_seqlens_S1, batch.logp_T.shape[0]
    scale_S = loss_scale(case.config.resolved_normalization, sum_per_sequence(batch.mask_T, cu), batch.group_ids_S)
    whole, whole_grad = loss_and_grad(batch, case, scale_S, case.dtype, case.backend)
    exact, exact_grad = loss_and_grad(batch, case, scale_S, torch.float64, "torch")

    index = zigzag.token_index(cu, tokens, rank, size)

    def local(values):
        if values is None:
            return None
        if case.rows:
            return zigzag.shard_rows(values.view(len(cu) - 1, -1), rank, size).flatten()
        return values[index]

    leaf = local(batch.logp_T).requires_grad_()
    with Collectives() as collectives:
        out = context_parallel_fipo_loss(
            leaf, local(batch.old_logp_T), batch.advantage_S, local(batch.mask_T), cu, case.config, group,
            token_weight_T=local(batch.token_weight_T), loss_scale_S=scale_S, backend=case.backend,
        )  # fmt: skip
        out.loss_sum.backward()

    local_beyond_c = out.statistics.sums[SUMS.index("dual_clipped")].item()
    totals = torch.stack([out.loss_sum.detach().double(), out.denominator, out.normalizer])
    dist.all_reduce(totals, group=group)
    statistics = out.statistics
    for values, op in ((statistics.sums, "SUM"), (statistics.minima, "MIN"), (statistics.maxima, "MAX")):
        dist.all_reduce(values, op=getattr(dist.ReduceOp, op), group=group)
    dist.all_reduce(statistics.histograms, group=group)

    # what a scan that stays on its rank would give: shows that the case can tell
    runs = zigzag.run_cu_seqlens(cu, size)
    alone = local(batch.logp_T).requires_grad_()
    fipo_loss(
        alone, local(batch.old_logp_T), batch.advantage_S.repeat_interleave(2), local(batch.mask_T), runs, case.config,
        token_weight_T=local(batch.token_weight_T), loss_scale_S=scale_S.repeat_interleave(2), backend=case.backend,
    ).loss_sum.backward()  # fmt: skip

    largest = exact_grad.abs().max().item() if tokens else 0.0
    mask = local(batch.mask_T)

    def grad_error(grad, reference):
        return ((grad.double() - reference[index].double()).abs().max() / max(largest, 1e-30)).item() if tokens else 0.0

    def loss_difference(reference):
        return abs(totals[0].item() - reference.loss_sum.item())

    sums_error = dict(zip(SUMS, (statistics.sums - whole.statistics.sums).abs().tolist(), strict=True))
    numbers = ("log_ratio", "weight", "raw_weight", "normalizer", "loss", "advantage", "weighted_advantage")
    relative = [sums_error.pop(name) for name in numbers]
    # a weight may lie on the other side of its bound by a rounding
    near_edge = [sums_error.pop(name) for name in ("weight_at_high", "weight_at_low", "active")]
    extrema = [(statistics.minima, whole.statistics.minima), (statistics.maxima, whole.statistics.maxima)]
    return {
        "loss": loss_difference(whole),
        "grad": grad_error(leaf.grad, whole_grad),
        "exact_loss": loss_difference(exact),
        "loss_size": max(abs(exact.loss_sum.item()), 1e-30),
        "terms_size": max(abs(exact.loss_sum.item()), exact_grad.abs().sum().item(), 1e-30),
        "exact_grad": grad_error(leaf.grad, exact_grad),
        "alone_grad": grad_error(alone.grad, whole_grad),
        "weights": (out.weights_T - local(whole.weights_T))[mask].abs().max().item() if bool(mask.any()) else 0.0,
        "denominator": totals[1].item(),
        "whole_denominator": whole.denominator.item(),
        "normalizer_error": abs(totals[2] - whole.normalizer).item() / max(whole.normalizer.item(), 1e-30),
        "counts": max(sums_error.values()),
        "near_edge": max(near_edge),
        "sums": max(relative) / max(whole.statistics.sums.abs().max().item(), 1.0),
        "extrema": max(((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(0).max().item() for a, b in extrema),
        "histograms_equal": torch.equal(statistics.histograms, whole.statistics.histograms),
        "finite": bool(leaf.grad.isfinite().all()),
        "response_tokens": int(batch.mask_T.sum()),
        "local_response_tokens": int(mask.sum()),
        "local_beyond_c": local_beyond_c,
        "sent": collectives.sent,
        "operators": collectives.operators,
        "sequences": len(cu) - 1,
    }


def rank_of_world(
    rank: int, store: str, tasks: Sequence[tuple], groups: Mapping[int, Sequence[int]], backend: str
) -> list[tuple]:
    """Body of one process: [(size, name of the task, rank in its group, what it returned)]."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world_size(groups),
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        members = {size: dist.new_group(ranks) for size, ranks in groups.items()}
        results = [
            (size, name, members[size].rank(), function(*arguments, members[size], device))
            for name, sizes, function, arguments in tasks
            for size in sizes
            if rank in groups.get(size, ())
        ]
        dist.barrier()
        dist.destroy_process_group()
    except Exception:  # the others wait for this rank: end them all now
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return results


def world_size(groups: Mapping[int, Sequence[int]]) -> int:
    return 1 + max(rank for ranks in groups.values() for rank in ranks)


def run_world(
    tasks: Sequence[tuple], groups: Mapping[int, Sequence[int]] = GROUPS, backend: str = "gloo"
) -> dict[tuple[int, str], list]:
    """{(size, name of the task): what its ranks returned, in the order of their group}.

    tasks: (name, sizes, function, its arguments before group and device). groups: ranks of the world by group size.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    size = world_size(groups)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=context) as pool:
        futures = [pool.submit(rank_of_world, r, f"{folder}/store", tasks, groups, backend) for r in range(size)]
        results = [result for future in futures for result in future.result()]
    gathered: dict[tuple[int, str], list] = {}
    for size, name, _, value in sorted(results, key=lambda result: result[:3]):
        gathered.setdefault((size, name), []).append(value)
    return gathered
