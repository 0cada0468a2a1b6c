"""Runs pytest on Bazel's build of the package, and on no other that the interpreter may find."""

import os
import sys
from pathlib import Path

import pytest

import deepgemm_jax._C

extension = Path(deepgemm_jax._C.__file__)
assert extension.is_relative_to(os.environ["TEST_SRCDIR"]), f"{extension} is not Bazel's build"

# Bazel's sandbox offers one writable directory.
os.environ["HOME"] = os.environ["TEST_TMPDIR"]
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
