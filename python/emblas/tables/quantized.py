"""Tables of integers with a scale for each row, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emblas._philox import WORD, philox4x32
from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.packed_codes import pack_codes, row_bytes, unpack_codes
from emblas.tables.quantized_lookup import BITS, check_bits, quantized_bag


def stochastic_round(x: Tensor, elements: Tensor, step: int, seed: int) -> Tensor:
    """Round to one of the two neighbouring integers, up with the probability of the fraction.

    The expectation of the result is ``x``, so that updates much smaller than a step of the integers
    still arrive on average; rounding to the nearest would lose them all.

    Parameters
    ----------
    x : Tensor
        Floating point.
    elements : Tensor
        int64, of a shape that broadcasts to that of ``x``: a number for each element. With ``step``
        and ``seed``, it decides the random number: Philox4x32-10 with counter
        ``(low and high half of element, low and high half of step)``, word 0.
    step, seed : int
        0 to 2^64 - 1.

    Returns
    -------
    Tensor
        Integers in the dtype of ``x``.
    """
    elements = elements.expand(x.shape)
    words = [elements & WORD, elements >> 32 & WORD]
    words += [torch.full_like(elements, part) for part in (step & WORD, step >> 32 & WORD)]
    uniform = philox4x32(words, seed)[0].double() * 2.0**-32
    floor = x.double().floor()
    return (floor + (uniform < x.double() - floor)).to(x.dtype)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.bounds = low, high
        return ratio.round().clamp(low, high) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ratio,) = ctx.saved_tensors
        low, high = ctx.bounds
        inside = (ratio >= low) & (ratio <= high)
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
        # The paper's g: an update moves scales and weights by like parts of themselves.
        balance = 1 / math.sqrt(ratio.numel() * max(high, 1))
        return grad * inside, (grad * slope).sum(1, keepdim=True) * balance, None, None


def learned_step(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize rows with scales that learn: ``scale clip(round(x / scale))``.

    Esser et al. (2020), "Learned Step Size Quantization". The gradient of ``x`` passes where
    nothing was clipped; that of a scale is ``round(x / scale) - x / scale`` there and the bound
    elsewhere, summed over the row and divided by the square root of the number of elements times
    the largest integer.

    Parameters
    ----------
    x : Tensor
        ``(rows, dim)``.
    scale : Tensor
        ``(rows, 1)``, positive.
    bits : int
        Integers are ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
    """
    check_bits(bits)
    return _LearnedStep.apply(x, scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class QuantizedEmbedding(VocabularyEmbedding):
    """A table of 2, 4, 8 or 16-bit integers with a scale for each row: ``scale[id] code[id]``.

    Or, asymmetric, with a zero point for each row as well: ``scale[id] (code[id] - zero[id])`` of
    unsigned codes, which spends no codes on values that a row doesn't have.

    Rows are taken out of the integers when they are looked up; no table of floats exists, neither
    for inference nor in training, which :class:`ALPT` does. :meth:`from_table` quantizes a trained
    table. In ``eval()`` and without gradients a lookup is one pass, :func:`quantized_bag`.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    bits : {2, 4, 8, 16}, default 8
        Of an integer.
    scale : float, default 0.01
        Of all rows at the start.
    asymmetric : bool, default False
        Have zero points. :class:`ALPT` trains tables without them.
    padding_id, device : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    packed : Tensor
        uint8 ``(num_embeddings, bytes)``: unsigned codes, or signed ones plus ``2^(bits-1)``,
        packed least significant bit first.
    scale : Parameter
        float32 ``(num_embeddings, 1)``.
    zero_point : Tensor or None
        float32 ``(num_embeddings, 1)``, at first ``2^(bits-1)``.
    """

    _specified = ("num_embeddings", "embedding_dim", "bits")
    num_embeddings: int
    packed: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        *,
        scale: float = 0.01,
        asymmetric: bool = False,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_bits(bits)
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.bits = bits
        size = row_bytes(embedding_dim, bits)
        packed = torch.empty(num_embeddings, size, dtype=torch.uint8, device=device)
        self.register_buffer("packed", packed)
        self.scale = nn.Parameter(torch.full((num_embeddings, 1), scale, device=device))
        zero = torch.full((num_embeddings, 1), 2.0 ** (bits - 1), device=device)
        self.register_buffer("zero_point", zero if asymmetric else None)
        # What a step of ALPT works on: the ids of the last lookup, and their rows as numbers.
        self._ids: Tensor | None = None
        self._rows: Tensor | None = None
        self._learns_scale = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew: uniform on (-0.05, 0.05), clipped to what the integers can hold."""
        if self.packed.is_meta:
            return
        for ids in torch.arange(self.num_embeddings, device=self.packed.device).split(2**16):
            rows = torch.empty(len(ids), self.embedding_dim, device=ids.device)
            self.write(ids, nn.init.uniform_(rows, -0.05, 0.05))

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        bits: int = 8,
        *,
        asymmetric: bool = False,
        padding_id: int | None = None,
    ) -> QuantizedEmbedding:
        """Quantize a table; each row's scale lets its largest element just fit.

        Parameters
        ----------
        table : Tensor
            ``(num_embeddings, embedding_dim)``.
        bits : {2, 4, 8, 16}, default 8
            Of an integer.
        asymmetric : bool, default False
            Let the codes of a row reach from its smallest element to its largest.
        padding_id : int, optional
            An id that embeds to zeros.
        """
        if table.dim() != 2:
            raise ValueError(f"table must have 2 dimensions, got shape {tuple(table.shape)}")
        rows, dim = table.shape
        module = cls(
            rows, dim, bits, asymmetric=asymmetric, padding_id=padding_id, device=table.device
        )
        with torch.no_grad():
            values = table.float()
            largest = values.abs().amax(1, keepdim=True)
            if module.zero_point is None:
                scale = largest / (2 ** (bits - 1) - 1)
            else:
                low = values.amin(1, keepdim=True)
                scale = (values.amax(1, keepdim=True) - low) / (2**bits - 1)
                # Of a row whose elements hardly differ: one step is an ulp of theirs.
                scale = scale.maximum(largest * 2.0**-24)
            scale = torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, 1)
            module.scale.copy_(scale)
            if module.zero_point is not None:
                module.zero_point.copy_(-low / scale)
            module.write(torch.arange(rows, device=table.device), values)
        return module

    @torch.no_grad()
    def resize(self, factor: int) -> QuantizedEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        Rows are repeated: a new id starts with that of the old one that differs from it by a
        multiple of the old ``num_embeddings``.

        Parameters
        ----------
        factor : int
            1 or more.
        """
        check_at_least(1, factor=factor)
        grown = QuantizedEmbedding(
            self.num_embeddings * factor, self.embedding_dim, self.bits,
            asymmetric=self.zero_point is not None, padding_id=self.padding_id,
            device=self.packed.device,
        )  # fmt: skip
        grown.packed.copy_(self.packed.repeat(factor, 1))
        grown.scale.copy_(self.scale.repeat(factor, 1))
        if self.zero_point is not None and grown.zero_point is not None:
            grown.zero_point.copy_(self.zero_point.repeat(factor, 1))
        return grown

    @classmethod
    def from_budget(
        cls, num_bytes: int, num_embeddings: int, embedding_dim: int, **kwargs: Any
    ) -> QuantizedEmbedding:
        """Build the table with the most bits that fits a number of bytes.

        Raises
        ------
        ValueError
            If not even 2 bits fit.
        """
        other = 8 if kwargs.get("asymmetric") else 4
        sizes = [num_embeddings * (row_bytes(embedding_dim, bits) + other) for bits in BITS]
        fitting = [bits for bits, size in zip(BITS, sizes, strict=True) if size <= num_bytes]
        if not fitting:
            raise ValueError(
                f"num_bytes must be at least {sizes[0]}, the size of {BITS[0]} bits, "
                f"got {num_bytes}"
            )
        return cls(num_embeddings, embedding_dim, fitting[-1], **kwargs)

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained: integers, scales and zero points."""
        return self.num_embeddings * (self.embedding_dim + (1 if self.zero_point is None else 2))

    def codes(self, ids: Tensor) -> Tensor:
        """Return the integers of ids ``(ids,)``, int64 ``(ids, embedding_dim)``.

        Signed ones, or unsigned ones where there are zero points.
        """
        unsigned = unpack_codes(self.packed[ids], self.bits, self.embedding_dim)
        return unsigned - 2 ** (self.bits - 1) if self.zero_point is None else unsigned

    @torch.no_grad()
    def write(self, ids: Tensor, rows: Tensor, *, step: int | None = None, seed: int = 0) -> None:
        """Store rows with the scales and zero points as they are, clipped.

        Parameters
        ----------
        ids : Tensor
            int64 ``(ids,)``, distinct.
        rows : Tensor
            ``(ids, embedding_dim)``.
        step : int, optional
            Round stochastically, with the numbers of this step; default: to the nearest.
        seed : int, default 0
            Of the stochastic rounding.
        """
        ratio, half = rows / self.scale[ids], 2 ** (self.bits - 1)
        if self.zero_point is not None:
            ratio += self.zero_point[ids] - half
        if step is None:
            codes = ratio.round()
        else:
            columns = torch.arange(self.embedding_dim, device=ids.device)
            codes = stochastic_round(ratio, ids[:, None] * self.embedding_dim + columns, step, seed)
        self.packed[ids] = pack_codes(codes.clamp(-half, half - 1).long() + half, self.bits)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`quantized_bag`."""
        if self.training and torch.is_grad_enabled():
            return super().forward(ids, offsets, per_sample_weights, mode=mode)
        return quantized_bag(
            ids, self.packed, self.scale, self.bits, self.embedding_dim, offsets,
            per_sample_weights, mode=mode, padding_id=self.padding_id, zero_point=self.zero_point,
        )  # fmt: skip

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        if self._learns_scale:
            # The second pass of ALPT: the rows are those that the first has updated.
            assert self._ids is not None
            assert self._rows is not None
            if not torch.equal(ids, self._ids):
                raise ValueError("closure must look up the ids of the forward pass before the step")
            return learned_step(self._rows, self.scale[ids], self.bits)
        rows = quantized_bag(
            ids, self.packed, self.scale, self.bits, self.embedding_dim, zero_point=self.zero_point
        )
        if torch.is_grad_enabled() and self.training:
            if self._rows is not None and self._rows.grad is not None:
                raise RuntimeError(
                    "the gradient of the last lookup is not applied: call step() or zero_grad() of "
                    "ALPT before the next"
                )
            self._ids, self._rows = ids, rows.requires_grad_()
        return rows


class ALPT(torch.optim.Optimizer):
    """Adaptive low-precision training of :class:`QuantizedEmbedding`: no table of floats exists.

    Li et al. (2023), "Adaptive Low-Precision Training for Embeddings in Click-Through Rate
    Prediction". A step updates the rows in use in float32, by row-wise Adagrad; lets their scales
    take a gradient step on the loss of the updated rows, quantized (:func:`learned_step`); and
    stores the rows under the new scales, rounded stochastically. The module is looked up once in a
    forward pass.

    Without a closure, scales stay as they are (low-precision training)::

        loss = loss_of(model(ids)); loss.backward(); optimizer.step()

    With one, which clears gradients, computes the loss and calls ``backward`` again, they learn.
    Gradients of other parameters that the second pass leaves behind are not to be used; step their
    optimizer before this one.

    Parameters
    ----------
    modules : QuantizedEmbedding or list of QuantizedEmbedding
    lr : float, default 0.05
        Of the rows.
    scale_lr : float, default 2e-5
        Of the scales.
    eps : float, default 1e-8
    seed : int, default 0
        Of the stochastic rounding, which is Philox keyed by it and counted by step and element: the
        same bits on any machine.
    """

    def __init__(
        self,
        modules: QuantizedEmbedding | list[QuantizedEmbedding],
        lr: float = 0.05,
        *,
        scale_lr: float = 2e-5,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        self._modules = modules if isinstance(modules, list) else [modules]
        for module in self._modules:
            if not isinstance(module, QuantizedEmbedding):
                raise TypeError(f"modules must be QuantizedEmbedding, got {type(module).__name__}")
            if module.zero_point is not None:
                raise ValueError("modules must have no zero points: ALPT learns scales only")
        for name, value in (("lr", lr), ("scale_lr", scale_lr), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        check_at_least(0, seed=seed)
        defaults = {"lr": lr, "scale_lr": scale_lr, "eps": eps, "seed": seed}
        super().__init__([module.scale for module in self._modules], defaults)
        for module in self._modules:
            sums = torch.zeros(module.num_embeddings, 1, device=module.scale.device)
            self.state[module.scale] = {"sum": sums, "step": 0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows of the last forward pass; with ``closure``, their scales too."""
        group = self.param_groups[0]
        used = [m for m in self._modules if m._rows is not None and m._rows.grad is not None]
        for module in used:
            ids, rows = module._ids, module._rows
            assert ids is not None
            assert rows is not None
            assert rows.grad is not None
            sums = self.state[module.scale]["sum"]
            sums[ids] += rows.grad.square().mean(1, keepdim=True)
            rows.sub_(group["lr"] * rows.grad / (sums[ids].sqrt() + group["eps"]))
        loss = None
        if closure is not None:
            for module in used:
                module._learns_scale, module.scale.grad = True, None
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                for module in used:
                    module._learns_scale = False
            for module in used:
                if module.scale.grad is not None:
                    module.scale.sub_(group["scale_lr"] * module.scale.grad)
                    module.scale.clamp_(min=torch.finfo(torch.float32).tiny)
                    module.scale.grad = None
        for module in used:
            assert module._ids is not None
            assert module._rows is not None
            state = self.state[module.scale]
            module.write(module._ids, module._rows, step=state["step"], seed=group["seed"])
            state["step"] += 1
            module._ids = module._rows = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the last forward pass."""
        super().zero_grad(set_to_none)
        for module in self._modules:
            if module._rows is not None:
                module._rows.grad = None


class LearnedStepEmbedding(VocabularyEmbedding):
    """A table of floats that is looked up as if quantized, with scales that learn (LSQ).

    Esser et al. (2020), "Learned Step Size Quantization", with a scale for each row. Trained by any
    optimizer; :meth:`freeze` gives the :class:`QuantizedEmbedding` with the same vectors.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    bits : {2, 4, 8, 16}, default 8
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        ``(num_embeddings, embedding_dim)``, uniform on (-0.05, 0.05).
    scale : Parameter
        ``(num_embeddings, 1)``, at first ``2 mean |weight| / sqrt(2^(bits-1) - 1)`` of the row, as
        in the paper.
    """

    _specified = ("num_embeddings", "embedding_dim", "bits")
    num_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_bits(bits)
        self.bits = bits
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.scale = nn.Parameter(torch.empty(num_embeddings, 1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the table anew, and its scales to match."""
        nn.init.uniform_(self.weight, -0.05, 0.05)
        mean = self.weight.abs().mean(1, keepdim=True)
        self.scale.copy_(2 * mean / math.sqrt(max(2 ** (self.bits - 1) - 1, 1)))

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        return learned_step(self.weight[ids], self.scale[ids], self.bits)

    @torch.no_grad()
    def advance(self) -> None:
        """Keep scales positive; call it after each step of the optimizer."""
        self.scale.clamp_(min=torch.finfo(torch.float16).tiny)

    @torch.no_grad()
    def freeze(self) -> QuantizedEmbedding:
        """Return the table of integers that gives the same vectors."""
        module = QuantizedEmbedding(
            self.num_embeddings, self.embedding_dim, self.bits, padding_id=self.padding_id,
            device=self.weight.device,
        )  # fmt: skip
        module.scale.copy_(self.scale)
        module.write(torch.arange(self.num_embeddings, device=self.weight.device), self.weight)
        return module
