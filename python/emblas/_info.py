"""Facts about the installation: what was built, what this machine has, what each op would use."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

import torch

from emblas import _op
from emblas._load import _C, NO_CUDA_KERNELS


def info() -> dict[str, Any]:
    """Return what ``python -m emblas info`` prints.

    Returns
    -------
    dict
        ``emblas``, ``torch``, ``built_with_torch``, ``compiler``: versions. ``isa``: instruction
        set in use; ``isa_supported``, ``isa_compiled``: those that this CPU runs, those in the
        binary. ``threads``: torch's thread count, which the kernels follow. ``cuda``: CUDA version
        of torch and the GPU's name, or why there is none. ``cuda_kernels``: "loaded", or why the
        CUDA C++ kernels are not. ``triton``: its version, or None. ``ops``: the backend of each
        operator by device, None where it can't run.
    """
    if torch.version.cuda is None:
        cuda = "torch is a CPU build"
    elif not torch.cuda.is_available():
        cuda = f"torch has CUDA {torch.version.cuda}, no usable GPU"
    else:
        cuda = f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    build = _C.build_info()
    return {
        "emblas": version("emblas"),
        "torch": torch.__version__,
        "built_with_torch": build["torch"],
        "compiler": build["compiler"],
        "isa": _C.isa(),
        "isa_supported": _C.supported_isas(),
        "isa_compiled": _C.compiled_isas(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "cuda_kernels": NO_CUDA_KERNELS or "loaded",
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "ops": {
            name: {device: op.backend(device) for device in ("cpu", "cuda")}
            for name, op in sorted(_op.ops().items())
        },
    }


def render(facts: dict[str, Any]) -> str:
    """Lay out :func:`info` as lines of text."""
    lines = [f"emblas      {facts['emblas']} ({facts['compiler']})"]
    lines.append(f"torch       {facts['torch']} (built beside {facts['built_with_torch']})")
    lines.append(
        f"ISA         {facts['isa']} (this CPU runs {', '.join(facts['isa_supported'])}; "
        f"built {', '.join(facts['isa_compiled'])})"
    )
    lines.append(f"threads     {facts['threads']}")
    lines.append(f"CUDA        {facts['cuda']}; CUDA C++ kernels: {facts['cuda_kernels']}")
    lines.append(f"Triton      {facts['triton'] or 'not installed'}")
    lines.append("")
    width = max(map(len, facts["ops"]))
    lines.append(f"{'op':{width}}  cpu        cuda")
    for name, backends in facts["ops"].items():
        lines.append(f"{name:{width}}  {backends['cpu'] or '-':9}  {backends['cuda'] or '-'}")
    return "\n".join(lines)
