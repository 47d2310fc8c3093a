#pragma once
// How the Gram kernels are launched: row classes, threads and shared memory. Plain C++ for host and device.

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

/// How row class R = 8, 16 or 64 is laid out for the tensor cores, for elements of `element_bytes`. Eight consecutive rows are
/// a group. A warp multiplies one or two groups with one group at a time: a tile, whose sums its threads share evenly.
template <int element_bytes, int R>
struct TensorCoreShape {
  static constexpr int groups = R / 8;
  static constexpr int tile_groups = element_bytes == 8 ? 1 : 2;  // of a tile's rows
  // Of the upper triangle; where two groups make the rows of a tile, the lower group of one on the diagonal is wasted.
  static constexpr int tiles = tile_groups == 1 || groups == 1 ? groups * (groups + 1) / 2 : groups * (groups + 2) / 4;
  static constexpr int tile_sums = 2 * tile_groups;  // of a thread
  static constexpr int sums = tiles * tile_sums;
  static constexpr int threads = element_bytes == 8 && R == 64 ? 128 : 256;
  static constexpr int step = 64 / element_bytes;  // elements that a warp multiplies at a time: 64 bytes of each row
  static constexpr int batch = R == 64 ? 1 : element_bytes == 4 ? 2 : 4;  // steps that a warp loads at a time
  // Totals of every thread, float32 where float64 would not fit the 99 KiB of shared memory of every chip; and the products.
  static constexpr int total_bytes = element_bytes == 8 || R <= 16 ? 8 : 4;
  static constexpr int shared_bytes = threads * sums * total_bytes + num_pairs(R) * 8;
};

struct GramLaunch {
  int rows_class, threads, shared_bytes;
};

template <int R>
constexpr GramLaunch tensor_core_launch(int64_t element_bytes) {
  using Double = TensorCoreShape<8, R>;
  using Float = TensorCoreShape<4, R>;
  using Half = TensorCoreShape<2, R>;
  return element_bytes == 8   ? GramLaunch{R, Double::threads, Double::shared_bytes}
         : element_bytes == 4 ? GramLaunch{R, Float::threads, Float::shared_bytes}
                              : GramLaunch{R, Half::threads, Half::shared_bytes};
}

/// Threads and dynamic shared memory of stage one. `formed`: of rows that are made of pairs. Products of 8 rows of 16 bits are
/// exact on the tensor cores, and too many for the other units of the fastest chips.
constexpr GramLaunch gram_launch(DType dtype, int num_rows, bool formed = false) {
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const int rows_class = gram_class(num_rows);
  return rows_class == 8 && bytes == 2 && !formed ? tensor_core_launch<8>(bytes)
         : rows_class == 16                       ? tensor_core_launch<16>(bytes)
         : rows_class == 64                       ? tensor_core_launch<64>(bytes)
                                                  : GramLaunch{rows_class, kGramThreads, 0};
}

}  // namespace mtlkernels
