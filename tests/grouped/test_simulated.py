"""The kernel that finds the runs of rows of one group, on the host."""

import ctypes

import numpy as np
import pytest
from simulator_build import build

GROUPS = 5


@pytest.fixture(scope="module")
def find_runs(tmp_path_factory):
    run = build("runs.cc", (), tmp_path_factory.mktemp("runs")).run

    def find(ids: np.ndarray) -> np.ndarray:
        spans = np.full((len(ids) + 1, 4), -7, np.int32)
        ids_at, spans_at = (ctypes.c_void_p(x.ctypes.data) for x in (ids, spans))
        run(ids_at, len(ids), GROUPS, spans_at)
        return spans

    return find


def expected_runs(ids: np.ndarray) -> list[tuple[int, int, int]]:
    ids = np.where((ids >= 0) & (ids < GROUPS), ids, -1)
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    return [(start, end, ids[start]) for start, end in zip(borders, borders[1:], strict=False)]


@pytest.mark.parametrize("m", [1, 31, 1000, 140_000])  # 65,536 rows are looked at at once
@pytest.mark.parametrize("longest", [1, 40, 30_000])
def test_runs(find_runs, m, longest):
    rng = np.random.default_rng(m)
    count = 1 + m // longest
    # Ids of no group are one group's, whatever they are.
    ids = np.repeat(rng.integers(-2, GROUPS + 2, count), rng.integers(1, longest + 1, count))
    ids = np.resize(ids, m).astype(np.int32)
    spans = find_runs(ids)
    # Those of no group from the other end.
    for found, groups in ((spans, True), (spans[::-1], False)):
        expected = [run for run in expected_runs(ids) if (run[2] >= 0) == groups]
        np.testing.assert_array_equal(found[: len(expected), :3], np.reshape(expected, (-1, 3)))
        assert found[len(expected), 0] == m
