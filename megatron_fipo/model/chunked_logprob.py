"""Log-probs of labels under softmax(hidden @ weight.T / temperature), whose logits exist one tile at a time.

The forward pass walks over tiles of the logits and keeps three numbers for each row: the greatest logit so far, the sum
of exponentials relative to it, and the label's logit; for the entropy H a fourth, the sum of logits so weighted. The
backward pass computes the tiles again and multiplies their gradient, g (onehot - p) / temperature of the log-prob and
-h p (log p + H) / temperature of the entropy, with hidden states and weight at once. Tiles are cut along the vocabulary
too, not only along the rows: with all rows in a tile its share of the weight's gradient is complete, where strips of
rows would read and write the whole gradient for each strip.

Under tensor parallelism each rank walks over its own shard of the vocabulary; two all-reduces of a few numbers for each
row join the shards, as in Megatron's vocab-parallel cross entropy.

Suffixes: _R rows (positions that want a log-prob), _V vocabulary shard, _C columns of a tile, _H hidden width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 logits alive at once: a tile of 4,096 x 4,096. The two products that add a tile to the gradients then do 1,024
# floating-point operations for each byte of sums that they move, three times the balance of an H100, and a tile's
# arithmetic outlasts the launch of its dozen kernels; it is a thousandth of such a GPU's memory. On a CPU the time is
# the same for 1 to 64 MiB (hidden width 1,024).
TILE_BYTES = 64 * 2**20
# Tile sides are multiples of it: what the tensor cores of all generations want, in every precision.
ALIGNMENT = 128


def log_probs_of_labels(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_R: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    add_to_main_grad: bool = False,
    tile_bytes: int = TILE_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden_RH @ weight_VH.T / temperature)[r, labels_R[r]] for each row r.

    Values do not depend on whether gradients are on, nor on `with_entropy`, bit for bit.

    Args:
        hidden_RH: [R, H], the same on every rank of `group`; its gradient is this shard's part of the sum over `group`.
        weight_VH: [V, H], this rank's shard, of the same dtype.
        labels_R: int64 [R], in [0, vocab_size).
        vocab_size: rows of the whole weight that take probability; those behind are padding.
        with_entropy: also compute the entropy of each row's distribution.
        group: tensor-parallel group over which the vocabulary is cut in equal shards; None for one process.
        add_to_main_grad: add the weight's gradient to `weight_VH.main_grad` in that buffer's precision, as Megatron's
            `gradient_accumulation_fusion` does, instead of returning it to autograd.
        tile_bytes: bound on the fp32 logits alive at once.

    Returns:
        fp32 [R] log-probs and entropies in nats (None unless asked for), differentiable once.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    rows, first = hidden_RH.size(0), rank * weight_VH.size(0)
    columns = min(max(vocab_size - first, 0), weight_VH.size(0))
    height, width = tile_shape(rows, columns, tile_bytes)
    one_tile = (height, width) == (rows, columns)
    # DDP drops all of a step's gradients for a weight that is marked as added to main_grad once: no mixing.
    if one_tile and size == 1 and weight_VH.dtype == torch.float32 and not add_to_main_grad:
        return _from_whole_logits(hidden_RH, weight_VH, labels_R, columns, temperature, with_entropy)
    head = _Head(
        rows=_blocks(rows, height),
        columns=_blocks(columns, width),
        inverse_temperature=1.0 / temperature,
        group=group if size > 1 else None,
        add_to_main_grad=add_to_main_grad,
    )
    return _TiledLogProb.apply(hidden_RH, weight_VH, labels_R - first, head, with_entropy)


def tile_shape(rows: int, columns: int, tile_bytes: int) -> tuple[int, int]:
    """Height and width of the tiles of a [rows, columns] matrix of fp32 logits.

    As square as the matrix allows, because operands moved grow with height + width and arithmetic with their product;
    cut evenly, as far as the alignment allows. A side that is cut is a multiple of ALIGNMENT: `tile_bytes` below
    4 * ALIGNMENT**2 act as that.
    """
    elements = max(tile_bytes // 4, ALIGNMENT**2)
    height = _even_part(rows, max(math.isqrt(elements), elements // max(columns, 1)))
    width = _even_part(columns, elements // max(height, 1))
    return height, width


def _even_part(total: int, limit: int) -> int:
    """Cut `total` into the fewest parts of at most `limit`; the length of all parts but the last."""
    if total <= limit:
        return total
    parts = math.ceil(total / (limit // ALIGNMENT * ALIGNMENT))
    return math.ceil(total / parts / ALIGNMENT) * ALIGNMENT


def _blocks(total: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, total)) for start in range(0, total, max(length, 1))]


def _from_whole_logits(
    hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, columns: int, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The same where one tile holds everything: torch's own operations, fewer and without a second computation.

    The product includes the padding, because an aligned width is worth more than the few columns.
    """
    logp_RV = ((hidden_RH @ weight_VH.t())[:, :columns] / temperature).log_softmax(-1)
    logp_R = logp_RV.gather(1, labels_R[:, None])[:, 0]
    if not with_entropy:
        return logp_R, None
    return logp_R, -(logp_RV.exp() * logp_RV).sum(1)


