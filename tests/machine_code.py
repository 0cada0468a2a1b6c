"""Kernels as machine code; no GPU is needed to compile them and look."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepgemm_jax import _C, runtime

ARCH = "sm_90a"


def compile_all(source: str, configs: Iterable[Any]) -> None:
    """In processes of their own, at once; `disassemble` then finds them in the cache."""
    runtime.compile_variants(
        runtime.Variant(source, dataclasses.astuple(config), ARCH) for config in configs
    )


def disassemble(source: str, config: Any) -> str:
    """The instructions, and what the kernel takes of registers and memory."""
    (nvidia,) = importlib.util.find_spec("nvidia").submodule_search_locations
    (cuobjdump,) = Path(nvidia).glob("cu*/bin/cuobjdump")
    # It runs its neighbour nvdisasm, which it looks for on the path.
    path = f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(_C.compile(source, dataclasses.astuple(config), ARCH).cubin)
        file.flush()
        return subprocess.run(
            [cuobjdump, "-res-usage", "-sass", file.name],
            env=os.environ | {"PATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout


def assert_compiles_without_spills(source: str, config: Any) -> None:
    log = _C.compile(source, dataclasses.astuple(config), ARCH).log
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log)


def assert_nothing_spilled(code: str) -> None:
    assert not re.search(r"\b(LDL|STL)\b", code), "registers are spilled to local memory"
    assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", code), "the kernel has a stack"
