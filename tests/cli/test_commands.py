"""The commands as a user runs them, on a machine with no GPU or with one."""

import jax
import pytest

import deepgemm_jax
from deepgemm_jax import _C, runtime
from deepgemm_jax.__main__ import main

ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "cache_dir", lambda: tmp_path)
    return tmp_path


def test_info_names_versions_and_cache(cache, capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert deepgemm_jax.__version__ in shown
    assert jax.__version__ in shown
    assert str(cache) in shown


def test_info_says_how_to_get_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find_nvrtc", lambda: [])
    main(["info"])
    [nvrtc] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NVRTC")]
    assert "pip install" in nvrtc


@pytest.mark.skipif(ON_GPU, reason="JAX sees a GPU")
def test_info_says_that_jax_lacks_its_gpu_plugin(monkeypatch, capsys):
    monkeypatch.setattr(_C, "driver_version", lambda: 13000)
    main(["info"])
    [gpu] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU")]
    assert "pip install 'jax[cuda13]'" in gpu


def test_demo_is_right_and_says_where_it_ran(capsys):
    with jax.default_device(None):  # as from a shell
        assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert jax.devices()[0].device_kind in shown
    assert ("CUDA kernel, 2 calls" if ON_GPU else "plain JAX") in shown


@pytest.mark.skipif(not runtime.find_nvrtc(), reason="no NVRTC to compile with")
def test_warmup_fills_the_cache_and_clear_empties_it(cache, capsys):
    shapes = ["--shape", "1,576,7168", "--shape", "4096,4096,4096"]
    assert main(["warmup", "--jobs", "2", *shapes]) == 0
    kernels = deepgemm_jax.cache_info().entries
    assert f"{kernels} kernels compiled" in capsys.readouterr().out

    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(cache) in shown and f"{kernels} kernels" in shown

    assert main(["cache", "clear"]) == 0
    assert deepgemm_jax.cache_info().entries == 0


def test_warmup_wants_three_sizes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["warmup", "--shape", "1,2"])
    assert exit.value.code == 2
    assert "--shape" in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="JAX sees a GPU")
def test_bench_without_a_gpu_says_so(capsys):
    assert main(["bench"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
