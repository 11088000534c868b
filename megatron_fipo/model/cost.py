"""What a sequence costs to compute."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Forward floating-point operations of one sequence of n tokens, ``linear * n + quadratic * n**2``.

    The decoder is one of grouped-query attention, SwiGLU and a separate output weight. ``head_dim`` is Megatron's
    ``kv_channels``; ``ffn_hidden_size`` is the width of the MLP that one token passes, on average over the layers
    (mixture of experts: of the experts chosen for it together). A matrix product of m x k and k x n takes 2mkn
    operations, the causal mask leaves half of each attention matrix; norms, rotary embedding, softmax and router are
    left out. This is Megatron's ``num_floating_point_operations`` (megatron/training/training.py) divided by its 3 for
    forward and backward; see Narayanan et al. 2021 (arXiv 2104.04473), appendix.
    """

    layers: int
    hidden_size: int
    ffn_hidden_size: float
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def logits(self) -> float:
        """Operations of one token's logits."""
        return float(2 * self.hidden_size * self.vocab_size)

    @property
    def linear(self) -> float:
        """Operations per token: projections, MLP, logits."""
        attention = 2 * self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 2 * self.hidden_size * self.ffn_hidden_size * 3
        return float(self.layers * (attention + mlp)) + self.logits

    @property
    def quadratic(self) -> float:
        """Operations per pair of tokens: query x key and weight x value, on half of the matrix."""
        return float(self.layers * 2 * self.heads * self.head_dim)

    def sequence(self, tokens: int) -> float:
        """Operations of one sequence of ``tokens`` tokens."""
        return self.linear * tokens + self.quadratic * tokens**2
