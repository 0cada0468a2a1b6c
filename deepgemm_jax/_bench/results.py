"""The results file, and the figures of others that stand beside them."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import deepgemm_jax

from .. import _C
from .._cli.info import cuda_version, driver_version

Row = dict[str, Any]


def gpu_slug(device_kind: str) -> str:
    """A file name for a GPU: "h200" for "NVIDIA H200"."""
    return re.sub(r"\W+", "_", device_kind.lower().removeprefix("nvidia ")).strip("_")


def kernels_sha256(sources: Mapping[str, str] | None = None) -> str:
    """The digest of the device sources that are measured."""
    digest = hashlib.sha256()
    for name, text in sorted((sources or _C.device_sources()).items()):
        if name.endswith(".cuh"):
            digest.update(name.encode() + b"\0" + text.encode())
    return digest.hexdigest()


def about(method: str) -> dict[str, Any]:
    return {
        "gpu": jax.devices()[0].device_kind,
        "driver": driver_version(),
        "cuda": cuda_version(),
        "nvrtc": "{}.{}".format(*_C.nvrtc_version()),
        "jax": jax.__version__,
        "deepgemm_jax": deepgemm_jax.__version__,
        "date": datetime.date.today().isoformat(),
        "kernels_sha256": kernels_sha256(),
        "method": method,
    }


class References:
    """The figures of others on this GPU, where there are any."""

    def __init__(self, file: Path):
        if not file.exists():
            print(f"there is no {file} here with figures to compare with")
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        self._rows = {_key(row): row for row in rows}

    def compare(self, row: Row, op: str | None = None) -> Row:
        """The row's ``deepgemm_us``, ``ratio`` and ``cublaslt_us``, as far as they are known; those
        of another op if it is named."""
        theirs = self._rows.get(_key(row if op is None else row | {"op": op}), {})
        known = {name: theirs[name] for name in ("deepgemm_us", "cublaslt_us") if name in theirs}
        if "deepgemm_us" in known:
            known["ratio"] = known["deepgemm_us"] / row["us"]
        return known


class Results:
    """A results file, written whole after each row so that a failure loses nothing.

    Rows that an earlier run measured in the same way on the same kernels stay.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self._path = path
        self._about = about
        self._rows: dict[tuple, Row] = {}
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            if _comparable(before["about"]) == _comparable(about):
                self.add(*before["rows"])

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(self, *rows: Row) -> None:
        self._rows.update({_key(row): row for row in rows})
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text(_dump(self._about, self.rows))
            new.replace(self._path)


def _key(row: Row) -> tuple:
    return row["op"], *row["shape"]


def _comparable(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != "date"}


def _rounded(row: Row) -> Row:
    return {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in row.items()}


def _dump(about: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """JSON with a line for each row, which a diff shows well."""
    lines = ",\n".join("  " + json.dumps(_rounded(row), allow_nan=False) for row in rows)
    header = json.dumps(about, indent=1, ensure_ascii=False).replace("\n", "\n ")
    return f'{{\n "about": {header},\n "rows": [\n{lines}\n ]\n}}\n'
