"""Every GPU kernel compiles for every architecture and stays within its means."""

from __future__ import annotations

import os

import pytest
from emblas._op import has_triton

if not has_triton() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, not interpreted", allow_module_level=True)

import nvcc
import report
import sass

if nvcc.nvcc() is None:
    pytest.skip("needs nvcc", allow_module_level=True)

# The first and the last with all that kernels use; `make full` and `make gpu-table` take all.
ARCHITECTURES = tuple(map(int, os.environ.get("EMBLAS_ARCHITECTURES", "80 120").split()))
# Warps that hide the latency of memory; a kernel for tensor cores pipelines its loads instead.
FLOOR, FLOOR_WITH_TENSOR_CORES = 16, 8
_TWO_WORDS = "ptxas spills two words for another four warps"
_ALL_REGISTERS = "two words on sm_90, with all of its registers"
_ALL_ON_120 = (
    "some words on sm_120, with all of its registers; half the tile would read twice as much"
)
_WIDE_ROWS = "rows of 1 KiB: the smallest tile that tensor cores take, 16 x 16, spills some words"
# Bytes of local memory that are allowed, and why.
LOCAL_MEMORY = {
    ("pool_contributions", ""): (8, "two words, to get by with 40 to 64 registers"),
    ("gem_contributions", "double, true"): (8, "two words on sm_120, to get by with 80 registers"),
    ("_weight_gradients", "float32, padded, weights, 2 modes"): (8, _TWO_WORDS),
    ("_grad_distances", "bfloat16, head_dim 64, distances"): (16, _ALL_ON_120),
    ("_rotate", "float32, dim 384"): (8, "two words on sm_100, to get by with 64 registers"),
    ("_grad_queries", "float32, head_dim 256"): (136, _WIDE_ROWS),
    ("_grad_keys", "float32, head_dim 256"): (208, _WIDE_ROWS),
    ("_grad_weights", ""): (8, "ptxas spills two words to get by with 32 or 40 registers"),
    ("grad_keys_tile", "bfloat16, 256"): (8, _ALL_REGISTERS),
    ("grad_keys_tile", "float16, 256"): (8, _ALL_REGISTERS),
    ("_compose_bags", "product, float32, bags, max"): (8, "two words, to get by with 72 registers"),
    ("_quantized_bags", "4 bits, dim 128, float16, bags, max"): (
        8,
        "two words on sm_120, to get by with 72 registers",
    ),
    ("_highest_of_chunk", ""): (16, "ptxas spills two to four words for another four warps"),
    ("sum_chunks", "double, true, true"): (
        8,
        "two words on sm_120, to get by with 80 registers",
    ),
    ("_maximum", "float32, padded"): (8, "two words on sm_120, to get by with 80 registers"),
    ("_vocab_max", "float32"): (32, "eight words on sm_120, with all of its registers"),
    ("_weight_gradients", "float32, spans, skip, mean_sqrt_len"): (8, _TWO_WORDS),
    ("_weight_gradients", "float32, padded, weights, mean_sqrt_len"): (8, _TWO_WORDS),
    ("_maxsim", "float32"): (8, _TWO_WORDS),
    ("_maxsim", "floats and bits"): (8, _TWO_WORDS),
    ("_maxsim", "bits"): (8, _TWO_WORDS),
}
_ODD = "rows of odd width are read by bytes"
_FEW_BITS = "the 32 codes of a thread are 8 bytes"
NO_WIDE_LOADS = {
    ("_pool", "float32, lists, weights, last"): "a block reads one row, each lane one value of it",
    ("_add_sequences", ""): "sums begin anywhere, and are a number for each token and head",
    ("_all_distances", "16 queries, odd width"): _ODD,
    ("_attention_gradients", ""): "its threads share the reads of 32 tokens and of 64 columns",
    ("_choose", ""): "its threads share the reads of 32 tokens",
    ("_place", ""): "its threads share the reads of 32 tokens",
    ("_hash_keys", ""): "reads nothing but 8-byte ids, one for each thread",
    ("_maxsim", "bits"): "the 32 bits of each row that a tile holds are 4 bytes",
    ("_nearest_of_chunk", "16 queries, k = 16, odd width"): _ODD,
    ("_quantized_bags", "2 bits, dim 128, float32, bags, sum"): _FEW_BITS,
    ("_quantized_lookup", "2 bits, dim 128, float32"): _FEW_BITS,
    ("_random_codes", ""): "reads nothing but an id and a sequence for each of its threads",
    ("_spread_rows", ""): "its threads share a vector of a row, which goes to many tokens",
    ("_sum_rows", "float32, dim 1"): "each thread reads values one by one, of one element each",
    ("_unpack_planes", ""): "a byte becomes eight values: its threads read as they write",
    ("_row_gradients", ""): "but for the generalized mean it reads what segments contribute, "
    "64 columns at a time, from the caches",
}
# Files of CUDA C++ without any.
NO_WIDE_LOADS_IN_FILE = {
    "codes": "a thread reads an id and a sequence",
    "lexical": "all lanes of a warp read the same ids and weights",
    "merge": "lists hold 8 bytes for each lane of a warp",
    "unpack_planes": "a thread reads the bits of the 16 bytes that it writes",
}
# Calls of kernels for tensor cores that need no product.
NO_PRODUCT = {
    ("_grad_queries", ""): "that of late interaction, which adds rows; attention's has variants",
    ("_logit_slopes", "float32, activation 0"): "the slope is 1 whatever the logits are",
}
_SEVERAL_MODES = "keeps what all of its modes have found, of which there may be seven"
# Fewer warps than the floor.
FEW_WARPS = {
    **{
        ("_pool", f"{variant} modes"): (8, _SEVERAL_MODES)
        for variant in (
            "float32, 2",
            "bfloat16, 2",
            "float16, 2",
            "float32, 7",
            "bfloat16, 7",
            "float16, 7",
            "float32, lists, weights, 2",
            "float32, lists, weights, 7",
            "float32, spans, skip, 2",
            "float32, spans, skip, 7",
            "float32, padded, weights, 2",
            "float32, padded, weights, 7",
        )
    },
    **{
        ("_row_gradients", f"{variant} modes"): (12, _SEVERAL_MODES)
        for variant in (
            "float32, 7",
            "bfloat16, 7",
            "float16, 7",
            "float32, spans, skip, 7",
            "float32, padded, weights, 2",
            "float32, padded, weights, 7",
        )
    },
    ("_weight_gradients", "float32, lists, weights, 7 modes"): (12, _SEVERAL_MODES),
    ("_weight_gradients", "float32, padded, weights, 7 modes"): (8, _SEVERAL_MODES),
    ("_rotate", "float32, dim 3072"): (8, "a block of 8 warps holds a row of 16 KiB in registers"),
    ("_weight_gradients", "float32, lists, weights, weighted_mean"): (
        12,
        "156 registers on sm_120, for sums and products of a tile of rows",
    ),
}


