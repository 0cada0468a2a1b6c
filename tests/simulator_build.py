"""Kernels' sources compiled for the host: see tests/simulator."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def build(name: str, config: Sequence[int], folder: Path) -> ctypes.CDLL:
    """One variant of tests/simulator/NAME.cc."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("no C++ compiler")
    library = folder / f"{name}_{'_'.join(map(str, config))}.so"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-Wno-psabi"),
            f"-DCONFIG={','.join(map(str, config))}",
            *(f"-I{TESTS / 'simulator'}", f"-I{TESTS.parent / 'csrc'}"),
            *(TESTS / "simulator" / f"{name}.cc", "-o", library),
        ],
        check=True,
    )
    return ctypes.CDLL(library)
