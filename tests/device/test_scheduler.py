"""The order in which the kernels walk their tiles: it is plain C++, so that a host can run it."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parents[2] / "csrc"

PROGRAM = r"""
#include <cstdio>

#include "device/scheduler.cuh"

// For each order and range of indices on stdin, the tiles as integers of the machine on stdout. In
// a group of its own rows, if it has any.
int main() {
  int rows, columns, batch, band, group_rows, begin, end;
  while (std::scanf("%d %d %d %d %d %d %d", &rows, &columns, &batch, &band, &group_rows, &begin,
                    &end) == 7) {
    const auto order = deepgemm::TileOrder::of(rows, columns, batch, band);
    for (int index = begin; index < end; ++index) {
      const auto tile = group_rows ? order.in_group(index, group_rows) : order(index);
      const int tiles[3] = {tile.batch, tile.m, tile.n};
      std::fwrite(tiles, sizeof tiles, 1, stdout);
    }
    if (begin == 0 && !group_rows && end != order.count()) return 1;
  }
}
"""


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The tiles of orders (rows, columns, batch, band) for a group's rows, or 0, with ranges of
    indices (begin, end)."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("scheduler")
    (folder / "walk.cc").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", f"-I{CSRC}", "-o", folder / "walk"]
    subprocess.run([*command, folder / "walk.cc"], check=True)

    def walk(cases):
        lines = "\n".join(" ".join(map(str, case)) for case in cases)
        done = subprocess.run(
            [folder / "walk"], input=lines.encode(), stdout=subprocess.PIPE, check=True
        )
        lengths = [end - begin for *_, begin, end in cases]
        tiles = np.frombuffer(done.stdout, np.intc).reshape(sum(lengths), 3)
        return np.split(tiles, np.cumsum(lengths)[:-1])

    return walk


def bands_column_by_column(rows, columns, batch, band):
    return [
        (matrix, m, n)
        for matrix in range(batch)
        for first in range(0, rows, band)
        for n in range(columns)
        for m in range(first, min(first + band, rows))
    ]


def test_every_tile_comes_once_and_bands_are_filled_column_by_column(walk):
    rng = np.random.default_rng(0)
    orders = [(1, 1, 1, 1), (7, 1, 3, 3), (1, 9, 2, 1), (8, 5, 1, 8), (8, 5, 2, 4), (9, 5, 2, 4)]
    for _ in range(500):
        rows, columns, batch = (int(rng.geometric(p)) for p in (0.08, 0.08, 0.4))
        orders.append((rows, columns, batch, int(rng.integers(1, rows + 1))))
    cases = [(*order, 0, 0, order[0] * order[1] * order[2]) for order in orders]
    for order, tiles in zip(orders, walk(cases), strict=True):
        np.testing.assert_array_equal(tiles, bands_column_by_column(*order), err_msg=str(order))


def test_a_group_has_fewer_rows_than_all_groups_together(walk):
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(200):
        rows, columns = rng.geometric(0.08, 2)
        groups.append((int(rng.integers(1, rows + 1)), columns, 1, int(rng.integers(1, rows + 1))))
    cases = [
        (rows + band, columns, 1, band, rows, 0, rows * columns)
        for rows, columns, _, band in groups
    ]
    for group, tiles in zip(groups, walk(cases), strict=True):
        np.testing.assert_array_equal(tiles, bands_column_by_column(*group), err_msg=str(group))


@pytest.mark.parametrize("band", [1, 11, 46340])
def test_as_many_tiles_as_an_integer_counts(walk, band):
    side = 46340
    last = side * side - 1
    (tiles,) = walk([(side, side, 1, band, 0, last, last + 1)])
    assert tiles.tolist() == [[0, side - 1, side - 1]]
