"""Packed attention as a torch module."""

from __future__ import annotations

from torch import Tensor, nn

from emblas.attention.functions import varlen_attention


class PackedSelfAttention(nn.Module):
    """Multi-head self-attention over a packed batch.

    One fused projection to queries, keys and values, which the kernel reads in place, and one
    projection of the result.

    Parameters
    ----------
    hidden_size : int
        Width of the token vectors.
    num_heads : int
        Number of heads; divides ``hidden_size``.
    bias : bool, default True
        Whether the projections have biases.

    Raises
    ------
    ValueError
        If ``num_heads`` doesn't divide ``hidden_size``.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.output = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Map tokens ``(tokens, hidden_size)`` to the same shape, each within its sequence."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return self.output(out.flatten(1))
