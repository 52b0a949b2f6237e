"""The numpy doors that test_hamming.py and test_pack_sign.py leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.binary import (
    arrays,
    asymmetric_topk,
    inverse_norms,
    pack_planes,
    range_search_csr,
    symmetric_topk,
)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_array_equal(one, other.numpy())
        assert torch.from_numpy(one).dtype == other.dtype


@pytest.mark.parametrize(("queries", "rows", "dim", "bits"), [
    (3, 500, 40, 1), (300, 70, 13, 2), (1, 9, 64, 4), (0, 5, 8, 2), (4, 0, 8, 1),
])  # fmt: skip
def test_doors(isa, queries, rows, dim, bits):
    """The same answers as the functions on tensors."""
    wanted, documents = torch.randn(queries, dim), torch.randn(rows, dim)
    codes = pack_planes(documents, bits)
    of_queries = pack_planes(wanted, bits)
    scale = inverse_norms(codes, dim) if rows else torch.ones(0)
    for k in (1, 12):
        for factors in (None, scale):
            numbers = None if factors is None else factors.numpy()
            same(
                arrays.asymmetric_topk(wanted.numpy(), codes.numpy(), k, numbers),
                asymmetric_topk(wanted, codes, k, scale=factors),
            )
            same(
                arrays.symmetric_topk(of_queries.numpy(), codes.numpy(), k, dim, numbers),
                symmetric_topk(of_queries, codes, k, dim=dim, scale=factors),
            )
    for radius in (0, dim * bits // 2, 10**6):
        same(
            arrays.range_search_csr(of_queries.numpy(), codes.numpy(), radius),
            range_search_csr(of_queries, codes, radius),
        )


X, CODES = np.zeros((2, 16), np.float32), np.zeros((3, 2), np.uint8)
ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries must be a C-", lambda: arrays.range_search_csr(X, CODES, 1)),
        (TypeError, "codes must be a C-", lambda: arrays.range_search_csr(CODES, CODES.T, 1)),
        (ValueError, "same width", lambda: arrays.range_search_csr(CODES, CODES[:, :1].copy(), 1)),
        (ValueError, "radius must not be", lambda: arrays.range_search_csr(CODES, CODES, -1)),
        (TypeError, "queries must be a C-", lambda: arrays.asymmetric_topk(CODES, CODES, 1)),
        (TypeError, "codes must be a C-", lambda: arrays.asymmetric_topk(X, X, 1)),
        (ValueError, "one or more planes", lambda: arrays.asymmetric_topk(X[:, :8].copy() * 0,
                                                                          CODES[:, :0], 1)),
        (ValueError, "one or more planes", lambda: arrays.asymmetric_topk(X, CODES[:, :1].copy(),
                                                                          1)),
        (ValueError, "k must be at least 1", lambda: arrays.asymmetric_topk(X, CODES, 0)),
        (ValueError, "must be finite", lambda: arrays.asymmetric_topk(X + np.inf, CODES, 1)),
        (ValueError, "one value per code", lambda: arrays.asymmetric_topk(X, CODES, 1, ONES[:2])),
        (ValueError, "positive and finite", lambda: arrays.asymmetric_topk(X, CODES, 1, -ONES)),
        (TypeError, "scale must be a C-", lambda: arrays.asymmetric_topk(X, CODES, 1, ONES[:, None]
                                                                         .astype(np.float64))),
        (TypeError, "array of uint8", lambda: arrays.symmetric_topk(X, CODES, 1, 16)),
        (ValueError, "same width", lambda: arrays.symmetric_topk(CODES[:, :1], CODES, 1, 16)),
        (ValueError, "multiple of 2 bytes", lambda: arrays.symmetric_topk(
            np.zeros((1, 3), np.uint8), np.zeros((1, 3), np.uint8), 1, 16)),
        (ValueError, "for dim = 0", lambda: arrays.symmetric_topk(CODES, CODES, 1, 0)),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
