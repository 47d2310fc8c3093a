// The loop of the kernels that work element by element: blocks of a column's rows, read as they lie or from a copy.

#pragma once

#include <cstring>
#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements; a multiple of every vector

/// Results of T for the elements from `begin` to `end`, block by block, written where they belong or scattered there.
///
/// `prepare(at, count)` points the `used` rows at the block's elements; `run(from, count, to, stream)` writes the results of
/// whole vectors of the prepared block, from its element `from` on, where the rows point. `values` [used, kBlock] is what rows
/// may be copied to, `results` [kBlock] scratch. Without a row that counts the results are 0.
template <typename S, typename T, typename Prepare, typename Run>
void for_blocks(const Column& column, int64_t begin, int64_t end, const Output& out, int used, const S** rows, S* values,
                S* results, Prepare prepare, Run run) {
  const bool in_place = column.layout.dim == 0 && std::is_same_v<S, T>;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock, whole = count / kLanes<S> * kLanes<S>;
    S* to = in_place ? static_cast<S*>(out.rows[0]) + at : results;
    if (used == 0) {
      std::memset(to, 0, size_t(count) * sizeof(S));
    } else {
      prepare(at, count);
      run(0, whole, to, in_place && out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0);
      if (whole < count) {  // a vector's worth of copies
        S last[kLanes<S>] = {};
        for (int r = 0; r < used; ++r) {
          S* copy = values + r * kBlock;
          std::memmove(copy, rows[r] + whole, size_t(count - whole) * sizeof(S));
          rows[r] = copy;
        }
        run(whole, kLanes<S>, last, false);
        std::memcpy(to + whole, last, size_t(count - whole) * sizeof(S));
      }
    }
    if (!in_place) store_row(results, column.layout, out, at, count, static_cast<T*>(out.rows[0]));
  }
  if (out.stream) fence_streaming();
}

}  // namespace
}  // namespace mtlkernels::cpu
