"""Where NVRTC is looked for."""

from pathlib import Path

import pytest

from deepgemm_jax import runtime


def install(folder: Path, major: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [folder / f"libnvrtc-builtins.so.{major}.0", folder / f"libnvrtc.so.{major}"]
    for library in libraries:
        library.touch()
    return libraries


@pytest.fixture
def driver(monkeypatch):
    """Sets the driver's CUDA version."""

    def set_version(version: int | None) -> None:
        monkeypatch.setattr(runtime._C, "driver_version", lambda: version)

    set_version(None)
    return set_version


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders that are searched, and no others."""
    both = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(runtime, "_library_folders", lambda: iter(both))
    return both


def test_builtins_come_first(folders, driver):
    assert runtime.find_nvrtc() == []
    libraries = install(folders[1], 13)
    assert runtime.find_nvrtc() == libraries


def test_first_folder_wins(folders, driver):
    install(folders[1], 13)
    libraries = install(folders[0], 12)
    assert runtime.find_nvrtc() == libraries


def test_an_old_driver_gets_what_it_loads(folders, driver):
    new = install(folders[0], 13)
    old = install(folders[0], 12)
    driver(12080)
    assert runtime.find_nvrtc() == old
    driver(13000)
    assert runtime.find_nvrtc() == new


def test_builtins_are_of_the_same_version(folders, driver):
    _, nvrtc = install(folders[0], 13)
    (folders[0] / "libnvrtc-builtins.so.13.0").unlink()
    install(folders[0], 12)
    (folders[0] / "libnvrtc.so.12").unlink()
    assert runtime.find_nvrtc() == [nvrtc]


def test_pip_packages_are_searched_first():
    folders = list(runtime._library_folders())
    system = folders.index(Path("/usr/lib64"))
    assert all(folders.index(f) < system for f in folders if f.parts[-3:-2] == ("nvidia",))
