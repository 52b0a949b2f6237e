"""emblas: kernels for embedding systems."""

import importlib as _importlib
import os as _os
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from emblas import _op, attention, binary, evaluation, linear, losses, packed, pooling, tables
from emblas._info import info
from emblas._op import use_backend

__version__ = _version("emblas")
_op.force_backend(_os.environ.get("EMBLAS_BACKEND") or "auto")

if _TYPE_CHECKING:
    from emblas import encoder
    from emblas.encoder import Encoder, EncoderPair
    from emblas.integrations.optimize import optimize, verify

# They need transformers, which is imported when one of them is first asked for.
_LAZY = {
    "Encoder": "emblas.encoder",
    "EncoderPair": "emblas.encoder",
    "encoder": "emblas.encoder",
    "optimize": "emblas.integrations.optimize",
    "verify": "emblas.integrations.optimize",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


__all__ = [
    "Encoder",
    "EncoderPair",
    "attention",
    "binary",
    "encoder",
    "evaluation",
    "info",
    "linear",
    "losses",
    "optimize",
    "packed",
    "pooling",
    "tables",
    "use_backend",
    "verify",
]
