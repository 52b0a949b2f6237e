"""emblas: kernels for embedding systems."""

from importlib.metadata import version as _version

from emblas import attention, binary, evaluation, losses, packed, pooling, tables
from emblas._info import info
from emblas._op import use_backend

__version__ = _version("emblas")
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
