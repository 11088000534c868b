"""The key/value cache of one batch of sequences that are being generated."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class KVCache(StaticInferenceContext):
    """Rotated keys and values of all layers, for rows whose prompts differ in length.

    Prompts are aligned left and padded right, so that prefilling is plain causal attention. All rows write their n-th
    generated token into the same slot, `max_prompt + n`; its RoPE position is the row's own `prompt length + n`, so
    numbers are those of the training forward. The slots between a row's prompt and `max_prompt` stay masked.

    Generation: `start_prefill`, a forward pass over the prompts, then `start_decode` and a forward pass for each token.
    """

    def __init__(self, rotary: RotaryEmbedding, max_length: int) -> None:
        """`rotary` is GPTModel's rotary embedding; `max_length` counts prompt and generated tokens."""
        # GPTModel computes angles of its own, which nobody uses, and cuts them into 2 x context-parallel size pieces.
        super().__init__(max_batch_size=0, max_sequence_length=max_length + max_length % 2)
        self._max_length = max_length
        angles = rotary.get_emb(max_length)[:, 0, 0]  # [max_length, d], first and second half alike
        sign = torch.ones_like(angles[0])
        sign[: sign.numel() // 2] = -1
        self._cos, self._sin = angles.cos(), angles.sin() * sign
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [b, groups, capacity, d]
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._slot = 0  # where the next pass stores its first token
        self._end = 0  # slots in use

    def start_prefill(self, max_prompt: int) -> None:
        """Expect prompts padded to `max_prompt`."""
        self._slot = 0
        self._rotation = (self._cos[:max_prompt, None, None], self._sin[:max_prompt, None, None])

    def start_decode(self, slot: int, position_B: Tensor) -> None:
        """Expect one token for each row, to be stored in `slot`, at RoPE positions `position_B` (int64 [b])."""
        self._slot = slot
        self._rotation = (self._cos[position_B][None, :, None], self._sin[position_B][None, :, None])

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE on x [s, b, heads, d], as Megatron computes it without fusion: x cos + rotate_half(x) sin."""
        assert self._rotation is not None
        cos, sin = (r.to(x.dtype) for r in self._rotation)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [s, b, groups, d] of this pass; return all so far as views [slots, b, groups, d]."""
        end = self._slot + key.size(0)
        key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if layer not in self._layers:
            self._layers[layer] = (key[:, :, :0], value[:, :, :0])
        keys, values = self._layers[layer]
        if end > keys.size(2):
            keys, values = (_copy(cache[:, :, : self._slot], self._capacity(end)) for cache in (keys, values))
            self._layers[layer] = (keys, values)
        keys, values = keys[:, :, :end], values[:, :, :end]
        keys[:, :, self._slot :] = key
        values[:, :, self._slot :] = value
        self._end = end
        return keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the cached rows `rows` (int64), in this order; a row may be taken several times."""
        for layer, caches in self._layers.items():
            capacity = caches[0].size(2)
            keys, values = (_copy(cache[:, :, : self._end].index_select(0, rows), capacity) for cache in caches)
            self._layers[layer] = (keys, values)

    def _capacity(self, end: int) -> int:
        """Room for `end` slots and as many again: long completions are rare, and memory follows what is used."""
        return min(2 * end, self._max_length)


def _copy(used: Tensor, capacity: int) -> Tensor:
    """A buffer with `capacity` slots that begins with the slots `used` [b, groups, slots, d]."""
    buffer = used.new_empty(*used.shape[:2], capacity, used.size(3))
    buffer[:, :, : used.size(2)] = used
    return buffer
