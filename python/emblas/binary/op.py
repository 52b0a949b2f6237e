"""The bit-code operators: tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, needs_grad, rows, use_reference
from emblas.binary import reference


def _pack_sign_fake(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], (x.shape[1] + 7) // 8, dtype=torch.uint8)


def _unpack_planes_fake(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], dim, dtype=dtype)


def _rotate_fake(x: Tensor, signs: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _hamming_topk_fake(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def _hamming_distance_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


def _range_search_fake(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    max_results: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    counts = queries.new_empty(queries.shape[0], dtype=torch.int64)
    return counts, *_hamming_topk_fake(queries, codes, max_results)


def _range_search_csr_fake(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        queries.new_empty(queries.shape[0] + 1, dtype=torch.int64),
        queries.new_empty(found, dtype=torch.int32),
        queries.new_empty(found, dtype=torch.int64),
    )


def _asymmetric_topk_fake(
    queries: Tensor,
    codes: Tensor,
    k: int,
    filter: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _dense_topk_fake(
    queries: Tensor, documents: Tensor, k: int, metric: int, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _asymmetric_topk_fake(queries, documents, k)


def _gather_scores_fake(queries: Tensor, documents: Tensor, ids: Tensor, metric: int) -> Tensor:
    return queries.new_empty(ids.shape)


def _maxsim_fake(
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    dim: int,
    need_argmax: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if documents.dtype == torch.float64 else torch.float32
    count = document_offsets.shape[0] - 1
    tokens = queries.shape[0] if need_argmax else 0
    return (
        queries.new_empty(query_offsets.shape[0] - 1, count, dtype=dtype),
        queries.new_empty(tokens, count, dtype=torch.int32),
    )


def _maxsim_backward_fake(
    grad: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), documents.new_empty(documents.shape)


_CUDA_BYTES = 4095  # of a code, so that a distance has 15 bits
_CUDA_RESULTS = 2**27


def _cuda_rotates(x: Tensor, signs: Tensor) -> bool:
    return x.shape[1] <= (6144 if x.dtype == torch.float64 else 12288)  # shared memory


def _cuda_distances(a: Tensor, b: Tensor) -> bool:
    return a.shape[1] <= _CUDA_BYTES


def _cuda_topk(queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None) -> bool:
    return _cuda_distances(queries, codes) and k <= _CUDA_RESULTS


def _cuda_range(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    max_results: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> bool:
    return _cuda_topk(queries, codes, max_results)


def _cuda_range_csr(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> bool:
    return _cuda_distances(queries, codes)


def _cuda_scores(
    queries: Tensor,
    codes: Tensor,
    k: int,
    filter: Tensor | None = None,
    scale: Tensor | None = None,
) -> bool:
    return _cuda_topk(codes, codes, k)


def _cuda_dense(
    queries: Tensor, documents: Tensor, k: int, metric: int, filter: Tensor | None = None
) -> bool:
    return queries.shape[1] < 2**28 and k <= _CUDA_RESULTS


def _cuda_maxsim(
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    dim: int,
    need_argmax: bool,
) -> bool:
    return dim < 2**28 and (query_offsets.shape[0] - 1) * (document_offsets.shape[0] - 1) < 2**31


def _cuda_maxsim_backward(grad: Tensor, queries: Tensor, *_: Tensor) -> bool:
    return queries.shape[1] < 2**22


_pack_sign = Op(
    "pack_sign",
    reference=reference.pack_sign,
    fake=_pack_sign_fake,
    triton="emblas.binary.triton",
)
_unpack_planes = Op(
    "unpack_planes",
    reference=reference.unpack_planes,
    fake=_unpack_planes_fake,
    triton="emblas.binary.triton",
)
_hadamard_rotate = Op(
    "hadamard_rotate",
    reference=reference.hadamard_rotate,
    fake=_rotate_fake,
    backward="hadamard_unrotate",
    triton="emblas.binary.triton",
    cuda_supports=_cuda_rotates,
)
_hadamard_unrotate = Op(
    "hadamard_unrotate",
    reference=reference.hadamard_unrotate,
    fake=_rotate_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_rotates,
)
_hamming_topk = Op(
    "hamming_topk",
    reference=reference.hamming_topk,
    fake=_hamming_topk_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_topk,
)
_hamming_distance = Op(
    "hamming_distance",
    reference=reference.hamming_distance,
    fake=_hamming_distance_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_distances,
)
_range_search = Op(
    "range_search",
    reference=reference.range_search,
    fake=_range_search_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_range,
)
_range_search_csr = Op(
    "range_search_csr",
    reference=reference.range_search_csr,
    fake=_range_search_csr_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_range_csr,
)
_asymmetric_topk = Op(
    "asymmetric_topk",
    reference=reference.asymmetric_topk,
    fake=_asymmetric_topk_fake,
    cuda_supports=_cuda_scores,
    triton="emblas.binary.triton",
)
_dense_topk = Op(
    "dense_topk",
    reference=reference.dense_topk,
    fake=_dense_topk_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_dense,
)
_gather_scores = Op(
    "gather_scores",
    reference=reference.gather_scores,
    fake=_gather_scores_fake,
    triton="emblas.binary.triton",
)
_maxsim = Op(
    "maxsim",
    reference=reference.maxsim,
    fake=_maxsim_fake,
    backward="maxsim_backward",
    triton="emblas.binary.triton",
    cuda_supports=_cuda_maxsim,
)
_maxsim_backward = Op(
    "maxsim_backward",
    reference=reference.maxsim_backward,
    fake=_maxsim_backward_fake,
    triton="emblas.binary.triton",
    cuda_supports=_cuda_maxsim_backward,
)


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad_out, 0)


class _SignTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.temperature = temperature
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        smooth = torch.tanh(x / ctx.temperature)
        return grad_out * (1 - smooth * smooth) / ctx.temperature, None


def sign_ste(x: Tensor) -> Tensor:
    """Binarize a checked argument; see :func:`emblas.binary.sign_ste`."""
    return _SignSTE.apply(x)


def sign_tanh(x: Tensor, temperature: float) -> Tensor:
    """Binarize with the gradient of ``tanh(x / temperature)``."""
    return _SignTanh.apply(x, temperature)


class _HadamardRotate(torch.autograd.Function):
    """A rotation, whose gradient is its transpose: the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.inverse = inverse
        return _hadamard_unrotate(x, signs) if inverse else _hadamard_rotate(x, signs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (signs,) = ctx.saved_tensors
        transposed = _hadamard_rotate if ctx.inverse else _hadamard_unrotate
        return transposed(grad_out.contiguous(), signs), None, None


def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rotate checked arguments; see :class:`emblas.binary.HadamardRotation`."""
    if use_reference():
        return reference.hadamard_rotate(x, signs)
    if needs_grad(x):
        return _HadamardRotate.apply(x, signs, False)
    return _hadamard_rotate(x, signs)


def hadamard_unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Undo :func:`hadamard_rotate`."""
    if use_reference():
        return reference.hadamard_unrotate(x, signs)
    if needs_grad(x):
        return _HadamardRotate.apply(x, signs, True)
    return _hadamard_unrotate(x, signs)


def pack_sign(x: Tensor, threshold: Tensor | None) -> Tensor:
    """Pack checked arguments; see :func:`emblas.binary.pack_sign`."""
    return reference.pack_sign(x, threshold) if use_reference() else _pack_sign(x, threshold)


def unpack_planes(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Unpack checked arguments; see :func:`emblas.binary.unpack_planes`."""
    args = (codes, dim, dtype)
    return reference.unpack_planes(*args) if use_reference() else _unpack_planes(*args)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute with checked arguments; see :func:`emblas.binary.hamming_distance`."""
    return reference.hamming_distance(a, b) if use_reference() else _hamming_distance(a, b)


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.hamming_topk`."""
    if use_reference():
        return reference.hamming_topk(queries, codes, k, filter)
    return _hamming_topk(queries, codes, k, filter)


def range_search(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    max_results: int,
    filter: Tensor | None,
    later_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.range_search`."""
    if use_reference():
        return reference.range_search(queries, codes, radius, max_results, filter, later_only)
    return _range_search(queries, codes, radius, max_results, filter, later_only)


def range_search_csr(
    queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, later_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.range_search_csr`."""
    if use_reference():
        return reference.range_search_csr(queries, codes, radius, filter, later_only)
    return _range_search_csr(queries, codes, radius, filter, later_only)


def asymmetric_topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.asymmetric_topk`."""
    if use_reference():
        return reference.asymmetric_topk(queries, codes, k, filter, scale)
    return _asymmetric_topk(queries, codes, k, filter, scale)


def dense_topk(
    queries: Tensor, documents: Tensor, k: int, metric: int, filter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.dense_topk`."""
    if use_reference():
        return reference.dense_topk(queries, documents, k, metric, filter)
    return _dense_topk(queries, documents, k, metric, filter)


def gather_scores(queries: Tensor, documents: Tensor, ids: Tensor, metric: int) -> Tensor:
    """Score with checked arguments; see :func:`emblas.binary.rescore`."""
    if use_reference():
        return reference.gather_scores(queries, documents, ids, metric)
    return _gather_scores(queries, documents, ids, metric)


def _accumulated(x: Tensor) -> Tensor:
    """Return a tensor of 16-bit values as float32, others as they are; contiguous."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).contiguous()


def _query_tokens(queries: Tensor, documents: Tensor) -> Tensor:
    """Return queries as the operator takes them: in the documents' dtype, float32 beside codes."""
    beside_codes = queries.dtype != torch.uint8 and documents.dtype == torch.uint8
    return (queries.float() if beside_codes else queries).contiguous()


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        query_offsets: Tensor,
        documents: Tensor,
        document_offsets: Tensor,
        dim: int,
    ) -> Tensor:
        wanted, given = queries.contiguous(), rows(documents)
        scores, argmax = _maxsim(wanted, query_offsets, given, document_offsets, dim, True)
        ctx.save_for_backward(queries, query_offsets, documents, document_offsets, argmax)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        queries, query_offsets, documents, document_offsets, argmax = ctx.saved_tensors
        grad_queries, grad_documents = _maxsim_backward(
            grad.contiguous(),
            _accumulated(queries),
            query_offsets,
            _accumulated(documents),
            document_offsets,
            argmax,
        )
        return grad_queries.to(queries.dtype), None, grad_documents.to(documents.dtype), None, None


def maxsim(
    queries: Tensor, query_offsets: Tensor, documents: Tensor, document_offsets: Tensor, dim: int
) -> Tensor:
    """Score checked arguments; see :func:`emblas.binary.maxsim`."""
    args = (queries, query_offsets, documents, document_offsets, dim)
    if use_reference():
        return reference.maxsim(*args, False)[0]
    if documents.dtype != torch.uint8 and needs_grad(queries, documents):
        return _MaxSim.apply(*args)
    wanted = _query_tokens(queries, documents)
    return _maxsim(wanted, query_offsets, rows(documents), document_offsets, dim, False)[0]