@dataclass(frozen=True)
class _Head:
    """What both passes know: the cuts of this shard's logits (padding is outside), and how to treat them."""

    rows: list[slice]
    columns: list[slice]
    inverse_temperature: float
    group: dist.ProcessGroup | None
    add_to_main_grad: bool

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the largest tile: allocating each tile anew costs a CPU a page fault for every 4 KiB."""
        elements = self.rows[0].stop * self.columns[0].stop if self.rows and self.columns else 0
        return torch.empty(elements, dtype=dtype, device=device)

    def logits(self, hidden_RH: Tensor, weight_CH: Tensor, buffer: Tensor) -> Tensor:
        """fp32 [R, C], in `buffer`."""
        logits_RC = _shaped(buffer, hidden_RH.size(0), weight_CH.size(0))
        _matmul(hidden_RH, weight_CH.t(), out=logits_RC, keep=0.0, scale=self.inverse_temperature)
        return logits_RC


class _TiledLogProb(torch.autograd.Function):
    """`labels_R` counts from the shard's first row; those of other shards lie outside its columns."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, head: _Head, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        operand_RH = hidden_RH.to(_operand_dtype(hidden_RH))
        # For each row: the greatest logit, finite so that an empty shard counts as nothing; the sum of exponentials
        # and the sum of logits weighted by them, both relative to it; the label's logit, 0 if another shard has it.
        maximum_R = hidden_RH.new_full(labels_R.shape, torch.finfo(torch.float32).min, dtype=torch.float32)
        total_R, weighted_R, label_R = (torch.zeros_like(maximum_R) for _ in range(3))
        buffer = head.buffer(torch.float32, hidden_RH.device)
        exp_buffer = head.buffer(torch.float32, hidden_RH.device) if with_entropy else buffer
        for columns in head.columns:
            weight_CH = weight_VH[columns].to(operand_RH.dtype)
            for rows in head.rows:
                tile_RC = head.logits(operand_RH[rows], weight_CH, buffer)
                position_R1, inside_R = _locate(labels_R[rows], columns)
                label_R[rows] += tile_RC.gather(1, position_R1)[:, 0].where(inside_R, 0.0)
                new_maximum_R = torch.maximum(maximum_R[rows], tile_RC.amax(1))
                total, weighted = _relative_to(new_maximum_R, maximum_R[rows], total_R[rows], weighted_R[rows])
                tile_RC.sub_(new_maximum_R[:, None])
                exp_RC = torch.exp(tile_RC, out=_shaped(exp_buffer, *tile_RC.shape))
                maximum_R[rows] = new_maximum_R
                total_R[rows] = total + exp_RC.sum(1)
                if with_entropy:
                    weighted_R[rows] = weighted + tile_RC.mul_(exp_RC).sum(1)
        if head.group is not None:
            own_maximum_R = maximum_R.clone()
            dist.all_reduce(maximum_R, op=dist.ReduceOp.MAX, group=head.group)
            sums = torch.stack([*_relative_to(maximum_R, own_maximum_R, total_R, weighted_R), label_R])
            dist.all_reduce(sums, group=head.group)
            total_R, weighted_R, label_R = sums
        ctx.head = head
        ctx.set_materialize_grads(False)
        log_total_R = total_R.log()
        logp_R = label_R - maximum_R - log_total_R
        mean_R = weighted_R / total_R if with_entropy else None  # of the logits, relative to the greatest
        ctx.save_for_backward(hidden_RH, weight_VH, labels_R, maximum_R, total_R, mean_R)
        return logp_R, None if mean_R is None else log_total_R - mean_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, labels_R, maximum_R, total_R, mean_R = ctx.saved_tensors
        head: _Head = ctx.head
        grad_R = torch.zeros_like(total_R) if grad_R is None else grad_R
        operand_RH = hidden_RH.to(_operand_dtype(hidden_RH))
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=torch.float32)
        grad_weight_VH = weight_VH.main_grad if head.add_to_main_grad else torch.zeros_like(weight_VH)
        # With z the logits and exp their exponentials, both relative to the greatest, a tile's gradient is
        #     scale * (exp * slope - label), label = g total onehot, slope = g + h (z - mean)    scale = -1 / (T total)
        # for upstream gradients g of the log-prob and h of the entropy, as log p + H = z - mean. Without h, g is taken
        # into the scale.
        scale_R, label_R = -head.inverse_temperature / total_R, total_R
        if grad_entropy_R is None:
            scale_R = scale_R * grad_R
        else:
            label_R = grad_R * total_R
        buffer = head.buffer(torch.float32, hidden_RH.device)
        exp_buffer = buffer if grad_entropy_R is None else head.buffer(torch.float32, hidden_RH.device)
        grad_buffer = buffer if operand_RH.dtype == torch.float32 else head.buffer(operand_RH.dtype, hidden_RH.device)
        for columns in head.columns:
            weight_CH = weight_VH[columns].to(operand_RH.dtype)
            grad_weight_CH = grad_weight_VH[columns]
            in_fp32 = grad_weight_CH.dtype == torch.float32
            sum_CH = grad_weight_CH if in_fp32 else torch.zeros_like(grad_weight_CH, dtype=torch.float32)
            for rows in head.rows:
                tile_RC = head.logits(operand_RH[rows], weight_CH, buffer).sub_(maximum_R[rows, None])
                exp_RC = torch.exp(tile_RC, out=_shaped(exp_buffer, *tile_RC.shape))
                if grad_entropy_R is not None:
                    slope_RC = (
                        tile_RC.sub_(mean_R[rows, None]).mul_(grad_entropy_R[rows, None]).add_(grad_R[rows, None])
                    )
                    exp_RC.mul_(slope_RC)
                position_R1, inside_R = _locate(labels_R[rows], columns)
                exp_RC.scatter_add_(1, position_R1, -label_R[rows].where(inside_R, 0.0)[:, None])
                grad_RC = torch.mul(exp_RC, scale_R[rows, None], out=_shaped(grad_buffer, *tile_RC.shape))
                _matmul(grad_RC, weight_CH, out=grad_hidden_RH[rows])
                _matmul(grad_RC.t(), operand_RH[rows], out=sum_CH)
            if not in_fp32:
                grad_weight_CH += sum_CH
        if head.add_to_main_grad:
            grad_weight_VH = _placeholder_gradient(weight_VH)
        return grad_hidden_RH.to(hidden_RH.dtype), grad_weight_VH, None, None, None


