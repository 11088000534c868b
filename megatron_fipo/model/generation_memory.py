"""What generation takes of a GPU's memory, by counting."""

import torch

SPARE = 0.1  # of the free memory: fragments, workspaces, and what is not counted here
# Bytes a row for each token of the vocabulary, in a step that samples with top-p: logits as they come and in fp32,
# log-probs, probabilities; these sorted, their tokens (int64), their sums, the cut; its sums in fp64.
SAMPLING = 2 + 4 + 4 + 4 + 4 + 8 + 4 + 4 + 8


def kv_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of one row of `tokens` tokens on a rank that holds `layers` layers and `kv_heads` of each."""
    return layers * 2 * kv_heads * head_dim * itemsize * tokens


def row_bytes(
    layers: int,
    kv_heads: int,
    head_dim: int,
    prompt: int,
    tokens: int,
    *,
    vocab_size: int,
    activations: int,
    itemsize: int = 2,
) -> int:
    """Bytes that a row of the embedded engine takes on a rank at its largest, as its prompt is read or at its end.

    Args:
        prompt, tokens: tokens of the prompt, and of prompt and response.
        activations: elements of a layer's activations for one token of a prompt, those alive at once.
    """
    # KVCache grows and shrinks layer by layer: meanwhile one layer's exist twice, a part of them three times.
    copied = layers + 2
    at_end = kv_bytes(copied, kv_heads, head_dim, tokens, itemsize) + SAMPLING * vocab_size
    room = min(2 * prompt, tokens)  # KVCache's for a prompt
    in_prompt = kv_bytes(copied, kv_heads, head_dim, room, itemsize) + prompt * activations * itemsize
    return max(at_end, in_prompt)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that tensors can still take, what the caching allocator holds unused included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
