r"""Scores of all queries against all documents, a block of queries at a time.

What InfoNCE needs of the score matrix ``s = scale * cos(q_i, d_j)`` is small: the scores of the
positives and, per query, the log-sum-exp over the negatives (``n (p + 1)`` numbers of ``n m``).
This module computes those and their gradients without ever holding the matrix::

    lse_i = log sum_{j in N(i)} exp s_ij           N(i): not positive, not left out
    d s_ij = (d lse_i) exp(s_ij - lse_i)           j in N(i)
    d q_i = scale sum_j (d s_ij) d_j               d d_j = scale sum_i (d s_ij) q_i

A block of queries against all documents is one matrix product into a buffer that is used again
and again, so the extra memory is ``block x m``, chosen to stay in the cache. Everything between
the products (scaling, masks, softmax) then costs cache traffic only. The products bound the time:
``2 n m d`` flops each, one forward and three backward. A loss that is summed to a scalar needs
only three in all: its gradients are taken block by block in the forward pass, while the scores
are there (:class:`_Fused`).

Cosines are not taken on normalized copies. A unit vector is the vector times the inverse of its
norm, so documents are scaled by a row in the score buffer, and the gradient is made orthogonal to
the vector at the end::

    d x = (g - (g . x^) x^) / |x|                  g: gradient of the unit vector x^
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas._op import needs_grad, use_reference
from emblas.losses import reference
from emblas.losses.checks import accumulator, full_precision, inverse

BLOCK_BYTES = 8 << 20
LEAST_ROWS = 128  # of a block: below it, packing the documents costs more than multiplying them


class Problem(NamedTuple):
    """The arguments of the operators, checked and complete; see :func:`emblas.losses.info_nce`."""

    queries: Tensor  # (n, dim)
    documents: Tensor  # (m, dim)
    negatives: Tensor | None  # (n, k, dim)
    scale: Tensor  # (), 1 / temperature
    targets: Tensor  # (n, p) int64; -1 where there is none
    query_ids: Tensor | None  # (n,)
    document_ids: Tensor | None  # (m,)
    mask: Tensor | None  # (n, m) bool
    margin: Tensor | None  # ()
    guide_queries: Tensor | None  # (n, guide dim), unit vectors
    guide_documents: Tensor | None  # (m, guide dim), unit vectors
    guide_margin: Tensor | None  # ()
    cosine: bool
    both: bool  # the columns' log-sum-exp too
    rows: int  # queries in a block; 0: as many as suits the cache


def block_rows(width: int, dtype: torch.dtype) -> int:
    """Return how many queries make a block whose rows have ``width`` scores."""
    return max(LEAST_ROWS, BLOCK_BYTES // (max(width, 1) * dtype.itemsize))


def slots(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices that are all legal, and where they mean something.

    An empty slot repeats the row's largest index, so that marking positives twice is harmless.
    """
    valid = targets >= 0
    return torch.where(valid, targets, targets.amax(1, keepdim=True).clamp_min(0)), valid


def _inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return inverse(torch.linalg.vector_norm(x, dim=-1, dtype=dtype))


def _tangent_(gradient: Tensor, x: Tensor, inverse_norm: Tensor) -> Tensor:
    """Take the part along ``x`` from ``gradient``, in place; return its coefficients."""
    along = torch.linalg.vecdot(gradient, x.to(gradient.dtype)) * inverse_norm
    gradient.addcmul_(x.to(gradient.dtype), (along * inverse_norm)[..., None], value=-1)
    return along


