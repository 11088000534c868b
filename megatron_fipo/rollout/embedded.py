"""The embedded rollout engine: generates with the training weights, inside the trainer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.model.generation import GenerationModel
from megatron_fipo.model.generation_memory import SPARE, free_memory
from megatron_fipo.model.kv_cache import KVCache
from megatron_fipo.rollout.engine import MAX_RUNNING, Completion, ProgressCallback, SamplingParams
from megatron_fipo.rollout.sampling import sample

# Finished rows leave the batch once they are this share of it: moving the cache costs less than a decoding step.
COMPACT_SHARE = 1 / 16
POLL_TOKENS = 32  # between two looks at whether anybody still wants the completions


class EmbeddedEngine:
    """A RolloutEngine on the training model: no copy of the weights, log-probs of the very same numerics.

    All ranks of a data-parallel replica call it with the same arguments and get the same completions. Tensor-parallel
    ranks sample the same tokens; of a pipeline the last stage samples, and what travels in a step is one hidden state
    for each boundary and the tokens; context-parallel ranks, which hold the same weights, share the prompts out.
    With expert parallelism all replicas call it equally often, with the same SamplingParams.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], vocab_size: int, max_batch: int | None, pad_id: int
    ) -> None:
        """
        Args:
            model_chunks: what Megatron's set-up returned, wrapped or not.
            vocab_size: real vocabulary; the padded rows behind it are never sampled.
            max_batch: rows that generate together at most; None: 256. On a GPU as many of them as its memory holds.
            pad_id: fills short prompts; any valid token.

        Raises:
            UserError: the model is built in a way that cannot generate, see GenerationModel.
        """
        self._model = GenerationModel(model_chunks, vocab_size)
        self.in_step = self._model.in_step
        self._max_batch = max_batch
        self._pad_id = pad_id

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
        starts: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Return one completion for each (prompt, seed), in order; see RolloutEngine.

        Under context parallelism `on_finished` hears of this rank's share, scaled up.
        """
        context = self._model.context_group
        starts = starts or [0] * len(prompts)
        # Sorted, a wave holds prompts of similar length, and equal prompts side by side.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        share = _part(order, context.rank(), context.size())
        longest = max(map(len, prompts), default=1)
        max_batch = self._rows_at_once(longest, longest + sampling.max_tokens)
        waves = self._model.largest(math.ceil(len(share) / max_batch))
        done: list[Completion] = []
        with self._model.generating():
            for number in range(waves):
                wave = _part(share, number, waves)
                completed = self._generate_wave(
                    [tuple(prompts[i]) for i in wave],
                    [seeds[i] for i in wave],
                    [starts[i] for i in wave],
                    sampling,
                    lambda n: on_finished(n * context.size()) if on_finished else None,
                    given_up,
                )
                if completed is None:
                    break
                done += completed
        if context.size() > 1:
            shares: list[list[Completion]] = [[] for _ in range(context.size())]
            dist.all_gather_object(shares, done, group=context)
            done = [completion for share in shares for completion in share]
        if len(done) < len(order):
            return []
        completions = dict(zip(order, done, strict=True))
        return [completions[i] for i in range(len(prompts))]

    def check_memory(self, prompt: int, tokens: int) -> None:
        """Refuse what cannot fit beside the model; collective over the ranks that generate in step.

        Args:
            prompt, tokens: of the longest prompt, and of it with the longest response.

        Raises:
            UserError: a GPU has no room for `max_batch` rows of that length, or for a single one.
        """
        free = free_memory(self._model.device)
        if free is None:
            return
        rows, comfortable = (self._rows_within(share * free, prompt, tokens) for share in (1.0, 1.0 - SPARE))
        if rows < self._rows_for(1):
            raise UserError(
                f"a GPU has no memory left beside the model to generate {tokens} tokens (--max-prompt-tokens and "
                f"--rollout-max-tokens); spread the model over more of them, e.g. by --tensor-model-parallel-size"
            )
        if self._max_batch and self._rows_for(self._max_batch) > rows:
            raise UserError(
                f"--rollout-max-running {self._max_batch}: so many rows of {tokens} tokens do not fit on a GPU beside "
                f"the model; use at most {max(comfortable, 1)}, or leave it out"
            )

    def _rows_at_once(self, prompt: int, tokens: int) -> int:
        """Rows of this length that the ranks generate together: measured anew for each call of `generate`, as the
        optimizer's moments, say, come with the first update."""
        most, free = self._max_batch or MAX_RUNNING, free_memory(self._model.device)
        if free is None:
            return most
        return min(most, max(1, self._rows_within((1.0 - SPARE) * free, prompt, tokens)))

    def _rows_within(self, memory: float, prompt: int, tokens: int) -> int:
        """Rows that fit into `memory` bytes on every rank, in multiples of what FP8 layers want."""
        rows = int(memory) // self._model.row_bytes(prompt, tokens)
        return self._model.fewest(rows - rows % self._model.row_multiple)

    def update_weights(self, version: int) -> None:
        """Nothing to do: the weights are the trainer's."""

    def sleep(self) -> None:
        """Nothing to do: caches live only inside `generate`."""

    def wake(self) -> None:
        """Nothing to do."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to do."""

    def _generate_wave(
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        starts: list[int],
        sampling: SamplingParams,
        on_finished: Callable[[int], None],
        given_up: Callable[[], bool],
    ) -> list[Completion] | None:
        """Complete `prompts` together; without any, run the passes that the other ranks of the experts wait for.

        None: given up.
        """
        alive = len(prompts)
        fillers = self._rows_for(alive) - alive  # rows that are finished from the start
        prompts = prompts + [prompts[-1] if prompts else (self._pad_id,)] * fillers
        seeds, starts = seeds + [0] * fillers, starts + [0] * fillers
        rows, logits_BV = self._prefill(prompts, seeds, starts, sampling.max_tokens)
        rows.finished_B[alive:] = True
        device = self._model.device
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        token_BN = torch.zeros(len(prompts), sampling.max_tokens, dtype=torch.int64, device=device)
        logp_BN = torch.zeros(len(prompts), sampling.max_tokens, device=device)
        count = alive
        for n in range(sampling.max_tokens):
            if n % POLL_TOKENS == 0 and given_up():
                return None
            token_B = torch.empty_like(rows.seed_B)
            if logits_BV is not None:  # on the last stage
                token_B, logp_BN[rows.output_B, n] = sample(logits_BV, rows.seed_B, rows.start_B + n, sampling)
            token_B = token_BN[rows.output_B, n] = self._model.from_last_stage(token_B)
            if sampling.stop_token_ids:
                rows.finished_B |= torch.isin(token_B, stop_ids)
                still_alive = len(token_B) - int(rows.finished_B.sum())  # the only wait for the device in a step
                if still_alive < alive:
                    on_finished(alive - still_alive)
                    alive = still_alive
                if self._model.largest(alive) == 0:
                    break
                kept = self._rows_for(alive)  # rows that have finished fill up
                if kept <= (1 - COMPACT_SHARE) * len(token_B):
                    unfinished_first = rows.finished_B.int().argsort(stable=True)
                    rows.select(unfinished_first[:kept])
                    token_B = token_B[unfinished_first[:kept]]
            if n + 1 < sampling.max_tokens:
                logits_BV = self._decode(rows, token_B, n)
        if alive:
            on_finished(alive)
        logp_BN = self._model.from_last_stage(logp_BN[:, : n + 1].contiguous())
        return _completions(token_BN[:, : n + 1], logp_BN, stop_ids)[:count]

    def _rows_for(self, alive: int) -> int:
        """Rows of a batch in which `alive` ones generate."""
        multiple = self._model.row_multiple
        return max(math.ceil(alive / multiple), 1) * multiple

    def _prefill(
        self, prompts: list[tuple[int, ...]], seeds: list[int], starts: list[int], max_tokens: int
    ) -> tuple["_Rows", Tensor | None]:
        """Run the distinct prompts through the model; return the rows of the wave and their logits [B, V]."""
        device = self._model.device
        distinct = list(dict.fromkeys(prompts))
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        longest = max(len(p) for p in distinct)
        longest += -longest % self._model.row_multiple
        padded = [list(p) + [self._pad_id] * (longest - len(p)) for p in distinct]
        cache = self._model.new_cache(longest + max_tokens)
        cache.start_prefill(longest)
        logits = self._model.logits(torch.tensor(padded, device=device), cache, None, lengths - 1)

        place = {prompt: i for i, prompt in enumerate(distinct)}
        distinct_B = torch.tensor([place[p] for p in prompts], device=device)
        cache.select_rows(distinct_B)
        length_B = lengths[distinct_B]
        mask = None
        if any(len(prompt) != longest for prompt in distinct):
            slots = torch.arange(longest + max_tokens, device=device)
            gap = (slots >= length_B[:, None]) & (slots < longest)
            mask = torch.zeros(gap.shape, dtype=self._model.dtype, device=device)
            mask = mask.masked_fill_(gap, -torch.inf)[:, None, None]
        rows = _Rows(
            cache=cache,
            first_slot=longest,
            mask=mask,
            prompt_length_B=length_B,
            seed_B=torch.tensor(seeds, dtype=torch.int64, device=device),
            start_B=torch.tensor(starts, device=device),
            output_B=torch.arange(len(prompts), device=device),
            finished_B=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        )
        return rows, None if logits is None else logits[distinct_B]

    def _decode(self, rows: "_Rows", token_B: Tensor, n: int) -> Tensor | None:
        """Append generated token number `n`; return the logits [B, V] for the next one."""
        slot = rows.first_slot + n
        rows.cache.start_decode(slot, rows.prompt_length_B + n)
        mask = None if rows.mask is None else rows.mask[..., : slot + 1]
        return self._model.logits(token_B[:, None], rows.cache, mask, None)


