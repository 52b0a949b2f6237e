"""The operators of tables in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.tables.triton.codes import random_codes
from emblas.tables.triton.compose import compose_bag
from emblas.tables.triton.compose_backward import compose_bag_backward
from emblas.tables.triton.compose_update import compose_bag_backward_rows, compose_bag_update_
from emblas.tables.triton.hash_bag import hash_bag, hash_bag_backward, hash_keys
from emblas.tables.triton.quantized import quantized_bag, quantized_bag_backward

__all__ = [
    "compose_bag", "compose_bag_backward", "compose_bag_backward_rows", "compose_bag_update_",
    "hash_bag", "hash_bag_backward", "hash_keys", "quantized_bag", "quantized_bag_backward",
    "random_codes",
]  # fmt: skip
