"""Every variant of the kernel, as machine code; no GPU is needed to compile it and look."""

import dataclasses
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from deepgemm_jax import _C, runtime
from deepgemm_jax.gemm import config

ARCH = "sm_90a"
VARIANTS = config.variants()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All at once in processes of their own; the tests then read them from the cache."""
    runtime.compile_variants(
        runtime.Variant(config.SOURCE, dataclasses.astuple(variant), ARCH) for variant in VARIANTS
    )


@pytest.fixture
def disassemble(tmp_path):
    def disassemble(cubin: bytes) -> str:
        (nvidia,) = importlib.util.find_spec("nvidia").submodule_search_locations
        (cuobjdump,) = Path(nvidia).glob("cu*/bin/cuobjdump")
        file = tmp_path / "kernel.cubin"
        file.write_bytes(cubin)
        # It runs its neighbour nvdisasm, which it looks for on the path.
        path = f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"
        command = [cuobjdump, "-res-usage", "-sass", file]
        return subprocess.run(
            command, env=os.environ | {"PATH": path}, check=True, capture_output=True, text=True
        ).stdout

    return disassemble


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_code_multiplies_in_fp8_and_spills_nothing(variant, disassemble):
    code = disassemble(_C.compile(config.SOURCE, dataclasses.astuple(variant), ARCH).cubin)
    assert re.search(r"\bQGMMA\b", code)
    assert not re.search(r"\b(LDL|STL)\b", code), "registers are spilled to local memory"
    assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", code), "the kernel has a stack"