def _relative_to(new_maximum_R: Tensor, maximum_R: Tensor, total_R: Tensor, weighted_R: Tensor) -> tuple[Tensor, ...]:
    """Sums of exp(z - maximum) and (z - maximum) exp(z - maximum), made relative to a greater maximum."""
    below_R = maximum_R - new_maximum_R
    shrink_R = below_R.exp()
    return shrink_R * total_R, shrink_R * (weighted_R + below_R * total_R)


def _locate(labels_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each label's column in the tile as an index [R, 1], and whether the tile has it (if not, the index is any)."""
    column_R = labels_R - columns.start
    width = columns.stop - columns.start
    return column_R.clamp(0, width - 1)[:, None], (column_R >= 0) & (column_R < width)


def _operand_dtype(hidden_RH: Tensor) -> torch.dtype:
    """Tensor cores sum bf16 products in fp32; a CPU's bf16 product is bf16, so there a tile's operands become fp32."""
    return hidden_RH.dtype if hidden_RH.is_cuda else torch.float32


def _matmul(a: Tensor, b: Tensor, *, out: Tensor, keep: float = 1.0, scale: float = 1.0) -> None:
    """out = keep * out + scale * a @ b, with sums and result in fp32 also for bf16 operands."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=keep, alpha=scale, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=keep, alpha=scale, out=out)


def _shaped(buffer: Tensor, height: int, width: int) -> Tensor:
    return buffer[: height * width].view(height, width)


def _placeholder_gradient(weight_VH: Tensor) -> Tensor:
    """What autograd gets where main_grad has the gradient already, as from Megatron's own linear layers.

    DDP's hook wants to see a gradient; the mark makes the hook drop it. With `zero_out_wgrad` the hook adds it all the
    same, because autograd has added the embedding's share of a tied weight to it.
    """
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight_VH) if getattr(weight_VH, "zero_out_wgrad", False) else torch.empty_like(weight_VH)
