"""Learned multi-bit codes: recurrent binarization of float embeddings (arXiv 2302.08714)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas import _op
from emblas.binary.functions import pack_sign, sign_ste


def _perceptron(inputs: int, outputs: int, hidden: int, blocks: int) -> nn.Sequential:
    """Linear, batch norm and ReLU ``blocks`` times, then linear; just linear if hidden is 0."""
    layers: list[nn.Module] = []
    width = inputs
    for _ in range(blocks if hidden else 0):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    layers.append(nn.Linear(width, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RecurrentBinarizer(nn.Module):
    """Float embeddings to codes of several bits per dimension, each bit coding what is left.

    The first bits are ``b_0 = sign(W(f))``. Step t rebuilds the embedding from the bits so far and
    codes the residual: ``r_t = sign(R_t(f - normalize(B_t(b_{t-1}))))``, ``b_t = b_{t-1} +
    2^-t r_t`` (arXiv 2302.08714, section 3.2). W, B_t and R_t are perceptrons of their own. It is
    trained on embeddings alone, with :func:`recurrent_binary_loss`; gradients pass the signs by
    the clipped straight-through estimator of :func:`emblas.binary.sign_ste`.

    Parameters
    ----------
    in_dim : int
        Dimensions of the embeddings, which should have unit length.
    dim : int
        Dimensions of the codes.
    bits : int, default 2
        Bits per dimension, 1 to 4: one and the number of residual steps.
    hidden : int, default 0
        Width of the perceptrons' hidden layers; 0 makes them linear.
    blocks : int, default 1
        Hidden layers.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(
        self, in_dim: int, dim: int, *, bits: int = 2, hidden: int = 0, blocks: int = 1
    ) -> None:
        super().__init__()
        if in_dim < 1 or dim < 1 or hidden < 0 or blocks < 1:
            raise ValueError(
                "in_dim, dim and blocks must be at least 1 and hidden 0, got "
                f"{in_dim}, {dim}, {blocks} and {hidden}"
            )
        if not 1 <= bits <= 4:
            raise ValueError(f"bits must be between 1 and 4, got {bits}")
        self.dim = dim
        self.bits = bits
        steps = range(bits - 1)
        self.encoder = _perceptron(in_dim, dim, hidden, blocks)
        self.decoders = nn.ModuleList([_perceptron(dim, in_dim, hidden, blocks) for _ in steps])
        self.residuals = nn.ModuleList([_perceptron(in_dim, dim, hidden, blocks) for _ in steps])

    def _planes(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the values of the codes, and what each plane takes the signs of."""
        _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
        planes = [self.encoder(x)]
        values = sign_ste(planes[0])
        for step, (decoder, residual) in enumerate(
            zip(self.decoders, self.residuals, strict=True), start=1
        ):
            rebuilt = nn.functional.normalize(decoder(values), dim=1)
            planes.append(residual(x - rebuilt))
            values = values + 2.0**-step * sign_ste(planes[-1])
        return values, planes

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the codes of ``(rows, in_dim)``: ``(rows, dim)``, differentiable."""
        return self._planes(x)[0]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of ``(rows, in_dim)``, uint8 ``(rows, bits * ceil(dim / 8))``.

        :func:`emblas.binary.unpack_planes` gives back the values of :meth:`forward`;
        :func:`emblas.binary.symmetric_topk` searches them. Call :meth:`eval` first: in training,
        batch norm would use the batch's own statistics.
        """
        return torch.cat([pack_sign(plane) for plane in self._planes(x)[1]], 1)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"dim={self.dim}, bits={self.bits}"


def recurrent_binary_loss(
    queries: Tensor,
    documents: Tensor,
    items: Tensor | None = None,
    *,
    temperature: float = 0.05,
    hard_negatives: int = 5,
) -> Tensor:
    """Contrast each pair of a batch with its hardest negatives, in both directions.

    InfoNCE over cosines in which only the positive and the ``hard_negatives`` most similar others
    of the batch take part (arXiv 2302.08714, section 3.3). For compatible training, which lets a
    new binarizer search an index of an old one, add the same loss of the new queries against the
    documents' old codes.

    Parameters
    ----------
    queries, documents : Tensor
        ``(batch, dim)``: row i of one belongs to row i of the other; values of
        :class:`RecurrentBinarizer`, or of :func:`emblas.binary.unpack_planes` for old codes.
    items : Tensor, optional
        ``(batch,)`` integers: pairs of the same item are no negatives of each other.
    temperature : float, default 0.05
        Divides the cosines.
    hard_negatives : int, default 5
        Negatives per row, at least 1; all there are if the batch has fewer.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes don't fit together or a number is out of range.
    """
    _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS)
    _op.check_tensor("documents", documents, ndim=2, dtypes=_op.FLOATS, device=queries.device)
    if queries.shape != documents.shape or len(queries) < 2:
        raise ValueError(
            "queries and documents must have the same shape with at least 2 rows, got "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    if not temperature > 0 or hard_negatives < 1:
        raise ValueError(
            f"temperature must be above 0 and hard_negatives at least 1, got {temperature} and "
            f"{hard_negatives}"
        )
    batch = len(queries)
    same = torch.eye(batch, dtype=torch.bool, device=queries.device)
    if items is not None:
        _op.check_tensor("items", items, ndim=1, device=queries.device)
        if len(items) != batch:
            raise ValueError(f"items must have {batch} entries, got {len(items)}")
        same = same | (items[:, None] == items)
    unit = nn.functional.normalize
    logits = unit(queries, dim=1) @ unit(documents, dim=1).T / temperature
    count = min(hard_negatives, batch - 1)
    total = logits.new_zeros(())
    for one in (logits, logits.T):
        # -1e9 leaves a row without negatives a loss of 0, where -inf would make NaN gradients.
        negatives = one.masked_fill(same, -1e9).topk(count, dim=1).values
        total = (
            total
            + (
                torch.cat((one.diagonal()[:, None], negatives), 1).logsumexp(1) - one.diagonal()
            ).mean()
        )
    return total / 2
