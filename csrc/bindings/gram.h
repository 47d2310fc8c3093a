#pragma once
// Gram matrices: sums of products over columns that are cut into chunks, in an order that no number of threads changes, and the
// op on CUDA.

#include "columns.h"

namespace mtlkernels {

/// Consecutive pieces that share a partial sum.
struct Unit {
  int64_t first, last, slot;
};

/// Pieces grouped into units of at least kChunk elements (small tensors together) per result slot.
inline std::vector<Unit> group(const std::vector<Piece>& pieces, bool per_tensor) {
  std::vector<Unit> units;
  int64_t elements = 0;
  for (int64_t p = 0; p < int64_t(pieces.size()); ++p) {
    const int64_t slot = per_tensor ? pieces[p].column : 0, size = pieces[p].end - pieces[p].begin;
    if (units.empty() || units.back().slot != slot || elements + size > kChunk) {
      units.push_back({p, p, slot});
      elements = 0;
    }
    units.back().last = p + 1;
    elements += size;
  }
  return units;
}

/// Copies the upper triangles of `count` matrices to the lower ones.
inline void mirror(double* matrices, int64_t count, int64_t size) {
  for (int64_t m = 0; m < count; ++m, matrices += size * size)
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < i; ++j) matrices[i * size + j] = matrices[j * size + i];
}

/// sums[slot][size] += what run(piece, partial) adds to a partial [size] for the pieces of a slot: a column, or all of them.
template <typename Run>
void sum_chunks(const Columns& columns, bool per_tensor, int64_t size, double* sums, const Run& run) {
  if (size == 0) return;
  const std::vector<Piece> pieces = cut(columns);
  const std::vector<Unit> units = group(pieces, per_tensor);
  std::vector<double> partials(units.size() * size, 0.0);
  for_each(int64_t(units.size()), columns.total_elements(), [&](int64_t u) {
    for (int64_t p = units[u].first; p < units[u].last; ++p) run(pieces[p], partials.data() + u * size);
  });
  for (size_t u = 0; u < units.size(); ++u)
    for (int64_t i = 0; i < size; ++i) sums[units[u].slot * size + i] += partials[u * size + i];
}

/// The op gram on CUDA, which others begin with.
Tensor gram_cuda(TensorList grads, int64_t num_tasks, std::string per);

}  // namespace mtlkernels
