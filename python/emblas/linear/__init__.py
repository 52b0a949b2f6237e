"""Linear layers whose rows have the same bits in every batch."""

from emblas.linear.functions import linear

__all__ = ["linear"]
