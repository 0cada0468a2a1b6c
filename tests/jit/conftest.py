import pytest

from deepgemm_jax import _C, runtime


@pytest.fixture
def nvrtc():
    return [str(library) for library in runtime.find_nvrtc()]


@pytest.fixture
def cache(tmp_path, nvrtc):
    """The kernel cache's folder while the test runs; nothing has made it yet."""
    folder = tmp_path / "cache"
    _C.configure(str(folder), nvrtc)
    yield folder
    _C.configure(str(runtime.cache_dir()), nvrtc)
