"""Rows for another vocabulary: copied, regressed from a donor, or rebuilt from similar rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emblas import _op
from emblas.tables.base import ComposedEmbedding, check_at_least
from emblas.tables.modules import HashEmbedding

METHODS = ("mean", "least_squares", "matching_pursuit")
_BLOCK = 2**24  # correlations held at once


def match_tokens(old: Sequence[str], new: Sequence[str]) -> Tensor:
    """Return the index in ``old`` of each token of ``new``, -1 for those that aren't there.

    Parameters
    ----------
    old, new : sequence of str
        Tokens by id.

    Returns
    -------
    Tensor
        int64 ``(len(new),)``.
    """
    position = {token: number for number, token in enumerate(old)}
    return torch.tensor([position.get(token, -1) for token in new], dtype=torch.int64)


@torch.no_grad()
def transfer_rows(
    table: Tensor,
    index: Tensor,
    donor: Tensor | None = None,
    *,
    method: str = "mean",
    num_atoms: int = 32,
) -> Tensor:
    """Build the table of a new vocabulary for a model that knows another one.

    Rows of tokens that both vocabularies have are copied. The others are

    - ``"mean"``: the mean of the copied rows;
    - ``"least_squares"``: an affine function of the token's row in the table of a donor, another
      model with the new vocabulary; fitted on the tokens that both have, of least norm where they
      don't determine it;
    - ``"matching_pursuit"``: the same sums of a few rows as in the donor's table: the donor's row
      is approximated by rows of tokens that both have (:func:`matching_pursuit`), and the model's
      rows of these tokens are summed with the same coefficients.

    Parameters
    ----------
    table : Tensor
        ``(old vocabulary, dim)``, the model's.
    index : Tensor
        int64 ``(new vocabulary,)``: row of the same token in ``table`` or -1; see
        :func:`match_tokens`.
    donor : Tensor, optional
        ``(new vocabulary, any dim)``; needed but for ``"mean"``.
    method : {"mean", "least_squares", "matching_pursuit"}, default "mean"
        See above.
    num_atoms : int, default 32
        Rows in a sum of ``"matching_pursuit"``.

    Returns
    -------
    Tensor
        ``(new vocabulary, dim)`` in the dtype of ``table``; computed in float64.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or no token is in both vocabularies.
    """
    _op.check_choice("method", method, METHODS)
    _op.check_tensor("table", table, ndim=2, dtypes=_op.FLOATS)
    _op.check_tensor("index", index, ndim=1, dtypes=(torch.int64,), device=table.device)
    if not bool((index >= 0).any()):
        raise ValueError("index must have at least one token that is in both vocabularies")
    if int(index.max()) >= len(table) or int(index.min()) < -1:
        raise ValueError(
            f"index must be -1 to {len(table) - 1}, got {int(index.min())} to {int(index.max())}"
        )
    known = index >= 0
    rows = table[index[known]].double()
    new = torch.empty(len(index), table.shape[1], dtype=torch.float64, device=table.device)
    new[known] = rows
    if method == "mean":
        new[~known] = rows.mean(0)
        return new.to(table.dtype)
    if donor is None:
        raise ValueError(f"method {method!r} needs a donor")
    _op.check_tensor("donor", donor, ndim=2, dtypes=_op.FLOATS, device=table.device)
    if len(donor) != len(index):
        raise ValueError(f"donor must have a row for each of {len(index)} tokens, got {len(donor)}")
    wide = donor.double()
    if method == "least_squares":
        ones = wide.new_ones(len(wide), 1)
        design = torch.cat([wide, ones], 1)
        # The pseudo-inverse serves short and dependent rows too.
        new[~known] = design[~known] @ (torch.linalg.pinv(design[known]) @ rows)
    else:
        atoms, coefficients = matching_pursuit(wide[~known], wide[known], num_atoms)
        new[~known] = torch.einsum("nk,nkd->nd", coefficients, rows[atoms])
    return new.to(table.dtype)


@torch.no_grad()
def matching_pursuit(
    targets: Tensor, dictionary: Tensor, num_atoms: int, *, tolerance: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """Approximate vectors by sums of few rows of a dictionary, all at once.

    Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad, 1993): again and again, the atom
    with the largest cosine to what is left of the target is added, and all coefficients are fitted
    anew by least squares.

    Parameters
    ----------
    targets : Tensor
        ``(targets, dim)``.
    dictionary : Tensor
        ``(atoms, dim)``.
    num_atoms : int
        In each sum, at least 1; at most as many as there are, and as ``dim``.
    tolerance : float, default 1e-9
        A target is done when what is left is shorter than this part of it; the coefficients of
        further atoms are 0.

    Returns
    -------
    atoms : Tensor
        int64 ``(targets, k)``, distinct in each row.
    coefficients : Tensor
        float64 ``(targets, k)``.
    """
    for name, tensor in (("targets", targets), ("dictionary", dictionary)):
        _op.check_tensor(name, tensor, ndim=2, dtypes=_op.FLOATS)
    if targets.shape[1] != dictionary.shape[1] or len(dictionary) == 0:
        raise ValueError(
            f"dictionary must have rows of {targets.shape[1]} numbers, "
            f"got shape {tuple(dictionary.shape)}"
        )
    check_at_least(1, num_atoms=num_atoms)
    count = min(num_atoms, *dictionary.shape)
    wide = dictionary.double()
    lengths = wide.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    unit = wide / lengths[:, None]
    found = [
        _pursue(part, wide, unit, count, tolerance)
        for part in targets.double().split(max(1, _BLOCK // len(dictionary)))
    ]
    return torch.cat([atoms for atoms, _ in found]), torch.cat([c for _, c in found])


def _pursue(
    targets: Tensor, dictionary: Tensor, unit: Tensor, count: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(targets), device=targets.device)
    atoms = torch.empty(len(targets), 0, dtype=torch.int64, device=targets.device)
    coefficients = targets.new_empty(len(targets), 0)
    residual = targets
    for _ in range(count):
        active = residual.norm(dim=1) > tolerance * targets.norm(dim=1)
        fit = (residual @ unit.t()).abs()
        fit[rows[:, None], atoms] = -1
        atoms = torch.cat([atoms, fit.argmax(1, keepdim=True)], 1)
        chosen = dictionary[atoms]  # (targets, k, dim)
        # Normal equations. An atom that correlates with what is left does not depend on the others;
        # where nothing is left it may, and what was found before stays.
        factor, failed = torch.linalg.cholesky_ex(chosen @ chosen.transpose(1, 2))
        solution = torch.cholesky_solve(chosen @ targets[:, :, None], factor)[..., 0]
        kept = torch.nn.functional.pad(coefficients, (0, 1))
        coefficients = torch.where((active & (failed == 0))[:, None], solution, kept)
        residual = targets - torch.einsum("nk,nkd->nd", coefficients, chosen)
    return atoms, coefficients


def fit_rows(
    module: HashEmbedding | ComposedEmbedding,
    ids: Tensor,
    vectors: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> float:
    """Set a hashed table so that known ids come out as near to given vectors as they can.

    For moving to another seed, hash or number of rows: ``fit_rows(new, ids, old(ids))``. A vector
    is a linear function of the table, so this is a least-squares problem; it is solved by conjugate
    gradients (CGLS, Hestenes and Stiefel, 1952), which start from the table as it is.

    Parameters
    ----------
    module : HashEmbedding, MultiHashEmbedding, UnifiedEmbedding, ...
        A module whose rows are summed or joined; products are not linear.
    ids : Tensor
        What the module embeds.
    vectors : Tensor
        Of the shape of ``module(ids)``.
    iterations : int, default 50
        At most.
    tolerance : float, default 1e-6
        Stop when the gradient has shrunk by this factor.

    Returns
    -------
    float
        Root mean squared error at the end.

    Raises
    ------
    TypeError, ValueError
        If the module isn't linear in its table or a shape doesn't fit.
    """
    composition = getattr(module, "composition", None)
    if composition is None or composition.combine == "product":
        raise TypeError("module must be a table whose rows are summed or joined")
    weight, fused = module.weight, module.fused_optimizer
    if fused is not None:
        raise ValueError("module must have no fused optimizer: detach it first")
    with torch.no_grad():
        shape = module(ids).shape
    if vectors.shape != shape:
        raise ValueError(f"vectors must have shape {tuple(shape)}, got {tuple(vectors.shape)}")

    def look_up(table: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": table}, (ids,))

    with torch.no_grad():
        table, residual = conjugate_gradients(
            look_up, weight.detach(), vectors.to(weight.dtype), iterations, tolerance
        )
        weight.copy_(table)
    return float(residual.square().mean().sqrt())


def conjugate_gradients(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    target: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Solve ``min |target - function(x)|`` for a linear function, from a start.

    Returns the solution and what is left of the target.
    """

    def pull_back(residual: Tensor) -> Tensor:
        x = torch.zeros_like(start).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(x), x, residual)
        return gradient.to_dense() if gradient.is_sparse else gradient

    x = start.clone()
    residual = target - function(x)
    direction = gradient = pull_back(residual)
    size = first = float(gradient.square().sum())
    for _ in range(iterations):
        if size <= tolerance**2 * first:
            break
        image = function(direction)
        step = size / float(image.square().sum())
        x += step * direction
        residual -= step * image
        gradient = pull_back(residual)
        before, size = size, float(gradient.square().sum())
        direction = gradient + size / before * direction
    return x, residual
