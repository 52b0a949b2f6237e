"""nvcc accepts what the emulator runs: every wrapper of simt.h, for every architecture we ship."""

from __future__ import annotations

import re
import subprocess

import nvcc
import pytest
from simt.emulator import ROOT

pytestmark = pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed")

INSTRUCTIONS = (
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc",
    "cp.async.cg.shared.global",
    "cp.async.wait_group",
    r"ld.(global.)?v4.(u32|b32)",
    r"st.(global.)?v4.(u32|b32)",
    "redux.sync.add.s32",
)


@pytest.mark.parametrize("architecture", ["80", "90", "120"])
def test_test_kernels_compile(architecture, tmp_path):
    source, ptx = tmp_path / "cases.cu", tmp_path / "cases.ptx"
    source.write_text('#include "simt/cases.cuh"\n')
    command = [nvcc.nvcc(), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}",
               "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", source]  # fmt: skip
    subprocess.run([*command, f"-arch=compute_{architecture}", "-ptx", "-o", ptx], check=True)
    subprocess.run(
        [*command, f"-arch=sm_{architecture}", "-cubin", "-o", tmp_path / "cubin"], check=True
    )
    text = ptx.read_text()
    for instruction in INSTRUCTIONS:
        assert re.search(instruction, text), instruction
