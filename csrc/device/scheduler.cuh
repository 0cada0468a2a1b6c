// Which output tile a cluster works on, and in what order.
#pragma once

#include "device/types.h"

namespace deepgemm {

struct Tile {
  int batch, m, n;  // in tiles
};

// Walks `batch` matrices of rows x columns tiles. Tiles that run at the same time should share as
// much of A and B in L2 as they can, so the order fills bands `band` rows high column by column.
struct TileOrder {
  int rows, columns, batch, band;
  Divisor by_matrix, by_band, by_height, by_last_height;

  static constexpr TileOrder of(int rows, int columns, int batch, int band) {
    return {rows,
            columns,
            batch,
            band,
            Divisor::of(rows * columns),
            Divisor::of(band * columns),
            Divisor::of(band),
            Divisor::of((rows - 1) % band + 1)};
  }

  constexpr int count() const { return rows * columns * batch; }

  constexpr Tile operator()(int index) const {
    const int matrix = by_matrix(index);
    index -= matrix * rows * columns;
    const int first = by_band(index) * band;
    index -= first * columns;
    const bool last = first + band >= rows;
    const int column = (last ? by_last_height : by_height)(index);
    return {matrix, first + index - column * (last ? rows - first : band), column};
  }

  // The same in a group of so many rows, which only the device knows.
  constexpr Tile in_group(int index, int rows) const {
    const int first = by_band(index) * band;
    index -= first * columns;
    const int height = rows - first < band ? rows - first : band;
    const int column = index / height;
    return {0, first + index - column * height, column};
  }
};

// `batch` matrices of rows x columns tiles, row after row.
struct TileGrid {
  int batch, rows, columns;
  Divisor by_rows, by_columns;

  static constexpr TileGrid of(int batch, int rows, int columns) {
    return {batch, rows, columns, Divisor::of(rows), Divisor::of(columns)};
  }

  constexpr int count() const { return batch * rows * columns; }

  constexpr Tile operator()(int index) const {
    const int row = by_columns(index), matrix = by_rows(row);
    return {matrix, row - matrix * rows, index - row * columns};
  }
};

}  // namespace deepgemm