class _Blocks:
    """Blocks of scores in a reused buffer, and the gradients that flow back from them."""

    def __init__(self, problem: Problem, *, gradients: bool, need_documents: bool = False) -> None:
        self.problem = p = problem
        self.dtype = dtype = accumulator(p.queries, p.documents)
        self.documents = p.documents.to(dtype)
        self.index, self.valid = slots(p.targets)
        self.columns = p.documents.shape[0]
        own = 0 if p.negatives is None else p.negatives.shape[1]
        self.rows = p.rows or block_rows(self.columns + own, dtype)
        size = min(self.rows, p.queries.shape[0]), self.columns + own
        self._scores = p.queries.new_empty(size, dtype=dtype)
        self.work = torch.empty_like(self._scores)
        if p.cosine:
            self.document_norm = _inverse_norm(p.documents, dtype)
        if gradients:
            n, dim = p.queries.shape
            self.grad_queries = p.queries.new_empty(n, dim, dtype=dtype)
            self.grad_documents = (
                p.documents.new_zeros(p.documents.shape, dtype=dtype) if need_documents else None
            )
            self.grad_negatives = (
                None if p.negatives is None else torch.empty_like(p.negatives, dtype=dtype)
            )
            self.grad_scale = p.scale.new_zeros((), dtype=dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of the queries, their scores (-inf at what isn't a negative), positives."""
        n = self.problem.queries.shape[0]
        for begin in range(0, n, self.rows):
            rows = slice(begin, min(begin + self.rows, n))
            yield rows, *self._block(rows)

    def _block(self, rows: slice) -> tuple[Tensor, Tensor]:
        p, dtype = self.problem, self.dtype
        self.block = p.queries[rows].to(dtype)
        if p.cosine:
            self.query_norm = _inverse_norm(self.block, dtype)
            self.block = self.block * self.query_norm[:, None]
        self.scaled = self.block * p.scale
        scores = self._scores[: len(self.block)]
        shared, own = scores[:, : self.columns], scores[:, self.columns :]
        torch.mm(self.scaled, self.documents.t(), out=shared)
        if p.cosine:
            shared.mul_(self.document_norm)
        if p.negatives is not None:
            negatives = p.negatives[rows].to(dtype)
            torch.sum(negatives * self.scaled[:, None], -1, out=own)
            if p.cosine:
                own.mul_(_inverse_norm(negatives, dtype))
        index = self.index[rows]
        positives = shared.gather(1, index)
        if p.query_ids is not None and p.document_ids is not None:
            shared.masked_fill_(p.query_ids[rows, None] == p.document_ids, -torch.inf)
        if p.mask is not None:
            shared.masked_fill_(~p.mask[rows], -torch.inf)
        if p.margin is not None:
            scores.masked_fill_(
                scores > self._best(rows, positives) + p.margin * p.scale, -torch.inf
            )
        if p.guide_queries is not None:
            assert p.guide_documents is not None
            assert p.guide_margin is not None
            guide = p.guide_queries[rows] @ p.guide_documents.t()
            best = self._best(rows, guide.gather(1, index))
            shared.masked_fill_(guide > best - p.guide_margin, -torch.inf)
        # A query without any positive keeps the score that its idle slots point to.
        rest = torch.where(
            self.valid[rows].any(1, keepdim=True), -torch.inf, shared.gather(1, index)
        )
        shared.scatter_(1, index, rest)
        return scores, positives

    def _best(self, rows: slice, positives: Tensor) -> Tensor:
        """Score (rows, 1) of the best positive; infinite where there is none."""
        valid = self.valid[rows]
        best = positives.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        return torch.where(valid.any(1, keepdim=True), best, torch.inf)

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over each row, in the work buffer, and the rows' log-sum-exp."""
        if not scores.shape[1]:
            return self.work[: len(scores)], scores.new_full((len(scores),), -torch.inf)
        share = torch.softmax(scores, 1, out=self.work[: len(scores)])
        most = scores.amax(1)
        empty = most == -torch.inf
        share.masked_fill_(empty[:, None], 0)
        # Of the largest term, softmax says the sum: cheaper than another pass of exponentials.
        return share, torch.where(empty, most, most - share.amax(1).log())

    def accumulate(self, rows: slice, gradient: Tensor, grad_positives: Tensor) -> None:
        """Send the gradient of a block's scores to queries, documents, negatives and scale."""
        p, dtype = self.problem, self.dtype
        shared, own = gradient[:, : self.columns], gradient[:, self.columns :]
        shared.scatter_add_(1, self.index[rows], grad_positives * self.valid[rows])
        if p.cosine:
            shared.mul_(self.document_norm)
        grad = torch.mm(shared, self.documents, out=self.grad_queries[rows])
        if p.negatives is not None and self.grad_negatives is not None:
            negatives = p.negatives[rows].to(dtype)
            if p.cosine:
                norm = _inverse_norm(negatives, dtype)
                own.mul_(norm)
            grad.add_((own[:, :, None] * negatives).sum(1))
            grad_negatives = self.grad_negatives[rows]
            torch.mul(own[:, :, None], self.scaled[:, None], out=grad_negatives)
            if p.cosine:
                _tangent_(grad_negatives, negatives, norm)
        if self.grad_documents is not None:
            self.grad_documents.addmm_(shared.t(), self.scaled)
        along = torch.linalg.vecdot(grad, self.block)
        self.grad_scale += along.sum()
        if p.cosine:
            grad.addcmul_(self.block, along[:, None], value=-1)
            grad.mul_((self.query_norm * p.scale)[:, None])
        else:
            grad.mul_(p.scale)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries, documents, negatives (empty if not asked for) and scale.

        They have the accumulator's dtype; :func:`_narrowed` gives them that of the vectors.
        """
        p, documents = self.problem, self.grad_documents
        if p.cosine and documents is not None:
            for begin in range(0, self.columns, self.rows):
                part = slice(begin, begin + self.rows)
                _tangent_(documents[part], p.documents[part], self.document_norm[part])
        empty = self.grad_scale.new_empty(0)
        return (
            self.grad_queries,
            empty if documents is None else documents,
            empty if self.grad_negatives is None else self.grad_negatives,
            self.grad_scale,
        )


def _narrowed(gradients: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, ...]:
    """Gradients of :meth:`_Blocks.gradients` in the dtypes of what they belong to."""
    return tuple(
        gradient if x is None else gradient.to(x.dtype)
        for gradient, x in zip(gradients, problem[:4], strict=True)
    )


class _Columns:
    """Log-sum-exp of every column, kept while blocks of rows pass by."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks = blocks
        shape = (blocks.columns,)
        self.most = blocks.documents.new_full(shape, -torch.inf)
        self.total = blocks.documents.new_zeros(shape)

    def add(self, scores: Tensor) -> None:
        scores = scores[:, : self.blocks.columns]
        most = torch.maximum(self.most, scores.amax(0))
        shift = torch.where(most == -torch.inf, 0, most)
        work = self.blocks.work[: len(scores), : self.blocks.columns]
        terms = torch.sub(scores, shift, out=work).exp_()
        self.total = self.total * (self.most - shift).exp() + terms.sum(0)
        self.most = most

    def result(self) -> Tensor:
        return torch.where(self.most == -torch.inf, self.most, self.most + self.total.log())


# --- the operators: opaque to torch.compile, on any device ---------------------------------------

_ARGUMENTS = (
    "Tensor queries, Tensor documents, Tensor? negatives, Tensor scale, Tensor targets, "
    "Tensor? query_ids, Tensor? document_ids, Tensor? mask, Tensor? margin, "
    "Tensor? guide_queries, Tensor? guide_documents, Tensor? guide_margin, "
    "bool cosine, bool both, int rows"
)


def _scores(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*arguments)
    with full_precision(problem.queries):
        blocks = _Blocks(problem, gradients=False)
        positives = problem.queries.new_empty(problem.targets.shape, dtype=blocks.dtype)
        lse = positives.new_empty(problem.queries.shape[0])
        columns = _Columns(blocks) if problem.both else None
        for rows, scores, positives[rows] in blocks:
            _, lse[rows] = blocks.softmax(scores)
            if columns is not None:
                columns.add(scores)
    return positives, lse, positives.new_empty(0) if columns is None else columns.result()


def _scores_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = Problem(*arguments)
    new = p.queries.new_empty(p.targets.shape, dtype=accumulator(p.queries, p.documents))
    n, m = p.queries.shape[0], p.documents.shape[0]
    return new, new.new_empty(n), new.new_empty(m if p.both else 0)


def _scores_backward(
    grad_positives: Tensor,
    grad_lse: Tensor,
    grad_columns: Tensor,
    column_lse: Tensor,
    need_documents: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    shift = torch.where(column_lse == -torch.inf, 0, column_lse)
    with full_precision(problem.queries):
        blocks = _Blocks(problem, gradients=True, need_documents=need_documents)
        m = blocks.columns
        for rows, scores, _ in blocks:
            gradient, _ = blocks.softmax(scores)
            gradient.mul_(grad_lse[rows, None])
            if problem.both:
                gradient[:, :m] += scores[:, :m].sub_(shift).exp_().mul_(grad_columns)
            blocks.accumulate(rows, gradient, grad_positives[rows])
        return _narrowed(blocks.gradients(), problem)


def _scores_backward_fake(
    grad_positives: Tensor,
    grad_lse: Tensor,
    grad_columns: Tensor,
    column_lse: Tensor,
    need_documents: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    p = Problem(*arguments)
    empty = p.queries.new_empty(0, dtype=accumulator(p.queries, p.documents))
    return (
        p.queries.new_empty(p.queries.shape),
        p.documents.new_empty(p.documents.shape if need_documents else 0),
        empty if p.negatives is None else p.negatives.new_empty(p.negatives.shape),
        p.scale.new_empty(()),
    )


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(f"{name}{schema}")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emblas::{name}", fake)
    return getattr(torch.ops.emblas, name).default


_library = torch.library.Library("emblas", "FRAGMENT")
_scores_op = _define(
    "info_nce_scores", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _scores, _scores_fake
)
_scores_backward_op = _define(
    "info_nce_scores_backward",
    "(Tensor grad_positives, Tensor grad_lse, Tensor grad_columns, Tensor column_lse, "
    "bool need_documents, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _scores_backward,
    _scores_backward_fake,
)


class _Last(torch.autograd.Function):
    """A gradient, handed on as a function of ``inputs`` that can't be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "losses over blocks of scores have no second derivative; "
            'emblas.use_backend("reference") has one, with the whole score matrix'
        )


def _first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make ``backward`` refuse a second derivative, of which terms would be missing.

    Unlike torch's ``once_differentiable``, it also does so where only what was saved requires grad,
    as for ``loss.backward(create_graph=True)``.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        inputs = *grads, *ctx.saved_tensors
        return tuple(None if g is None else _Last.apply(g, *inputs) for g in gradients)

    return refusing


class _Scores(torch.autograd.Function):
    """The scores with their gradient, which computes each block again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        positives, lse, columns = _scores_op(*arguments)
        _save(ctx, arguments, columns)
        return positives, lse, columns

    @staticmethod
    @_first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        columns, arguments = _load(ctx)
        grads = tuple(g.contiguous() for g in grads)
        need_documents = ctx.needs_input_grad[1]
        gradients = _scores_backward_op(*grads, columns, need_documents, *arguments)
        return _returned(ctx, gradients)


class _Fused(torch.autograd.Function):
    """A scalar loss whose gradients are taken in the forward pass, three products in all."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[[Tensor, Tensor, slice], Tensor],
        need_documents: bool,
        *arguments: Any,
    ) -> Tensor:
        problem = Problem(*arguments)
        with full_precision(problem.queries):
            blocks = _Blocks(problem, gradients=True, need_documents=need_documents)
            total = blocks.documents.new_zeros(())
            grad_positives = total.new_empty(problem.targets.shape)
            grad_lse = total.new_empty(problem.queries.shape[0])
            for rows, scores, positives in blocks:
                share, lse = blocks.softmax(scores)
                positives, lse = positives.requires_grad_(), lse.requires_grad_()
                with torch.enable_grad():
                    part = loss(positives, lse, rows)
                    grads = torch.autograd.grad(part, (positives, lse))
                grad_positives[rows], grad_lse[rows] = grads
                total += part.detach()
                share.mul_(grad_lse[rows, None])
                blocks.accumulate(rows, share, grad_positives[rows])
            # Not in 16 bits yet: the factor that keeps them from underflow comes in backward.
            ctx.gradients = blocks.gradients()
        _save(ctx, arguments, grad_positives, grad_lse)
        return total

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_positives, grad_lse, arguments = _load(ctx)
        if ctx.gradients is None:  # a second time (retain_graph): the first has used them up
            empty = grad_lse.new_empty(0)
            gradients = _scores_backward_op(
                grad_positives * grad,
                grad_lse * grad,
                empty,
                empty,
                ctx.needs_input_grad[3],
                *arguments,
            )
        else:
            gradients, ctx.gradients = ctx.gradients, None
            for gradient in gradients:
                gradient.mul_(grad)
            gradients = _narrowed(gradients, Problem(*arguments))
        return None, None, *_returned(ctx, gradients, 2)


def _save(ctx: Any, arguments: tuple[Any, ...], *more: Tensor) -> None:
    """Save the arguments of an operator, tensors and others, and some results."""
    ctx.where = [isinstance(argument, Tensor) for argument in arguments]
    ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
    ctx.save_for_backward(*more, *(a for a in arguments if isinstance(a, Tensor)))


def _load(ctx: Any) -> tuple[Any, ...]:
    """Return what :func:`_save` saved: the results, then the tuple of arguments."""
    more = len(ctx.saved_tensors) - sum(ctx.where)
    tensors = iter(ctx.saved_tensors[more:])
    arguments = tuple(
        next(tensors) if is_tensor else other
        for is_tensor, other in zip(ctx.where, ctx.others, strict=True)
    )
    return *ctx.saved_tensors[:more], arguments


def _returned(ctx: Any, gradients: tuple[Tensor, ...], before: int = 0) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[before:]
    return tuple(
        gradients[i] if i < len(gradients) and needed[i] else None for i in range(len(needed))
    )


def scores(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the positives (n, p), log-sum-exp over each query's negatives (n,), documents (m,).

    The last is empty unless ``problem.both``. Where nothing is left, a log-sum-exp is -inf.
    """
    if use_reference():
        with full_precision(problem.queries):
            return reference.info_nce_scores(*problem)
    if needs_grad(*problem[:4]):
        return _Scores.apply(*problem)
    return _scores_op(*problem)


def fused(problem: Problem, loss: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
    """Sum of ``loss(positives, lse, rows)`` over blocks of queries, with its gradients.

    ``loss`` must be a function of its own rows only.
    """
    return _Fused.apply(loss, problem.documents.requires_grad, *problem)