@dataclass
class _Rows:
    """The rows that still generate, and all that belongs to them."""

    cache: KVCache
    first_slot: int
    mask: Tensor | None  # [B, 1, 1, slots], -inf where a short prompt has no token
    prompt_length_B: Tensor
    seed_B: Tensor
    start_B: Tensor  # the place of the completion in its response
    output_B: Tensor  # the row's place in the wave
    finished_B: Tensor

    def select(self, kept: Tensor) -> None:
        self.cache.select_rows(kept)
        if self.mask is not None:
            self.mask = self.mask[kept]
        self.prompt_length_B = self.prompt_length_B[kept]
        self.seed_B, self.start_B = self.seed_B[kept], self.start_B[kept]
        self.output_B, self.finished_B = self.output_B[kept], self.finished_B[kept]


def _part(items: list[int], part: int, parts: int) -> list[int]:
    """Part number `part` of `items`, cut into `parts` pieces of about equal size."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def _completions(token_BN: Tensor, logp_BN: Tensor, stop_ids: Tensor) -> list[Completion]:
    """Cut each row after its first stop token."""
    stops_BN = torch.isin(token_BN, stop_ids)
    stopped = stops_BN.any(1).tolist()
    lengths = torch.where(stops_BN.any(1), stops_BN.int().argmax(1) + 1, token_BN.size(1)).tolist()
    return [
        Completion(tuple(tokens[:length]), tuple(logps[:length]), "stop" if stop else "length")
        for tokens, logps, length, stop in zip(token_BN.tolist(), logp_BN.tolist(), lengths, stopped, strict=True)
    ]
