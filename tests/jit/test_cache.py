"""The disk cache: who compiles, what is believed, and what happens when it cannot be written."""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepgemm_jax import _C
from deepgemm_jax.gemm import config

FIRST = config.variants()[0]
KERNEL = (FIRST.source, FIRST.integers, "sm_90a")
# Any device source compiles; these hold no kernel and take no time.
QUICK = ("device/types.h", (), "sm_90a")
OTHER = ("gemm/config.h", (), "sm_90a")


class CompilingProcess:
    def __init__(self, cache, nvrtc, variant, handicap=None):
        request = {
            "extension": _C.__file__,
            "cache": str(cache),
            "nvrtc": nvrtc,
            "variant": variant,
            "handicap": handicap,
        }
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("compiling_process.py"), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self):
        assert self._process.stdout.readline() == "ready\n"

    def start(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self):
        out, self.warnings = self._process.communicate()
        assert self._process.returncode == 0, self.warnings
        return json.loads(out)


def compile_elsewhere(*args):
    process = CompilingProcess(*args)
    process.wait_until_ready()
    process.start()
    return process.result(), process.warnings


def entry(cache):
    """The one file in the cache: nothing else stays behind."""
    (file,) = cache.iterdir()
    return file


def test_second_call_compiles_nothing(cache):
    before = _C.statistics()
    first, second = _C.compile(*KERNEL), _C.compile(*KERNEL)
    assert not first.cached and second.cached
    assert (first.cubin, first.log) == (second.cubin, second.log)
    after = _C.statistics()
    assert after["compiled"] - before["compiled"] == 1
    assert after["disk_hits"] - before["disk_hits"] == 1
    entry(cache)


def test_folder_is_made_for_this_user_alone(cache):
    _C.compile(*QUICK)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_source_config_and_arch_have_entries_of_their_own(cache):
    for variant in [
        QUICK,
        OTHER,
        ("device/types.h", (1,), "sm_90a"),
        ("device/types.h", (), "sm_90"),
    ]:
        assert not _C.compile(*variant).cached
    assert _C.compile(*QUICK).cached


def test_processes_that_race_compile_once(cache, nvrtc):
    processes = [CompilingProcess(cache, nvrtc, KERNEL) for _ in range(8)]
    for process in processes:
        process.wait_until_ready()
    for process in processes:
        process.start()
    results = [process.result() for process in processes]
    assert sum(result["compiled"] for result in results) == 1
    assert sum(result["disk_hits"] for result in results) == 7
    assert len({result["size"] for result in results}) == 1
    entry(cache)


def test_threads_that_race_compile_once(cache):
    before = _C.statistics()["compiled"]
    with ThreadPoolExecutor(8) as pool:
        cubins = set(pool.map(lambda _: _C.compile(*KERNEL).cubin, range(8)))
    assert len(cubins) == 1
    assert _C.statistics()["compiled"] - before == 1


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda data: b"",
        "truncated": lambda data: data[: len(data) // 2],
        "last byte lost": lambda data: data[:-1],
        "too long": lambda data: data + b"\0",
        "bit flipped in the kernel": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "bit flipped in the middle": lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        ),
        "foreign": lambda data: b"\x7fELF" + data,
    }.items(),
    ids=lambda damage: damage[0],
)
def test_damaged_entry_is_compiled_anew(cache, damage):
    intact = _C.compile(*QUICK).cubin
    file = entry(cache)
    file.write_bytes(damage[1](file.read_bytes()))
    again = _C.compile(*QUICK)
    assert not again.cached and again.cubin == intact
    repaired = _C.compile(*QUICK)
    assert repaired.cached and repaired.cubin == intact
    entry(cache)


def test_another_kernels_entry_is_not_believed(cache):
    _C.compile(*OTHER)
    other = entry(cache)
    data = other.read_bytes()
    other.unlink()
    intact = _C.compile(*QUICK).cubin
    entry(cache).write_bytes(data)
    again = _C.compile(*QUICK)
    assert not again.cached and again.cubin == intact


def test_another_nvrtcs_entry_is_not_taken(cache, tmp_path):
    _C.compile(*QUICK)
    other = tmp_path / "libnvrtc.so.14"
    other.write_bytes(b"not a library")
    _C.configure(str(cache), [str(other)])
    with pytest.raises(RuntimeError, match="cannot be opened"):
        _C.compile(*QUICK)


@pytest.mark.parametrize("leave", [Path.touch, Path.mkdir], ids=["of the dead", "not to be had"])
def test_lock_costs_nothing(cache, leave):
    _C.compile(*QUICK)
    file = entry(cache)
    file.unlink()
    lock = file.with_suffix(".lock")
    leave(lock)
    assert not _C.compile(*QUICK).cached
    assert _C.compile(*QUICK).cached
    if leave is Path.mkdir:
        lock.rmdir()
    assert entry(cache) == file


def test_read_only_folder_serves_what_it_has(cache, nvrtc):
    _C.compile(*QUICK)
    cache.chmod(0o500)
    result, warnings = compile_elsewhere(cache, nvrtc, QUICK, "no_privileges")
    assert result["cached"] and not warnings
    result, warnings = compile_elsewhere(cache, nvrtc, OTHER, "no_privileges")
    assert result["compiled"] == 1 and result["size"] > 0
    assert str(cache) in warnings and "Permission denied" in warnings
    entry(cache)
    cache.chmod(0o700)  # or pytest cannot remove it


def test_folder_that_cannot_be_made_costs_only_the_cache(tmp_path, nvrtc):
    (tmp_path / "file").touch()
    result, warnings = compile_elsewhere(tmp_path / "file" / "cache", nvrtc, QUICK)
    assert result["compiled"] == 1 and result["size"] > 0
    assert "Not a directory" in warnings


def test_full_disk_costs_only_the_cache(cache, nvrtc):
    result, warnings = compile_elsewhere(cache, nvrtc, QUICK, "full_disk")
    assert result["compiled"] == 1 and result["size"] > 0
    assert str(cache) in warnings
    assert not list(cache.iterdir())


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_folder_that_others_can_write_to_is_refused(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(RuntimeError, match="refused.*can write to it.*chmod"):
        _C.compile(*QUICK)
    cache.chmod(0o755)
    assert not _C.compile(*QUICK).cached


def test_folder_of_another_user_is_refused(cache):
    cache.mkdir(mode=0o700)
    try:
        os.chown(cache, 65534, -1)
    except OSError:
        pytest.skip("only root can give a folder away, and only to a user of its namespace")
    with pytest.raises(RuntimeError, match="refused.*owns it"):
        _C.compile(*QUICK)


def test_no_folder_is_no_cache(nvrtc, cache):
    _C.configure("", nvrtc)
    assert not _C.compile(*QUICK).cached
    assert not _C.compile(*QUICK).cached
