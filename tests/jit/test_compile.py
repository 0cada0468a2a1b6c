"""What a compilation says when it fails, and where it finds its sources and its compiler."""

import re
from pathlib import Path

import pytest

from deepgemm_jax import _C
from deepgemm_jax.gemm import config

QUICK = ("device/types.h", (), "sm_90a")
FIRST = config.variants()[0]
TOO_LONG = (FIRST.source, tuple(range(50)), "sm_90a")  # more integers than a config has


def test_failure_names_the_variant_and_the_log(cache):
    with pytest.raises(RuntimeError) as error:
        _C.compile(*TOO_LONG)
    sentence, _, end_of_log = str(error.value).partition("\n")
    assert FIRST.source in sentence
    assert ",".join(map(str, TOO_LONG[1])) in sentence
    assert "sm_90a" in sentence
    log = Path(re.search(r"whole log is in (\S+),", sentence)[1])
    assert log.parent == cache
    assert "error" in log.read_text()
    assert log.read_text().endswith(end_of_log[-200:])


def test_failure_is_logged_without_a_cache_too(cache, nvrtc, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    _C.configure("", nvrtc)
    with pytest.raises(RuntimeError, match=f"whole log is in {re.escape(str(tmp_path))}"):
        _C.compile(*TOO_LONG)


def test_failure_is_not_cached(cache):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not compile"):
            _C.compile(*TOO_LONG)


def test_unknown_arch(cache):
    with pytest.raises(RuntimeError, match="could not compile .* for sm_1"):
        _C.compile("device/types.h", (), "sm_1")


def test_unknown_source(cache):
    with pytest.raises(RuntimeError, match="no device source gemm/sm10.cuh"):
        _C.compile("gemm/sm10.cuh", (), "sm_90a")


def test_log_tells_registers_and_spills(cache):
    kernel = _C.compile(FIRST.source, FIRST.integers, "sm_90a")
    assert re.search(r"\d+ bytes spill stores", kernel.log)


def test_nvrtc_is_missing(cache):
    _C.configure(str(cache), [])
    for call in (_C.nvrtc_version, lambda: _C.compile(*QUICK)):
        with pytest.raises(RuntimeError, match="pip install"):
            call()


def test_nvrtc_cannot_be_opened(cache, tmp_path):
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_bytes(b"not a library")
    _C.configure(str(cache), [str(broken)])
    for call in (_C.nvrtc_version, lambda: _C.compile(*QUICK)):
        with pytest.raises(RuntimeError, match=f"cannot be opened: {re.escape(str(broken))}"):
            call()


def test_nvrtc_version(cache):
    assert _C.nvrtc_version() >= (12, 0)
