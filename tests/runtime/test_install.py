"""What pip installs."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import deepgemm_jax


@pytest.fixture
def installed():
    """The distribution under test; a checkout's package and Bazel's build are none."""
    try:
        distribution = metadata.distribution("deepgemm_jax")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    package = Path(distribution.locate_file("deepgemm_jax/__init__.py"))
    if package.resolve() != Path(deepgemm_jax.__file__).resolve():
        pytest.skip("not the installed package")
    return distribution


def test_files(installed):
    files = {str(file) for file in installed.files if "__pycache__" not in file.parts}
    assert {"deepgemm_jax/py.typed", "deepgemm_jax/_C.pyi"} <= files
    assert any(re.search(r"\.dist-info/(licenses/)?LICENSE$", file) for file in files)
    assert any(re.fullmatch(r"deepgemm_jax/_C\..*so", file) for file in files)
    assert {re.match(r"(\w+)", file)[0] for file in files} == {"deepgemm_jax"}


def test_metadata(installed):
    assert installed.version == deepgemm_jax.__version__
    needed = {re.match(r"[\w-]+", line)[0] for line in installed.requires if "extra ==" not in line}
    assert needed == {"jax", "jaxlib", "ml_dtypes", "numpy"}
    extras = set(installed.metadata.get_all("Provides-Extra"))
    assert extras == {"bench", "cuda12", "cuda13", "docs", "test"}
