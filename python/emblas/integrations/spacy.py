"""The hashed embeddings of thinc and spaCy on emblas' kernels.

>>> accelerate(nlp.get_pipe("tok2vec").model)       # an existing pipeline, in place
>>> layer = HashEmbed(96, 5000, seed=8, column=0)    # or a new layer, with thinc's arguments

Both read the same ids, tables and seeds as thinc's own layer and give the same sums, so what one
has saved, the other loads. On thinc's GPU backends its own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from emblas.integrations import versions
from emblas.tables import TableSpec, arrays, hash_bag

try:
    from thinc.api import NumpyOps, concatenate, registry
    from thinc.layers import hashembed as _thinc
except ImportError as error:
    raise versions.import_error(__name__, "thinc", error) from error


@registry.layers("emblas.HashEmbed.v1")
def HashEmbed(
    nO: int,
    nV: int,
    *,
    seed: int | None = None,
    column: int | None = None,
    initializer: Callable[..., Any] | None = None,
    dropout: float | None = None,
) -> Any:
    """Thinc's ``HashEmbed``: the sum of four rows of a table for each id.

    Parameters
    ----------
    nO, nV : int
        Width and rows of the table.
    seed : int, optional
        Of the hash; default: the number of the layer, as in thinc.
    column : int, optional
        Which column of two-dimensional ids to read.
    initializer : callable, optional
        Of the table; default: uniform on (-0.1, 0.1).
    dropout : float, optional
        Share of the columns that are dropped in training.

    Returns
    -------
    thinc.api.Model
        With the name, parameters and attributes of thinc's, so that either loads the other's bytes.
    """
    model: Any = _thinc.HashEmbed(
        nO, nV, seed=seed, column=column, initializer=initializer, dropout=dropout
    )
    accelerate(model)
    return model


@registry.layers("emblas.MultiHashEmbed.v1")
def MultiHashEmbed(
    width: int, rows: list[int], *, seed: int = 8, dropout: float | None = None
) -> Any:
    """Tables of several attributes side by side, the first layer of spaCy's ``MultiHashEmbed``.

    Parameters
    ----------
    width : int
        Of each table.
    rows : list of int
        Of the tables, one per column of the ids.
    seed : int, default 8
        Of the first table; the others count on, as in spaCy.
    dropout : float, optional
        As in :func:`HashEmbed`.

    Returns
    -------
    thinc.api.Model
        From ids ``(tokens, len(rows))`` to vectors ``(tokens, len(rows) * width)``.
    """
    if not rows:
        raise ValueError("rows must name at least one table, got none")
    layers = [
        HashEmbed(width, count, seed=seed + i, column=i, dropout=dropout)
        for i, count in enumerate(rows)
    ]
    return layers[0] if len(layers) == 1 else concatenate(*layers)


def accelerate(model: Any) -> int:
    """Let every ``HashEmbed`` inside a model of thinc run on emblas.

    Parameters
    ----------
    model : thinc.api.Model
        Changed in place: parameters, attributes and what is saved stay as they are.

    Returns
    -------
    int
        Number of layers that were changed.

    Raises
    ------
    UnsupportedVersionError
        If this version of thinc keeps a layer's function somewhere else.
    """
    layers = [node for node in model.walk() if node.name == "hashembed"]
    for layer in layers:
        versions.private("thinc", layer, "_func")
        layer._func = _forward
    return len(layers)


def _forward(model: Any, ids: Any, is_train: bool) -> tuple[Any, Callable[[Any], Any]]:
    """Embed ids; thinc's ``forward`` with one kernel in place of keys and sums."""
    if not isinstance(model.ops, NumpyOps) or len(ids) == 0:
        return _thinc.forward(model, ids, is_train)
    vectors = np.ascontiguousarray(model.get_param("E"))
    spec = TableSpec(len(vectors), seed=model.attrs["seed"], allow_degenerate_seed=True)
    keys = np.ascontiguousarray(ids, dtype=np.uint64)
    output = arrays.hash_bag(keys, vectors, spec)
    mask = None
    if is_train:
        mask = model.ops.get_dropout_mask((vectors.shape[1],), model.attrs.get("dropout_rate"))
        if mask is not None:
            output *= mask

    def backprop(d_vectors: Any) -> Any:
        if mask is not None:
            d_vectors = d_vectors * mask
        table = torch.zeros(vectors.shape, requires_grad=True)
        pooled = hash_bag(torch.from_numpy(keys.view(np.int64)), table, spec)
        (gradient,) = torch.autograd.grad(pooled, table, torch.from_numpy(d_vectors))
        model.inc_grad("E", gradient.numpy())
        return model.ops.alloc1i(len(keys))

    return output, backprop