@pytest.fixture(scope="module")
def rows():
    return report.all_rows(ARCHITECTURES)


def of_triton(rows):
    return [row for row in rows if row.section == "Triton"]


def found(row, exceptions):
    """Key of the exception for a row, if there is one: of its call, or of its kernel."""
    keys = ((row.kernel, row.variant), (row.kernel, ""))
    return next((key for key in keys if key in exceptions), None)


def test_registers_suffice(rows):
    limits = {cell: limit for cell, (limit, _) in LOCAL_MEMORY.items()}
    spilling = [r for r in rows if r.local > limits.get(found(r, limits), 0)]
    assert not spilling, "\n".join(map(str, spilling))


def test_enough_warps(rows):
    def floor(row):
        if key := found(row, FEW_WARPS):
            return FEW_WARPS[key][0]
        return FLOOR_WITH_TENSOR_CORES if row.tensor_cores else FLOOR

    idle = [row for row in rows if row.warps < floor(row)]
    assert not idle, "\n".join(map(str, idle))


def test_shared_memory_fits(rows):
    for row in rows:
        assert row.shared <= sass.ARCHITECTURES[row.architecture].shared_per_block, row


def test_loads_are_wide(rows):
    narrow = [r for r in of_triton(rows) if not r.wide_loads and not found(r, NO_WIDE_LOADS)]
    assert not narrow, "\n".join(map(str, narrow))


def test_files_have_wide_loads(rows):
    """In CUDA C++ what is large goes by 16 bytes, but a file also has kernels for what is not."""
    rows = [row for row in rows if row.section == "CUDA C++"]
    wide = {row.operator for row in rows if row.wide_loads}
    assert {row.operator for row in rows} - wide == set(NO_WIDE_LOADS_IN_FILE)


def test_products_use_tensor_cores(rows):
    kernels = {
        "_add_to_tokens", "_add_to_words", "_attend", "_grad_distances", "_grad_documents",
        "_grad_keys", "_grad_queries", "_highest_of_chunk", "_logit_slopes", "_maxsim",
        "_vocab_max", "_vocab_sum",
    }  # fmt: skip
    rows = of_triton(rows)
    assert {row.kernel for row in rows if row.tensor_cores} == kernels
    idle = {(r.kernel, r.variant) for r in rows if r.kernel in kernels and not r.tensor_cores}
    assert idle == set(NO_PRODUCT)


@pytest.mark.skipif(
    not set(ARCHITECTURES) >= set(nvcc.ARCHITECTURES), reason="`make full` compiles for all"
)
def test_exceptions_are_needed(rows):
    assert set(LOCAL_MEMORY) == {found(r, LOCAL_MEMORY) for r in rows if r.local}
    narrow = {found(r, NO_WIDE_LOADS) for r in of_triton(rows) if not r.wide_loads}
    assert set(NO_WIDE_LOADS) == narrow
    assert set(FEW_WARPS) == {found(r, FEW_WARPS) for r in rows if r.warps < FLOOR} - {None}


def test_table_is_current(rows):
    written = report.FILE.read_text()
    for section in report.SOURCES:
        for architecture in set(ARCHITECTURES) & set(report.ARCHITECTURES[section]):
            assert report.table(section, architecture, rows) in written, "run `make gpu-table`"


def test_occupancy_counts():
    """Worked out by hand."""

    def kernel(registers, warps):
        return sass.Kernel("k", "", warps, registers, 0, 0, sass.Counter())

    assert kernel(64, 4).warps_resident(80) == 32
    assert kernel(64, 4).warps_resident(120) == 32
    assert kernel(64, 4).warps_resident(80, dynamic_shared=41 * 1024) == 12
    assert kernel(16, 1).warps_resident(90) == 32
    assert kernel(16, 8).warps_resident(86) == 48
