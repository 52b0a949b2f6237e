"""The installed binary: what it links to, how it is configured, what importing it brings along."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emblas._load import _C, runs_on, why_no_cuda_kernels

BINARY = Path(_C.__file__)
ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")


def tool(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@linux
def test_only_stable_torch_symbols():
    undefined = re.findall(r" U (\S+)", tool("nm", "-D", str(BINARY)))
    torch_like = [s for s in undefined if re.search(r"torch|c10|at::|_ZN2at|_ZN3c10", s)]
    assert torch_like
    assert all(re.match(r"(aoti_)?torch_", symbol) for symbol in torch_like), torch_like


@linux
def test_needs_no_openmp_and_no_path():
    dynamic = tool("readelf", "-d", str(BINARY))
    assert "libtorch_cpu" in dynamic
    assert not re.search(r"libgomp|libomp|libiomp|RPATH|RUNPATH", dynamic), dynamic


def test_no_build_path_in_the_binary():
    assert str(ROOT).encode() not in BINARY.read_bytes()


@linux
def test_one_thread_pool():
    """Our operators run on torch's threads, and torch.set_num_threads rules them."""
    code = """
import os, torch
from emblas.pooling import segment_pool
threads = lambda: len(os.listdir("/proc/self/task"))
x, cu = torch.randn(200_000, 64), torch.arange(0, 200_001, 100)
torch.set_num_threads(3)
segment_pool(x, cu)
after_ours = threads()
(x * 2).sum()  # torch's own work finds its pool ready
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
print(after_ours == threads(), len(maps))
"""
    result = python(code)
    assert result.stdout.split() == ["True", "1"], result.stdout + result.stderr


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_environment_chooses_the_isa(isa):
    result = python("import emblas; print(emblas.info()['isa'])", EMBLAS_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_wrong_environment():
    result = python("import emblas", EMBLAS_ISA="avx9000")
    assert "ImportError: EMBLAS_ISA: isa must be one that this CPU runs" in result.stderr
    result = python("import emblas", EMBLAS_BACKEND="fpga")
    assert "backend must be one of" in result.stderr


def test_info_command():
    command = [sys.executable, "-m", "emblas", "info"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for word in ("torch", "ISA", "threads", "CUDA", "Triton", "segment_pool"):
        assert word in text
    output = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout
    assert json.loads(output)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "reason"),
    [
        ("", "13.0", "built without CUDA"),
        ("13.0.88", None, "torch is a CPU build"),
        ("13.0.88", "12.8", "built with CUDA 13.0.88, torch with CUDA 12.8"),
        ("13.0.88", "13.2", None),
    ],
)
def test_when_cuda_kernels_load(toolkit, torch_cuda, reason):
    actual = why_no_cuda_kernels(toolkit, torch_cuda)
    assert actual is None if reason is None else reason in actual


@linux
def test_cuda_library_needs_no_python():
    library = BINARY.with_name("_cuda.so")
    if not library.exists():
        pytest.skip("built without EMBLAS_CUDA")
    assert not re.search(r" U _?Py", tool("nm", "-D", str(library)))
    dynamic = tool("readelf", "-d", str(library))
    assert not re.search(r"libcudart|libcuda\.|libpython|RPATH|RUNPATH", dynamic), dynamic
    assert str(ROOT).encode() not in library.read_bytes()


@linux
def test_cuda_library_registers(tmp_path):
    """Its symbols resolve, beside torch and one symbol of a CUDA torch, and its ops are there."""
    library = BINARY.with_name("_cuda.so")
    if not library.exists() or torch.version.cuda or not shutil.which("g++"):
        pytest.skip("loads _cuda, built with EMBLAS_CUDA, beside a CPU torch; needs g++")
    source = tmp_path / "stream.c"
    source.write_text("int aoti_torch_get_current_cuda_stream() { return 1; }")
    stand_in = tmp_path / "libtorch_cuda.so"
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", source, "-o", stand_in], check=True)
    code = f"""
import emblas, torch
torch.ops.load_library({str(library)!r})
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("emblas::")]
kernels = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
print(sorted(n for n in kernels if n.endswith("_cuda")))
"""
    result = python(code, LD_LIBRARY_PATH=str(tmp_path))
    sources = (ROOT / "csrc").glob("*/*_ops_cuda.cpp")
    names = {name for path in sources for name in re.findall(r"impl\(\"(\w+)", path.read_text())}
    assert names
    assert {name for name in names if f"'emblas::{name}'" in result.stdout} == names, result.stderr


def test_import_is_light():
    code = "import sys, emblas; print({'transformers', 'triton'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"


def test_stub_is_up_to_date(tmp_path):
    pytest.importorskip("pybind11_stubgen", reason="needs emblas[dev]")
    subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", "emblas._C", "-o", str(tmp_path)],
        check=True,
        capture_output=True,
    )
    stub = (tmp_path / "emblas" / "_C.pyi").read_text()
    assert stub == (ROOT / "python" / "emblas" / "_C.pyi").read_text()


@linux
@pytest.mark.skipif(not list(ROOT.glob("build/*/CMakeFiles")), reason="no build tree here")
def test_isa_objects_share_nothing():
    """A symbol that two ISA objects share would carry one's instructions into the other."""
    objects = [
        path
        for path in ROOT.glob("build/*/CMakeFiles/*/csrc/**/*_cpu.cpp.o")
        if path.parts[-4].endswith(".dir") or "_cpu" in path.name
    ]
    assert objects
    for path in objects:
        for line in tool("nm", "-C", "--defined-only", str(path)).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind.isupper() and kind not in "U":
                assert "emblas::table_of<" in name, f"{path.name}: {line}"


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80-real 120", (8, 0), True),
        ("80-real 120", (8, 9), True),  # machine code of its generation
        ("86-real 120", (8, 0), False),
        ("80-real 120", (9, 0), False),
        ("80-real 120", (12, 1), True),
        ("80-real 120", (13, 0), True),  # PTX
        ("80-real 120-real", (13, 0), False),
        ("80-virtual", (7, 5), False),
        ("80-virtual", (9, 0), True),
        ("", (9, 0), False),
    ],
)
def test_architectures(architectures, capability, expected):
    assert runs_on(architectures, capability) is expected
