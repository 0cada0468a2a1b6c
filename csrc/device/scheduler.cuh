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

  constexpr int count() const { return rows * columns * batch; }

  constexpr Tile operator()(int index) const {
    const int matrix = rows * columns;
    const int in_matrix = index % matrix;
    const int first = in_matrix / (band * columns) * band;
    const int height = rows - first < band ? rows - first : band;
    const int in_band = in_matrix - first * columns;
    return {index / matrix, first + in_band % height, in_band / height};
  }
};

}  // namespace deepgemm
