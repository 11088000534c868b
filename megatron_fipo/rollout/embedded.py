"""The embedded rollout engine: generates with the training weights, inside the trainer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.model.attention import CachedSelfAttention
from megatron_fipo.model.kv_cache import KVCache
from megatron_fipo.rollout.engine import Completion, ProgressCallback, SamplingParams
from megatron_fipo.rollout.sampling import sample

# Finished rows leave the batch once they are this share of it: moving the cache costs less than a decoding step.
COMPACT_SHARE = 1 / 16
POLL_TOKENS = 32


class EmbeddedEngine:
    """A RolloutEngine on the training model: no copy of the weights, log-probs of the very same numerics.

    The data-parallel replica that calls it generates alone; tensor-parallel ranks call it together with the same
    arguments and sample the same tokens.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], vocab_size: int, max_batch: int, pad_id: int) -> None:
        """
        Args:
            model_chunks: what Megatron's set-up returned (one chunk, wrapped or not).
            vocab_size: real vocabulary; the padded rows behind it are never sampled.
            max_batch: rows that generate together.
            pad_id: fills short prompts; any valid token.

        Raises:
            UserError: the model is built from TransformerEngine's modules, whose attention has no such cache.
        """
        assert len(model_chunks) == 1, "generation over pipeline stages comes later"
        self._model: Any = unwrap_model(model_chunks[0])
        config = get_model_config(self._model)
        assert config.pipeline_model_parallel_size == 1, "generation over pipeline stages comes later"
        assert not config.sequence_parallel, "generation under sequence parallelism comes later"
        if not isinstance(self._model.decoder.layers[0].self_attention, CachedSelfAttention):
            raise UserError(
                "--rollout-engine embedded generates with Megatron's local layers, but the model is built from "
                "TransformerEngine's: pass --transformer-impl local."
            )
        self._vocab_size = vocab_size
        self._max_batch = max_batch
        self._pad_id = pad_id

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        """Return one completion for each (prompt, seed), in order; see RolloutEngine."""
        # Waves of about equal size; sorted, they hold prompts of similar length, and equal prompts side by side.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        wave_size = math.ceil(len(order) / math.ceil(len(order) / self._max_batch)) if order else 1
        completions: dict[int, Completion] = {}
        was_training = self._model.training
        self._model.eval()
        try:
            for start in range(0, len(order), wave_size):
                wave = order[start : start + wave_size]
                texts = [tuple(prompts[i]) for i in wave]
                own_seeds = [seeds[i] for i in wave]
                done = self._generate_wave(texts, own_seeds, sampling, on_finished or (lambda n: None), poll)
                completions.update(zip(wave, done, strict=True))
        finally:
            self._model.train(was_training)
        return [completions[i] for i in range(len(prompts))]

    def update_weights(self, version: int) -> None:
        """Nothing to do: the weights are the trainer's."""

    def sleep(self) -> None:
        """Nothing to do: caches live only inside `generate`."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def _generate_wave(
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        sampling: SamplingParams,
        on_finished: Callable[[int], None],
        poll: Callable[[], None],
    ) -> list[Completion]:
        rows, logits_BV = self._prefill(prompts, seeds, sampling.max_tokens)
        device = logits_BV.device
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        token_BN = torch.zeros(len(prompts), sampling.max_tokens, dtype=torch.int64, device=device)
        logp_BN = torch.zeros(len(prompts), sampling.max_tokens, device=device)
        alive = len(prompts)
        for n in range(sampling.max_tokens):
            if n % POLL_TOKENS == 0:
                poll()
            token_B, logp_B = sample(logits_BV, rows.seed_B, n, sampling)
            token_BN[rows.output_B, n] = token_B
            logp_BN[rows.output_B, n] = logp_B
            if sampling.stop_token_ids:
                rows.finished_B |= torch.isin(token_B, stop_ids)
                still_alive = len(token_B) - int(rows.finished_B.sum())  # the only wait for the device in a step
                if still_alive < alive:
                    on_finished(alive - still_alive)
                    alive = still_alive
                if alive == 0:
                    break
                if alive <= (1 - COMPACT_SHARE) * len(token_B):
                    kept = (~rows.finished_B).nonzero()[:, 0]
                    rows.select(kept)
                    token_B = token_B[kept]
            if n + 1 < sampling.max_tokens:
                logits_BV = self._decode(rows, token_B, n)
        if alive:
            on_finished(alive)
        return _completions(token_BN, logp_BN, stop_ids)

    def _prefill(self, prompts: list[tuple[int, ...]], seeds: list[int], max_tokens: int) -> tuple["_Rows", Tensor]:
        """Run the distinct prompts through the model; return the rows of the wave and their logits [B, V]."""
        device = self._model.embedding.word_embeddings.weight.device
        distinct = list(dict.fromkeys(prompts))
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        longest = max(len(p) for p in distinct)
        padded = [list(p) + [self._pad_id] * (longest - len(p)) for p in distinct]
        cache = KVCache(self._model.rotary_pos_emb, longest + max_tokens)
        cache.start_prefill(longest)
        logits = self._forward(torch.tensor(padded, device=device), cache, None, lengths - 1)

        place = {prompt: i for i, prompt in enumerate(distinct)}
        distinct_B = torch.tensor([place[p] for p in prompts], device=device)
        cache.select_rows(distinct_B)
        length_B = lengths[distinct_B]
        mask = None
        if len(set(map(len, distinct))) > 1:
            slots = torch.arange(longest + max_tokens, device=device)
            gap = (slots >= length_B[:, None]) & (slots < longest)
            mask = torch.zeros(gap.shape, dtype=self._model.config.params_dtype, device=device)
            mask = mask.masked_fill_(gap, -torch.inf)[:, None, None]
        rows = _Rows(
            cache=cache,
            first_slot=longest,
            mask=mask,
            prompt_length_B=length_B,
            seed_B=torch.tensor(seeds, dtype=torch.int64, device=device),
            output_B=torch.arange(len(prompts), device=device),
            finished_B=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        )
        return rows, logits[distinct_B]

    def _decode(self, rows: "_Rows", token_B: Tensor, n: int) -> Tensor:
        """Append generated token number `n`; return the logits [B, V] for the next one."""
        slot = rows.first_slot + n
        rows.cache.start_decode(slot, rows.prompt_length_B + n)
        mask = None if rows.mask is None else rows.mask[..., : slot + 1]
        return self._forward(token_B[:, None], rows.cache, mask, None)

    def _forward(self, token_BL: Tensor, cache: KVCache, mask: Tensor | None, last_B: Tensor | None) -> Tensor:
        """Logits fp32 [B, V] at positions `last_B` (None: at the last)."""

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

        # The cache knows the RoPE positions; Megatron ignores position ids under RoPE.
        return self._model(token_BL, None, mask, inference_context=cache, output_processor=logits_of_last)


@dataclass
class _Rows:
    """The rows that still generate, and all that belongs to them."""

    cache: KVCache
    first_slot: int
    mask: Tensor | None  # [B, 1, 1, slots], -inf where a short prompt has no token
    prompt_length_B: Tensor
    seed_B: Tensor
    output_B: Tensor  # the row's place in the wave
    finished_B: Tensor

    def select(self, kept: Tensor) -> None:
        self.cache.select_rows(kept)
        if self.mask is not None:
            self.mask = self.mask[kept]
        self.prompt_length_B, self.seed_B = self.prompt_length_B[kept], self.seed_B[kept]
        self.output_B, self.finished_B = self.output_B[kept], self.finished_B[kept]


def _completions(token_BN: Tensor, logp_BN: Tensor, stop_ids: Tensor) -> list[Completion]:
    """Cut each row after its first stop token."""
    stops_BN = torch.isin(token_BN, stop_ids)
    stopped = stops_BN.any(1).tolist()
    lengths = torch.where(stops_BN.any(1), stops_BN.int().argmax(1) + 1, token_BN.size(1)).tolist()
    return [
        Completion(tuple(tokens[:length]), tuple(logps[:length]), "stop" if stop else "length")
        for tokens, logps, length, stop in zip(token_BN.tolist(), logp_BN.tolist(), lengths, stopped, strict=True)
    ]
