"""emblas: kernels for embedding systems."""

import os as _os
from importlib.metadata import version as _version

from emblas import _op, attention, binary, evaluation, losses, packed, pooling, tables
from emblas._info import info
from emblas._op import use_backend

__version__ = _version("emblas")
_op.force_backend(_os.environ.get("EMBLAS_BACKEND") or "auto")

__all__ = [
    "attention",
    "binary",
    "evaluation",
    "info",
    "losses",
    "packed",
    "pooling",
    "tables",
    "use_backend",
]
