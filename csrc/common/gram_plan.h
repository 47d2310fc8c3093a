#pragma once
// How the Gram kernels are launched: row classes, tiles and shared memory. Plain C++ for host and device.

#include "launch_plan.h"
#include "numeric.h"

namespace mtlkernels {

constexpr int kGramThreads = 256;

MTL_HOST_DEVICE constexpr int num_pairs(int rows) { return rows * (rows + 1) / 2; }

/// Index of pair (i, j), j >= i, in the upper triangle row by row.
MTL_HOST_DEVICE constexpr int pair_index(int rows, int i, int j) { return i * rows - i * (i - 1) / 2 + j - i; }

/// The row class of a number of rows: the smallest of 1, 2, 3, 4, 8, 16 and 64 that holds it; 0 past 64.
constexpr int gram_class(int num_rows) {
  return num_rows <= 4 ? (num_rows < 1 ? 1 : num_rows) : num_rows <= 8 ? 8 : num_rows <= 16 ? 16 : num_rows <= 64 ? 64 : 0;
}

/// How row class R = 16 or 64 is laid out for elements of `element_bytes`. A thread owns a tile of 4 x 4 pairs and a slice of a
/// stage's elements.
template <int element_bytes, int R>
struct TileShape {
  static constexpr int tiles_per_side = R / 4;
  static constexpr int tiles = tiles_per_side * (tiles_per_side + 1) / 2;
  static constexpr int slices = R == 16 ? 24 : 2;
  static constexpr int threads = (tiles * slices + 31) / 32 * 32;
  // Groups of four elements in a stage; fewer of float64, so that a block fits the 99 KiB of shared memory of every chip.
  static constexpr int quads = R == 16 ? 48 : element_bytes == 8 ? 12 : 16;
  static constexpr int elements = 4 * quads;
  static constexpr int stride = elements + 16 / element_bytes;  // of a row in shared memory: 16 bytes past its elements
  static constexpr int stages = 3;
  // The stages, and after them the exchange of sums with the products.
  static constexpr int stage_bytes = stages * R * stride * element_bytes;
  static constexpr int sum_bytes = (threads + num_pairs(R)) * 8;
  static constexpr int shared_bytes = stage_bytes > sum_bytes ? stage_bytes : sum_bytes;
};

struct GramLaunch {
  int rows_class, threads, shared_bytes;
};

template <int R>
constexpr GramLaunch tile_launch(int64_t element_bytes) {
  return element_bytes == 8   ? GramLaunch{R, TileShape<8, R>::threads, TileShape<8, R>::shared_bytes}
         : element_bytes == 4 ? GramLaunch{R, TileShape<4, R>::threads, TileShape<4, R>::shared_bytes}
                              : GramLaunch{R, TileShape<2, R>::threads, TileShape<2, R>::shared_bytes};
}

/// Threads and dynamic shared memory of stage one.
constexpr GramLaunch gram_launch(DType dtype, int num_rows) {
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const int rows_class = gram_class(num_rows);
  return rows_class == 16   ? tile_launch<16>(bytes)
         : rows_class == 64 ? tile_launch<64>(bytes)
                            : GramLaunch{rows_class, kGramThreads, 0};
}

}  // namespace mtlkernels
