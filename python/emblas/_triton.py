"""What the Triton kernels of all families share; imported by their modules only.

Kernels are written for any version of triton that torch >= 2.10 brings along: masked loads and
stores of plain pointers, no autotuning (the few configurations are chosen by shape), no float
atomics. Integers that may exceed 32 bits are annotated ``tl.int64``; then the compiler neither
types them by their value nor makes a constant of a 1. These modules don't postpone annotations.
"""

import torch
import triton
import triton.language as tl

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # float64 takes the reference


@triton.jit
def segment_bounds(offsets, segment, total):
    """First and last + 1 element of a segment, inside [0, total] whatever the offsets hold."""
    begin = tl.load(offsets + segment).to(tl.int64)
    end = tl.load(offsets + segment + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total)
