"""What is needed of other packages, and the errors that say so where it isn't there.

Some of it these packages don't promise to keep: private names, and classes in modules that may
move. All that is used of it is asked for here, so that a version that has changed is named.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

# Versions, and what to install.
KNOWN = {
    "torch": (">= 2.10", "'torch>=2.10'"),
    "transformers": (">= 5", "'emblas[hf]'"),
    "sentence-transformers": (">= 6", "'emblas[hf]'"),
    "thinc": (">= 8.3, < 9", "'thinc>=8.3,<9'"),
}


class UnsupportedVersionError(RuntimeError):
    """A version of another package that lacks what emblas uses of it."""


def import_error(module: str, package: str, error: ImportError) -> ImportError:
    """Return the error of a module of emblas whose imports from ``package`` failed.

    Parameters
    ----------
    module : str
        Name of the module of emblas.
    package : str
        One of ``KNOWN``, by its name on PyPI.
    error : ImportError
        What failed.

    Returns
    -------
    ImportError
        Says whether the package isn't there or is another version.
    """
    versions, wanted = KNOWN[package]
    try:
        found = f"{package} {metadata.version(package)} is installed, where {error}"
    except metadata.PackageNotFoundError:
        found = f"there is none ({error})"
    return ImportError(f"{module} needs {package} {versions}, {found}: pip install {wanted}")


def private(package: str, holder: Any, name: str) -> Any:
    """Return ``holder.name``, which ``package`` does not promise to keep.

    Raises
    ------
    UnsupportedVersionError
        If it is gone.
    """
    try:
        return getattr(holder, name)
    except AttributeError:
        kind = holder if isinstance(holder, type) else type(holder)
        raise UnsupportedVersionError(
            f"{kind.__name__} has no {name} in {package} {metadata.version(package)}; emblas uses "
            f"it, and knows {package} {KNOWN[package][0]}: install another version of either"
        ) from None
