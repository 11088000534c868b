"""The influence weight of every token of a few samples, for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.parallel.zigzag import token_index
from megatron_fipo.rollout.rollout import GeneratedSamples, Rollout

MAX_TOKENS = 1500
"""Response tokens of a sample that are written."""

_REPLACEMENT = "\ufffd"  # what a tokenizer makes of a part of a character


@dataclass(frozen=True, eq=False)
class WeightedSample:
    """tokens int64 [n], prompt and response; response_mask bool [n]; weight fp64 [n], f, -1 where no rank knows one."""

    number: int
    tokens: Tensor
    response_mask: Tensor
    weight: Tensor


def best_and_worst(rollout: Rollout, update: UpdatePlan) -> list[int]:
    """The samples of an update with the highest and the lowest reward (one if they are the same), by number."""
    members = sorted(i for packs in update.micro_batches for pack in packs for i in pack)
    members = [i for i in members if rollout.response_tokens_S[i] > 0]
    rewards = rollout.reward_S.tolist()
    if not members:
        return []
    return list(dict.fromkeys((max(members, key=rewards.__getitem__), min(members, key=rewards.__getitem__))))


def gather_weights(
    numbers: Sequence[int],
    rollout: Rollout,
    micro_batches: Sequence[PackedBatch],
    weights: Sequence[Tensor],
    replicas: Replicas,
) -> list[WeightedSample]:
    """The samples ``numbers`` from whichever ranks hold their tokens; collective over all ranks.

    micro_batches: of the update that trained on them, this rank's share of the tokens. weights: their f [T], none on
    pipeline stages that compute no loss.
    """
    if not numbers:
        return []
    lengths = [int(rollout.packed_length_S[number]) + 1 for number in numbers]
    rows = torch.full((len(numbers), 3, max(lengths)), -1.0, dtype=torch.float64, device=replicas.device)
    for batch, weight_T in zip(micro_batches, weights, strict=False):
        for row, number in zip(rows, numbers, strict=True):
            for sequence in (batch.sample_ids_S == number).nonzero()[:, 0].tolist():
                _fill(row, batch, weight_T, sequence, replicas)
    rows = replicas.all_reduce_pieces(rows, torch.distributed.ReduceOp.MAX)
    return [
        WeightedSample(number, row[0, :n].long(), row[1, :n] > 0, row[2, :n])
        for number, row, n in zip(numbers, rows, lengths, strict=True)
    ]


def _fill(row: Tensor, batch: PackedBatch, weight_T: Tensor, sequence: int, replicas: Replicas) -> None:
    """Put this rank's tokens of one sequence in their places: [tokens, response mask, f]."""
    context, offsets_S1 = replicas.context, batch.cu_seqlens_padded_S1
    if context.size() > 1:
        index_T = token_index(offsets_S1, int(offsets_S1[-1]), context.rank(), context.size())
    else:
        index_T = torch.arange(len(weight_T), device=weight_T.device)
    position_T = index_T - offsets_S1[sequence]
    length = batch.cu_seqlens_S1.diff()[sequence]
    own_T = ((position_T >= 0) & (position_T < length)).nonzero()[:, 0]
    position_T = position_T[own_T]
    row[0, position_T] = batch.tokens_T[own_T].double()
    for line, values_T in enumerate((batch.labels_T, batch.response_mask_T, weight_T)):
        row[line, position_T + 1] = values_T[own_T].double()


def sample_record(
    sample: WeightedSample, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, when: str
) -> dict[str, Any]:
    """A line of samples.jsonl: the response as pieces of text, each with its f (null: not a token of the policy).

    A piece is a token, or the few tokens that make up one character together, with their mean f.
    """
    start = int(sample.response_mask.nonzero()[0, 0])
    tokens = sample.tokens.tolist()
    shown = slice(start, start + MAX_TOKENS)
    weights = [
        weight if inside else None
        for weight, inside in zip(sample.weight[shown].tolist(), sample.response_mask[shown].tolist(), strict=True)
    ]
    pieces, influence = _pieces(tokens[start - 1 : start], tokens[shown], weights, tokenizer)
    return {
        "when": when,
        "prompt": tokenizer.decode(tokens[:start]),
        "response": "".join(pieces),
        "correct": bool(GeneratedSamples.of(rollout.table[list(rollout.kept)]).correct[sample.number]),
        "reward": float(rollout.reward_S[sample.number]),
        "pieces": pieces,
        "influence": influence,
        "tokens_left_out": max(0, len(tokens) - start - MAX_TOKENS),
    }


def _pieces(
    before: list[int], tokens: list[int], weights: list[float | None], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[float | None]]:
    """Text of each token after the one ``before`` it (alone, some tokenizers would drop its leading space)."""
    pieces: list[str] = []
    influence: list[float | None] = []
    pending: list[int] = []
    known: list[float] = []
    for i, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        pending.append(token)
        known += [] if weight is None else [weight]
        text = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
        if text.endswith(_REPLACEMENT) and len(pending) < 4 and i + 1 < len(tokens):
            continue
        pieces.append(text)
        influence.append(round(sum(known) / len(known), 4) if known else None)
        before, pending, known = [token], [], []
    return pieces, influence
