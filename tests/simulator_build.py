"""Kernels' sources compiled for the host: see tests/simulator."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def build(source: str | Path, config: Sequence[int], folder: Path) -> ctypes.CDLL:
    """One variant of a file, which is looked for in tests/simulator."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("no C++ compiler")
    library = folder / f"{Path(source).stem}_{'_'.join(map(str, config))}.so"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-Og", "-fPIC", "-shared", "-w", "-Wno-psabi"),
            "-ffp-contract=off",
            f"-DCONFIG={','.join(map(str, config))}",
            *(f"-I{TESTS / 'simulator'}", f"-I{TESTS.parent / 'csrc'}"),
            *(TESTS / "simulator" / source, "-o", library),
        ],
        check=True,
    )
    return ctypes.CDLL(library)
